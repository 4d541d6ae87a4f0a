"""The tables of both examples: events, and seats booked in them."""

from sqlalchemy import CheckConstraint, ForeignKey, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Collect the tables."""


class Event(Base):
    """Name something that has seats."""

    __tablename__ = "mapping_event"
    __table_args__ = (
        UniqueConstraint("title", name="uq_mapping_event_title"),
        CheckConstraint("seats > 0", name="ck_mapping_event_seats"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    seats: Mapped[int]


class Booking(Base):
    """Give a seat to a guest, who has one for each event."""

    __tablename__ = "mapping_booking"
    __table_args__ = (UniqueConstraint("event_id", "guest", name="uq_mapping_booking_guest"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[int] = mapped_column(ForeignKey(Event.id))
    guest: Mapped[str]
