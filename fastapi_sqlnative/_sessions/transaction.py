"""One transaction: the work in it, done and pending, and the object that `begin()` returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import Connection, inspect
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import History

from .._drivers import transactions
from .._drivers.statements import MYSQL, Effect, Statement, changed_nothing


@dataclass(eq=False, repr=False, slots=True)
class Work:
    wrote: bool = False  # by a statement or flush
    unknown: bool = False  # a statement may have written
    handed_out: bool = False  # a connection, so anything may have been sent
    defined: bool = False  # DDL has run
    undone: bool = False  # a savepoint was rolled back
    prepared: bool = False  # for a two-phase commit, with something to store
    committed: bool = False  # even if a later, empty COMMIT has reset the record's
    # What had been written when a savepoint began, by its name or its depth.
    _savepoints: dict[str | int, tuple[bool, bool, bool, Mapping[Connection, float]]] | None = None

    @property
    def may_have_written(self) -> bool:
        """Return whether a commit may store something, judged without asking the server."""
        return self.wrote or self.unknown or self.handed_out

    def note(
        self, statement: Statement, result: CursorResult[Any], connections: dict[Connection, float]
    ) -> None:
        """Record what a statement has done or may have done."""
        effect, savepoint, _, _ = statement
        if effect is Effect.NONE:
            return  # the common case
        if effect is Effect.WRITE:
            self.wrote = self.wrote or not changed_nothing(statement, result, connections)
        elif effect is Effect.UNKNOWN:
            self.unknown = True
        elif effect is Effect.DEFINE:
            connection = result.context.root_connection
            # MySQL commits at DDL, together with everything before it.
            self.wrote = connection.dialect.name not in MYSQL
            # Python's driver for SQLite begins no transaction for it: then it is stored at once.
            on_sqlite = connection.dialect.name == "sqlite"
            within = not on_sqlite or transactions.is_open_on_sqlite(connection)
            self.defined = self.wrote and within
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


def depth_of(transaction: SessionTransaction) -> int:
    """Return the number of transactions and savepoints around a savepoint."""
    return 0 if transaction.parent is None else 1 + depth_of(transaction.parent)


class BegunTransaction:
    """The transaction that `begin()` returns. Its commit is the session's commit."""

    def __init__(self, session: Any, transaction: SessionTransaction) -> None:
        self._session = session
        self.transaction = transaction

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transaction, name)

    def connection(
        self, bindkey: Any, execution_options: Any = None, **arguments: Any
    ) -> Connection:
        """Hand out a connection, as the session's own `connection()` does."""
        if not self.transaction.is_active:
            return self.transaction.connection(bindkey)  # raises SQLAlchemy's own error
        arguments["mapper"] = bindkey
        connection: Connection = self._session.connection(arguments, execution_options)
        return connection

    # SQLAlchemy 2.1.7 and later.

    def bound_connection(self, *args: Any, **arguments: Any) -> Connection:
        found: Connection = self.transaction.bound_connection(*args, **arguments)
        self._session.sqlnative.hand_out(found)
        return found

    @property
    def connections(self) -> frozenset[Connection]:
        for each in self.transaction.connections:
            self._session.sqlnative.hand_out(each)
        return self.transaction.connections

    def commit(self) -> None:
        """Commit the session, if this is still its transaction."""
        if self.transaction.is_active:
            self._session.commit()
        else:
            self.transaction.commit()  # raises SQLAlchemy's own error

    def prepare(self) -> None:
        self._session.prepare()

    def rollback(self) -> None:
        self._session.sqlnative.end_results(streams_only=True)
        self.transaction.rollback()

    def __enter__(self) -> Self:
        self.transaction.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if error is None and self.transaction.is_active:
                self._session.commit()
        except BaseException as failure:
            kind, error, traceback = type(failure), failure, failure.__traceback__
            raise
        finally:
            self._session.sqlnative.end_results(streams_only=True)
            self.transaction.__exit__(kind, error, traceback)


# -- pending changes ---------------------------------------------------------------------------


def is_dirty(session: Session) -> bool:
    """Return whether a flush would connect and call listeners, if only for an unchanged object."""
    return bool(session.new or session.deleted or session.identity_map.check_modified())


def would_flush(session: Session) -> bool:
    """Return the same, but only in a transaction: an `after_commit` listener has none."""
    return session.in_transaction() and is_dirty(session)


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


def is_update_observed(row: object) -> bool:
    """Return whether a flush of a changed object calls listeners of the application."""
    heard = inspect(row).mapper.dispatch
    return bool(heard.before_update or heard.after_update)
