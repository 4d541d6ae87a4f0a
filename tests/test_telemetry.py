"""The metrics of connection pools."""

import asyncio
import contextlib
import importlib
import importlib.util
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from time import perf_counter
from typing import Any, cast

import pytest
from fastapi import APIRouter, Depends, FastAPI
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import Engine, NullPool, QueuePool, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from fastapi_sqlnative import (
    Database,
    get_db,
    health_router,
    install_database,
    install_error_handlers,
    installed_databases,
)
from fastapi_sqlnative.exceptions import ApplicationAlreadyStartedError
from fastapi_sqlnative.telemetry import instrument_pools
from fastapi_sqlnative.testing import override_database
from tests.conftest import MakeEngine
from tests.in_process import async_sqlite, is_kept, running, sqlite, start_and_stop
from tests.serving import Item, Kind, until, using

needs_fastapis_telemetry = pytest.mark.skipif(
    importlib.util.find_spec("fastapi.telemetry") is None, reason="this FastAPI has no telemetry"
)

pytestmark = pytest.mark.anyio

PREFIX = "db.client.connection"


class Reader:
    """A reader of one application's metrics."""

    def __init__(self, app: FastAPI) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])
        instrument_pools(app, meter_provider=self.provider)

    def points(self, metric: str) -> dict[tuple[str, ...], Any]:
        """Return the data points of a metric by pool, and by state or route if they have one."""
        data = self._reader.get_metrics_data()
        found = [
            each
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for each in scope.metrics
            if each.name == f"{PREFIX}.{metric}"
        ]
        return {
            tuple(str(value) for _, value in sorted((point.attributes or {}).items())): point
            for each in found
            for point in each.data.data_points
        }

    def values(self, metric: str) -> dict[tuple[str, ...], int]:
        """Return the values of a metric."""
        return {key: point.value for key, point in self.points(metric).items()}

    def recorded(self, metric: str) -> dict[tuple[str, ...], int]:
        """Return how often a duration was recorded."""
        return {key: point.count for key, point in self.points(metric).items()}


@contextlib.asynccontextmanager
async def held(app: FastAPI, name: str = "default", *, lose: bool = False) -> AsyncGenerator[None]:
    """Hold a connection of a database of either colour, invalidated if `lose` is true."""
    database: Any = installed_databases(app)[name]

    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))
        if lose:
            session.connection().invalidate()

    if isinstance(database.engine, AsyncEngine):
        async with database.session() as session:
            await session.run_sync(work)
            yield
    else:
        with database.session() as session:
            work(session)
            yield


def sqlite_file() -> Engine:
    """Build an engine whose pool reports figures."""
    return create_engine("sqlite://", poolclass=QueuePool)


def sqlite_created(connect: Callable[[str], Any]) -> Engine:
    """Build an engine whose connections are made by a function of the application."""
    return create_engine("sqlite://", poolclass=QueuePool, creator=lambda: connect(":memory:"))


def instrumented(engine: Engine | AsyncEngine, name: str = "default") -> tuple[FastAPI, Reader]:
    app = FastAPI()
    install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    return app, Reader(app)


# --- counts ---


async def test_connections_are_counted_by_state(make_engine: MakeEngine) -> None:
    """`count` reports the used and idle connections of a pool at the time of collection."""
    app, reader = instrumented(make_engine(), "books")
    used, idle = ("books", "used"), ("books", "idle")
    async with running(app):
        assert reader.values("count") == {used: 0, idle: 0}
        async with held(app, "books"):
            async with held(app, "books"):
                assert reader.values("count") == {used: 2, idle: 0}
            assert reader.values("count") == {used: 1, idle: 1}
        assert reader.values("count") == {used: 0, idle: 2}
    assert reader.values("count") == {}, "a database that does not run has no pool to speak of"


async def test_the_limit_is_size_and_overflow(make_engine: MakeEngine) -> None:
    """`max` is the largest number of connections that the pool opens."""
    app, reader = instrumented(make_engine(pool_size=2, max_overflow=3))
    async with running(app):
        assert reader.values("max") == {("default",): 5}


async def test_what_is_unknown_is_not_reported(make_engine: MakeEngine) -> None:
    """A pool without a limit has no `max`, and a NullPool no `count`, instead of a wrong zero."""
    app = FastAPI()
    for name, engine in (
        ("unlimited", make_engine(max_overflow=-1)),
        ("unpooled", make_engine(poolclass=NullPool)),
    ):
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    reader = Reader(app)
    async with running(app):
        async with held(app, "unpooled"):
            assert {name for name, _ in reader.values("count")} == {"unlimited"}
            assert reader.values("max") == {}
        assert reader.recorded("use_time") == {("unpooled",): 1}


