"""OpenTelemetry metrics for connection pools, following its conventions for database clients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, count
from time import perf_counter
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry
from starlette.applications import Starlette

from ._drivers.pools import OUTSIDE, ask_pool, pool_capacity, pool_timeout
from ._lifespan.running import installations_of, running_of
from ._sessions.engines import sync_engine
from ._sessions.session import NativeSession
from .databases import AnyDatabase, sessions_of
from .exceptions import ApplicationAlreadyStartedError

try:
    from opentelemetry import metrics
except ImportError as _error:
    raise ImportError(
        "fastapi_sqlnative.telemetry needs OpenTelemetry's API: "
        'pip install "fastapi-sqlnative[telemetry]"'
    ) from _error
try:
    from fastapi.telemetry import get_telemetry_data

    _telemetry_data: Callable[[], Any] | None = get_telemetry_data
except ImportError:  # FastAPI before 0.143
    _telemetry_data = None

__all__ = ["instrument_pools"]

_PREFIX: Final = "db.client.connection"
_POOL: Final = f"{_PREFIX}.pool.name"
_STATE: Final = f"{_PREFIX}.state"
# In seconds. OpenTelemetry's default buckets start at 5.
_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
# The attribute of an instrument that holds the `_Instruments`.
_SHARED: Final = "fastapi_sqlnative_shared"


def instrument_pools(
    app: Starlette, *, meter_provider: metrics.MeterProvider | None = None
) -> None:
    """Report the pools of an application's databases, including those of mounted applications.

    There are seven `db.client.connection` metrics, each with the database's name as `pool.name`.
    `count` by state, `max` and `pending_requests` are read at collection time. `create_time`,
    `wait_time`, `use_time` and `timeouts` are measured, by `http.route` if FastAPI's telemetry is
    on. Figures that a pool class doesn't have are not reported, and only this package's sessions
    have their waits measured. An engine with two names is reported under the first; if two engines
    share a name, the second is `name#2`. The connections that readiness opens outside a pool are
    not counted.

    Args:
        app: an application that has not started. Databases may be installed before and after.
        meter_provider: defaults to that of `FastAPI(telemetry=...)`, or else to OpenTelemetry's
            global provider, looked up when the application starts.

    Raises:
        ApplicationAlreadyStartedError: the application has started.
    """
    installed = installations_of(app)
    if app.middleware_stack is not None or installed.runs:
        raise ApplicationAlreadyStartedError(
            "Pools cannot be instrumented: the application has started. Call instrument_pools "
            "where the application is created, before it is served."
        )

    @functools.cache  # called at the first start: only then is the provider sure to be set up
    def instruments() -> _Instruments:
        # A private attribute: there is no public one. If it is gone, the global one is used.
        own: metrics.MeterProvider | None = getattr(app, "_telemetry", {}).get("meter_provider")
        found = _instruments_of(meter_provider or own or metrics.get_meter_provider())
        found.applications.add(app)
        return found

    installed.observers.append(lambda database: instruments().listen(database))


def _instruments_of(provider: metrics.MeterProvider) -> _Instruments:
    meter = provider.get_meter("fastapi_sqlnative")
    timeouts = meter.create_counter(
        f"{_PREFIX}.timeouts", "{timeout}", "Waits for a connection that timed out."
    )
    # For a known name the SDK returns the existing instrument. So the others are kept on this one.
    shared: _Instruments = getattr(timeouts, _SHARED, None) or _Instruments(meter, timeouts)
    setattr(timeouts, _SHARED, shared)
    return shared


class _Instruments:
    """The instruments shared by all applications with one meter provider."""

    def __init__(self, meter: metrics.Meter, timeouts: metrics.Counter) -> None:
        self.applications: WeakSet[Starlette] = WeakSet()
        self.timeouts = timeouts
        self.create_time, self.wait_time, self.use_time = (
            meter.create_histogram(
                f"{_PREFIX}.{name}", "s", description, explicit_bucket_boundaries_advisory=_BUCKETS
            )
            for name, description in (
                ("create_time", "The time it took to make a connection."),
                ("wait_time", "The time it took to obtain a connection from the pool."),
                ("use_time", "The time until a connection came back."),
            )
        )
        for name, callback, unit, description in (
            ("count", self._count, "{connection}", "Connections in the given state."),
            ("max", self._limit, "{connection}", "Open connections that the pool allows."),
            ("pending_requests", self._pending, "{request}", "Sessions waiting for a connection."),
        ):
            meter.create_observable_up_down_counter(
                f"{_PREFIX}.{name}", [callback], unit, description
            )
        self._pools: WeakKeyDictionary[Engine, _Pool] = WeakKeyDictionary()

    def listen(self, database: AnyDatabase) -> None:
        """Listen to a database that is starting, and to its pool once, however often it starts."""
        engine = sync_engine(database.engine)
        if engine not in self._pools:
            # Mounted applications, or others with the same provider, may use the same name.
            taken = {pool.name for _, pool in self._running()}
            numbered = (f"{database.name}#{number}" for number in count(2))
            free = (each for each in chain([database.name], numbered) if each not in taken)
            self._pools[engine] = _Pool(next(free), engine, self)
        # Again for each application around it; SQLAlchemy has the same listener only once.
        self._pools[engine].listen_to_sessions(sessions_of(database).native)

    def _running(self) -> list[tuple[Engine, _Pool]]:
        """List the running engines that we listen to, each once."""
        engines = dict.fromkeys(
            sync_engine(database.engine)
            for app in tuple(self.applications)
            for database in running_of(app).databases()
        )
        return [(each, self._pools[each]) for each in engines if each in self._pools]

    def _count(self, _options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for engine, pool in self._running():
            for state, method in ("used", "checkedout"), ("idle", "checkedin"):
                connections = ask_pool(engine.pool, method)
                if connections is not None:
                    yield metrics.Observation(connections, {_POOL: pool.name, _STATE: state})

    def _limit(self, _options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for engine, pool in self._running():
            capacity = pool_capacity(engine.pool)
            if capacity is not None:
                yield metrics.Observation(capacity, {_POOL: pool.name})

    def _pending(self, _options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for _, pool in self._running():
            yield metrics.Observation(len(pool.waiting), {_POOL: pool.name})


def _attributes(pool: str) -> Mapping[str, str]:
    """Return the attributes: the pool, and the current request's route if FastAPI knows it."""
    data = None if _telemetry_data is None else _telemetry_data()
    served: Any = data and (data.request or data.websocket)
    # The route as FastAPI's own metrics report it, from a private key: there is no public one.
    route = served and getattr(served.scope.get("fastapi.telemetry"), "route", None)
    return {_POOL: pool, "http.route": route} if route else {_POOL: pool}


