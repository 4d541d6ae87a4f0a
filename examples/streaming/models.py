"""The table."""

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Collect the tables."""


class Measurement(Base):
    """Hold what was measured."""

    __tablename__ = "streaming_measurement"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]
