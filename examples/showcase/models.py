"""The tables of both databases."""

from datetime import datetime

from sqlalchemy import CheckConstraint, DateTime, ForeignKey, UniqueConstraint, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The base class of the models in the database `default`."""


class User(Base):
    """A user who owns accounts."""

    __tablename__ = "showcase_user"

    name: Mapped[str] = mapped_column(primary_key=True)


class Account(Base):
    """A user's account, in cents. The database refuses a negative balance."""

    __tablename__ = "showcase_account"
    __table_args__ = (CheckConstraint("balance >= 0", name="showcase_balance_not_negative"),)

    number: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey(User.name))
    balance: Mapped[int]


class LedgerEntry(Base):
    """One side of a transfer. A reference is booked once per account."""

    __tablename__ = "showcase_ledger_entry"
    __table_args__ = (UniqueConstraint("account", "reference"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey(Account.number))
    reference: Mapped[str]
    amount: Mapped[int]
    booked_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class AnalyticsBase(DeclarativeBase):
    """The base class of the models in the database `analytics`."""


class Event(AnalyticsBase):
    """An event, without the user it concerns."""

    __tablename__ = "showcase_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    amount: Mapped[int]
