"""The handles of a database, and the only place where sync and async differ."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from sqlalchemy import Engine, Pool, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ._completion import ended_within, in_thread, to_completion
from ._guards import EngineGuard, SessionGuard
from ._options import NO_OPTIONS, IsolationLevel, TransactionOptions
from ._pools import PoolStatus, ask_pool, max_overflow, pool_capacity
from ._retries import Retries, refuse_coroutine
from ._sessions import guard_of, guarded_class, has_pending_changes
from ._statements import listen
from .exceptions import DatabaseNotStartedError, TransactionOptionsError

logger = logging.getLogger("fastapi_sqlnative")

AnyEngine: TypeAlias = Engine | AsyncEngine
AnySession: TypeAlias = Session | AsyncSession
EngineT = TypeVar("EngineT", Engine, AsyncEngine)
SessionT = TypeVar("SessionT", Session, AsyncSession)
T = TypeVar("T")


class _Database(ABC, Generic[EngineT, SessionT]):
    """Hold one engine, its session class and the guard of its sessions."""

    engine_type: ClassVar[type[AnyEngine]]
    session_type: ClassVar[type[AnySession]]
    blocking: ClassVar[bool]

    def __init__(
        self,
        engine: EngineT,
        *,
        name: str = "default",
        session_options: Mapping[str, Any] | None = None,
        shutdown_timeout: float = 10.0,
    ) -> None:
        given: object = engine
        if not isinstance(given, self.engine_type):
            raise TypeError(
                f"{type(self).__name__} {name!r} takes an {self.engine_type.__name__}, not "
                f"{type(engine).__name__}."
            )
        self.name = name
        self.engine: EngineT = engine
        self.shutdown_timeout = shutdown_timeout
        self._refusal: str | None = None
        self._guard = EngineGuard(name, self.sync_engine, listen)
        options = {"expire_on_commit": False, "close_resets_only": False} | dict(
            session_options or {}
        )
        self._session_class = self._check_session_class(options.pop("class_", self.session_type))
        self._session_options = self._guarded(options)
        self._check_options()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.engine!r}>"

    def _check_options(self) -> None:
        """Open a session: mistakes in its options show now, not in the first request."""
        try:
            close(sync_session(self.open()))
        except TypeError as error:
            raise TypeError(f"session_options of database {self.name!r}: {error}") from error

    def open(
        self, options: TransactionOptions = NO_OPTIONS, *, loop_thread: int | None = None
    ) -> SessionT:
        """Open a session without a connection; the caller finishes it.

        Raises:
            DatabaseNotStartedError: the application has stopped, or is about to.
        """
        if self._refusal is not None:
            raise DatabaseNotStartedError(
                f"Database {self.name!r} is {self._refusal}: no new session is handed out. Finish "
                "work with the database before the application shuts down."
            )
        if options is not NO_OPTIONS:
            self.support(options)
        guard = SessionGuard(self._guard, options, loop_thread)
        session: SessionT = self._session_class(self.engine, guard=guard, **self._session_options)
        return session

    def support(self, options: TransactionOptions) -> None:
        """Refuse what the database cannot do, before anything is sent to it.

        Raises:
            TransactionOptionsError: an isolation level, or `read_only`, that there is not.
        """
        dialect = self.sync_engine.dialect
        lacking = options.lacking_in(dialect)
        if lacking is not None:
            raise TransactionOptionsError(
                f"Database {self.name!r} ({dialect.name}+{dialect.driver}) has {lacking}."
            )

    def pool_status(self) -> PoolStatus:
        """Look into the connection pool, without touching the database."""
        pool = self.pool
        size = ask_pool(pool, "size") or None  # a size of 0 is SQLAlchemy's "no limit"
        overflow = None if size is None else ask_pool(pool, "overflow")
        return PoolStatus(
            size=size,
            max_overflow=max_overflow(pool),
            checked_out=ask_pool(pool, "checkedout"),
            checked_in=ask_pool(pool, "checkedin"),
            overflow=None if overflow is None else max(overflow, 0),
        )

    @property
    def pool(self) -> Pool:
        """The pool that the engine has now; disposing of the engine replaces it."""
        return self.sync_engine.pool

    def connections_in_use(self) -> int:
        """Count the connections that somebody holds, as far as pool and sessions know."""
        checked_out = ask_pool(self.pool, "checkedout")
        return self._held_by_sessions() if checked_out is None else checked_out

    def sessions_hold_all(self) -> bool:
        """Tell whether sessions hold every connection that the pool hands out."""
        capacity = pool_capacity(self.pool)
        return capacity is not None and self._held_by_sessions() >= capacity

    def _held_by_sessions(self) -> int:
        return sum(len(guard.transactions) for guard in tuple(self._guard.busy))

    def refuse_sessions(self) -> None:
        """Hand out no new session from now on; open ones still work."""
        self._refusal = "shutting down"

    def refuse_statements(self) -> None:
        """Let open sessions send nothing more: the engine is about to be closed."""
        self._refusal = "stopped"
        self._guard.stopped = True

    async def answer(self, timeout: float) -> None:
        """Do what `ping` does, without blocking the event loop, whichever kind this is.

        What does not end in time is left behind.
        """
        asking = asyncio.create_task(self.run_sync(_ask_for_one_row))
        if not await ended_within(timeout, asking):
            raise self._no_answer(timeout)
        asking.result()

    @abstractmethod
    async def run_sync(self, work: Callable[[Engine], T]) -> T:
        """Give the engine to plain code, without blocking the event loop, whichever kind this is.

        In the greenlet of an `AsyncEngine`, which a cancellation reaches, or in a daemon thread of
        its own, which it leaves behind: only the driver's timeouts bound that one.
        """

    @abstractmethod
    async def dispose(self) -> None:
        """Close the engine's idle connections, without blocking the event loop."""

    @property
    @abstractmethod
    def sync_engine(self) -> Engine:
        """The engine that has the pool: an `AsyncEngine` is a proxy for one."""

    @abstractmethod
    def _guarded(self, options: dict[str, Any]) -> dict[str, Any]: ...

    def _check_session_class(self, class_: object) -> type[Any]:
        if not (isinstance(class_, type) and issubclass(class_, self.session_type)):
            raise TypeError(
                f"session_options of database {self.name!r}: class_ must be a subclass of "
                f"{self.session_type.__name__}, because its engine is an "
                f"{self.engine_type.__name__}; it is {class_!r}."
            )
        return class_

    def _no_answer(self, timeout: float) -> TimeoutError:
        return TimeoutError(f"Database {self.name!r} did not answer within {timeout} s.")

    def _check_alive(self) -> None:
        if self._guard.stopped:
            raise DatabaseNotStartedError(f"Database {self.name!r} is stopped.")


