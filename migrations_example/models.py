"""The tables of the newest release, with which `alembic check` compares the databases."""

from datetime import datetime

from sqlalchemy import MetaData, String, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The base class of the models in the database `default`."""


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200), index=True)


class AnalyticsBase(DeclarativeBase):
    """The base class of the models in the database `analytics`."""


class Sale(AnalyticsBase):
    __tablename__ = "sale"

    id: Mapped[int] = mapped_column(primary_key=True)
    book_id: Mapped[int]
    sold_at: Mapped[datetime] = mapped_column(server_default=func.now())


METADATA: dict[str, MetaData] = {"default": Base.metadata, "analytics": AnalyticsBase.metadata}