class _Pool:
    """The measurements of one engine's connections: create time, wait time and use time."""

    def __init__(self, name: str, engine: Engine, instruments: _Instruments) -> None:
        self.name = name
        self.waiting: WeakKeyDictionary[Session, float] = WeakKeyDictionary()
        self._timeout = pool_timeout(engine.pool)
        self._instruments = instruments
        self._measure(engine, "do_connect", "connect", instruments.create_time)
        self._measure(engine, "checkout", "checkin", instruments.use_time)

    def listen_to_sessions(self, sessions: Any) -> None:
        """Listen to a handle's sessions, because the pool has no event for the start of a wait."""
        event.listen(sessions, "do_orm_execute", self._execute)
        event.listen(sessions, "before_flush", self._wait)
        event.listen(sessions, "after_begin", self._connect)
        event.listen(sessions, "after_transaction_end", self._end)

    def _measure(self, engine: Engine, start: str, end: str, histogram: metrics.Histogram) -> None:
        """Measure the time between two events of each connection."""
        key = f"fastapi_sqlnative_{start}"

        def started(_: object, record: ConnectionPoolEntry, *_more: object) -> None:
            record.info[key] = perf_counter()

        def ended(_: object, record: ConnectionPoolEntry) -> None:
            began = record.info.pop(key, None)  # None if the engine has a `creator`
            if began is not None and OUTSIDE not in record.info:
                self._record(histogram, began)

        # On the engine, because these listeners carry over to pools that replace this one.
        event.listen(engine, start, started)
        event.listen(engine, end, ended)

    def _execute(self, state: Any) -> None:
        self._wait(state.session)

    def _wait(self, session: NativeSession, *_flush: object) -> None:
        if not session.sqlnative.connections:
            self.waiting.setdefault(session, perf_counter())

    def _connect(self, session: Session, *_transaction: object) -> None:
        began = self.waiting.pop(session, None)
        if began is not None:
            self._record(self._instruments.wait_time, began)

    def _end(self, session: Session, _transaction: object) -> None:
        began = self.waiting.pop(session, None)
        # There is no event for a pool timeout, so infer it from the elapsed time.
        if began is not None and perf_counter() - began >= self._timeout:
            self._instruments.timeouts.add(1, _attributes(self.name))

    def _record(self, histogram: metrics.Histogram, began: float) -> None:
        histogram.record(perf_counter() - began, _attributes(self.name))
