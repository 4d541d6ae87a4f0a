"""The database handles, sync and async."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import wait
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ._drivers.pools import PoolStatus, pool_status
from ._retries import Retries
from ._sessions.completion import in_thread, within
from ._sessions.engines import AnyEngine, ask, hint_for_engine, run_on_engine, sync_engine
from ._sessions.factory import SessionFactory
from ._sessions.finishing import finishing, finishing_async
from ._sessions.holders import holders_of
from ._sessions.options import IsolationLevel, TransactionOptions
from ._sessions.session import record_of
from ._sessions.shared import SharedState

EngineT = TypeVar("EngineT", Engine, AsyncEngine)
T = TypeVar("T")


class _Database(Generic[EngineT]):
    """The common part of both handles: a name, an engine and its session factory."""

    _engine_type: ClassVar[type[AnyEngine]]

    def __init__(
        self,
        engine: EngineT,
        *,
        name: str = "default",
        session_options: Mapping[str, Any] | None = None,
        shutdown_timeout: float = 10.0,
        warn_held_after: float | None = None,
    ) -> None:
        given: object = engine
        if not isinstance(given, self._engine_type):
            raise TypeError(
                f"{type(self).__name__} {name!r} takes an {self._engine_type.__name__}, not "
                f"{type(engine).__name__}.{hint_for_engine(given)}"
            )
        self.name = name
        self.engine: EngineT = engine
        state = SharedState(name, sync_engine(engine), shutdown_timeout, warn_held_after)
        self._sessions = SessionFactory(engine, state, session_options or {})

    def __repr__(self) -> str:
        # Not the engine's repr, which shows a password in the URL's query string.
        return f"<{type(self).__name__} {self.name!r} {self.engine.url.drivername}>"

    def pool_status(self) -> PoolStatus:
        """Return the state of the pool and the holders of its connections, without any query."""
        return pool_status(sync_engine(self.engine).pool, holders_of(self._sessions.state))

    def _open_transaction(self, isolation_level: IsolationLevel | None, read_only: bool) -> Any:
        options = TransactionOptions.checked(isolation_level, read_only)
        session = self._sessions.open()
        record_of(session).will_commit(options)
        return session

    def _no_answer(self, timeout: float) -> TimeoutError:
        return TimeoutError(f"Database {self.name!r} did not answer within {timeout} s.")


class Database(_Database[Engine]):
    """A database on an `Engine`, inside or outside an application.

    The handle owns neither the engine nor its pool. In an application, depend on
    `get_database_handle(name)` or look the handle up in `installed_databases(app)`. In a script or
    worker, create one yourself:

        database = Database(create_engine(url))
        with database.transaction() as session:
            session.add(Account(name="Ada"))

    Args:
        engine: an engine that you dispose of yourself.
        name: a name for messages; give each handle its own.
        session_options: as for `install_database`.
        shutdown_timeout: seconds that a COMMIT may take to finish after a cancellation.
        warn_held_after: seconds, as for `install_database`.
    """

    _engine_type = Engine

    def session(self) -> AbstractContextManager[Session]:
        """Open a session for a block, and roll back and close it at the end. Never commits."""
        return finishing(self._sessions.open())

    def transaction(
        self, *, isolation_level: IsolationLevel | None = None, read_only: bool = False
    ) -> AbstractContextManager[Session]:
        """Open a session for a block, and commit it at the end, or roll back on any exception.

        Args:
            isolation_level: for this transaction only; it is reset when the connection is returned.
            read_only: make the server refuse writes.

        Raises:
            TransactionAbortedError: an error inside the block was swallowed.
            CommitOutcomeUnknownError: the connection was lost during COMMIT.
            AfterCommitError: code that ran after the COMMIT failed.
        """
        return finishing(self._open_transaction(isolation_level, read_only))

    def run_in_transaction(
        self,
        work: Callable[[Session], T],
        *,
        attempts: int = 3,
        isolation_level: IsolationLevel | None = None,
        read_only: bool = False,
        timeout: float = 10.0,
        backoff: float = 0.05,
    ) -> T:
        """Run work in a transaction, and retry all of it after a temporary failure.

        Each attempt has its own session and transaction. An attempt is retried after a
        serialization failure (also at COMMIT), a deadlock, or a connection lost before COMMIT; it
        is never retried if the server is overloaded or unreachable, or if the outcome is unknown.
        The last error is raised unchanged.

        Args:
            work: called with the session for each attempt; its result is returned. It must not
                commit. Its other effects, such as sending mail, are repeated.
            attempts: the maximum number of attempts.
            isolation_level: as for `transaction`.
            read_only: as for `transaction`.
            timeout: seconds after which no new attempt begins; a running one is not interrupted.
            backoff: the longest first pause, in seconds. The limit doubles for each retry, up to
                2 s, and each pause is a random part of it.

        Raises:
            ValueError: `attempts` is below 1, or a time is negative.
            TypeError: `work` is a coroutine or generator function.
            CommitOutcomeUnknownError: the connection was lost during COMMIT.

        Example:
            database.run_in_transaction(book_seat, isolation_level="SERIALIZABLE")
        """
        retries = Retries(self.name, attempts, timeout, backoff)
        options: dict[str, Any] = {"isolation_level": isolation_level, "read_only": read_only}
        while True:
            if retries.pause:
                time.sleep(retries.pause)
            with retries.attempt(), self.transaction(**options) as session:
                retries.session = session
                return retries.checked(work(session))

    def ping(self, timeout: float = 5.0) -> None:
        """Query one row from the database, waiting at most `timeout` seconds.

        The querying thread may take longer: only the driver's own timeouts bound it.

        Raises:
            TimeoutError: the database did not answer in time.
        """
        self._sessions.state.check_running()
        asking = in_thread(lambda: ask(self.engine))
        if wait({asking}, timeout).not_done:
            raise self._no_answer(timeout)
        asking.result()


class AsyncDatabase(_Database[AsyncEngine]):
    """A database on an `AsyncEngine`, inside or outside an application.

    Its arguments and its lifetime are those of `Database`:

        database = AsyncDatabase(create_async_engine(url))
        async with database.transaction() as session:
            session.add(Account(name="Ada"))
    """

    _engine_type = AsyncEngine

    def session(self) -> AbstractAsyncContextManager[AsyncSession]:
        """Open a session for a block, and roll back and close it at the end. Never commits."""
        return finishing_async(self._sessions.open())

    def transaction(
        self, *, isolation_level: IsolationLevel | None = None, read_only: bool = False
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Open a session for a block, and commit it at the end, or roll back on any exception.

        Arguments and errors are those of `Database.transaction`. A cancellation does not interrupt
        the COMMIT, which is awaited for at most `shutdown_timeout` seconds.
        """
        return finishing_async(self._open_transaction(isolation_level, read_only))

    async def run_in_transaction(
        self,
        work: Callable[[AsyncSession], Awaitable[T]],
        *,
        attempts: int = 3,
        isolation_level: IsolationLevel | None = None,
        read_only: bool = False,
        timeout: float = 10.0,
        backoff: float = 0.05,
    ) -> T:
        """Run an `async def` like `Database.run_in_transaction`.

        Example:
            await database.run_in_transaction(book_seat, isolation_level="SERIALIZABLE")
        """
        retries = Retries(self.name, attempts, timeout, backoff)
        options: dict[str, Any] = {"isolation_level": isolation_level, "read_only": read_only}
        while True:
            if retries.pause:
                await asyncio.sleep(retries.pause)
            with retries.attempt():
                async with self.transaction(**options) as session:
                    retries.session = session
                    return retries.checked(await retries.checked(work(session), to_await=True))

    async def ping(self, timeout: float = 5.0) -> None:
        """Query one row like `Database.ping`, but cancel the query when the time is up."""
        self._sessions.state.check_running()
        await within(timeout, run_on_engine(self.engine, ask), late=self._no_answer(timeout))


AnyDatabase: TypeAlias = Database | AsyncDatabase


def sessions_of(database: AnyDatabase) -> SessionFactory:
    """Return the session factory of a database. For this package only."""
    # A private attribute, because users of a handle should not see it.
    return database._sessions  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]


def database_class(engine: object) -> type[AnyDatabase] | None:
    """Return the handle class for an engine; `None` for anything else."""
    if isinstance(engine, AsyncEngine):
        return AsyncDatabase
    return Database if isinstance(engine, Engine) else None
