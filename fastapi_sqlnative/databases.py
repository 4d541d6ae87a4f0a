"""The handles of a database: what an application calls, sync and async."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from concurrent.futures import wait
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ._drivers.pools import PoolStatus, pool_status
from ._retries import Retries
from ._sessions.completion import in_thread
from ._sessions.engines import AnyEngine, ask_for_one_row, run_on_engine, sync_engine
from ._sessions.factory import SessionFactory
from ._sessions.finishing import close, commit, commit_and_close, finishing, roll_back_and_close
from ._sessions.holders import holders_of
from ._sessions.options import IsolationLevel, TransactionOptions
from ._sessions.session import record_of
from ._sessions.shared import SharedState

EngineT = TypeVar("EngineT", Engine, AsyncEngine)
T = TypeVar("T")


class _Database(Generic[EngineT]):
    """A name, an engine and the maker of its sessions."""

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
                f"{type(engine).__name__}.{remedy_for_address(given)}"
            )
        self.name = name
        self.engine: EngineT = engine
        state = SharedState(name, sync_engine(engine), shutdown_timeout, warn_held_after)
        self._sessions = SessionFactory(engine, state, session_options or {})

    def __repr__(self) -> str:
        # Not the engine's own: SQLAlchemy prints a password that stands in the URL's query.
        return f"<{type(self).__name__} {self.name!r} {self.engine.url.drivername}>"

    def pool_status(self) -> PoolStatus:
        """Look into the pool and at the holders of its connections; ask the database nothing."""
        return pool_status(sync_engine(self.engine).pool, holders_of(self._sessions.state))

    def _open_transaction(self, isolation_level: IsolationLevel | None, read_only: bool) -> Any:
        session = self._sessions.open(TransactionOptions.checked(isolation_level, read_only))
        record_of(session).commits = True
        return session

    def _no_answer(self, timeout: float) -> TimeoutError:
        return TimeoutError(f"Database {self.name!r} did not answer within {timeout} s.")


class Database(_Database[Engine]):
    """A database on an `Engine`, inside or outside an application.

    The handle owns neither the engine nor its pool. An installed one is the application's:
    depend on `get_database_handle(name)`, or look it up in `installed_databases(app)`. In a
    script or worker build one yourself:

        database = Database(create_engine(url))
        with database.transaction() as session:
            session.add(Account(name="Ada"))

    Args:
        engine: whoever built it disposes of it.
        name: appears in messages; give each handle its own where there are several.
        session_options: as for `install_database`.
        shutdown_timeout: seconds for which a COMMIT is awaited after a cancellation.
        warn_held_after: seconds, as for `install_database`.
    """

    _engine_type = Engine

    @contextmanager
    def session(self) -> Generator[Session]:
        """Open a session for a block; at its end roll back and close. Never commits."""
        with self._finished(self._sessions.open()) as session:
            yield session

    @contextmanager
    def transaction(
        self, *, isolation_level: IsolationLevel | None = None, read_only: bool = False
    ) -> Generator[Session]:
        """Open a session for a block; commit at its end, roll back on any exception.

        Args:
            isolation_level: for this transaction only; the pooled connection gets its own back.
            read_only: have the server refuse writes.

        Raises:
            TransactionAbortedError: an error inside the block was swallowed.
            CommitOutcomeUnknownError: the connection was lost during COMMIT.
            AfterCommitError: what ran after the COMMIT has failed.
        """
        with self._finished(self._open_transaction(isolation_level, read_only)) as session:
            yield session
            commit(session)

    @staticmethod
    @contextmanager
    def _finished(session: Any) -> Generator[Session]:
        try:
            yield session
        except BaseException:
            roll_back_and_close(session)
            raise
        close(session)

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
        """Run work in a transaction, and all of it again after a failure that may pass by itself.

        Each attempt has a session and transaction of its own. It is repeated after a
        serialization failure, that of a COMMIT too, a deadlock and a connection lost before
        COMMIT; never where the server is busy or away, nor where the outcome is unknown. The last
        error is raised as it is.

        Args:
            work: called with the session, once for each attempt; its result is returned. It leaves
                the commit to the handle. What it does besides, such as sending mail, is repeated.
            attempts: how many in all.
            isolation_level: as for `transaction`.
            read_only: as for `transaction`.
            timeout: seconds after which no attempt is begun; a running one is not interrupted.
            backoff: seconds, the most that the first pause takes. The limit doubles, up to 2 s,
                and a pause is any part of it.

        Raises:
            ValueError: for fewer than one attempt.
            TypeError: the work is `async def`.
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
        """Ask the database for one row, waiting at most `timeout` seconds.

        The wait has an end, the thread that asks may not: the driver's own timeouts bound it.

        Raises:
            TimeoutError: no answer came in time.
        """
        self._sessions.state.check_running()
        asking = in_thread(lambda: ask_for_one_row(self.engine))
        wait({asking}, timeout)
        if not asking.done():
            raise self._no_answer(timeout)
        asking.result()


class AsyncDatabase(_Database[AsyncEngine]):
    """A database on an `AsyncEngine`, inside or outside an application.

    It lives, and takes its arguments, as `Database` does:

        database = AsyncDatabase(create_async_engine(url))
        async with database.transaction() as session:
            session.add(Account(name="Ada"))
    """

    _engine_type = AsyncEngine

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[AsyncSession]:
        """Open a session for a block; at its end roll back and close. Never commits."""
        session = cast("AsyncSession", self._sessions.open())
        async with finishing(session, close, timeout=self._sessions.state.shutdown_timeout):
            yield session

    @asynccontextmanager
    async def transaction(
        self, *, isolation_level: IsolationLevel | None = None, read_only: bool = False
    ) -> AsyncGenerator[AsyncSession]:
        """Open a session for a block; commit at its end, roll back on any exception.

        The arguments and errors are those that `Database.transaction` has. A cancellation does not
        interrupt the COMMIT: it is awaited, for `shutdown_timeout` seconds at most.
        """
        session = self._open_transaction(isolation_level, read_only)
        timeout = self._sessions.state.shutdown_timeout
        async with finishing(session, commit_and_close, timeout=timeout):
            yield session

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
        """Do what `Database.run_in_transaction` does, with an `async def`.

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
                    return retries.checked(await work(session))

    async def ping(self, timeout: float = 5.0) -> None:
        """Ask the database for one row, waiting at most `timeout` seconds.

        Raises:
            TimeoutError: no answer came in time.
        """
        self._sessions.state.check_running()
        try:
            async with asyncio.timeout(timeout):
                await run_on_engine(self.engine, ask_for_one_row)
        except TimeoutError as error:
            raise self._no_answer(timeout) from error


AnyDatabase: TypeAlias = Database | AsyncDatabase


def sessions_of(database: AnyDatabase) -> SessionFactory:
    """Return what makes the sessions of a database; for the package only."""
    # The class is this module's own, and its users are to see nothing of it.
    return database._sessions  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]


def remedy_for_address(given: object) -> str:
    """Say how an address becomes an engine, where one was given in place of it."""
    if not isinstance(given, str | URL):
        return ""
    return " Make one of the address: create_async_engine(url), or create_engine(url)."


def database_class(engine: object) -> type[AnyDatabase] | None:
    """Choose the handle for an engine; `None` for what is no engine."""
    if isinstance(engine, AsyncEngine):
        return AsyncDatabase
    return Database if isinstance(engine, Engine) else None