async def test_an_engine_under_two_names_is_one_pool(make_engine: MakeEngine) -> None:
    """An engine that is installed twice is reported once, under its first name."""
    app = FastAPI()
    engine = make_engine()
    for name in "first", "second":
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    reader = Reader(app)
    async with running(app):
        async with held(app, "second"):
            assert reader.values("count") == {("first", "used"): 1, ("first", "idle"): 0}
        assert reader.recorded("use_time") == {("first",): 1}


async def test_mounted_applications_are_reported(make_engine: MakeEngine) -> None:
    """Databases of a mounted application are reported with those of the instrumented one."""
    app, below = FastAPI(), FastAPI()
    install_database(app, name="above", engine=async_sqlite)
    engine = make_engine()
    install_database(below, name="below", engine=engine, shutdown=engine.dispose)
    app.mount("/below", below)
    reader = Reader(app)
    async with running(app):
        async with held(below, "below"):
            assert reader.values("count")["below", "used"] == 1
        assert reader.recorded("use_time") == {("below",): 1}


async def test_a_stand_in_for_a_mounted_database_is_reported() -> None:
    """An instrumented application measures the pool of a stand-in for a mounted database."""
    app, below = FastAPI(), FastAPI()
    install_database(app, name="above", engine=async_sqlite)
    install_database(below, name="below", engine=async_sqlite)
    app.mount("/below", below)
    reader, engine = Reader(app), async_sqlite()
    async with running(app):
        with override_database(app, "below", engine):
            async with held(below, "below"):
                pass
            assert reader.recorded("use_time") == {("below",): 1}
    await engine.dispose()


async def test_pools_of_one_name_are_told_apart(make_engine: MakeEngine) -> None:
    """Pools of two databases with the same name are reported under different names."""
    app, below = FastAPI(), FastAPI()
    for each in app, below:
        engine = make_engine()
        install_database(each, engine=engine, shutdown=engine.dispose)
    app.mount("/below", below)
    reader = Reader(app)
    for _ in range(2):
        async with running(app), held(below):
            used = {
                name: n for (name, state), n in reader.values("count").items() if state == "used"
            }
            assert used == {"default": 0, "default#2": 1}


async def test_applications_with_one_provider_all_report() -> None:
    """All applications that share a meter provider are reported.

    The SDK returns the first application's instruments to the others.
    """
    first, second, namesake = FastAPI(), FastAPI(), FastAPI()
    reader = Reader(first)
    for app, name in (first, "public"), (second, "admin"), (namesake, "admin"):
        install_database(app, name=name, engine=sqlite_file)
        if app is not first:
            instrument_pools(app, meter_provider=reader.provider)
    async with running(first), running(second):
        async with held(first, "public"), held(second, "admin"):
            assert reader.values("count")["public", "used"] == 1
            assert reader.values("count")["admin", "used"] == 1
            async with running(namesake):
                assert {name for name, _ in reader.values("count")} == {
                    "public",
                    "admin",
                    "admin#2",
                }
        assert reader.recorded("use_time") == {("public",): 1, ("admin",): 1}
    assert reader.values("count") == {}


async def test_two_that_instrument_one_engine_record_it_once() -> None:
    """An engine is measured once even if several applications that use it are instrumented.

    One is mounted in another, and one only has the same engine.
    """
    app, below, beside = FastAPI(), FastAPI(), FastAPI()
    engine = sqlite_file()
    install_database(below, engine=engine)
    install_database(beside, name="beside", engine=engine)
    install_database(app, name="above", engine=sqlite_file)
    app.mount("/below", below)
    reader = Reader(app)
    for each in below, beside:
        instrument_pools(each, meter_provider=reader.provider)
    async with running(app), running(beside):
        async with held(below):
            assert {name for name, _ in reader.values("count")} == {"default", "above"}
            assert reader.values("count")["default", "used"] == 1
        assert reader.recorded("use_time") == reader.recorded("wait_time") == {("default",): 1}


@needs_fastapis_telemetry
async def test_the_provider_is_fastapis_where_it_has_one() -> None:
    """`instrument_pools` uses the meter provider that was passed to `FastAPI(telemetry=...)`."""
    reader = Reader(FastAPI())
    app = FastAPI(telemetry={"meter_provider": reader.provider})
    install_database(app, engine=sqlite_file)
    instrument_pools(app)
    async with running(app):
        assert reader.values("max") == {("default",): 15}


async def test_the_global_provider_is_looked_up_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a provider, OpenTelemetry's global one at the time of the start is used."""
    app = FastAPI()
    install_database(app, engine=sqlite_file)
    instrument_pools(app)
    reader = Reader(FastAPI())
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: reader.provider)
    async with running(app):
        assert reader.values("max") == {("default",): 15}


