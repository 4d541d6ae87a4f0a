"""The one connection of an isolated database, in a transaction that is rolled back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, SingletonThreadPool, StaticPool, Transaction, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.orm import Session

from .._drivers.statements import writes
from .._drivers.transactions import autocommits, is_aborted
from .._sessions.engines import run_in_greenlet
from .._sessions.session import NativeSession
from ._targets import IsolationError, running_loop
from ._turns import REFUSED, SERVED, Turn, in_flow

T = TypeVar("T")
# The execution options of an isolated connection, and of what is sent for the block's own sake.
_ISOLATED: Final = "fastapi_sqlnative_isolated"
_OURS: Final = "fastapi_sqlnative_testing"
_ENDS: Final = ("commit", "end", "abort", "rollback")
_READS: Final = ("select", "with", "values", "pragma", "show", "explain", "set", "listen")
_DEFINES: Final = ("create", "alter", "drop", "comment", "grant")
_IN_MEMORY: Final = (StaticPool, SingletonThreadPool)
# Constraints that wait for COMMIT, unless they are told otherwise.
_DEFERRED: Final = """
SELECT string_agg(quote_ident(nspname) || '.' || quote_ident(conname), ', ')
FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace n ON n.oid = connamespace
WHERE condeferred AND has_schema_privilege(n.oid, 'USAGE')
"""
# What is sent in production where a block sends something about a savepoint.
_IN_PRODUCTION: Final = {
    "SAVEPOINT": "BEGIN",
    "RELEASE SAVEPOINT": "COMMIT",
    "ROLLBACK TO SAVEPOINT": "ROLLBACK",
}


@dataclass(eq=False)
class IsolatedConnection:
    """The connection that all sessions of a database share until the end of the block."""

    name: str
    engine: Engine
    turn: Turn
    home: Callable[[], asyncio.AbstractEventLoop | None]  # finds the application's event loop
    # The open ones, each with its transaction once there is a connection.
    blocks: dict[object, Transaction | None] = field(
        default_factory=dict[object, Transaction | None]
    )
    # The test's sessions, with their blocks; they give way to the application's.
    own_sessions: dict[Session, object] = field(default_factory=dict[Session, object])
    loop: asyncio.AbstractEventLoop | None = None  # that the connection belongs to
    _connection: Connection | None = None
    # The savepoint that stands for the application's transaction, and whether it comes next.
    _root: str = ""
    _begins: bool = False

    @property
    def asynchronous(self) -> bool:
        """Return whether it belongs to an AsyncEngine."""
        return self.engine.dialect.is_async

    def refused(self, why: str) -> IsolationError:
        """Build the error for what one connection cannot do; a request may swallow it."""
        error = IsolationError(f"Database {self.name!r} is isolated: {why}")
        if (request := SERVED.get()) is not None:
            request[REFUSED] = str(error)
        return error

    # -- transactions of the application's -------------------------------------------------

    def begin(self, session: object, *, transaction: bool) -> Connection:
        """Return the connection to a session of the application's, when its turn has come."""
        if self.turn.holds(session):
            return self.opened()
        here = running_loop()
        if self.asynchronous and here is not (self.loop or self.home() or here):
            raise self.refused(
                "its connection belongs to another event loop, the application's. Use the client "
                "that runs it, or client.portal.call(); several applications need one event loop, "
                "with async_client."
            )
        self.turn.take(session, self, transaction=transaction)
        try:
            connection = self.opened()
            # Whoever sends a request waits for it: its sessions are at rest.
            self._settle(filter(in_flow, self.own_sessions))
        except BaseException:
            self.turn.release(session)
            raise
        self._begins = transaction
        return connection

    def end(self, session: NativeSession) -> None:
        """Let others use the connection, after a transaction."""
        self._begins = False  # the session may only have looked at its bind
        if session.sqlnative.options.read_only and self.engine.dialect.name == "sqlite":
            _send(self.opened(), "PRAGMA query_only = OFF")
        self.turn.release(session)

    def _settle(self, sessions: Iterable[Session]) -> None:
        """Commit what the test's sessions have added, which others then cannot undo."""
        for own in [each for each in sessions if each.in_transaction()]:
            with self.turn.lent(own):
                if not own.is_active or is_aborted(self.opened(), doubtful=True):
                    own.rollback()  # the test has seen the error
                else:
                    own.commit()

    # -- the connection --------------------------------------------------------------------

    def opened(self) -> Connection:
        """Return the connection, in its transaction and a savepoint for each inner block."""
        if self._connection is None:
            self._connection = self._open()
        if self._connection.closed or self._connection.invalidated:
            raise self.refused(
                "its connection was lost, or a statement cancelled, and with it went all that the "
                "test has stored. Test that with cloned(app)."
            )
        for block in [each for each, begun in self.blocks.items() if begun is None]:
            around = [each for each in self.blocks.values() if each]
            self.blocks[block] = self._connection.get_transaction()  # settling comes here again
            if around:
                self._settle(own for own, its in self.own_sessions.items() if its is not block)
                self.blocks[block] = self._connection.begin_nested()
        return self._connection

    def _open(self) -> Connection:
        self.loop = running_loop() if self.asynchronous else None
        connection = self.engine.connect().execution_options(**{_ISOLATED: self})
        connection.begin()
        driver: Any = connection.connection.driver_connection
        if self.engine.dialect.name == "sqlite" and not driver.in_transaction:
            _send(connection, "BEGIN")  # else the first savepoint would be the transaction
        if autocommits(connection):
            connection.close()
            raise self.refused("its engine is in AUTOCOMMIT. Test with cloned(app).")
        event.listen(connection, "release_savepoint", self._check_deferred)
        return connection

    def _check_deferred(self, connection: Connection, savepoint: str, _context: None) -> None:
        """Check at the application's COMMIT what PostgreSQL would check."""
        if savepoint != self._root or connection.dialect.name != "postgresql":
            return
        deferred = _send(connection, _DEFERRED).scalar()
        try:
            _send(connection, "SET CONSTRAINTS ALL IMMEDIATE")
            if deferred:
                _send(connection, f"SET CONSTRAINTS {deferred} DEFERRED")
        except BaseException:
            if (transaction := connection.get_nested_transaction()) is not None:
                transaction.rollback()  # SQLAlchemy takes the failed release for its end
            raise

    def watch(self, connection: Connection, _cursor: object, statement: str, *_: Any) -> None:
        """Refuse what would end the block and, over other connections, what would be stored."""
        sql = statement.strip(" \t\r\n;").lower()
        if isolated_on(connection) is self:
            command, following = sql.partition(" ")[::2]
            if self._begins and command == "savepoint":
                self._root, self._begins = following, False
            if command in _ENDS and not (command == "rollback" and "to " in following):
                raise self.refused("COMMIT and ROLLBACK as text would end the block.")
        # Tables may be created before the first use; later it could wait for the test's locks.
        elif not (
            (sql.startswith(_READS) and not writes(statement))
            or (sql.startswith(_DEFINES) and self._connection is None)
        ):
            raise self.refused(
                "what is written on its engine itself would be stored for good. Use a session, or "
                "test with cloned(app)."
            )

    # -- blocks ----------------------------------------------------------------------------

    def leave(self, block: object) -> None:
        """Undo the work of a block, and close the connection with the last one."""
        undo = partial(self._undo, block)
        if self._connection is None:
            undo()
        else:
            self.run(partial(self.turn.during, block, self, undo))

    def _undo(self, block: object) -> None:
        for session, its in [*self.own_sessions.items()]:
            with self.turn.lent(session):
                if its is block:
                    session.close()
                    del self.own_sessions[session]
                elif session.in_transaction():
                    session.rollback()  # to a savepoint that is about to go
        transaction = self.blocks.pop(block)
        if not self.blocks:
            self.close()
        elif transaction is not None and transaction.is_active:
            transaction.rollback()

    def close(self) -> None:
        """Undo everything, because the last block or the application ends."""
        for session in self.own_sessions:
            with self.turn.lent(session):
                session.close()
        connection, self._connection, self.loop = self._connection, None, None
        self.blocks = dict.fromkeys(self.blocks)
        if connection is not None and not connection.closed:
            # Nobody else may: the pool may be another one by now, or the application never run.
            # But a database in memory goes with its connection.
            if not isinstance(self.engine.pool, _IN_MEMORY):
                if (transaction := connection.get_transaction()) is not None:
                    transaction.rollback()
                connection.invalidate()
            connection.close()

    def run(self, work: Callable[[], T]) -> T:
        """Run plain code where the connection may be used: here, or on its event loop."""
        if not self.asynchronous:
            return work()
        loop = self.loop or self.home()
        if loop is None or not loop.is_running():
            raise self.refused(
                "its event loop is not running. Use the session inside of `with TestClient(app)`, "
                "and leave isolated(app) on the event loop that has entered it."
            )
        return asyncio.run_coroutine_threadsafe(run_in_greenlet(work), loop).result()

    def in_production(self, sql: str, context: ExecutionContext) -> str | None:
        """Return what is sent in production where this is sent; `None` for what a block adds."""
        if _OURS in context.execution_options:
            return None
        command, _, savepoint = sql.rpartition(" ")
        begins = self._begins and command == "SAVEPOINT"  # nobody has told what it is called yet
        return _IN_PRODUCTION.get(command, sql) if begins or savepoint == self._root else sql


_send = partial(Connection.exec_driver_sql, execution_options={_OURS: True})


def isolated_on(connection: Connection) -> IsolatedConnection | None:
    """Return what a connection is isolated by."""
    found: IsolatedConnection | None = connection.get_execution_options().get(_ISOLATED)
    return found
