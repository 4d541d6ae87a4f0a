"""The single connection of an isolated database, in a transaction that is rolled back."""

import asyncio
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar, cast

from sqlalchemy import Connection, Engine, SingletonThreadPool, StaticPool, Transaction, event
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin

from .._drivers import transactions
from .._drivers.statements import without_literals, writes
from .._sessions.engines import run_in_greenlet
from .._sessions.session import NativeSession
from ._targets import IsolationError, running_loop
from ._turns import ENDED, REFUSED, SERVED, Turn, in_flow

T = TypeVar("T")
# The execution options that mark an isolated connection, and the block's own statements.
ISOLATED: Final = "fastapi_sqlnative_isolated"
OURS: Final = "fastapi_sqlnative_testing"
# Execution options that a connection can't change in its transaction, or that can't be unset.
_FIXED: Final = (
    *("isolation_level", "postgresql_readonly", "postgresql_deferrable"),
    *("max_row_buffer", "insertmanyvalues_page_size"),
)
_ENDS: Final = re.compile(r"\s*(commit|end|abort|rollback)\b(?!(\s+(work|transaction))?\s+to\b)")
_READS: Final = ("select", "with", "values", "pragma", "show", "explain", "set", "listen")
_DEFINES: Final = ("create", "alter", "drop", "comment", "grant")
_IN_MEMORY: Final = (StaticPool, SingletonThreadPool)
_DEFERRED: Final = """SELECT string_agg(quote_ident(nspname) || '.' || quote_ident(conname), ', ')
FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace n ON n.oid = connamespace
WHERE condeferred AND has_schema_privilege(n.oid, 'USAGE')
"""


