"""Connection pools: their state, as far as their class exposes it, and what comes back to them."""

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any, Final

from sqlalchemy import Engine, Pool, event
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only

# The key in `info` of the autocommit with which a connection was checked out.
_AUTOCOMMIT: Final = "fastapi_sqlnative_autocommit"
# Marks, in `info`, a connection that never belonged to a pool of the application.
OUTSIDE: Final = "fastapi_sqlnative_outside"


@dataclass(frozen=True, slots=True)
class ConnectionHolder:
    """The connections held by the sessions of one route.

    Attributes:
        route: such as `GET /orders/{id}`; `None` for sessions opened from a handle.
        connections: the number of connections held.
        seconds: the time for which the oldest has been held.
        idle_in_transaction: those with an open transaction and no statement running.
    """

    route: str | None
    connections: int
    seconds: float
    idle_in_transaction: int


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The state of a connection pool at one moment; `None` for figures its class doesn't have.

    Attributes:
        size: connections that the pool keeps open; also `None` for "no limit".
        max_overflow: connections that it opens beyond `size`; also `None` for "no limit".
        checked_out: connections in use.
        checked_in: idle connections.
        overflow: open connections beyond `size`.
        holders: the routes whose sessions hold connections of this database, longest first.
    """

    size: int | None
    max_overflow: int | None
    checked_out: int | None
    checked_in: int | None
    overflow: int | None
    holders: tuple[ConnectionHolder, ...] = field(default=(), compare=False)


def pool_status(pool: Pool, holders: tuple[ConnectionHolder, ...]) -> PoolStatus:
    size = ask_pool(pool, "size") or None  # a size of 0 is SQLAlchemy's "no limit"
    overflow = None if size is None else ask_pool(pool, "overflow")
    return PoolStatus(
        size=size,
        max_overflow=max_overflow(pool),
        checked_out=ask_pool(pool, "checkedout"),
        checked_in=ask_pool(pool, "checkedin"),
        overflow=None if overflow is None else max(overflow, 0),
        holders=holders,
    )


def ask_pool(pool: Pool, method: str) -> int | None:
    """Return one of the pool's figures; `None` if this pool class doesn't have it."""
    # NullPool, StaticPool and SingletonThreadPool have no such figures.
    answer: Callable[[], int] | None = getattr(pool, method, None)
    return answer() if callable(answer) else None


def max_overflow(pool: Pool) -> int | None:
    """Return how many connections a pool opens beyond its size; `None` for "no limit"."""
    # A private attribute: there is no public one. If it is gone, the limit is unknown.
    limit: int | None = getattr(pool, "_max_overflow", None)
    return None if limit is None or limit < 0 else limit


def pool_capacity(pool: Pool) -> int | None:
    """Return the most connections that a pool hands out at a time; `None` for no limit."""
    size, overflow = ask_pool(pool, "size"), max_overflow(pool)
    return None if size is None or overflow is None or size == 0 else size + overflow


def pre_pings(pool: Pool) -> bool | None:
    """Return whether a pool pings a connection at checkout; `None` if unknown."""
    # A private attribute: there is no public one.
    return getattr(pool, "_pre_ping", None)


def pool_timeout(pool: Pool) -> float:
    """Return a pool's checkout timeout in seconds; SQLAlchemy's default if unknown."""
    ask: Callable[[], float] | None = getattr(pool, "timeout", None)
    return 30.0 if ask is None else ask()


def knows_server(engine: Engine) -> bool:
    """Return whether a connection has initialized the dialect.

    It has to be one of the pool's: its other connections wait for that, but not for one outside.
    """
    return hasattr(engine.dialect, "default_isolation_level")


def wait_for_first_connection(engine: Engine) -> None:
    """Wait until the dialect is initialized, for a second at most: few may never tell."""
    ends_at = monotonic() + 1
    while not knows_server(engine) and monotonic() < ends_at:
        if engine.dialect.is_async:
            await_only(asyncio.sleep(0.01))
        else:
            sleep(0.01)


@contextmanager
def beside_pool(engine: Engine) -> Generator[Engine]:
    """Yield an engine with the same settings and a pool of its own, which is disposed of at exit.

    Its connections are marked, because the events of the original pool fire for them as well.
    """
    pool = engine.pool.recreate()
    event.listen(pool, "connect", _mark, insert=True)
    try:
        options = engine.get_execution_options()
        yield Engine(pool, engine.dialect, engine.url, execution_options=options)
    finally:
        pool.dispose()


def _mark(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[OUTSIDE] = True


def awaits_autocommit(engine: Engine) -> bool:
    """Return whether a cancellation can come between setting AUTOCOMMIT and SQLAlchemy's noting it.

    psycopg yields there to an event loop that has been busy.
    """
    return engine.dialect.is_async and engine.dialect.driver in {"psycopg", "psycopg_async"}


def ends_in_one_step(engine: Engine) -> bool:
    """Return whether cancelling the end of a transaction costs no more than the connection.

    aiosqlite would leave a thread behind, which the process waits for when it exits. SQLAlchemy
    also resets an engine's options at the end. If that goes through the driver (psycopg's
    `set_autocommit`), then after a cancelled ROLLBACK the pool could lose the connection's slot.
    """
    reset: set[str] = set(getattr(engine.dialect, "connection_characteristics", ()))
    return engine.dialect.driver == "asyncpg" or (
        awaits_autocommit(engine) and reset.isdisjoint(engine.get_execution_options())
    )


def keep_autocommit(engine: Engine) -> None:
    """Have the pool close a connection that comes back with another autocommit than it left with.

    Otherwise each statement of the next request would be committed at once.
    """
    # The same functions each time, so that SQLAlchemy adds them once to an engine.
    event.listen(engine, "checkout", _note_autocommit)
    event.listen(engine, "checkin", _check_autocommit)


def _note_autocommit(connection: Any, record: ConnectionPoolEntry, _: object) -> None:
    record.info[_AUTOCOMMIT] = connection.autocommit


def _check_autocommit(connection: Any, record: ConnectionPoolEntry) -> None:
    if connection is not None and connection.autocommit is not record.info.get(_AUTOCOMMIT, False):
        record.invalidate()
