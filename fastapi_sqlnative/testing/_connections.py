"""The one connection of an isolated database, in a transaction that is rolled back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, NestedTransaction, Transaction, event
from sqlalchemy.orm import Session

from .._drivers.statements import writes
from .._drivers.transactions import autocommits, is_aborted
from .._sessions.engines import run_in_greenlet
from ._targets import SERVED, IsolationError, running_loop
from ._turns import Turn, in_flow

T = TypeVar("T")
# Marks a connection, and what is sent for the block's own sake.
_MARK: Final = "fastapi_sqlnative_testing"
_ENDS: Final = re.compile(
    r"\s*(commit|end|abort|rollback(?!\s+to|\s+(work|transaction)\s+to))\b", re.IGNORECASE
)
_READS: Final = ("select", "with", "values", "pragma", "show", "explain", "set", "listen")
# Constraints that wait for COMMIT, unless they are told otherwise.
_DEFERRED: Final = """
SELECT string_agg(quote_ident(nspname) || '.' || quote_ident(conname), ', ')
FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace n ON n.oid = connamespace
WHERE condeferred AND has_schema_privilege(n.oid, 'USAGE')
"""
# What is sent in production where a block ends a savepoint.
_IN_PRODUCTION: Final = {"RELEASE SAVEPOINT": "COMMIT", "ROLLBACK TO SAVEPOINT": "ROLLBACK"}


class IsolatedConnection:
    """The connection that all sessions of a database share, from its first use to the block's end.

    Attributes:
        loop: the event loop that it belongs to, once it is open.
        own_sessions: the test's, with their blocks; they give way to the application's.
        blocks: that are open on it: the first has the transaction, the others savepoints in it.
        beginning: the next savepoint stands for the BEGIN of a transaction.
        root: the one that stands for the application's transaction.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        turn: Turn,
        home: Callable[[], asyncio.AbstractEventLoop | None],
    ) -> None:
        self.engine = engine
        self.turn = turn
        self.asynchronous: bool = engine.dialect.is_async
        self.own_sessions: dict[Session, object] = {}
        self.beginning: bool = False
        self.root: NestedTransaction | None = None
        self.name = name
        self._home = home  # finds the application's event loop
        self.loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None
        self.blocks: dict[object, Transaction | None] = {}
        self._guarded = ExitStack()

    def refused(self, why: str) -> IsolationError:
        """Build the error for what one connection cannot do; a request may swallow it."""
        error = IsolationError(f"Database {self.name!r} is isolated: {why}")
        if (request := SERVED.get()) is not None:
            request.refusals.append(str(error))
        return error

    # -- sessions --------------------------------------------------------------------------

    def begin(self, session: Any, *, beside: bool = False) -> Connection:
        """Return the connection to a session of the application's, when its turn has come."""
        if self.turn.holds(session):
            return self.opened()
        here = running_loop()
        if self.asynchronous and here is not (self.loop or self._home() or here):
            raise self.refused(
                "its connection belongs to another event loop, the application's. Use the session "
                "that `with isolated(app)` gives, the client that runs the application, or "
                "client.portal.call(). Two applications can share a database on one event loop, "
                "with async_client."
            )
        self.turn.take(session, self, beside=beside)
        try:
            self.opened()
            # Whoever sends a request waits for it: its sessions are at rest.
            self._settle(filter(in_flow, self.own_sessions))
        except BaseException:
            self.turn.give_back(session)
            raise
        self.beginning = not beside
        return self.opened()

    def exclusively(self, who: object, work: Callable[[], T]) -> T:
        """Do something when nobody else uses the connection."""
        if self.turn.holds(who):
            return work()
        self.turn.take(who, self, brief=True)
        try:
            return work()
        finally:
            self.turn.give_back(who)

    def _settle(self, sessions: Iterable[Session]) -> None:
        """Commit what the test's sessions have added, which others then cannot undo."""
        for own in [each for each in sessions if each.in_transaction()]:
            if getattr(own, "open_blocks", 0):
                raise self.refused(
                    "the application was to begin a transaction inside of the test's own `with "
                    "session.begin()`. End that block first, or call commit() instead."
                )
            with self.turn.lent(own):
                if not own.is_active or is_aborted(self.opened(), doubtful=True):
                    own.rollback()  # the test has seen the error
                else:
                    own.commit()

    # -- the connection --------------------------------------------------------------------

    def opened(self) -> Connection:
        """Return the connection, in the transaction of every block that is open."""
        if self._connection is None:
            if not self.blocks:
                raise self.refused("its block has ended. Finish work with the database before.")
            self._connection = self._open()
        if self._connection.closed or self._connection.invalidated:
            raise self.refused(
                "its one connection was lost, and with it all that the test has stored: the "
                "server hung up, or a statement was cancelled. Test that with cloned(app)."
            )
        for block in [each for each, begun in self.blocks.items() if begun is None]:
            self.blocks[block] = self._connection.get_transaction()  # settling comes here again
            self._settle(each for each, its in self.own_sessions.items() if its is not block)
            self.blocks[block] = self._connection.begin_nested()
        return self._connection

    def _open(self) -> Connection:
        self.loop = running_loop() if self.asynchronous else None
        self._pool = self.engine.pool
        connection = self.engine.connect()
        connection.info[_MARK] = self
        self.blocks[next(iter(self.blocks))] = connection.begin()
        driver: Any = connection.connection.driver_connection
        if self.engine.dialect.name == "sqlite" and not driver.in_transaction:
            _send(connection, "BEGIN")  # else the first savepoint would be the transaction
        if autocommits(connection):
            connection.close()
            raise self.refused("its engine is in AUTOCOMMIT. Test with cloned(app).")
        event.listen(connection, "release_savepoint", self._before_release)
        return connection

    def _before_release(self, connection: Connection, _name: str, _context: None) -> None:
        """Check at the application's COMMIT what PostgreSQL would check."""
        if self.root is None or connection.get_nested_transaction() is not self.root:
            return
        if connection.dialect.name != "postgresql":
            return
        deferred = _send(connection, _DEFERRED).scalar()
        try:
            _send(connection, "SET CONSTRAINTS ALL IMMEDIATE")
            if deferred:
                _send(connection, f"SET CONSTRAINTS {deferred} DEFERRED")
        except BaseException:
            self.root.rollback()  # SQLAlchemy takes the failed release for its end
            raise

    def guard(self, engine: Engine) -> None:
        """Refuse what is written over other connections: it would stay, or wait for this one."""
        listener = (engine, "before_cursor_execute", self._refuse_writes)
        if not event.contains(*listener):
            event.listen(*listener)
            self._guarded.callback(event.remove, *listener)

    def _refuse_writes(self, connection: Connection, *call: Any) -> None:
        _, statement, _, context, _ = call
        # Tables may be created before the first use; later it could wait for the test's locks.
        harmless = statement.lstrip().lower().startswith(_READS) and not writes(statement)
        harmless = harmless or (context.isddl and self._connection is None)
        if connection.info.get(_MARK) is self:
            if _ENDS.match(statement):
                raise self.refused("COMMIT and ROLLBACK as text would end the block.")
        elif not harmless:
            raise self.refused(
                "this was sent over another connection, on its engine itself, and would be stored "
                "for good. Use a session, or test with cloned(app), where Core may be used."
            )

    # -- blocks ----------------------------------------------------------------------------

    def enter(self, block: object) -> None:
        """Begin a block, whose work will be undone at its end."""
        self.blocks[block] = None

    def leave(self, block: object) -> Future[None]:
        """Undo the work of a block, and close the connection with the first one."""
        if self._connection is None:
            self._undo(block)
            return _done(None)
        return self.run(lambda: self.exclusively(block, lambda: self._undo(block)))

    def _undo(self, block: object) -> None:
        first, transaction = next(iter(self.blocks)), self.blocks.pop(block)
        for session, its in [*self.own_sessions.items()]:
            with self.turn.lent(session):
                if its is block:
                    session.close()
                    del self.own_sessions[session]
                elif session.in_transaction():
                    session.rollback()  # to a savepoint that is about to go
        if block is first:
            self._guarded.close()
            self.close()
        elif transaction is not None and transaction.is_active:
            transaction.rollback()

    def close(self) -> None:
        """Undo everything, because the block or the application ends."""
        for session in self.own_sessions:
            with self.turn.lent(session):
                session.close()
        connection, self._connection, self.loop = self._connection, None, None
        self.blocks = dict.fromkeys(self.blocks)
        if connection is not None and not connection.closed:
            if not connection.invalidated:
                connection.info.pop(_MARK, None)
            if self.engine.pool is not self._pool:
                connection.invalidate()  # its pool was disposed of: nobody else would close it
            connection.close()

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Run plain code where the connection may be used: here, or on its event loop."""
        if not self.asynchronous:
            return _done(work())
        loop = self.loop or self._home()
        if loop is None or not loop.is_running():
            raise self.refused(
                "the event loop of its AsyncEngine's connection is not running. Use the session "
                "inside of `with TestClient(app)`, and leave isolated(app) on its own event loop."
            )
        return asyncio.run_coroutine_threadsafe(run_in_greenlet(work), loop)


def _done(result: T) -> Future[T]:
    done = Future[T]()
    done.set_result(result)
    return done


_send = partial(Connection.exec_driver_sql, execution_options={_MARK: True})


def is_ours(context: Any) -> bool:
    """Tell a statement that only an isolated block sends."""
    return _MARK in context.execution_options


def isolated_on(connection: Connection) -> IsolatedConnection | None:
    """Return what a connection is isolated by."""
    found: IsolatedConnection | None = connection.info.get(_MARK)
    return found


def as_in_production(connection: Connection, sql: str) -> str | None:
    """Return what is sent in production where this is sent; `None` for what a block adds."""
    isolated = isolated_on(connection)
    if isolated is None or sql in ("BEGIN", "COMMIT", "ROLLBACK"):
        return sql if isolated is None else None
    command = sql.rpartition(" ")[0]
    if command == "SAVEPOINT":
        return "BEGIN" if isolated.beginning else sql
    savepoint = connection.get_nested_transaction()
    at_root = savepoint is not None and savepoint is isolated.root
    return _IN_PRODUCTION.get(command, sql) if at_root else sql
