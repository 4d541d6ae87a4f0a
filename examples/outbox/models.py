"""The tables of both databases."""

from sqlalchemy import Identity
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Collect the tables of the database `default`."""


class Order(Base):
    """Hold an order."""

    __tablename__ = "outbox_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class Message(Base):
    """Wait to be carried to the second database. Its id is never given out twice."""

    __tablename__ = "outbox_message"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    item: Mapped[str]


class WarehouseBase(DeclarativeBase):
    """Collect the tables of the database `warehouse`."""


class Parcel(WarehouseBase):
    """Be what a message asks for. Its id is the key: a second delivery changes nothing."""

    __tablename__ = "outbox_parcel"

    message_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    item: Mapped[str]