class Database(_Database[Engine, Session]):
    """Open sessions and transactions on an `Engine`, inside or outside an application.

    The handle owns neither the engine nor its pool. An installed one is the application's:
    depend on `get_database_handle(name)`, or look it up in `installed_databases(app)`. In a
    script or worker build one yourself:

        database = Database(create_engine(url))
        with database.transaction() as session:
            session.add(Account(name="Ada"))
    """

    engine_type = Engine
    session_type = Session
    blocking = True

    @contextmanager
    def session(self) -> Generator[Session]:
        """Open a session for a block; at its end roll back and close. Never commits."""
        session = self.open()
        try:
            yield session
        finally:
            close(session)

    @contextmanager
    def transaction(
        self, *, isolation_level: IsolationLevel | None = None, read_only: bool = False
    ) -> Generator[Session]:
        """Open a session for a block; commit at its end, roll back on any exception.

        Raises:
            TransactionAbortedError: an error inside the block was swallowed.
            CommitOutcomeUnknownError: the connection was lost during COMMIT.
        """
        session = self.open(TransactionOptions.checked(isolation_level, read_only))
        try:
            yield session
            commit(session)
        finally:
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
                the commit to the handle. What it does besides, such as sending mail, it does
                again.
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
        while True:
            try:
                with self.transaction(
                    isolation_level=isolation_level, read_only=read_only
                ) as session:
                    result = work(session)
                    refuse_coroutine(self.name, result)
            except Exception as error:
                pause = retries.pause_after(error)
                if pause is None:
                    raise
            else:
                return result
            time.sleep(pause)

    def ping(self, timeout: float = 5.0) -> None:
        """Ask the database for one row, waiting at most `timeout` seconds.

        The wait has an end, the thread that asks may not: the driver's own timeouts bound it.

        Raises:
            TimeoutError: no answer came in time.
        """
        self._check_alive()
        asking = in_thread(lambda: _ask_for_one_row(self.engine))
        wait({asking}, timeout)
        if not asking.done():
            raise self._no_answer(timeout)
        asking.result()

    async def run_sync(self, work: Callable[[Engine], T]) -> T:
        """Run it in a thread."""
        self._check_alive()
        return await asyncio.wrap_future(in_thread(lambda: work(self.engine)))

    async def dispose(self) -> None:
        """Close the connections in a thread."""
        await anyio.to_thread.run_sync(self.engine.dispose, limiter=anyio.CapacityLimiter(1))

    @property
    def sync_engine(self) -> Engine:
        """The engine itself."""
        return self.engine

    def _guarded(self, options: dict[str, Any]) -> dict[str, Any]:
        _refuse(options, self.name, "bind", "sync_session_class")
        self._session_class = guarded_class(self._session_class)
        return options


