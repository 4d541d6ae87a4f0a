"""The work of one transaction, and whether a COMMIT would store anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from sqlalchemy import Connection
from sqlalchemy.engine import CursorResult, ExecutionContext

from .._drivers import transactions
from .._drivers.statements import Effect, Statement, matched_no_row

_Written: TypeAlias = tuple[bool, bool, bool, Mapping[Connection, float]]


class Work:
    """The work of one transaction.

    Attributes:
        wrote: a statement or flush has written.
        unknown: a statement may have written.
        handed_out: a connection was handed out, so anything may have been sent.
        defined: DDL has run.
        undone: a savepoint was rolled back.
    """

    __slots__ = (
        "_savepoints",
        "defined",
        "handed_out",
        "undone",
        "unknown",
        "wrote",
    )

    def __init__(self) -> None:
        self.wrote = self.unknown = False
        self.handed_out = self.defined = self.undone = False
        # What had been written when a savepoint began, by its name or its depth.
        self._savepoints: dict[str | int, _Written] | None = None

    @property
    def may_have_written(self) -> bool:
        """Return whether a commit may store something, judged without asking the server."""
        return self.wrote or self.unknown or self.handed_out

    def note(
        self,
        statement: Statement,
        result: CursorResult[Any],
        context: ExecutionContext,
        connections: dict[Connection, float],
    ) -> None:
        """Record what a statement has done or may have done."""
        effect, savepoint, counted = statement
        if effect is Effect.NONE:
            return  # the common case
        if effect is Effect.WRITE:
            self.wrote = self.wrote or not (counted and matched_no_row(result, context))
        elif effect is Effect.UNKNOWN:
            self.unknown = True
        elif effect is Effect.DEFINE:
            # MySQL commits at DDL, together with everything before it.
            self.wrote = self.defined = context.dialect.name not in {"mysql", "mariadb"}
            self.unknown = self.unknown and self.wrote
        elif effect is Effect.SAVEPOINT:
            self.savepoint_begins(savepoint, connections)
        elif effect is Effect.UNDO:
            self.savepoint_undone(savepoint, connections)

    def savepoint_begins(
        self, savepoint: str | int, connections: Mapping[Connection, float]
    ) -> None:
        """Save the current state, in case the savepoint is rolled back."""
        kept = {each: transactions.changes(each) - before for each, before in connections.items()}
        self._savepoints = self._savepoints or {}
        self._savepoints[savepoint] = self.wrote, self.unknown, self.defined, kept

    def savepoint_undone(self, savepoint: str | int, connections: dict[Connection, float]) -> None:
        """Restore the state that was saved when the savepoint began.

        Args:
            savepoint: its name or depth.
            connections: SQLite's counts of changes to ignore, which the undone ones are now too.
        """
        self.undone = True
        known = (self._savepoints or {}).get(savepoint)
        if known is None:
            return
        self.wrote, self.unknown, self.defined, kept = known
        for connection in connections:
            if not connection.closed and not connection.invalidated:
                connections[connection] = transactions.changes(connection) - kept.get(connection, 0)

    def is_unstored(
        self,
        connection: Connection,
        changes_before: float,
        *,
        wrote: bool,
        if_lost: bool,
        joined: bool,
    ) -> bool:
        """Return whether a COMMIT on a connection would store something; ask the server if unsure.

        Args:
            connection: a connection of the transaction.
            changes_before: SQLite's count of changes when the transaction began.
            wrote: the answer if the database can't tell.
            if_lost: the answer if the connection is lost.
            joined: someone else owns the transaction, so the server's answer would include theirs.
        """
        if not connection.in_transaction() or transactions.autocommits(connection):
            return False
        if joined:
            return wrote
        if transactions.is_lost(connection):
            return if_lost
        if connection.dialect.name == "sqlite":
            changed = self.defined or transactions.changes(connection) != changes_before
            return changed and transactions.is_open_on_sqlite(connection)
        if connection.dialect.name != "postgresql":
            return wrote
        found = transactions.would_store(connection, id_explained=self.undone)
        return if_lost if found is None else found
