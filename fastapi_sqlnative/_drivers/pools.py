"""What a connection pool tells about itself, as far as its kind knows it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Engine, Pool, event
from sqlalchemy.pool import ConnectionPoolEntry

# In the `info` of a connection that no pool of the application's has ever held.
OUTSIDE: Final = "fastapi_sqlnative_outside"


@dataclass(frozen=True, slots=True)
class ConnectionHolder:
    """Describe the sessions of one route that hold connections.

    Attributes:
        route: such as `GET /orders/{id}`, `None` for sessions that a handle has opened.
        connections: how many they hold.
        seconds: how long the oldest has been held.
        idle_in_transaction: so many of them ask nothing of the server, and keep a transaction open.
    """

    route: str | None
    connections: int
    seconds: float
    idle_in_transaction: int


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The state of a connection pool at one moment; `None` for what its kind does not keep.

    Attributes:
        size: connections the pool keeps, `None` also for "no limit".
        max_overflow: connections it opens beyond that, `None` also for "no limit".
        checked_out: connections in use.
        checked_in: connections that wait to be used.
        overflow: connections open beyond `size`.
        holders: the sessions of this database that have those in use, the oldest first.
    """

    size: int | None
    max_overflow: int | None
    checked_out: int | None
    checked_in: int | None
    overflow: int | None
    holders: tuple[ConnectionHolder, ...] = field(default=(), compare=False)


def pool_status(pool: Pool, holders: tuple[ConnectionHolder, ...] = ()) -> PoolStatus:
    """Look into a pool."""
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
    """Return one of the pool's figures; `None` where this kind of pool has none."""
    # NullPool, StaticPool and SingletonThreadPool have no such figures.
    answer: Callable[[], int] | None = getattr(pool, method, None)
    return answer() if callable(answer) else None


def max_overflow(pool: Pool) -> int | None:
    """Return how many connections a pool opens beyond its size; `None` for "no limit"."""
    # Private, because SQLAlchemy tells it nowhere else. Without it the limit is "unknown".
    limit: int | None = getattr(pool, "_max_overflow", None)
    return None if limit is None or limit < 0 else limit


def pool_capacity(pool: Pool) -> int | None:
    """Return the number of connections a pool hands out at a time; `None` for unlimited."""
    size, overflow = ask_pool(pool, "size"), max_overflow(pool)
    return None if size is None or overflow is None or size == 0 else size + overflow


def pre_pings(pool: Pool) -> bool | None:
    """Tell whether a pool asks its connections before it hands them out."""
    # Private, because SQLAlchemy tells it nowhere else. Without it nothing is said.
    return getattr(pool, "_pre_ping", None)


def pool_timeout(pool: Pool) -> float:
    """Return the seconds that a pool lets its callers wait; SQLAlchemy's default if unknown."""
    ask: Callable[[], float] | None = getattr(pool, "timeout", None)
    return 30.0 if ask is None else ask()


@contextmanager
def beside_pool(engine: Engine, options: Mapping[str, Any] | None = None) -> Generator[Engine]:
    """Give an engine that connects as another one does, beside its pool; close it at the end.

    Its connections are marked, because whoever listens to the pool hears of them as well.

    Args:
        engine: the application's.
        options: execution options; the other engine's own are not taken over.
    """
    pool = engine.pool.recreate()
    event.listen(pool, "connect", _mark, insert=True)
    try:
        yield Engine(pool, engine.dialect, engine.url, execution_options=options)
    finally:
        pool.dispose()


def _mark(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[OUTSIDE] = True