class AsyncDatabase(_Database[AsyncEngine, AsyncSession]):
    """Open sessions and transactions on an `AsyncEngine`, inside or outside an application.

    The handle owns neither the engine nor its pool. An installed one is the application's:
    depend on `get_database_handle(name)`, or look it up in `installed_databases(app)`. In a
    script or worker build one yourself:

        database = AsyncDatabase(create_async_engine(url))
        async with database.transaction() as session:
            session.add(Account(name="Ada"))
    """

    engine_type = AsyncEngine
    session_type = AsyncSession
    blocking = False

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[AsyncSession]:
        """Open a session for a block; at its end roll back and close. Never commits."""
        session = self.open()
        async with _finishing(self, session, close):
            yield session

    @asynccontextmanager
    async def transaction(
        self, *, isolation_level: IsolationLevel | None = None, read_only: bool = False
    ) -> AsyncGenerator[AsyncSession]:
        """Open a session for a block; commit at its end, roll back on any exception.

        A cancellation does not interrupt the COMMIT: it is awaited, for `shutdown_timeout`
        seconds at most.

        Raises:
            TransactionAbortedError: an error inside the block was swallowed.
            CommitOutcomeUnknownError: the connection was lost during COMMIT.
        """
        session = self.open(TransactionOptions.checked(isolation_level, read_only))
        async with _finishing(self, session, _commit_and_close):
            yield session
            guard_of(session.sync_session).check_discarded()

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

        Raises:
            ValueError: for fewer than one attempt.
            CommitOutcomeUnknownError: the connection was lost during COMMIT.

        Example:
            await database.run_in_transaction(book_seat, isolation_level="SERIALIZABLE")
        """
        retries = Retries(self.name, attempts, timeout, backoff)
        while True:
            try:
                async with self.transaction(
                    isolation_level=isolation_level, read_only=read_only
                ) as session:
                    result = await work(session)
            except Exception as error:
                pause = retries.pause_after(error)
                if pause is None:
                    raise
            else:
                return result
            await asyncio.sleep(pause)

    async def ping(self, timeout: float = 5.0) -> None:
        """Ask the database for one row, waiting at most `timeout` seconds.

        Raises:
            TimeoutError: no answer came in time.
        """
        self._check_alive()
        try:
            async with asyncio.timeout(timeout):
                await self.run_sync(_ask_for_one_row)
        except TimeoutError as error:
            raise self._no_answer(timeout) from error

    async def run_sync(self, work: Callable[[Engine], T]) -> T:
        """Run it in a greenlet, of a session that is there for nothing else."""
        self._check_alive()
        return await AsyncSession(self.engine).run_sync(lambda _: work(self.engine.sync_engine))

    async def dispose(self) -> None:
        """Close the connections on the event loop."""
        await self.engine.dispose()

    @property
    def sync_engine(self) -> Engine:
        """The engine behind the asynchronous one."""
        return self.engine.sync_engine

    def _guarded(self, options: dict[str, Any]) -> dict[str, Any]:
        _refuse(options, self.name, "bind")
        base = options.get("sync_session_class") or self._session_class.sync_session_class
        return options | {"sync_session_class": guarded_class(base)}


AnyDatabase: TypeAlias = Database | AsyncDatabase


def _ask_for_one_row(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.scalar(select(1))


def database_class(engine: object) -> type[AnyDatabase] | None:
    """Choose the handle for an engine; `None` for what is no engine."""
    if isinstance(engine, AsyncEngine):
        return AsyncDatabase
    return Database if isinstance(engine, Engine) else None


# -- finishing sessions ----------------------------------------------------------------------

Call: TypeAlias = Callable[[AnySession, Callable[[Session], None]], None]


def sync_session(session: AnySession) -> Session:
    """Return the session that does the work: an `AsyncSession` is a proxy for one."""
    return session.sync_session if isinstance(session, AsyncSession) else session


def is_busy(session: Session) -> bool:
    """Tell whether finishing the session needs the database."""
    return session.in_transaction() and (guard_of(session).asked or has_pending_changes(session))


def commit(session: Session) -> None:
    """Commit, where there is something to commit or to refuse."""
    guard_of(session).check_discarded()
    if is_busy(session):
        session.commit()


def close(session: Session) -> None:
    """Roll back what is not committed, give the connection back, refuse further use.

    A failure here only means that the connection is gone: it is logged, because it must not
    hide the answer, or the error, that the session's work ended with.
    """
    guard = guard_of(session)
    guard.finished = True
    if not session.in_transaction() and not session.identity_map:
        return  # never used: there is nothing to roll back, to give back or to detach
    try:
        if guard.engines.stopped:
            session.invalidate()  # no pool waits for the connection any more, to close it
        else:
            session.close()
    except BaseException as error:
        guard.discard_connections()
        if not isinstance(error, Exception):
            raise  # the deadline of a cancellation
        logger.warning(
            "A session of database %r could not give its connection back, which is discarded: "
            "it was lost, or a task that the request left behind is still using it.",
            guard.engines.name,
            exc_info=True,
        )


async def run_together(
    sessions: Sequence[AnySession],
    work: Callable[[Call], None],
    *,
    timeout: float,
    cancelled: bool = False,
) -> None:
    """Run what finishes these sessions to its end, whoever cancels the caller meanwhile.

    `work` is plain code over synchronous sessions, and gets `call` to touch one: in the
    greenlet of an `AsyncSession`, in one worker thread, or, where a request has both kinds, in a
    thread that hands the asynchronous part back to the event loop. Where no session needs the
    database they are only closed, and that costs neither task nor thread.

    Args:
        sessions: everything that `work` touches.
        work: commits, rolls back, closes.
        timeout: seconds from the cancellation after which an asynchronous connection is
            discarded. A synchronous one is waited for: its driver's timeouts bound it.
        cancelled: the caller is being cancelled already.
    """
    inner = [sync_session(session) for session in sessions]
    if not any(map(is_busy, inner)):
        for session in inner:
            close(session)
        return
    asynchronous = [session for session in sessions if isinstance(session, AsyncSession)]
    bridge = _Bridge()
    if len(asynchronous) == len(sessions):
        running = asynchronous[0].run_sync(lambda _: work(_directly))
    else:
        call = bridge.call if asynchronous else _directly
        # A limiter of its own: the default one may be full of threads that wait for a
        # connection, which this work is about to give back.
        running = anyio.to_thread.run_sync(work, call, limiter=anyio.CapacityLimiter(1))

    def abandon(task: asyncio.Task[None]) -> None:
        logger.error(
            "Database %s did not finish within %s s of a cancellation: the connection is "
            "discarded, and whether a COMMIT took effect is unknown.",
            ", ".join(repr(guard_of(session).engines.name) for session in inner),
            timeout,
        )
        # SQLAlchemy invalidates a connection that is cancelled in mid-flight.
        bridge.cancel() if len(asynchronous) < len(sessions) else task.cancel()

    await to_completion(
        running, timeout=timeout, cancelled=cancelled, abandon=abandon if asynchronous else None
    )


def _directly(session: AnySession, operation: Callable[[Session], None]) -> None:
    operation(sync_session(session))


class _Bridge:
    """Touch sessions of both kinds from one thread, the asynchronous ones on the event loop."""

    def __init__(self) -> None:
        self._crossing: asyncio.Task[Any] | None = None

    def call(self, session: AnySession, operation: Callable[[Session], None]) -> None:
        if isinstance(session, AsyncSession):
            anyio.from_thread.run(self._cross, session, operation)
        else:
            operation(session)

    def cancel(self) -> None:
        """Give up what runs on the event loop now; the thread goes on with the rest."""
        if self._crossing is not None:
            self._crossing.cancel()

    async def _cross(self, session: AsyncSession, operation: Callable[[Session], None]) -> None:
        self._crossing = asyncio.current_task()
        try:
            await session.run_sync(operation)
        finally:
            self._crossing = None


@asynccontextmanager
async def _finishing(
    database: AsyncDatabase, session: AsyncSession, success: Callable[[Session], None]
) -> AsyncGenerator[None]:
    async def finish(operation: Callable[[Session], None], *, cancelled: bool = False) -> None:
        await run_together(
            [session],
            lambda call: call(session, operation),
            timeout=database.shutdown_timeout,
            cancelled=cancelled,
        )

    try:
        yield
    except BaseException as error:
        await finish(close, cancelled=isinstance(error, asyncio.CancelledError))
        raise
    await finish(success)


def _commit_and_close(session: Session) -> None:
    try:
        commit(session)
    finally:
        close(session)


def _refuse(options: Mapping[str, Any], name: str, *keywords: str) -> None:
    for keyword in keywords:
        if keyword in options:
            raise TypeError(
                f"session_options of database {name!r}: {keyword!r} is not for you to give; the "
                "sessions use the engine that was installed, and a class_ that fits it."
            )
