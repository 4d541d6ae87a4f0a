"""Probes: does the database answer, and do the pool's connections come back?"""

from contextlib import suppress
from enum import StrEnum
from time import monotonic
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from ._drivers import pools
from ._sessions.engines import ask
from .errors import DatabaseErrorKind, describe_database_error

# The engine's execution option that holds the time of the pool's last checkout.
_LAST_CHECKOUT: Final = "fastapi_sqlnative_last_checkout"
# From these a probe would check out the only connection, or the thread's, ahead of a request.
_EXCLUSIVE: Final = (sa.AssertionPool, sa.SingletonThreadPool)
# Queries that answer `writable` if the server accepts writes, by SQLAlchemy's dialect name.
WRITES: Final = {
    "postgresql": """SELECT CASE WHEN pg_is_in_recovery() THEN 'standby'
        WHEN current_setting('transaction_read_only') = 'on' THEN 'read only'
        ELSE 'writable' END""",
    **dict.fromkeys(("mysql", "mariadb"), "SELECT IF(@@global.read_only, 'read only', 'writable')"),
}


class DatabaseState(StrEnum):
    """The state of a database as readiness sees it, worst last."""

    UP = "up"
    SATURATED = "saturated"  # it answers, but every connection of the pool is in use
    READ_ONLY = "read_only"  # it answers, but accepts no writes although it should
    WEDGED = "wedged"  # every connection is in use, and none has come back for too long
    DOWN = "down"


def ask_database(engine: Engine, *, in_use: int, writable: bool) -> DatabaseState:
    """Return the state of a database that answers; raise the error of a database that does not.

    Plain code, for a greenlet or a thread. It never queues for the pool: if no connection is
    idle, it opens one as the pool would and closes it again. `in_use` is the number of connections
    that sessions hold; not every pool class knows it.
    """
    pool = engine.pool
    if isinstance(pool, sa.StaticPool) and in_use:
        # All share one connection: returning it would roll back a session's open transaction.
        return DatabaseState.UP
    full = is_full(engine)
    if full:
        pools.wait_for_first_connection(engine)
    if isinstance(pool, sa.QueuePool) and pool.checkedin():
        with suppress(Exception):  # a stale connection; the server may be back, so retry below
            return _ask(engine, writable)
    elif not (
        isinstance(pool, _EXCLUSIVE)
        or full
        or (pools.ask_pool(pool, "checkedout") and pools.knows_server(engine))
    ):
        # Nobody queues for an unused pool, or for one that is making its first connections.
        return _ask(engine, writable)
    try:
        with pools.beside_pool(engine) as outside:
            state = _ask(outside, writable)
    except Exception as error:
        failure = describe_database_error(error)
        server_full = failure and failure.kind is DatabaseErrorKind.TOO_MANY_CONNECTIONS
        if server_full and pools.ask_pool(pool, "checkedout"):
            return DatabaseState.SATURATED
        raise
    return DatabaseState.SATURATED if full and state is DatabaseState.UP else state


def _ask(engine: Engine, writable: bool) -> DatabaseState:
    name = engine.dialect.name
    if writable and name not in WRITES:
        raise NotImplementedError(f"{name} has no check for writes: use the policy 'required'.")
    answer = ask(engine, sa.text(WRITES[name])) if writable else ask(engine)
    return DatabaseState.UP if answer in (1, "writable") else DatabaseState.READ_ONLY


def is_wedged(engine: Engine, seconds: float) -> bool:
    """Return whether the pool has been full for longer than `seconds`, with none coming back.

    The pool's own timeout applies if it is longer. The first call starts listening to the pool.
    """
    last_checkout = engine.get_execution_options().get(_LAST_CHECKOUT) or _listen(engine)
    # If a connection had come back, the pool would not be full or would have had a checkout.
    limit = max(seconds, pools.pool_timeout(engine.pool))
    return is_full(engine) and monotonic() - last_checkout[0] > limit


def _listen(engine: Engine) -> list[float]:
    last_checkout = [monotonic()]

    def note(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        if pools.OUTSIDE not in record.info:
            last_checkout[0] = monotonic()

    event.listen(engine, "checkout", note)
    engine.update_execution_options(**{_LAST_CHECKOUT: last_checkout})
    return last_checkout


def is_full(engine: Engine) -> bool:
    """Return whether every connection that the pool allows is in use."""
    capacity, in_use = pools.pool_capacity(engine.pool), pools.ask_pool(engine.pool, "checkedout")
    return capacity is not None and in_use is not None and in_use >= capacity
