"""The table of measurements."""

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The base class of all models."""


class Measurement(Base):
    """A measurement."""

    __tablename__ = "streaming_measurement"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]
