"""Asking a database whether it is there, without joining the queue for its pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from traceback import clear_frames
from typing import Final

from sqlalchemy import (
    Engine,
    Pool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
    event,
    select,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from ._drivers.pools import pool_capacity
from .errors import DatabaseErrorKind, describe_database_error

# In the `info` of a connection that no pool of the application's has ever held.
OUTSIDE: Final = "fastapi_sqlnative_outside"


class DatabaseState(StrEnum):
    """Say what readiness knows of a database, the worst last."""

    UP = "up"
    SATURATED = "saturated"  # it answers, and every connection of the pool is in use
    DOWN = "down"


class Probe:
    """Ask one database, in plain code for a greenlet or a thread.

    Attributes:
        asking: a question has not ended yet: the database hangs, or the pool does.
        waiting: that question waits for the pool, or for the database to show that the
            connection from it is alive.
    """

    def __init__(self) -> None:
        self.asking = False
        self.waiting = False

    def ask(self, engine: Engine, in_use: Callable[[], int]) -> DatabaseState:
        """Return the state of a database that answers; raise what a dead one answers with."""
        self.asking = True
        try:
            return self._ask(engine, in_use)
        except asyncio.CancelledError as error:
            # SQLAlchemy's greenlet holds on to them: a half-open connection would stay open
            # until the garbage collector comes by.
            clear_frames(error.__traceback__)
            raise
        finally:
            self.asking = self.waiting = False

    def _ask(self, engine: Engine, in_use: Callable[[], int]) -> DatabaseState:
        pool = engine.pool
        if isinstance(pool, StaticPool):
            # One connection for everybody, in memory as a rule: giving it back would roll back
            # what a session has begun.
            if not in_use():
                self._ask_pooled(engine)
            return DatabaseState.UP
        if isinstance(pool, SingletonThreadPool):
            # A database for each thread: ours would take the place of one that is in use.
            _connect_outside(engine, pool)
            return DatabaseState.UP
        if not isinstance(pool, QueuePool) or not (pool.checkedin() or pool.checkedout()):
            # The first connection readies the dialect, and only those of its own pool wait for
            # that. An empty pool makes nobody wait for a connection.
            self._ask_pooled(engine)
            return DatabaseState.UP
        if pool.checkedin() and self._ask_idle(engine):
            return DatabaseState.UP
        return _ask_outside(engine, pool)

    def _ask_idle(self, engine: Engine) -> bool:
        try:
            self._ask_pooled(engine)
        except Exception:  # noqa: BLE001 - old versions let asyncpg's own errors through
            return False  # lost with a server that may be back, as will show
        return True

    def _ask_pooled(self, engine: Engine) -> None:
        # A thread of the application's may have taken the idle connection just now.
        self.waiting = True
        with engine.connect() as connection:
            self.waiting = False
            connection.scalar(select(1))


def _ask_outside(engine: Engine, pool: QueuePool) -> DatabaseState:
    capacity, in_use = pool_capacity(pool), pool.checkedout()
    try:
        _connect_outside(engine, pool)
    except Exception as error:
        failure = describe_database_error(error)
        full = failure is not None and failure.kind is DatabaseErrorKind.TOO_MANY_CONNECTIONS
        if full and in_use:
            return DatabaseState.SATURATED
        raise
    at_capacity = capacity is not None and in_use >= capacity
    return DatabaseState.SATURATED if at_capacity else DatabaseState.UP


def _connect_outside(engine: Engine, pool: Pool) -> None:
    """Open a connection as the pool would, in the place of none of its own, and close it."""
    outside = pool.recreate()
    event.listen(outside, "connect", _mark, insert=True)
    connection = outside.connect()
    try:
        dbapi_connection = connection.dbapi_connection
        assert dbapi_connection is not None
        engine.dialect.do_ping(dbapi_connection)
    except BaseException:
        connection.invalidate()  # close() would roll back, and wait for that
        raise
    else:
        connection.close()
    finally:
        outside.dispose()


def _mark(_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    record.info[OUTSIDE] = True
