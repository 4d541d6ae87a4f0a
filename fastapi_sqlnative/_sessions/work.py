"""What one transaction has let through, and whether a COMMIT would store it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from sqlalchemy import Connection
from sqlalchemy.engine import ExecutionContext

from .._drivers import transactions
from .._drivers.statements import Effect, Statement, met_no_row

_Written: TypeAlias = tuple[bool, bool, bool, Mapping[Connection, int]]


class Work:
    """What one transaction has let through.

    Attributes:
        wrote: a statement or flush that writes.
        unknown: a statement that may have written.
        handed_out: a connection, over which anything may have been sent.
        defined: a table, a function or the like.
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
        """Tell whether a commit may store something, as far as can be told without asking."""
        return self.wrote or self.unknown or self.handed_out

    def note(
        self,
        statement: Statement,
        result: Any,
        context: ExecutionContext,
        connections: dict[Connection, int],
    ) -> None:
        """Note what a statement has done, or may have done."""
        effect, savepoint, counted = statement
        if effect is Effect.NONE:
            return  # nearly all of them
        if effect is Effect.WRITE:
            self.wrote = self.wrote or not (counted and met_no_row(result, context))
        elif effect is Effect.UNKNOWN:
            self.unknown = True
        elif effect is Effect.DEFINE:
            # MySQL commits what came before, and the definition itself.
            self.wrote = self.defined = context.dialect.name not in {"mysql", "mariadb"}
            self.unknown = self.unknown and self.wrote
        elif effect is Effect.SAVEPOINT:
            self.savepoint_begins(savepoint, connections)
        elif effect is Effect.UNDO:
            self.savepoint_undone(savepoint, connections)

    def savepoint_begins(self, savepoint: str | int, connections: Mapping[Connection, int]) -> None:
        """Remember what had been written, for the case that the savepoint is rolled back."""
        changes = {each: transactions.changes(each) for each in connections}
        self._savepoints = self._savepoints or {}
        self._savepoints[savepoint] = self.wrote, self.unknown, self.defined, changes

    def savepoint_undone(self, savepoint: str | int, connections: dict[Connection, int]) -> None:
        """Go back to what had been written when the savepoint began.

        Args:
            savepoint: its name or its depth.
            connections: the changes that do not count, which become more.
        """
        self.undone = True
        known = (self._savepoints or {}).get(savepoint)
        if known is None:
            return
        self.wrote, self.unknown, self.defined, changes = known
        for connection, before in connections.items():
            if not connection.closed and not connection.invalidated:
                undone = transactions.changes(connection) - changes.get(connection, before)
                connections[connection] = before + undone

    def is_unstored(
        self,
        connection: Connection,
        changes_before: int,
        *,
        wrote: bool,
        if_lost: bool,
        joined: bool,
    ) -> bool:
        """Tell whether a COMMIT on a connection would change something; in doubt ask.

        Args:
            connection: one that holds the transaction.
            changes_before: what SQLite had counted when the transaction began.
            wrote: the answer where nobody knows better.
            if_lost: the answer where the connection is gone.
            joined: the transaction around it is somebody else's, and so is what the server says.
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
