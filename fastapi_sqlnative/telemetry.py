"""Connection pools as OpenTelemetry metrics, by its conventions for database clients."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter
from typing import Final
from weakref import WeakSet

from sqlalchemy import Engine, Pool, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry
from starlette.applications import Starlette

from ._drivers.pools import ask_pool, pool_capacity
from ._lifespan.running import installations_of, running_of
from ._probes import OUTSIDE
from ._sessions.engines import sync_engine
from .databases import AnyDatabase
from .exceptions import ApplicationAlreadyStartedError

try:
    from opentelemetry import metrics
except ImportError as error:
    raise ImportError(
        "fastapi_sqlnative.telemetry needs OpenTelemetry's API: "
        'pip install "fastapi-sqlnative[telemetry]"'
    ) from error

__all__ = ["instrument_pools"]

_POOL: Final = "db.client.connection.pool.name"
_STATE: Final = "db.client.connection.state"
# In seconds; OpenTelemetry's own begin at 5.
_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
# In the `info` of a connection, since when it is being made and since when it is in use.
_MAKING: Final = "fastapi_sqlnative_making"
_IN_USE: Final = "fastapi_sqlnative_in_use"


def instrument_pools(
    app: Starlette, *, meter_provider: metrics.MeterProvider | None = None
) -> None:
    """Report the pools of an application's databases, those of mounted applications too.

    Four metrics, each with the database's name as `db.client.connection.pool.name`:
    `db.client.connection.count` by state and `db.client.connection.max` are read when they are
    collected; `db.client.connection.create_time` and `db.client.connection.use_time` are
    measured by SQLAlchemy's events. What a kind of pool does not know is not reported. An engine
    under two names is reported under the first. The connections that readiness opens outside a
    pool are not counted.

    Args:
        app: one that has not started; databases may be installed on it before and after this.
        meter_provider: OpenTelemetry's global one unless you give another.

    Raises:
        ApplicationAlreadyStartedError: the application has started.

    Example:
        instrument_pools(app)
    """
    registry = installations_of(app)
    if app.middleware_stack is not None or registry.runs:
        raise ApplicationAlreadyStartedError(
            "Pools cannot be instrumented: the application has started. Call instrument_pools "
            "where the application is made, before it is served."
        )
    meter = metrics.get_meter("fastapi_sqlnative", meter_provider=meter_provider)
    use_times = _UseTimes(_seconds(meter, "use_time", "The time until a connection came back."))
    pools = _Pools(lambda: running_of(app).databases_from_here(), use_times)
    meter.create_observable_up_down_counter(
        "db.client.connection.count",
        [pools.count],
        "{connection}",
        "The number of connections that are currently in the state given.",
    )
    meter.create_observable_up_down_counter(
        "db.client.connection.max",
        [pools.limit],
        "{connection}",
        "The number of open connections that the pool allows.",
    )
    create_time = _seconds(meter, "create_time", "The time it took to make a connection.")
    timed: WeakSet[Engine] = WeakSet()

    def observe(database: AnyDatabase) -> None:
        # A ready engine may have been seen at an earlier start, or under another name.
        if sync_engine(database.engine) not in timed:
            timed.add(sync_engine(database.engine))
            _Times(database.name, create_time, use_times).listen(sync_engine(database.engine))

    registry.observers.append(observe)


def _seconds(meter: metrics.Meter, name: str, description: str) -> metrics.Histogram:
    return meter.create_histogram(
        f"db.client.connection.{name}",
        "s",
        description,
        explicit_bucket_boundaries_advisory=_BUCKETS,
    )


class _Pools:
    """Read the pools of the databases that run at the time."""

    def __init__(
        self, databases: Callable[[], Iterable[AnyDatabase]], use_times: _UseTimes
    ) -> None:
        self._databases = databases
        self._use_times = use_times

    def count(self, _options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        """Observe the connections in use and those that wait."""
        self._use_times.record()
        for name, pool in self._named():
            for state, method in ("used", "checkedout"), ("idle", "checkedin"):
                connections = ask_pool(pool, method)
                if connections is not None:
                    yield metrics.Observation(connections, {_POOL: name, _STATE: state})

    def limit(self, _options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        """Observe how many connections there can be."""
        for name, pool in self._named():
            capacity = pool_capacity(pool)
            if capacity is not None:
                yield metrics.Observation(capacity, {_POOL: name})

    def _named(self) -> Iterator[tuple[str, Pool]]:
        seen: set[Pool] = set()
        for database in self._databases():
            if sync_engine(database.engine).pool not in seen:
                seen.add(sync_engine(database.engine).pool)
                yield database.name, sync_engine(database.engine).pool


class _UseTimes:
    """Keep durations until they are collected: to record one costs as much as a checkout."""

    def __init__(self, histogram: metrics.Histogram) -> None:
        self._histogram = histogram
        self._waiting: deque[tuple[float, Mapping[str, str]]] = deque()

    def add(self, seconds: float, attributes: Mapping[str, str]) -> None:
        """Keep one; a thousand are recorded at once, should nobody collect."""
        self._waiting.append((seconds, attributes))
        if len(self._waiting) >= 1000:
            self.record()

    def record(self) -> None:
        """Record what has been kept."""
        with contextlib.suppress(IndexError):  # empty, or emptied by another thread
            while True:
                self._histogram.record(*self._waiting.popleft())


class _Times:
    """Measure how long the connections of one engine are made and used."""

    def __init__(self, pool: str, create_time: metrics.Histogram, use_times: _UseTimes) -> None:
        self._attributes = {_POOL: pool}
        self._create_time = create_time
        self._use_times = use_times

    def listen(self, engine: Engine) -> None:
        """Hear of the connections of the engine's pool, and of those that replace it."""
        event.listen(engine, "do_connect", self._begin_to_make)
        event.listen(engine, "connect", self._made)
        event.listen(engine, "checkout", self._begin_to_use)
        event.listen(engine, "checkin", self._used)

    def _begin_to_make(
        self, _dialect: Dialect, record: ConnectionPoolEntry, *_arguments: object
    ) -> None:
        record.info[_MAKING] = perf_counter()

    def _made(self, _connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        began = record.info.pop(_MAKING, None)
        # Without one the engine has a `creator` of its own.
        if began is not None and OUTSIDE not in record.info:
            self._create_time.record(perf_counter() - began, self._attributes)

    def _begin_to_use(
        self, _connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object
    ) -> None:
        if OUTSIDE not in record.info:
            record.info[_IN_USE] = perf_counter()

    def _used(self, _connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        began = record.info.pop(_IN_USE, None)
        if began is not None:
            self._use_times.add(perf_counter() - began, self._attributes)
