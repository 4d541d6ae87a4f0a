"""The tables of both databases."""

from datetime import datetime

from sqlalchemy import CheckConstraint, DateTime, ForeignKey, UniqueConstraint, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Collect the tables of the database `default`."""


class User(Base):
    """Name somebody who owns accounts."""

    __tablename__ = "showcase_user"

    name: Mapped[str] = mapped_column(primary_key=True)


class Account(Base):
    """Hold what a user owns, in cents. The database itself refuses to go below zero."""

    __tablename__ = "showcase_account"
    __table_args__ = (CheckConstraint("balance >= 0", name="showcase_balance_not_negative"),)

    number: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey(User.name))
    balance: Mapped[int]


class LedgerEntry(Base):
    """Book one side of a transfer. A reference is booked once for an account."""

    __tablename__ = "showcase_ledger_entry"
    __table_args__ = (UniqueConstraint("account", "reference"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey(Account.number))
    reference: Mapped[str]
    amount: Mapped[int]
    booked_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class AnalyticsBase(DeclarativeBase):
    """Collect the tables of the database `analytics`."""


class Event(AnalyticsBase):
    """Record that something happened, without saying to whom."""

    __tablename__ = "showcase_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    amount: Mapped[int]