async def test_no_application_is_kept_alive_by_its_metrics() -> None:
    """Instruments live as long as their provider, but do not keep an application alive."""
    reader = Reader(FastAPI())

    async def use(app: FastAPI) -> None:
        install_database(app, engine=sqlite_file)
        instrument_pools(app, meter_provider=reader.provider)
        await start_and_stop(app)

    assert not await is_kept(use)


# --- waits ---


@needs_fastapis_telemetry
@pytest.mark.parametrize("given_up", [False, True], ids=["obtained", "given-up"])
async def test_waits_are_measured_by_route(
    make_engine: MakeEngine, kind: Kind, given_up: bool
) -> None:
    """A waiting session is counted, and its wait or its timeout is then recorded by route."""
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.2 if given_up else 20)
    reader = Reader(FastAPI())
    app = FastAPI(telemetry={"meter_provider": reader.provider})
    install_database(app, engine=engine, shutdown=engine.dispose)
    instrument_pools(app)
    install_error_handlers(app)
    router = APIRouter()
    read = using(kind, Depends(get_db()), lambda session: session.scalar(text("SELECT 1")))
    router.add_api_route("/items/{number}", read)
    app.include_router(router, prefix="/shop")
    by_route = ("default", "/shop/items/{number}")
    async with running(app) as client:
        async with held(app):
            assert reader.values("pending_requests") == {("default",): 0}
            asking = asyncio.create_task(client.get("/shop/items/7"))
            await until(lambda: reader.values("pending_requests") == {("default",): 1})
            if given_up:
                assert (await asking).status_code == 503
        assert (await asking).status_code == (503 if given_up else 200)
        assert reader.values("pending_requests") == {("default",): 0}
        assert reader.values("timeouts") == ({by_route: 1} if given_up else {})
        waited = {("default",): 1} | ({} if given_up else {by_route: 1})
        assert reader.recorded("wait_time") == waited
        assert reader.recorded("use_time") == waited


async def test_a_flush_waits_too() -> None:
    """The wait for a connection begins with the flush of an object, not when it is added."""
    app, reader = instrumented(sqlite_file())
    async with running(app):
        with installed_databases(app)["default"].session() as session:  # type: ignore[union-attr]
            session.add(Item(name="a"))
            assert reader.values("pending_requests") == {("default",): 0}
            with pytest.raises(OperationalError, match="no such table"):
                session.flush()
        assert reader.recorded("wait_time") == {("default",): 1}
        assert reader.values("pending_requests") == {("default",): 0}


async def test_a_session_with_a_connection_waits_no_more() -> None:
    """Later statements of a transaction with a connection are not counted as pending requests."""
    app, reader = instrumented(sqlite_file())
    async with running(app):
        with installed_databases(app, Database)["default"].session() as session:
            for _ in range(2):
                session.execute(text("SELECT 1")).close()
            assert reader.values("pending_requests") == {("default",): 0}
        assert reader.recorded("wait_time") == {("default",): 1}


async def test_what_no_event_began_is_not_measured() -> None:
    """Without an event for their start, no create time and no wait time are recorded.

    An engine with a `creator` and a session that only asks for its connection work nevertheless.
    """
    app, reader = instrumented(sqlite_created(sqlite3.connect))
    async with running(app):
        with installed_databases(app, Database)["default"].session() as session:
            session.connection()
        assert reader.recorded("create_time") == reader.recorded("wait_time") == {}
        assert reader.recorded("use_time") == {("default",): 1}


async def test_a_connection_that_cannot_be_made_is_no_timeout() -> None:
    """`timeouts` counts waits as long as the pool allows, but not connections that fail."""

    def refuse(_path: str) -> Any:
        raise sqlite3.OperationalError("unable to open database file")

    app, reader = instrumented(sqlite_created(refuse))
    async with running(app):
        database = installed_databases(app, Database)["default"]
        with database.session() as session, pytest.raises(OperationalError, match="unable to open"):
            session.execute(text("SELECT 1"))
        assert reader.values("timeouts") == {}
        assert reader.values("pending_requests") == {("default",): 0}


# --- durations ---


async def test_every_connection_and_every_use_is_recorded(make_engine: MakeEngine) -> None:
    """`create_time` has one record per connection made, and `use_time` one per return."""
    app, reader = instrumented(make_engine())
    async with running(app):
        async with held(app):
            assert reader.recorded("create_time") == {("default",): 1}
            assert reader.recorded("use_time") == {}
            async with held(app):
                pass
        async with held(app):
            pass
        assert reader.recorded("create_time") == {("default",): 2}
        assert reader.recorded("use_time") == {("default",): 3}


