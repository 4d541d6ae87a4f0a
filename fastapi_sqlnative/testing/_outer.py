"""The transaction around a test: one connection, on which COMMIT is the end of a savepoint."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, cast

from sqlalchemy import Engine, Pool, QueuePool, SingletonThreadPool, event, exc
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection
from sqlalchemy.sql.expression import (
    ReleaseSavepointClause,
    RollbackToSavepointClause,
    SavepointClause,
)

from .._pools import pool_timeout
from .._statements import AUTOCOMMITS
from ._dialect import Outer, ask, leave, raw_connection, run, tested
from ._settings import LocalSettings

# Seconds that one waits for another's turn, unless the application's pool is less patient.
_PATIENCE: Final = 10.0
# What the drivers of these don't begin by themselves, or begin too late.
_BEGIN: Final = {"sqlite": "BEGIN", "mysql": "BEGIN", "mariadb": "BEGIN"}
# Sent as text they would be the test's own end, or begin a second transaction.
_BEGINS: Final = re.compile(r"\s*BEGIN\b", re.IGNORECASE)
_ENDS: Final = re.compile(
    r"\s*(COMMIT|END|ABORT|ROLLBACK)(\s+(WORK|TRANSACTION))?\s*;?\s*", re.IGNORECASE
)


class IsolationError(RuntimeError):
    """Something was asked of an isolated database that one connection cannot be true to."""


# The request that the running code belongs to. Nothing else is shared by the threads of one
# request; it is set only while an application is isolated.
REQUEST: Final[ContextVar[object]] = ContextVar("fastapi_sqlnative_request", default=None)


@dataclass(frozen=True)
class Flow:
    """Tell apart those who ask for the one connection."""

    request: object
    task: object
    thread: int

    @classmethod
    def current(cls) -> Flow:
        """Return who is asking."""
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        return cls(REQUEST.get(), task, threading.get_ident())

    def waits_for_itself(self, holder: Flow) -> bool:
        """Tell whether what is asked for would have to be given back by who asks."""
        if self.request is not None and self.request is holder.request:
            return True
        if self.task is not None or holder.task is not None:
            return self.task is holder.task
        # A thread of the pool may have belonged to another request, which goes on elsewhere.
        mixed = self.request is not None and holder.request is not None
        return self.thread == holder.thread and not mixed


class IsolatedPool(QueuePool):
    """Hand out the one connection, to one after the other."""

    def __init__(self, outer: OuterTransaction) -> None:
        super().__init__(
            outer.connect,
            pool_size=1,
            max_overflow=0,
            timeout=outer.patience,
            dialect=outer.engine.dialect,
        )
        self.outer = outer
        self.beside: IsolatedPool | None = None
        self._holder: Flow | None = None
        for name in ("checkout", "checkin", "reset"):
            event.listen(self, name, outer.teller(name))
        event.listen(self, "checkout", outer.note_checkout)

    def connect(self) -> PoolProxiedConnection:
        """Wait for the connection, where somebody else has it.

        Raises:
            IsolationError: who asks has it already, runs on another event loop, or has waited
                too long.
        """
        self.outer.check_loop()
        flow = Flow.current()
        holder = self._holder
        if holder is not None and self.checkedout() and flow.waits_for_itself(holder):
            if not self.outer.is_between_statements:
                raise self.outer.second_session()
            # Who has it is in no transaction, as `reader`: there can be one beside it.
            if self.beside is None:
                self.beside = self.outer.new_pool()
            return self.beside.connect()
        try:
            connection = super().connect()
        except exc.TimeoutError:
            raise self.outer.busy() from None
        if self.beside is not None and self.beside.in_use():
            self._wait_for(self.beside, connection)
        self._holder = flow
        return connection

    def _wait_for(self, beside: IsolatedPool, connection: PoolProxiedConnection) -> None:
        """Wait for who has had a transaction beside the one that has given the connection back."""
        try:
            beside.connect().close()
        except IsolationError:
            connection.close()
            raise

    def in_use(self) -> int:
        """Count those who have the connection."""
        return self.checkedout() + (0 if self.beside is None else self.beside.in_use())

    def dispose(self) -> None:
        """Dispose of the application's own pool, later if the test's connection is out of it."""
        self.outer.dispose()

    def recreate(self) -> IsolatedPool:
        """Return one for the same connection: what disposing of an engine leaves there."""
        return self.outer.new_pool()


class AsyncIsolatedPool(IsolatedPool, AsyncAdaptedQueuePool):
    """Do the same without blocking the event loop."""


class OuterTransaction(Outer):
    """Hold one engine's transaction around a test, from its first use to the test's end.

    Until `end` the engine's pool is an `IsolatedPool`, and what asks the engine's dialect for a
    BEGIN, COMMIT or ROLLBACK on this one connection gets a savepoint.

    Args:
        name: the database's, for messages.
        engine: the application's.
        may_open: raises where the connection must not be opened: nobody could close it.
    """

    def __init__(self, name: str, engine: Engine, may_open: Callable[[], None]) -> None:
        if isinstance(engine.pool, SingletonThreadPool):
            raise IsolationError(_no_threads(name))
        self.name = name
        self.engine = engine
        self.pool = engine.pool
        self.patience = min(pool_timeout(self.pool), _PATIENCE)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.autocommits_by_default = False
        self._may_open = may_open
        self._proxied: PoolProxiedConnection | None = None
        self._latest: dict[Any, Any] = {}  # the `info` of who has got the connection last
        self._autocommitting: dict[Any, Any] = {}  # the same, where that one autocommits
        self._level: str | None = None
        self._refused_level: str | None = None
        self._read_only = False
        self._begun = False
        self._reset_level = False
        self._settings = LocalSettings()
        self._broken_before: set[Any] = set()
        self._disposed = False
        tests = tested(engine.dialect).sqlnative_tests
        self._savepoint = f"sqlnative_test_{len(tests.outers)}"
        self._transaction = f"sqlnative_transaction_{len(tests.outers)}"
        tests.outers.append(self)
        engine.pool = self.new_pool()

    @property
    def dbapi_connection(self) -> DBAPIConnection | None:
        """The connection, once it is open."""
        return None if self._proxied is None else raw_connection(self._proxied)

    @property
    def is_open(self) -> bool:
        """Whether anything has used the database."""
        return self._proxied is not None

    @property
    def root_pool(self) -> Pool:
        """The application's own pool, below all blocks."""
        below = self.pool
        return below.outer.root_pool if isinstance(below, IsolatedPool) else below

    def new_pool(self) -> IsolatedPool:
        """Make the pool that the engine has meanwhile."""
        return (AsyncIsolatedPool if self.engine.dialect.is_async else IsolatedPool)(self)

    def teller(self, name: str) -> Callable[..., None]:
        """Tell the application's listeners on its own pool."""
        return lambda *arguments: getattr(self.pool.dispatch, name)(*arguments)

    def note_checkout(self, _raw: DBAPIConnection, record: Any, _holder: object) -> None:
        """Note whom the next setting is for."""
        self._latest = record.info
        if self.autocommits_by_default:
            self.set_isolation_level("AUTOCOMMIT")

    @property
    def is_between_statements(self) -> bool:
        """Whether who has the connection autocommits, and is not at it."""
        return bool(self._autocommitting) and not self._begun

    def second_session(self) -> IsolationError:
        """Build the error for who would wait for itself."""
        return IsolationError(
            f"Database {self.name!r} is isolated, on one connection, and a second session (or "
            "connection) was used beside one that is in a transaction: it would wait for itself. "
            "End the first one before, leave one out, or test this without isolated(), on a "
            "database of its own."
        )

    def busy(self) -> IsolationError:
        """Build the error for who has waited in vain."""
        return IsolationError(
            f"Database {self.name!r} is isolated, on one connection, which nobody has given back "
            f"within {self.patience:g} s: requests take turns on it. Whoever has it may be "
            "waiting for this one: a transaction that the test itself holds open, or a request "
            "that waits for another. Test that without isolated(), on a database of its own."
        )

    # -- the connection ------------------------------------------------------------------------

    def connect(self) -> DBAPIConnection:
        """Open the connection and begin, or roll back what an earlier holder could not."""
        if self._proxied is None:
            self._open()
        else:
            self._recover()
        found = self.dbapi_connection
        assert found is not None
        return found

    def check_loop(self) -> None:
        """Refuse to use the connection on another event loop than its own."""
        if self.loop is not None and self.loop is not asyncio.get_running_loop():
            raise other_loop(self.name)

    def _open(self) -> None:
        self._may_open()
        if self.engine.dialect.is_async:
            self.loop = asyncio.get_running_loop()
        proxied = self.pool.connect()
        try:
            self._begin_outer(proxied)
        except BaseException:
            proxied.invalidate()
            raise
        self._proxied = proxied

    def _begin_outer(self, proxied: PoolProxiedConnection) -> None:
        connection = proxied.dbapi_connection
        assert connection is not None
        asked = self.engine.get_execution_options().get("isolation_level")
        asked = None if asked == "AUTOCOMMIT" else asked
        self._level = asked or self.engine.dialect.default_isolation_level
        if isinstance(self.pool, IsolatedPool):
            self.autocommits_by_default = self.pool.outer.autocommits_by_default
        else:
            self._begin_on_own_connection(proxied, connection, asked)
        run(connection, [self._sql(SavepointClause, self._savepoint)])
        if self.engine.dialect.name == "sqlite":
            self._broken_before = self._broken_foreign_keys(connection)

    def _begin_on_own_connection(
        self, proxied: PoolProxiedConnection, connection: DBAPIConnection, asked: str | None
    ) -> None:
        dialect = self.engine.dialect
        if dialect.name == "sqlite" and not dialect.is_async:
            self._check_threads(connection)
        self.autocommits_by_default = getattr(connection, "autocommit", False) is True
        if self._level is not None and (asked or self.autocommits_by_default):
            dialect.set_isolation_level(connection, cast("Any", self._level))
            self._reset_level = True
        begin = _BEGIN.get(dialect.name)
        if begin and not getattr(proxied.driver_connection, "in_transaction", False):
            run(connection, [begin])

    def _check_threads(self, connection: DBAPIConnection) -> None:
        """Refuse a SQLite connection that only one thread may use."""
        with ThreadPoolExecutor(1) as thread:
            try:
                thread.submit(lambda: connection.cursor().close()).result()
            except self.engine.dialect.loaded_dbapi.ProgrammingError as error:
                raise IsolationError(_no_threads(self.name)) from error

    def _recover(self) -> None:
        """Use a connection again that SQLAlchemy has discarded: the test's rows are on it."""
        try:
            if not self._begun:
                self._run(SavepointClause, self._transaction)
                self._begun = True
            self._roll_back()
        except Exception as error:
            raise self._lost() from error

    def end(self) -> None:
        """Roll everything back and give the engine its own pool again.

        Raises:
            IsolationError: something was stored after all, or somebody still has the connection.
        """
        try:
            self.close()
        finally:
            self.engine.pool = self.pool
            tested(self.engine.dialect).sqlnative_tests.outers.remove(self)
            leave(self.engine.dialect)

    def dispose(self) -> None:
        """Do to the application's own pool what it has asked for."""
        self._disposed = self.is_open
        if not self.is_open:
            self.pool.dispose()
            self.pool = self.pool.recreate()

    def close(self) -> None:
        """Roll everything back and give the connection back; the next use opens another.

        Raises:
            IsolationError: as `end`.
        """
        proxied, pool = self._proxied, self.engine.pool
        if proxied is None:
            return
        assert isinstance(pool, IsolatedPool)
        self.engine.pool = self.new_pool()
        try:
            if pool.in_use():
                raise IsolationError(
                    f"Database {self.name!r} is no longer isolated, but a session or connection "
                    "of it is still in use; it is cut off. Let requests, websockets and "
                    "background work end inside of the block."
                )
            self._run(RollbackToSavepointClause, self._savepoint)
        except IsolationError:
            self._forget()
            proxied.invalidate()
            raise
        except Exception as error:
            lost = self._lost()
            self._forget()
            proxied.invalidate()
            raise lost from error
        self._forget()
        with contextlib.closing(proxied):
            self.engine.dialect.do_rollback(proxied)
            if self._reset_level:
                dbapi_connection = raw_connection(proxied)
                assert dbapi_connection is not None
                self.engine.dialect.reset_isolation_level(dbapi_connection)
        if self._disposed:
            self.dispose()

    def _forget(self) -> None:
        self._proxied = self.loop = None
        self._begun = self._read_only = False
        self._refused_level = None

    def _lost(self) -> IsolationError:
        return IsolationError(
            f"The transaction around the test on database {self.name!r} has ended before the "
            "test: its connection was lost, or a statement has committed by itself (COMMIT as "
            "text; on MySQL any CREATE, ALTER or DROP), and what came before it is stored. Test "
            "that without isolated(), on a database of its own."
        )

    # -- what the dialect asks for ---------------------------------------------------------------

    def begin(self, holder: PoolProxiedConnection) -> None:
        """Pretend BEGIN.

        Raises:
            IsolationError: an isolation level of its own was asked for.
        """
        if self._refused_level is not None:
            raise IsolationError(
                f"Database {self.name!r} is isolated, in a transaction of isolation level "
                f"{self._level!r}, and {self._refused_level!r} was asked for: a level belongs to "
                "the whole transaction. Test this without isolated(), on a database of its own."
            )
        if holder.info.get(AUTOCOMMITS):
            return
        self._roll_back()
        self._run(SavepointClause, self._transaction)
        self._begun = True
        if self._read_only:
            run(self._connection, ["SET TRANSACTION READ ONLY"])

    def commit(self, holder: PoolProxiedConnection) -> None:
        """Pretend COMMIT: first what the server checks only then."""
        if not self._begun or holder.info.get(AUTOCOMMITS):
            return
        try:
            self._check_deferred()
        except Exception as error:
            self._roll_back()
            state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
            if state != "25P02":  # PostgreSQL commits an aborted transaction by a silent ROLLBACK
                raise
        else:
            self._run(ReleaseSavepointClause, self._transaction)
            self._begun = False
            self._settings.restore(self._connection)

    def rollback(self, holder: PoolProxiedConnection) -> None:
        """Pretend ROLLBACK."""
        if not holder.info.get(AUTOCOMMITS):
            self._roll_back()

    def _roll_back(self) -> None:
        if self._begun:
            self._run(RollbackToSavepointClause, self._transaction)
            self._run(ReleaseSavepointClause, self._transaction)
            self._begun = False
            self._settings.forget()

    def execute(
        self,
        holder: PoolProxiedConnection,
        send: Callable[[], None],
        statement: str,
        parameters: object,
    ) -> None:
        """Send a statement of the application's.

        Raises:
            IsolationError: it would end the transaction around the test, or see another's.
        """
        if _ENDS.fullmatch(statement):
            raise IsolationError(
                f"Database {self.name!r} is isolated, and {statement.strip()!r} was sent as text: "
                "it would end the transaction around the test. Call commit() or rollback()."
            )
        if self.engine.dialect.name == "sqlite" and _BEGINS.match(statement):
            return  # SQLAlchemy's recipe for savepoints: the transaction has begun
        if not holder.info.get(AUTOCOMMITS):
            if self.engine.dialect.name == "postgresql":
                self._settings.remember(self._connection, statement, parameters)
            send()
            return
        if self._begun:
            raise self.second_session()
        with self._statement_of_its_own():
            send()

    @contextlib.contextmanager
    def _statement_of_its_own(self) -> Generator[None]:
        self._run(SavepointClause, self._transaction)
        self._begun = True
        try:
            yield
            self._check_deferred()
        except BaseException:
            self._roll_back()
            raise
        self._run(ReleaseSavepointClause, self._transaction)
        self._begun = False

    def set_isolation_level(self, level: str) -> None:
        """Pretend AUTOCOMMIT; note another level, which is refused once it is used."""
        if level == "AUTOCOMMIT":
            self._autocommitting = self._latest
            self._autocommitting[AUTOCOMMITS] = True
        else:
            # Set by who wants a level, or by who autocommits and gives the connection back.
            self._autocommitting.pop(AUTOCOMMITS, None)
            self._autocommitting = {}
        self._refused_level = None if level in ("AUTOCOMMIT", self._level) else level

    def autocommits(self) -> bool:
        """Tell the setting of who has got the connection last."""
        return bool(self._latest.get(AUTOCOMMITS))

    def set_read_only(self, read_only: bool) -> None:
        """Have the next transaction read only: within a savepoint it ends with it."""
        self._read_only = read_only

    def refuse_two_phases(self) -> None:
        """Refuse what cannot be pretended."""
        raise IsolationError(
            f"Database {self.name!r} is isolated, which cannot be true to two-phase commits. Test "
            "this without isolated(), on a database of its own."
        )

    def _check_deferred(self) -> None:
        """Check the constraints that wait for COMMIT."""
        if self.engine.dialect.name == "sqlite":
            self._check_foreign_keys()
        if self.engine.dialect.name != "postgresql":
            return
        name = f"{self._transaction}_check"
        self._run(SavepointClause, name)
        run(self._connection, ["SET CONSTRAINTS ALL IMMEDIATE"])
        # Rolled back, or the setting would outlive this transaction.
        self._run(RollbackToSavepointClause, name)
        self._run(ReleaseSavepointClause, name)

    def _check_foreign_keys(self) -> None:
        """Raise what SQLite would: it checks at COMMIT only, but lists what it would find."""
        if self._broken_foreign_keys(self._connection) <= self._broken_before:
            return
        errors = self.engine.dialect.loaded_dbapi
        error = cast("Any", errors.IntegrityError("FOREIGN KEY constraint failed"))
        error.sqlite_errorcode = sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
        error.sqlite_errorname = "SQLITE_CONSTRAINT_FOREIGNKEY"
        raise error

    def _broken_foreign_keys(self, connection: DBAPIConnection) -> set[Any]:
        ((enforced,),) = ask(connection, "PRAGMA foreign_keys")
        return set(map(tuple, ask(connection, "PRAGMA foreign_key_check"))) if enforced else set()

    @property
    def _connection(self) -> DBAPIConnection:
        connection = self.dbapi_connection
        assert connection is not None
        return connection

    def _run(self, clause: Callable[..., Any], savepoint: str) -> None:
        run(self._connection, [self._sql(clause, savepoint)])

    def _sql(self, clause: Callable[..., Any], savepoint: str) -> str:
        return str(clause(savepoint).compile(dialect=self.engine.dialect))


def other_loop(name: str) -> IsolationError:
    """Build the error for code on an event loop where the connection cannot be used."""
    return IsolationError(
        f"Database {name!r} is isolated, on a connection that belongs to one event loop, and was "
        "used on another: the application's is meant, or that of `async with isolated(app)`. "
        "From a synchronous test run code on the application's: client.portal.call(function)."
    )


def _no_threads(name: str) -> str:
    return (
        f"Database {name!r} cannot be isolated: it is a SQLite connection that one thread alone "
        "may use, and the application works in several. Make the engine with "
        'poolclass=StaticPool, connect_args={"check_same_thread": False}.'
    )
