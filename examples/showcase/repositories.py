"""Repositories, which join the request's transaction and never end it."""

from collections.abc import Mapping

from sqlalchemy import select

from examples.showcase.dependencies import AnalyticsDb, Db
from examples.showcase.models import Account, Event, LedgerEntry


class Accounts:
    """A repository of accounts in the request's session."""

    def __init__(self, session: Db) -> None:
        self.session = session

    async def lock(self, *numbers: str) -> Mapping[str, Account]:
        """Load accounts, locked against changes until the transaction ends.

        The order is always the same, so opposite transfers wait for each other instead of
        holding one row each. SQLite has no FOR UPDATE: it allows one writer at a time.
        """
        query = select(Account).where(Account.number.in_(numbers)).order_by(Account.number)
        found = await self.session.scalars(query.with_for_update())
        return {account.number: account for account in found}


class Ledger:
    """A repository of ledger entries in the request's session."""

    def __init__(self, session: Db) -> None:
        self.session = session

    def book(self, reference: str, amounts: Mapping[str, int]) -> list[LedgerEntry]:
        """Add an entry for each account; the next flush assigns their IDs."""
        entries = [
            LedgerEntry(account=account, reference=reference, amount=amount)
            for account, amount in amounts.items()
        ]
        self.session.add_all(entries)
        return entries


class Events:
    """A repository of events in the request's session for the second database."""

    def __init__(self, session: AnalyticsDb) -> None:
        self.session = session

    def record(self, name: str, amount: int) -> None:
        """Add an event."""
        self.session.add(Event(name=name, amount=amount))
