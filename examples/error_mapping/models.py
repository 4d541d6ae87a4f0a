"""The tables of both examples: events, and seats booked in them."""

from sqlalchemy import CheckConstraint, ForeignKey, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The base class of all models."""


class Event(Base):
    """An event with seats."""

    __tablename__ = "mapping_event"
    __table_args__ = (
        UniqueConstraint("title", name="uq_mapping_event_title"),
        CheckConstraint("seats > 0", name="ck_mapping_event_seats"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    seats: Mapped[int]


class Booking(Base):
    """A guest's seat at an event; a guest has at most one per event."""

    __tablename__ = "mapping_booking"
    __table_args__ = (UniqueConstraint("event_id", "guest", name="uq_mapping_booking_guest"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[int] = mapped_column(ForeignKey(Event.id))
    guest: Mapped[str]
