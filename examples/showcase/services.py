"""The services. The one that owns a workflow declares its transaction."""

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated

from fastapi import Depends, HTTPException
from sqlalchemy import Select, func, select
from sqlalchemy.exc import IntegrityError

from examples.showcase.dependencies import (
    AnalyticsReader,
    AnalyticsTransaction,
    Reader,
    Transaction,
)
from examples.showcase.models import Account, Event, LedgerEntry, User
from examples.showcase.repositories import Accounts, Events, Ledger
from examples.showcase.schemas import EventSummary, LedgerEntryPublic, TransferOrder
from fastapi_sqlnative import AsyncDatabase, get_database_handle


class Transfers:
    """The service for transfers: both accounts and both ledger entries, or nothing.

    Any exception rolls back. The event is committed in the same request, but two
    databases are not atomic: both are flushed first, then `default` commits (it was installed
    first), then `analytics`. If only that last COMMIT fails, the money has moved, the event is
    lost, and the client gets a 500 (`PartialCommitError`). Store an event that must not be lost
    in a table of `default`, from where a worker delivers it.
    """

    def __init__(
        self,
        accounts: Annotated[Accounts, Depends()],
        ledger: Annotated[Ledger, Depends()],
        events: Annotated[Events, Depends()],
        transaction: Transaction,
        analytics: AnalyticsTransaction,  # declared, so that the changes of `events` are committed
    ) -> None:
        self.accounts = accounts
        self.ledger = ledger
        self.events = events
        self.transaction = transaction

    async def transfer(self, user: User, order: TransferOrder) -> list[LedgerEntry]:
        """Carry out an order and return its two ledger entries.

        Raises:
            HTTPException: 404 for an unknown account, or a source that is not the user's;
                409 for insufficient funds, or a reference that has been used.
        """
        await self._move(user, order)
        entries = self.ledger.book(
            order.reference, {order.source: -order.amount, order.target: order.amount}
        )
        # The response is created before the COMMIT, and shows IDs that the server generates.
        await self._flush(refused="This reference has been used.")
        self.events.record("transfer", order.amount)
        return entries

    async def _move(self, user: User, order: TransferOrder) -> None:
        accounts = await self.accounts.lock(order.source, order.target)
        source, target = accounts.get(order.source), accounts.get(order.target)
        if source is None or source.owner != user.name:  # do not reveal which of the two it is
            raise HTTPException(404, f"You have no account {order.source}.")
        if target is None:
            raise HTTPException(404, f"There is no account {order.target}.")
        # Computed by the database, so that SQLite, without row locks, loses no update either.
        source.balance = Account.balance - order.amount
        target.balance = Account.balance + order.amount
        await self._flush(refused="Insufficient funds.")

    async def _flush(self, *, refused: str) -> None:
        try:
            await self.transaction.flush()
        except IntegrityError as error:
            raise HTTPException(409, refused) from error


class Statements:
    """The service for reading accounts, with one round trip per query and no transaction."""

    def __init__(self, session: Reader) -> None:
        self.session = session

    async def accounts(self, user: User) -> Sequence[Account]:
        """List the user's accounts."""
        query = select(Account).where(Account.owner == user.name).order_by(Account.number)
        return (await self.session.scalars(query)).all()

    async def ledger(self, user: User) -> Sequence[LedgerEntry]:
        """List the newest hundred ledger entries of the user's accounts."""
        query = _entries_of(user).order_by(LedgerEntry.id.desc()).limit(100)
        return (await self.session.scalars(query)).all()


class Statistics:
    """The service for statistics, from the second database."""

    def __init__(self, session: AnalyticsReader) -> None:
        self.session = session

    async def events(self) -> list[EventSummary]:
        """Count the events by name."""
        query = select(
            Event.name,
            func.count().label("events"),
            func.sum(Event.amount).label("amount"),
        ).group_by(Event.name)
        return [EventSummary.model_validate(row) for row in await self.session.execute(query)]


class LedgerExport:
    """The service that streams the ledger, however long it is.

    The body is sent after the request's sessions have ended, so it opens its own.
    """

    def __init__(self, database: Annotated[AsyncDatabase, Depends(get_database_handle())]) -> None:
        self.database = database

    async def lines(self, user: User) -> AsyncGenerator[str]:
        """Yield every entry of the user's accounts as a line of JSON.

        A connection is in use for as long as the client reads.
        """
        # Without yield_per, the ORM would load everything before the first line.
        query = _entries_of(user).order_by(LedgerEntry.id).execution_options(yield_per=100)
        async with self.database.session() as session:
            async for entry in await session.stream_scalars(query):
                yield LedgerEntryPublic.model_validate(entry).model_dump_json() + "\n"


def _entries_of(user: User) -> Select[LedgerEntry]:
    return select(LedgerEntry).join(Account).where(Account.owner == user.name)
