"""Asking a database whether it is there, and a pool whether it moves."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from enum import StrEnum
from time import monotonic
from traceback import clear_frames
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from ._drivers.pools import OUTSIDE, ask_pool, beside_pool, pool_capacity, pool_timeout
from .errors import DatabaseErrorKind, describe_database_error

# The execution option under which an engine keeps when its pool last handed out a connection.
_TAKEN: Final = "fastapi_sqlnative_taken"
# They would give us the only connection, or the thread's own, before a request wants it.
_EXCLUSIVE: Final = (sa.AssertionPool, sa.SingletonThreadPool)
# Whether a server takes writes: `writable` if so, by the name of SQLAlchemy's dialect.
_MYSQL: Final = "SELECT IF(@@global.read_only, 'read only', 'writable')"
WRITES: Final = {
    "postgresql": """SELECT CASE WHEN pg_is_in_recovery() THEN 'standby'
        WHEN current_setting('transaction_read_only') = 'on' THEN 'read only'
        ELSE 'writable' END""",
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}


class DatabaseState(StrEnum):
    """What readiness knows of a database, the worst last."""

    UP = "up"
    SATURATED = "saturated"  # it answers, and every connection of the pool is in use
    READ_ONLY = "read_only"  # it answers, and takes no writes, which it should
    WEDGED = "wedged"  # every connection is in use, and none has come back for too long
    DOWN = "down"


def ask_database(engine: Engine, *, in_use: int, writable: bool) -> DatabaseState:
    """Return the state of a database that answers; raise the error of one that does not.

    Plain code, for a greenlet or a thread. It never joins the queue for the pool: where no
    connection is idle, it makes one as the pool would, and closes it. `in_use` counts those that
    sessions hold, which not every kind of pool knows.
    """
    pool = engine.pool
    if isinstance(pool, sa.StaticPool) and in_use:
        # One connection for everybody: giving it back would roll back what a session has begun.
        return DatabaseState.UP
    if isinstance(pool, sa.QueuePool) and pool.checkedin():
        with suppress(Exception):  # asked again below: it was lost with a server that may be back
            return _ask(engine, writable)
    elif not (isinstance(pool, _EXCLUSIVE) or ask_pool(pool, "checkedout")):
        # Nobody waits for an empty pool, and its first connection readies the dialect.
        return _ask(engine, writable)
    full = is_full(engine)
    try:
        with beside_pool(engine) as outside:
            state = _ask(outside, writable)
    except Exception as error:
        failure = describe_database_error(error)
        server_full = failure and failure.kind is DatabaseErrorKind.TOO_MANY_CONNECTIONS
        if server_full and ask_pool(pool, "checkedout"):
            return DatabaseState.SATURATED
        raise
    return DatabaseState.SATURATED if full and state is DatabaseState.UP else state


def _ask(engine: Engine, writable: bool) -> DatabaseState:
    name = engine.dialect.name
    if writable and name not in WRITES:
        raise NotImplementedError(f"Nothing asks {name} for writes: give it the policy 'required'.")
    query: Any = sa.text(WRITES[name]) if writable else sa.select(1)
    try:
        with engine.connect() as connection:
            answer = connection.scalar(query)
    except asyncio.CancelledError as error:
        clear_frames(error.__traceback__)  # half open, it would stay until the garbage collection
        raise
    return DatabaseState.UP if answer in (1, "writable") else DatabaseState.READ_ONLY


def is_wedged(engine: Engine, seconds: float) -> bool:
    """Tell whether every connection has been in use, and none has come back, for so long.

    Or for as long as the pool lets its callers wait, if that is longer. The first call begins to
    listen to the pool.
    """
    taken: list[float] | None = engine.get_execution_options().get(_TAKEN)
    if taken is None:
        taken = _listen(engine)
    # Had one come back, the pool would not be full, or somebody would have taken it since.
    limit = max(seconds, pool_timeout(engine.pool))
    return is_full(engine) and monotonic() - taken[0] > limit


def _listen(engine: Engine) -> list[float]:
    taken = [monotonic()]

    def note(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        if OUTSIDE not in record.info:
            taken[0] = monotonic()

    event.listen(engine, "checkout", note)
    engine.update_execution_options(**{_TAKEN: taken})
    return taken


def is_full(engine: Engine) -> bool:
    """Tell whether every connection that the pool hands out is in use."""
    capacity, in_use = pool_capacity(engine.pool), ask_pool(engine.pool, "checkedout")
    return capacity is not None and in_use is not None and in_use >= capacity
