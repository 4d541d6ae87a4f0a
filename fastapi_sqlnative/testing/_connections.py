"""The one connection of an isolated database, in a transaction that is rolled back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, NestedTransaction, event
from sqlalchemy.orm import Session

from .._drivers.statements import writes
from .._drivers.transactions import autocommits
from .._sessions.engines import run_in_greenlet
from ._targets import IsolationError, running_loop
from ._turns import Turn

T = TypeVar("T")
# Marks a connection, and what is sent for the block's own sake.
_MARK: Final = "fastapi_sqlnative_testing"
_ENDS: Final = re.compile(
    r"\s*(commit|end|abort|rollback(?!\s+to|\s+(work|transaction)\s+to))\b", re.IGNORECASE
)
_READS: Final = ("select", "with", "values", "pragma", "show", "explain", "set", "listen")
# Deferrable constraints, with whether they wait for COMMIT unless they are told otherwise.
_DEFERRABLE: Final = """
SELECT quote_ident(nspname) || '.' || quote_ident(conname), condeferred
FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace n ON n.oid = connamespace
WHERE condeferrable
"""


class IsolatedConnection:
    """The connection that all sessions of a database share, from its first use to the block's end.

    Attributes:
        home: finds the event loop to open it on, when a thread asks for it.
        loop: the event loop that it belongs to.
        own_sessions: of the test, with their blocks; they give way to the application's.
        beginning: the next savepoint stands for the BEGIN of a transaction.
        root: the savepoint that stands for a transaction of the application's.
    """

    def __init__(self, name: str, engine: Engine, turn: Turn) -> None:
        self.name = name
        self.engine = engine
        self.turn = turn
        self.asynchronous = engine.dialect.is_async
        self.home: Callable[[], asyncio.AbstractEventLoop | None] = lambda: None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.own_sessions: dict[Session, object] = {}
        self.beginning = False
        self.root: NestedTransaction | None = None
        self._connection: Connection | None = None
        self._entering = False
        # Blocks that are open on it, the first with the transaction, the others with a savepoint.
        self._blocks: dict[object, NestedTransaction | None] = {}
        self._guarded = ExitStack()

    def _refused(self, why: str) -> IsolationError:
        return IsolationError(f"Database {self.name!r} is isolated: {why}")

    # -- sessions of the application -------------------------------------------------------

    def begin(self, session: Any, *, beside: bool = False) -> Connection:
        """Return the connection to a session of the application's, when its turn has come."""
        if self.turn.holds(session):
            return self.opened()
        if self.asynchronous and self.loop not in (None, running_loop()):
            raise self._refused(
                "its connection belongs to another event loop, the application's. Use the session "
                "that `with isolated(app)` gives, or call what awaits with client.portal.call(). "
                "Two applications can share a database on one event loop, with async_client."
            )
        self._check_alive()  # one that is lost gives no turn back
        self.turn.take(session, self, beside=beside)
        if self.turn.holds(session):
            try:
                self.opened()  # and in every block, before anything is sent
                self._settle()
            except BaseException:
                self.turn.give_back(session)
                raise
            self.beginning = not beside
        return self.opened()

    def _settle(self, block: object = None) -> None:
        """Commit what the test has added, outside of a block or all: others cannot undo it."""
        for own in [each for each, its in self.own_sessions.items() if its is not block]:
            if not own.in_transaction():
                continue
            try:
                self._end(own.commit)
            except BaseException:
                self._end(own.rollback)
                raise

    def _end(self, method: Callable[[], None]) -> None:
        self.turn.giving_way = self
        try:
            method()
        finally:
            self.turn.giving_way = None

    # -- the connection --------------------------------------------------------------------

    def opened(self) -> Connection:
        """Return the connection, in the transaction of every block that is open."""
        if self._connection is None:
            self._connection = self._open()
        self._check_alive()
        for block in [] if self._entering else [*self._blocks][1:]:
            if self._blocks[block] is None:
                self._entering = True
                try:
                    self._settle(block)  # it stays when the block ends
                    self._blocks[block] = self._connection.begin_nested()
                finally:
                    self._entering = False
        return self._connection

    def _check_alive(self) -> None:
        if self._connection and (self._connection.closed or self._connection.invalidated):
            raise self._refused(
                "its one connection was lost, and with it all that the test has stored: the "
                "server hung up, or a statement was cancelled. Test that with cloned(app)."
            )

    def _open(self) -> Connection:
        self.loop = running_loop() if self.asynchronous else None
        self._pool = self.engine.pool
        connection = self.engine.connect()
        connection.info[_MARK] = self
        connection.begin()
        driver: Any = connection.connection.driver_connection
        if self.engine.dialect.name == "sqlite" and not driver.in_transaction:
            _send(connection, "BEGIN")  # else the first savepoint would be the transaction
        if autocommits(connection):
            connection.close()
            raise self._refused("its engine is in AUTOCOMMIT. Test with cloned(app).")
        event.listen(connection, "release_savepoint", self._before_release)
        return connection

    def _before_release(self, connection: Connection, _name: str, _context: None) -> None:
        """Check at the application's COMMIT what PostgreSQL would check."""
        if self.root is None or connection.get_nested_transaction() is not self.root:
            return
        if connection.dialect.name != "postgresql":
            return
        constraints = _send(connection, _DEFERRABLE).all()
        deferred = ", ".join(constraint for constraint, waits in constraints if waits)
        try:
            if constraints:
                _send(connection, "SET CONSTRAINTS ALL IMMEDIATE")
            if deferred:
                _send(connection, f"SET CONSTRAINTS {deferred} DEFERRED")
        except BaseException:
            self.root.rollback()  # SQLAlchemy takes the failed release for the savepoint's end
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
        if isolated_on(connection) is self:
            if _ENDS.match(statement):
                raise self._refused("COMMIT and ROLLBACK as text would end the block.")
        elif not harmless:
            raise self._refused(
                "this was sent over another connection, on its engine itself, and would be stored "
                "for good. Use a session, or test with cloned(app), where Core may be used."
            )

    # -- blocks ----------------------------------------------------------------------------

    def enter(self, block: object) -> None:
        """Begin a block, whose work will be undone at its end."""
        self._blocks[block] = None

    def leave(self, block: object) -> Future[None]:
        """Undo the work of a block, and close the connection with the first one."""
        if self._connection is None:
            self._undo(block)
            return _done(None)
        return self.run(lambda: self._leave(block))

    def _leave(self, block: object) -> None:
        try:
            self.turn.take(block, self)
        finally:
            self._undo(block)
            self.turn.give_back(block)

    def _undo(self, block: object) -> None:
        first, savepoint = next(iter(self._blocks)), self._blocks.pop(block)
        for session in [each for each, its in self.own_sessions.items() if its is block]:
            self._end(session.close)
            del self.own_sessions[session]
        if block is first:
            self._guarded.close()
            self._close()
        elif savepoint is not None and savepoint.is_active:
            savepoint.rollback()

    def close_now(self) -> Future[None]:
        """Undo everything, because the application ends."""
        return self.run(self._close) if self._connection else _done(None)

    def _close(self) -> None:
        for session in self.own_sessions:
            self._end(session.close)
        connection, self._connection, self.loop = self._connection, None, None
        self._blocks = dict.fromkeys(self._blocks)
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
        loop = self.loop or self.home()
        if loop is None or not loop.is_running():
            raise self._refused(
                "the event loop of its AsyncEngine's connection is not running. Use the session "
                "inside of `with TestClient(app)`, and leave isolated(app) on its own event loop."
            )
        return asyncio.run_coroutine_threadsafe(run_in_greenlet(work), loop)


def _done(result: T) -> Future[T]:
    done = Future[T]()
    done.set_result(result)
    return done


def _send(connection: Connection, sql: str) -> Any:
    return connection.exec_driver_sql(sql, execution_options={_MARK: True})


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
    savepoint = connection.get_nested_transaction()
    if isolated.beginning and sql.startswith("SAVEPOINT "):
        return "BEGIN"
    if savepoint is None or savepoint is not isolated.root:
        return sql
    if sql.startswith("RELEASE SAVEPOINT "):
        return "COMMIT"
    return "ROLLBACK" if sql.startswith("ROLLBACK TO SAVEPOINT ") else sql