async def test_a_use_lasts_from_taking_to_giving_back(make_engine: MakeEngine) -> None:
    """`use_time` lasts from checkout to return, so a nested use is shorter than the outer one."""
    app = FastAPI()
    for name in "outer", "inner":
        engine = make_engine()
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    reader = Reader(app)
    async with running(app):
        began = perf_counter()
        async with held(app, "outer"), held(app, "inner"):
            pass
        points = reader.points("use_time")
        assert 0 < points["inner",].sum < points["outer",].sum < perf_counter() - began
        assert 0 < reader.points("create_time")["inner",].sum < points["outer",].sum


async def test_a_lost_connection_was_used_too(make_engine: MakeEngine) -> None:
    """The use of a lost connection is recorded, and so is the creation of its replacement."""
    app, reader = instrumented(make_engine(pool_size=1, max_overflow=0))
    async with running(app):
        async with held(app, lose=True):
            pass
        async with held(app):
            pass
        assert reader.recorded("create_time") == {("default",): 2}
        assert reader.recorded("use_time") == {("default",): 2}
        assert reader.values("count")["default", "used"] == 0


async def test_no_use_is_forgotten() -> None:
    """Every use is recorded, however many connections are returned between two collections."""
    app, reader = instrumented(sqlite())
    async with running(app):
        database = installed_databases(app)["default"]
        for _ in range(2_500):
            with cast("Engine", database.engine).connect():
                pass
        assert reader.recorded("use_time") == {("default",): 2_500}


async def test_readiness_is_not_counted(make_engine: MakeEngine) -> None:
    """A connection that readiness opens outside the pool is not counted in the pool's metrics."""
    app, reader = instrumented(make_engine(pool_size=1, max_overflow=0))
    app.include_router(health_router(max_age=0.001, timeout=20))
    async with running(app) as client:
        async with held(app):
            ready = await client.get("/health/ready")
            assert ready.json()["databases"] == {"default": "saturated"}
            assert reader.values("count") == {("default", "used"): 1, ("default", "idle"): 0}
        assert reader.recorded("create_time") == reader.recorded("use_time") == {("default",): 1}


# --- starts ---


async def test_a_second_start_asks_for_no_more_instruments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without OpenTelemetry's SDK, too, starts do not add to what listens to an engine."""
    app, meters = FastAPI(), list[str]()
    provider = metrics.NoOpMeterProvider()

    def get_meter(name: str) -> metrics.Meter:
        meters.append(name)
        return metrics.NoOpMeter(name)

    monkeypatch.setattr(provider, "get_meter", get_meter)
    install_database(app, engine=sqlite_file)
    install_database(app, name="other", engine=sqlite_file)
    instrument_pools(app, meter_provider=provider)
    for _ in range(2):
        await start_and_stop(app)
    assert meters == ["fastapi_sqlnative"]


async def test_a_second_start_records_nothing_twice(make_engine: MakeEngine) -> None:
    """A ready engine that starts a second time is measured only once."""
    app, reader = instrumented(make_engine())
    await start_and_stop(app)
    async with running(app):
        async with held(app):
            pass
        assert reader.recorded("use_time") == {("default",): 1}


async def test_an_engine_of_a_factory_is_heard(build: Callable[[], Engine | AsyncEngine]) -> None:
    """An engine that a factory builds at start-up is measured like a ready engine."""
    app = FastAPI()
    reader = Reader(app)
    install_database(app, engine=build)
    for start in 1, 2:
        async with running(app):
            async with held(app):
                pass
            assert reader.recorded("use_time") == {("default",): start}


@pytest.fixture(params=["sync", "async"])
def build(request: pytest.FixtureRequest) -> Callable[[], Engine | AsyncEngine]:
    return async_sqlite if request.param == "async" else sqlite


async def test_a_running_application_is_not_instrumented() -> None:
    """Instrumenting an application that has started raises ApplicationAlreadyStartedError."""
    app = FastAPI()
    install_database(app, engine=async_sqlite)
    async with running(app):
        with pytest.raises(ApplicationAlreadyStartedError, match="before it is served"):
            instrument_pools(app)


# --- imports ---


def test_nothing_is_imported_unless_asked_for() -> None:
    """The package imports no extras or test tools, and describing an error imports no driver."""
    ours = {f"fastapi_sqlnative.{each}" for each in ("telemetry", "migrations", "testing")}
    drivers = {"asyncmy", "asyncpg", "psycopg", "psycopg2", "pymysql", "sqlite3"}
    code = (
        "import sys, fastapi_sqlnative as package;"
        "package.describe_database_error(ValueError());"
        f"print({ours | drivers | {'alembic'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_opentelemetry_the_import_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without OpenTelemetry's API, the ImportError names the extra to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "fastapi_sqlnative.telemetry")
    with pytest.raises(ImportError, match=r'pip install "fastapi-sqlnative\[telemetry\]"'):
        importlib.import_module("fastapi_sqlnative.telemetry")