@dataclass(eq=False)
class IsolatedConnection:
    """The connection that all sessions of a database share until the end of the block."""

    name: str
    engine: Engine
    turn: Turn
    home: Callable[[], asyncio.AbstractEventLoop | None]  # returns the application's event loop
    # The open blocks, each with its transaction once there is a connection.
    blocks: dict[Any, Transaction | None] = field(default_factory=dict[Any, Transaction | None])
    # The test's sessions, each with its block, in the order in which their savepoints began.
    own_sessions: dict[Session, object] = field(default_factory=dict[Session, object])
    loop: asyncio.AbstractEventLoop | None = None  # the event loop of the connection
    _connection: Connection | None = None
    # The savepoint that stands for the application's transaction; empty if it is about to begin.
    root: str | None = None
    # The transactions of the test's sessions in which it has begun.
    _around: set[SessionTransaction | None] = field(default_factory=set[SessionTransaction | None])

    def refused(self, why: str) -> IsolationError:
        """Build the error, and record it on the request, which fails even if it swallows it."""
        error = IsolationError(f"Database {self.name!r} is isolated: {why}")
        if (request := SERVED.get()) is not None:
            request[REFUSED] = str(error)
        return error

    def begin(self, session: object, *, transaction: bool) -> Connection:
        """Wait for the turn of a session of the application, and return the connection."""
        if self.turn.holds(session):
            return self.opened()
        here = running_loop()
        if self.engine.dialect.is_async and here is not (self.loop or self.home() or here):
            raise self.refused(
                "its connection belongs to the application's event loop, not to this one. Use the "
                "client that runs the application, or client.portal.call(). With async_client, use "
                "one event loop for everything; with pytest-asyncio, one loop_scope."
            )
        self.turn.take(session, self, transaction=transaction)
        with ExitStack() as undo:
            undo.callback(self.turn.release, session)
            connection = self.opened()
            self.settle(self._unused(), explicit=False)
            undo.pop_all()
        if transaction:
            self._around = {own.get_transaction() for own in self.own_sessions}
            self.root = ""
        return connection

    def end(self, session: NativeSession) -> None:
        """End the turn of a session after its transaction."""
        self.root = self.root or None  # the session may have sent no statement
        if session.sqlnative.options.read_only and self.engine.dialect.name == "sqlite":
            transactions.fetch_row(self.opened(), "PRAGMA query_only = OFF")
        self.turn.release(session)

    def _settle_inside(self, _: Connection, savepoint: str, _context: None) -> None:
        """Commit what the test's sessions have begun inside the application's transaction."""
        if savepoint == self.root:
            inside = [own for own in self._unused() if own.get_transaction() not in self._around]
            # A request raises the error at its end: the application must not see it.
            with suppress(IsolationError) if SERVED.get() else nullcontext():
                self.settle(inside)

    def _unused(self) -> list[Session]:
        """Return the test's sessions that are not in use, because the test waits for this work."""
        requested = (SERVED.get() or {}).get("type") in ("http", "websocket")
        return [own for own in self.own_sessions if requested or in_flow(own)]

    def settle(self, sessions: Iterable[Session], *, explicit: bool = True) -> None:
        """Commit the test's changes; if not `explicit`, only flush a transaction it has begun."""
        for own in reversed([*sessions]):  # a savepoint ends with those around it
            begun = own.get_nested_transaction() or own.get_transaction()
            if begun is None:
                continue
            with self.turn.during(own):
                try:
                    if not own.is_active or transactions.is_aborted(self.opened(), doubtful=True):
                        own.rollback()  # the test has already seen the error
                    elif explicit or begun.origin is SessionTransactionOrigin.AUTOBEGIN:
                        own.commit()
                    else:
                        own.connection()  # begins its savepoint, in which the request's work is
                        own.flush()
                except Exception as error:
                    own.rollback()
                    raise self.refused(
                        f"the changes of the test's session cannot be stored: {error}"
                    ) from error

    def opened(self) -> Connection:
        """Return the connection, in its transaction and a savepoint for each inner block."""
        if self._connection is None:
            self._connection = self._open()
        ended = any(not begun.is_active for begun in self.blocks.values() if begun)
        if ended or transactions.is_lost(self._connection):
            raise self.refused(
                "its connection was lost or ended, or a statement was cancelled, which undid "
                "everything that the test had stored. Test that with cloned(app)."
            )
        for block in [each for each, begun in self.blocks.items() if begun is None]:
            self.blocks[block] = self._connection.begin_nested()
        return self._connection

    def _open(self) -> Connection:
        if not self.blocks:
            raise self.refused(ENDED)
        self.loop = running_loop() if self.engine.dialect.is_async else None
        with ExitStack() as undo:  # a failure or cancellation leaves no connection
            connection = undo.enter_context(self.engine.connect())
            event.listen(connection, "set_connection_execution_options", self._keep_options)
            connection.execution_options()
            transaction = connection.begin()
            transactions.begin_before_savepoint(connection)
            if transactions.autocommits(connection):
                raise self.refused("its engine is in AUTOCOMMIT. Test with cloned(app).")
            undo.pop_all()
        self.blocks[next(iter(self.blocks))] = transaction
        event.listen(connection, "rollback_savepoint", self._settle_inside)
        event.listen(connection, "release_savepoint", self._settle_inside)
        event.listen(connection, "release_savepoint", self._check_released)
        event.listen(connection, "commit", self._refuse_end)
        event.listen(connection, "rollback", self._refuse_end)
        return connection

    def _keep_options(self, _: Connection, options: dict[str, Any]) -> None:
        """Ignore options that must stay as they are. SQLAlchemy refuses AUTOCOMMIT."""
        for key in _FIXED:
            if options.get(key) != "AUTOCOMMIT":
                options.pop(key, None)
        # Drivers open a cursor on the server for every statement otherwise, also for a SAVEPOINT.
        options.update({ISOLATED: self, "stream_results": False, "yield_per": None})

    def _refuse_end(self, _: Connection) -> None:
        if self._connection is not None:  # it is not the end of the block
            raise self.refused(
                "commit() or rollback() of the connection itself would end the block. Use those "
                "of the session, or test with cloned(app)."
            )

    def check_deferred(self) -> None:
        """Check deferred constraints, as PostgreSQL does at COMMIT."""
        if self.engine.dialect.name == "postgresql":
            connection = self.opened()
            send = partial(connection.exec_driver_sql, execution_options={OURS: True})
            deferred = send(_DEFERRED).scalar()
            send("SET CONSTRAINTS ALL IMMEDIATE")
            if deferred:
                send(f"SET CONSTRAINTS {deferred} DEFERRED")

    def _check_released(self, connection: Connection, savepoint: str, _context: None) -> None:
        """Do as COMMIT does: check deferred constraints, or roll back what is aborted."""
        if savepoint == self.root:
            aborted = transactions.is_aborted(connection, doubtful=True)
            with ExitStack() as undo:  # SQLAlchemy considers the savepoint ended by a failure
                undo.callback(connection.dialect.do_rollback_to_savepoint, connection, savepoint)
                if not aborted:
                    self.check_deferred()
                    undo.pop_all()

    def watch(self, connection: Connection, _cursor: object, statement: str, *_: Any) -> None:
        """Refuse statements that would end the block, and writes over other connections."""
        sql = without_literals(statement).lower()
        if isolated_on(connection) is self:
            if self.root == "" and sql.startswith("savepoint "):
                self.root = sql.partition(" ")[2]
            # A trigger or function may contain `; END`.
            if any(map(_ENDS.match, [sql] if sql.startswith("create ") else sql.split(";"))):
                raise self.refused("COMMIT and ROLLBACK as text would end the block.")
        # DDL is allowed before the first use; later it could wait for the test's locks.
        elif not (
            (sql.startswith(_READS) and not writes(statement))
            or (sql.startswith(_DEFINES) and self._connection is None)
        ):
            raise self.refused(
                "a write on the engine itself, or in a transaction begun before the block, would "
                "be stored permanently. Use a session within the block, or test with cloned(app)."
            )

    def enter(self, block: object) -> None:
        """Begin an inner block; what its outer blocks' sessions have pending is stored before."""
        used = self._connection is not None or any(map(Session.in_transaction, self.own_sessions))
        if used and self.blocks[block] is None:
            del self.blocks[block]  # until it has begun, which may be refused
            self.run(partial(self._enter, block))

    def _enter(self, block: object) -> None:
        with self.turn.during(block, self):
            self.settle(self.own_sessions)
            self.blocks[block] = None
            self.opened()

    def leave(self, block: object) -> None:
        """Roll back the work of a block, and close the connection after the last one."""
        if self._connection is None:
            self._undo(block)
        elif self.blocks[block] is None:
            del self.blocks[block]  # its event loop is not the connection's
        else:
            self.run(partial(self._undo, block))

    def _undo(self, block: object) -> None:
        for session, its in reversed([*self.own_sessions.items()]):
            with self.turn.during(session):
                if its is block:
                    session.close()
                    del self.own_sessions[session]
                else:
                    session.rollback()  # its savepoint ends with the block
        transaction = self.blocks.pop(block)
        if not self.blocks:
            self.close()
        elif transaction is not None and transaction.is_active:
            transaction.rollback()

    def ends_with(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether the shutdown of an application on an event loop ends the connection."""
        if isinstance(self.engine.pool, _IN_MEMORY):  # the database ends with its pool
            return self.loop in (None, loop)
        return self.loop is loop and all(block.loop is not loop for block in self.blocks)

    def close(self) -> None:
        """Roll back everything, because the last block or the application ends."""
        for session in reversed(self.own_sessions):
            with self.turn.during(session):
                session.close()
        connection, self._connection, self.loop, self.root = self._connection, None, None, None
        self.blocks = dict.fromkeys(self.blocks)
        if connection is not None and not connection.closed:
            try:  # also if SQLAlchemy considers a refused end as done
                transactions.rolls_back(connection)
            finally:  # a statement may be running
                # Close it for real: the pool may be another one. But in memory the data would go.
                if not isinstance(self.engine.pool, _IN_MEMORY):
                    connection.invalidate()
            connection.close()

    def run(self, work: Callable[[], T]) -> T:
        """Run plain code where the connection may be used: here, or on its event loop."""
        if not self.engine.dialect.is_async:
            return work()
        loop = self.loop or self.home()
        if loop is None or not loop.is_running():
            raise self.refused(
                "its event loop is not running. Use the session inside `with TestClient(app)`, and "
                "one event loop for all blocks; with pytest-asyncio, one loop_scope."
            )
        if loop is running_loop():
            raise self.refused(
                "on the application's event loop, the test's synchronous session would wait for "
                "itself, also to load an object's values. Use it in the test's thread. An override "
                "should leave get_db() as it is and load its objects from the request's session."
            )
        return asyncio.run_coroutine_threadsafe(run_in_greenlet(work), loop).result()


def isolated_on(connection: Connection) -> IsolatedConnection | None:
    """Return the isolated connection that a connection is, if any."""
    return cast("IsolatedConnection | None", connection.get_execution_options().get(ISOLATED))
