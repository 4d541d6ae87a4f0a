"""The tables of both databases."""

from sqlalchemy import Identity
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The base class of the models in the database `default`."""


class Order(Base):
    """An order."""

    __tablename__ = "outbox_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class Message(Base):
    """A message to be delivered to the second database. Its ID is never reused."""

    __tablename__ = "outbox_message"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    item: Mapped[str]


class WarehouseBase(DeclarativeBase):
    """The base class of the models in the database `warehouse`."""


class Parcel(WarehouseBase):
    """A parcel, with its message's ID, so that a second delivery changes nothing."""

    __tablename__ = "outbox_parcel"

    message_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    item: Mapped[str]
