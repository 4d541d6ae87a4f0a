"""The work of one transaction, done and pending."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, inspect
from sqlalchemy.engine import CursorResult, ExecutionContext
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import History

from .._drivers import transactions
from .._drivers.statements import MYSQL, Effect, Statement, changed_nothing


@dataclass(eq=False, repr=False, slots=True)
class Work:
    """The work of one transaction."""

    wrote: bool = False  # by a statement or flush
    unknown: bool = False  # a statement may have written
    handed_out: bool = False  # a connection, so anything may have been sent
    defined: bool = False  # DDL has run
    undone: bool = False  # a savepoint was rolled back
    committed: bool = False  # even if a later, empty COMMIT has reset the record's
    # What had been written when a savepoint began, by its name or its depth.
    _savepoints: dict[str | int, tuple[bool, bool, bool, Mapping[Connection, float]]] | None = None

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
        effect, savepoint, _, _ = statement
        if effect is Effect.NONE:
            return  # the common case
        if effect is Effect.WRITE:
            self.wrote = self.wrote or not changed_nothing(statement, result, context)
        elif effect is Effect.UNKNOWN:
            self.unknown = True
        elif effect is Effect.DEFINE:
            # MySQL commits at DDL, together with everything before it.
            self.wrote = self.defined = context.dialect.name not in MYSQL
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

        In `connections` are SQLite's counts of changes to ignore; those undone are added to them.
        """
        self.undone = True
        known = (self._savepoints or {}).get(savepoint)
        if known is None:
            return
        self.wrote, self.unknown, self.defined, kept = known
        for connection in connections:
            connections[connection] = transactions.changes(connection) - kept.get(connection, 0)


# -- pending changes ---------------------------------------------------------------------------


def has_pending_changes(session: Session) -> bool:
    """Return whether a flush would send something."""
    # Every addition or change begins a transaction, and checking for one first is cheap.
    return session.in_transaction() and bool(
        session.new
        or session.deleted
        or (
            session.identity_map.check_modified()
            and any(_would_be_sent(session, each) for each in session.dirty)
        )
    )


def _would_be_sent(session: Session, row: object) -> bool:
    """Return whether a flush would send an object, ignoring attributes without a column."""
    state = inspect(row)
    columns = {
        attribute.key
        for attribute in state.mapper.column_attrs
        if any(map(state.mapper.persist_selectable.c.contains_column, attribute.columns))
    } - state.unmodified
    related = {each.key for each in state.mapper.relationships if not each.viewonly}
    # History also covers deleted attributes, which have no value anymore.
    return any(state.attrs[key].history.has_changes() for key in columns) or any(
        _relates(session, state.attrs[key].history) for key in related - state.unmodified
    )


def _relates(session: Session, history: History) -> bool:
    # A flush skips related objects that are not in the session.
    return bool(history.deleted) or any(
        each is None or each in session for each in history.added or ()
    )
