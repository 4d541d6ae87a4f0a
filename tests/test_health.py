"""Liveness and readiness: the queries, how often they are sent, the answers and the log."""

import asyncio
import contextlib
import functools
import itertools
import logging
import socket
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse, PlainTextResponse
from sqlalchemy import (
    AssertionPool,
    Engine,
    NullPool,
    QueuePool,
    SingletonThreadPool,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only
from starlette.applications import Starlette

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    get_db,
    health_router,
    install_database,
    installed_databases,
    start_draining,
)
from fastapi_sqlnative._drivers.pools import OUTSIDE
from fastapi_sqlnative._sessions.engines import run_on_engine, sync_engine
from fastapi_sqlnative.databases import sessions_of
from fastapi_sqlnative.exceptions import DatabaseNotInstalledError
from fastapi_sqlnative.health import CheckResult, ReadinessCheck
from fastapi_sqlnative.testing import override_database
from tests.conftest import MakeEngine
from tests.in_process import (
    async_sqlite,
    client_of,
    is_kept,
    running,
    sqlite,
    start_and_stop,
    turns,
)
from tests.proxy import Fault, Proxy
from tests.serving import Kind, Rows, named, probing_threads, until, validate_openapi

pytestmark = pytest.mark.anyio

# A `max_age` so short that no answer is reused.
FRESH = 1e-9
# Seconds, where nothing hangs: the machine may be busy with other things.
PATIENT = 20
AnyEngine = Engine | AsyncEngine


def healthy(engine: AnyEngine | None = None, **options: Any) -> FastAPI:
    """Make an application with one database and the health router."""
    app = FastAPI()
    if engine is None:
        install_database(app, engine=sqlite)
    else:
        install_database(app, engine=engine, shutdown=engine.dispose)
    app.include_router(health_router(**{"max_age": FRESH, "timeout": PATIENT, **options}))
    return app


async def ready(client: httpx.AsyncClient, path: str = "/health/ready") -> tuple[int, Any]:
    """Request readiness, assert that the answer may not be cached, and return status and body."""
    response = await client.get(path)
    assert response.headers["cache-control"] == "no-store"
    return response.status_code, response.json()


def report(
    status: str = "ready", databases: Mapping[str, str] | None = None, **checks: str
) -> dict[str, Any]:
    """Return the expected body of ready, in which one database is up unless stated otherwise."""
    return {"status": status, "databases": databases or {"default": "up"}, "checks": checks}


@asynccontextmanager
async def held(engine: AnyEngine) -> AsyncGenerator[None]:
    """Hold a connection of the engine's pool, as a request does."""
    if isinstance(engine, AsyncEngine):
        async with engine.connect() as asynchronous:
            await asynchronous.execute(text("SELECT 1"))
            yield
    else:
        with engine.connect() as synchronous:
            synchronous.execute(text("SELECT 1"))
            yield


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Collect what the package logs."""
    caplog.set_level(logging.INFO, "fastapi_sqlnative")
    return caplog


# --- the queries ---


async def test_ready_and_live_answer_get_and_head(engine: AnyEngine) -> None:
    """Both paths answer GET with a body and HEAD without one, in each colour and on each driver."""
    async with running(healthy(engine)) as client:
        assert await ready(client) == (200, report())
        assert await ready(client, "/health/live") == (200, {"status": "alive"})
        for path in "/health/ready", "/health/live":
            response = await client.head(path)
            assert (response.status_code, response.content) == (200, b"")
            assert response.headers["cache-control"] == "no-store"
            assert (await client.post(path)).status_code == 405


@pytest.mark.parametrize(
    "settings",
    [
        {"default_response_class": HTMLResponse},
        {"default_response_class": PlainTextResponse},
        {"redirect_slashes": False, "strict_content_type": False},
    ],
    ids=["html", "text", "strict"],
)
async def test_the_applications_settings_change_nothing(settings: dict[str, Any]) -> None:
    """Probes get their JSON, whatever the application's default response and root path are."""
    app = FastAPI(**settings)
    install_database(app, engine=async_sqlite)
    app.include_router(health_router(timeout=PATIENT))
    async with running(app) as client:
        assert await ready(client) == (200, report())
        assert await ready(client, "/health/live") == (200, {"status": "alive"})
        assert (await client.head("/health/ready")).status_code == 200
        behind = httpx.ASGITransport(app, root_path="/api/v1")
        async with httpx.AsyncClient(transport=behind, base_url="http://app") as proxied:
            assert await ready(proxied, "/api/v1/health/ready") == (200, report())


async def test_probes_pass_the_dependencies_of_the_application() -> None:
    """A mounted application answers probes even if the application above it rejects every request.

    The probes report on the databases of the application above. FastAPI has no way to take a route
    out of `dependencies=`.
    """

    def refuse() -> None:
        raise HTTPException(401)

    app, probed = FastAPI(dependencies=[Depends(refuse)]), FastAPI()
    install_database(app, engine=async_sqlite)
    probed.include_router(
        health_router(prefix="", databases={"default": "required"}, timeout=PATIENT)
    )
    app.mount("/health", probed)
    app.get("/work")(lambda: None)
    async with running(app) as client:
        assert (await client.get("/work")).status_code == 401
        assert await ready(client) == (200, report())
        assert await ready(client, "/health/live") == (200, {"status": "alive"})
        start_draining(app)
        assert (await ready(client))[0] == 503


def memory_per_thread() -> Engine:
    """Build an engine as `create_engine("sqlite://")` does, with a database for each thread."""
    return create_engine("sqlite://", poolclass=SingletonThreadPool)


@pytest.mark.parametrize(
    "build",
    [
        sqlite,
        async_sqlite,
        memory_per_thread,
        lambda: create_engine("sqlite:///{file}"),
        lambda: create_async_engine("sqlite+aiosqlite:///{file}"),
        lambda: create_async_engine("sqlite+aiosqlite:///{file}", poolclass=NullPool),
    ],
    ids=["memory", "memory-async", "memory-per-thread", "file", "file-async", "file-without-pool"],
)
async def test_sqlite_is_ready(
    build: Callable[[], AnyEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SQLite is up in memory and in a file, in both colours, even while a connection is held."""
    monkeypatch.chdir(tmp_path)
    engine = build()
    async with running(healthy(engine)) as client:
        assert await ready(client) == (200, report())
        async with held(engine):
            assert await ready(client) == (200, report())
        assert await ready(client) == (200, report())


async def test_probes_leave_databases_of_threads_alone() -> None:
    """If each thread has its own in-memory database, repeated probes drop none of them."""
    engine = memory_per_thread()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (id INTEGER)"))
    async with running(healthy(engine)) as client:
        for _ in range(12):
            assert await ready(client) == (200, report())
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM kept")) == 0


@pytest.mark.parametrize("build", [sqlite, async_sqlite])
async def test_a_transaction_on_the_only_connection_survives_a_probe(
    build: Callable[[], AnyEngine],
) -> None:
    """A probe does not roll back a session's transaction on the only connection.

    A database in memory has just one connection.
    """
    app = healthy(build())

    async with running(app) as client:
        database = installed_databases(app)["default"]

        def insert(engine: Engine) -> None:
            with engine.begin() as connection:
                connection.execute(text("CREATE TABLE kept (id INTEGER)"))

        await run_on_engine(database.engine, insert)
        session = sessions_of(database).open()
        await as_coroutine(session.execute(text("INSERT INTO kept VALUES (1)")))
        assert await ready(client) == (200, report())
        await as_coroutine(session.commit())
        await as_coroutine(session.close())
        session = sessions_of(database).open()
        assert await as_coroutine(session.scalar(text("SELECT count(*) FROM kept"))) == 1
        await as_coroutine(session.close())


async def as_coroutine(result: Any) -> Any:
    return await result if asyncio.iscoroutine(result) else result


async def test_an_engine_without_a_pool_is_asked_by_a_connection_that_is_closed(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """With NullPool, each probe opens its own connection, queries it and closes it."""
    engine = make_engine(poolclass=NullPool, connect_args=named(kind.driver, "no pool"))
    opened: list[object] = []
    event.listen(sync_engine(engine), "connect", lambda _connection, record: opened.append(record))
    async with running(healthy(engine)) as client:
        assert await ready(client) == (200, report())
        async with held(engine):
            assert await ready(client) == (200, report())
    assert len(opened) == 3
    await until(lambda: not rows.backends(application="no pool"))


async def test_an_idle_connection_is_used_first(engine: AnyEngine) -> None:
    """A probe uses the pool's idle connection, returns it to the pool and opens no other."""
    opened: list[object] = []
    event.listen(sync_engine(engine), "connect", lambda _connection, record: opened.append(record))
    app = healthy(engine)
    async with running(app) as client:
        async with held(engine):
            pass
        for _ in range(3):
            assert await ready(client) == (200, report())
        status = installed_databases(app)["default"].pool_status()
        assert (status.checked_in, status.checked_out) == (1, 0)
    assert len(opened) == 1


async def test_an_idle_connection_of_a_busy_pool_is_used(make_engine: MakeEngine) -> None:
    """A probe uses an idle connection also while others of the pool are in use."""
    engine = make_engine()
    opened: list[object] = []
    event.listen(sync_engine(engine), "connect", lambda _connection, record: opened.append(record))
    async with running(healthy(engine)) as client, held(engine):
        async with held(engine):
            pass
        assert await ready(client) == (200, report())
    assert len(opened) == 2


async def test_a_session_that_holds_a_connection_proves_nothing(
    behind_proxy: AnyEngine, proxy: Proxy
) -> None:
    """A server that refuses new connections is down, even if a session still holds a connection."""
    app = healthy(behind_proxy)
    async with running(app) as client:
        session = sessions_of(installed_databases(app)["default"]).open()
        assert await as_coroutine(session.scalar(text("SELECT 7"))) == 7
        assert await ready(client) == (200, report(databases={"default": "saturated"}))
        proxy.fault = Fault.REFUSED
        assert await ready(client) == (503, report("not_ready", {"default": "down"}))
        await as_coroutine(session.close())


@pytest.mark.parametrize(
    ("saturated_is_ready", "expected"), [(True, (200, "ready")), (False, (503, "not_ready"))]
)
async def test_a_pool_held_by_others_is_saturated(
    engine: AnyEngine,
    saturated_is_ready: bool,
    expected: tuple[int, str],
    log: pytest.LogCaptureFixture,
) -> None:
    """A database that answers while the whole pool is in use is saturated, not down."""
    app = healthy(engine, saturated_is_ready=saturated_is_ready)
    code, status = expected
    log_level = "INFO" if saturated_is_ready else "WARNING"
    async with running(app) as client:
        async with held(engine):
            for _ in range(3):
                assert await ready(client) == (code, report(status, {"default": "saturated"}))
            held_now = installed_databases(app)["default"].pool_status()
            assert (held_now.checked_in, held_now.checked_out) == (0, 1)
        assert await ready(client) == (200, report())
    assert [(each.levelname, each.getMessage()) for each in log.records] == [
        (log_level, "Database 'default' is saturated."),
        ("INFO", "Database 'default' is up."),
    ]


async def test_an_unlimited_pool_is_never_saturated(make_engine: MakeEngine) -> None:
    """A pool without a limit is up, however many connections are in use."""
    engine = make_engine(pool_size=1, max_overflow=-1)
    async with running(healthy(engine)) as client, held(engine), held(engine):
        assert await ready(client) == (200, report())


async def test_an_assertion_pool_in_use_is_up(make_engine: MakeEngine) -> None:
    """An AssertionPool is up while its connection is in use, and a probe does not occupy it."""
    engine = make_engine(poolclass=AssertionPool)
    async with running(healthy(engine)) as client:
        async with held(engine):
            assert await ready(client) == (200, report())
        probe = asyncio.create_task(ready(client))
        await turns()
        async with held(engine):
            assert await probe == (200, report())


class Clock:
    """A replacement for `monotonic`, whose time a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("fastapi_sqlnative._probe.monotonic", clock)
    return clock


async def test_a_wedged_pool_is_not_ready_and_at_last_not_alive(
    make_engine: MakeEngine, clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    """If no connection comes back for too long, ready fails.

    Later live fails, too, if `restart_after` is set.
    """
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=15)
    app = healthy(engine, restart_after=60)
    async with running(app) as client:
        assert await ready(client) == (200, report())
        for wedged_again in range(2):
            async with held(engine):
                clock.now += 14  # more than the default, but not more than the pool's own timeout
                assert await ready(client) == (200, report(databases={"default": "saturated"}))
                clock.now += 2
                wedged = report("not_ready", {"default": "wedged"})
                assert await ready(client) == (503, wedged)
                assert await ready(client, "/health/live") == (200, {"status": "alive"})
                clock.now += 50 * (1 - wedged_again)
                live = (200, {"status": "alive"}) if wedged_again else (503, {"status": "wedged"})
                assert await ready(client, "/health/live") == live
            assert await ready(client) == (200, report())
            assert (await client.get("/health/live")).status_code == 200
    assert log.messages.count("Database 'default' is wedged.") == 2


async def test_a_busy_pool_that_moves_is_not_wedged(make_engine: MakeEngine, clock: Clock) -> None:
    """A pool that is full at every probe is not wedged as long as connections come back."""
    engine = make_engine(pool_size=2, max_overflow=0, pool_timeout=1)
    async with running(healthy(engine)) as client, held(engine):
        for _ in range(4):
            async with held(engine):
                clock.now += 8
                assert await ready(client) == (200, report(databases={"default": "saturated"}))


async def test_a_pool_with_room_is_not_wedged(make_engine: MakeEngine, clock: Clock) -> None:
    """A pool is not wedged while one connection is held for hours and another is available."""
    engine = make_engine(pool_size=2, max_overflow=0, pool_timeout=1)
    app = healthy(engine, restart_after=60)
    async with running(app) as client, held(engine):
        assert await ready(client) == (200, report())
        clock.now += 1e6
        assert await ready(client) == (200, report())
        assert await ready(client, "/health/live") == (200, {"status": "alive"})


async def test_live_does_not_fail_for_a_wedged_pool_unless_told_to(
    make_engine: MakeEngine, clock: Clock
) -> None:
    """Without `restart_after`, live does not fail for a wedged pool.

    A restart loses the work in progress, so the application has to ask for it.
    """
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=1)
    async with running(healthy(engine)) as client, held(engine):
        assert (await ready(client))[0] == 200
        clock.now += 1e6
        assert (await ready(client))[0] == 503
        assert (await ready(client, "/health/live")) == (200, {"status": "alive"})


async def test_a_pool_is_listened_to_once(make_engine: MakeEngine) -> None:
    """The pool of an engine that outlives its applications gets one listener, not one for each."""
    engine = make_engine()
    heard: list[int] = []
    for _ in range(3):
        async with running(healthy(engine)) as client:
            assert (await ready(client))[0] == 200
        heard.append(len(list(sync_engine(engine).pool.dispatch.checkout)))
    assert heard == [heard[0]] * 3


@pytest.mark.driver_decides
@pytest.mark.parametrize("policy", ["writable", "required", None])
async def test_a_read_only_server_is_not_ready_where_it_must_be_writable(
    kind: Kind, make_engine: MakeEngine, policy: Any
) -> None:
    """A read-only server is ready unless the policy of its database is `writable`."""
    refusing = (
        {"server_settings": {"default_transaction_read_only": "on"}}
        if kind.driver == "asyncpg"
        else {"options": "-c default_transaction_read_only=on"}
    )
    engine = make_engine(pool_size=1, max_overflow=0, connect_args=refusing)
    policies = {} if policy is None else {"default": policy}
    async with running(healthy(engine, databases=policies)) as client:
        refused = policy == "writable"
        expected = report("not_ready", {"default": "read_only"}) if refused else report()
        assert await ready(client) == (503 if refused else 200, expected)
        async with held(engine):  # so the probe connects outside the pool
            code, body = await ready(client)
        assert (code, body["databases"]["default"]) == (
            (503, "read_only") if refused else (200, "saturated")
        )


async def test_a_writable_server_is_up(make_engine: MakeEngine) -> None:
    """A server that accepts writes is ready under the policy `writable`."""
    async with running(healthy(make_engine(), databases={"default": "writable"})) as client:
        assert await ready(client) == (200, report())


async def test_a_database_that_nobody_can_ask_for_writes_is_down(
    log: pytest.LogCaptureFixture,
) -> None:
    """Under the policy `writable`, a database that has no check for writes is down.

    The log names the policy that works.
    """
    async with running(healthy(async_sqlite(), databases={"default": "writable"})) as client:
        assert await ready(client) == (503, report("not_ready", {"default": "down"}))
    assert "sqlite has no check for writes: use the policy 'required'." in log.text


@pytest.fixture
def own_port() -> Iterator[int]:
    """Reserve a port that refuses connections, and yield its number."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def refused(kind: Kind, postgres: WorkerPostgres, own_port: int) -> AnyEngine:
    """Build an engine for a port that refuses connections, with a password to look for."""
    url = make_url(postgres.url(kind.driver)).set(
        host="127.0.0.1", port=own_port, username="grace", password="seldom-seen"
    )
    return (create_async_engine if kind.asynchronous else create_engine)(url)


@pytest.mark.driver_decides
async def test_a_refused_connection_is_down(
    refused: AnyEngine, log: pytest.LogCaptureFixture
) -> None:
    """A database that refuses connections is down at once, and the log has the cause once."""
    async with running(healthy(refused)) as client:
        for _ in range(10):
            assert await ready(client) == (503, report("not_ready", {"default": "down"}))
        assert await ready(client, "/health/live") == (200, {"status": "alive"})
        assert (await client.head("/health/ready")).status_code == 503
    [record] = log.records
    assert (record.levelname, record.getMessage()) == ("WARNING", "Database 'default' is down.")
    assert record.exc_info is not None
    assert "seldom-seen" not in log.text
    assert "Connect" in log.text or "connect" in log.text


async def test_an_engine_that_stands_in_is_asked(engine: AnyEngine, refused: AnyEngine) -> None:
    """While `override_database` replaces an engine, readiness reports on the replacement."""
    app = healthy(engine)
    async with running(app) as client:
        assert await ready(client) == (200, report())
        with override_database(app, "default", refused):
            assert await ready(client) == (503, report("not_ready", {"default": "down"}))
        assert await ready(client) == (200, report())


async def test_the_body_tells_nobody_where_the_database_is(
    refused: AnyEngine, own_port: int, postgres: WorkerPostgres
) -> None:
    """The answer has names and states only.

    It has no host, port, user, error text, SQL, driver or version.
    """

    def broken() -> bool:
        raise RuntimeError("connection to 10.1.2.3 as grace failed")

    app = healthy(refused, checks={"broken": broken, "odd": lambda: "SELECT 1"})
    async with running(app) as client:
        response = await client.get("/health/ready")
    assert response.json() == report("not_ready", {"default": "down"}, broken="down", odd="down")
    everything = response.text.lower() + str(response.headers).lower()
    secrets = "127.0.0.1", str(own_port), "grace", "seldom", "select", "error", "10.1.2", "psycopg"
    for secret in *secrets, "asyncpg", "postgres", str(make_url(postgres.dsn).database):
        assert secret not in everything


# --- how often they are sent ---


@pytest.mark.parametrize("build", [sqlite, async_sqlite])
async def test_many_probes_cost_one_question(build: Callable[[], AnyEngine]) -> None:
    """Concurrent probes, and later ones within `max_age`, share one query and one check call."""
    engine = build()
    statements: list[str] = []
    event.listen(
        sync_engine(engine),
        "before_cursor_execute",
        lambda *arguments: statements.append(arguments[2]),
    )
    called: list[int] = []

    async def check() -> bool:
        called.append(1)
        await asyncio.sleep(0)
        return True

    app = healthy(engine, max_age=60, timeout=20, checks={"check": check})
    async with running(app) as client:
        answers = await asyncio.gather(*(client.get("/health/ready") for _ in range(200)))
        assert {each.status_code for each in answers} == {200}
        assert (await client.head("/health/ready")).status_code == 200
    assert len(statements) == len(called) == 1


async def test_an_answer_stands_for_as_long_as_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer, ready or not, is reused until `max_age` has passed."""
    answers = [True, False, True]
    asked: list[bool] = []

    def check() -> bool:
        asked.append(answers[len(asked)])
        return asked[-1]

    clock = Clock()
    monkeypatch.setattr("fastapi_sqlnative.health._watch.monotonic", clock)
    async with running(healthy(max_age=30, checks={"check": check})) as client:
        assert await ready(client) == (200, report(check="up"))
        clock.now += 29
        assert await ready(client) == (200, report(check="up"))
        clock.now += 2
        assert await ready(client) == (503, report("not_ready", check="down"))
        clock.now += 29
        assert await ready(client) == (503, report("not_ready", check="down"))
        clock.now += 2
        assert await ready(client) == (200, report(check="up"))
    assert len(asked) == 3


async def test_what_was_answered_last_stands_while_an_answer_takes_its_time(
    make_engine: MakeEngine, kind: Kind, log: pytest.LogCaptureFixture
) -> None:
    """While a query is slow, ready repeats its last result, or reports down if there is none."""
    engine = make_engine()
    app = healthy(engine, timeout=0.01, down_after=PATIENT)
    go_on = threading.Event()

    def wait(*_arguments: object) -> None:
        if kind.asynchronous:
            await_only(anyio.to_thread.run_sync(go_on.wait, PATIENT))
        else:
            go_on.wait(PATIENT)

    event.listen(sync_engine(engine), "before_cursor_execute", wait)
    async with running(app) as client:
        assert await ready(client) == (503, report("not_ready", {"default": "down"}))
        go_on.set()
        while (await ready(client))[0] != 200:
            pass
        go_on.clear()
        for _ in range(3):
            assert await ready(client) == (200, report())
        go_on.set()
        pool: Any = sync_engine(engine).pool
        await until(lambda: pool.checkedout() == 0)
    assert log.records == []


async def test_a_prober_that_goes_away_takes_nobodys_answer() -> None:
    """Cancelling a probe does not cancel a check that another probe is waiting for."""
    started, go_on = asyncio.Event(), asyncio.Event()
    called: list[int] = []

    async def check() -> bool:
        called.append(1)
        started.set()
        await go_on.wait()
        return True

    async with running(healthy(max_age=20, checks={"check": check})) as client:
        first = asyncio.create_task(client.get("/health/ready"))
        await started.wait()
        second = asyncio.create_task(client.get("/health/ready"))
        await turns()
        first.cancel()
        await asyncio.wait([first])
        go_on.set()
        assert (await second).status_code == 200
    assert first.cancelled()
    assert len(called) == 1


# --- the connection outside the pool ---


@pytest.mark.driver_decides
async def test_the_connection_outside_is_made_as_the_pool_makes_its_own(
    make_engine: MakeEngine, rows: Rows, kind: Kind
) -> None:
    """A connection outside the pool gets the engine's connect arguments and runs its listeners."""
    connect_args = named(kind.driver, "seen")
    engine = make_engine(pool_size=1, max_overflow=0, connect_args=connect_args)
    made: list[str] = []
    outside: list[bool] = []

    def do_connect(_dialect: object, _record: object, _arguments: object, keywords: Any) -> None:
        given = keywords.get("server_settings", keywords)
        made.append(given["application_name"])

    def connect(_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        outside.append(OUTSIDE in record.info)

    event.listen(sync_engine(engine), "do_connect", do_connect)
    event.listen(sync_engine(engine), "connect", connect)
    async with running(healthy(engine)) as client:
        async with held(engine):
            pool = sync_engine(engine).pool
            before = pool.status()
            for _ in range(3):
                assert await ready(client) == (200, report(databases={"default": "saturated"}))
            assert sync_engine(engine).pool is pool
            assert pool.status() == before
        async with held(engine):
            assert pool.status() == before
    assert made == ["seen"] * 4
    # The pool's own connection does not have the mark.
    assert outside == [False, True, True, True]
    await until(lambda: not rows.backends(application="seen"))


async def test_a_listener_that_refuses_the_connection_is_down(make_engine: MakeEngine) -> None:
    """A database whose `connect` listener raises is down, because requests would fail, too."""
    engine = make_engine()

    def refuse(_connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
        raise LookupError("no token")

    event.listen(sync_engine(engine), "connect", refuse)
    async with running(healthy(engine)) as client:
        assert await ready(client) == (503, report("not_ready", {"default": "down"}))


# --- which databases count ---


def broken_sqlite() -> Engine:
    """Build an engine for a file that cannot exist."""
    return create_engine("sqlite:////proc/nowhere/at.all")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("required", (503, report("not_ready", {"default": "up", "reports": "down"}))),
        ("degraded", (200, report("degraded", {"default": "up", "reports": "down"}))),
        ("ignored", (200, report())),
    ],
)
async def test_a_database_counts_as_the_application_says(
    policy: Any, expected: tuple[int, Any], log: pytest.LogCaptureFixture
) -> None:
    """The policy of a database decides whether it is required, only reported, or left out."""
    app = healthy(databases={" reports ": policy})
    install_database(app, name="reports", engine=broken_sqlite)
    async with running(app) as client:
        assert await ready(client) == expected
    assert ("Database 'reports' is down." in log.text) == (policy != "ignored")


@pytest.mark.parametrize("name", ["reports", "_sales"])
async def test_all_databases_are_required_by_default(name: str) -> None:
    """By default, every database is required and reported, whatever its name."""
    app = healthy()
    install_database(app, name=name, engine=broken_sqlite)
    async with running(app) as client:
        assert await ready(client) == (503, report("not_ready", {"default": "up", name: "down"}))


async def test_a_saturated_pool_that_is_degraded_stays_ready(make_engine: MakeEngine) -> None:
    """With `saturated_is_ready=False`, a saturated `degraded` database only degrades the report."""
    engine = make_engine(pool_size=1, max_overflow=0)
    app = healthy(engine, databases={"default": "degraded"}, saturated_is_ready=False)
    async with running(app) as client, held(engine):
        assert await ready(client) == (200, report("degraded", {"default": "saturated"}))


async def test_an_unknown_name_fails_the_boot() -> None:
    """A policy for an unknown name fails start-up, and the error states the route and all names."""
    app = healthy(databases={"report": "degraded"})
    install_database(app, name="reports", engine=async_sqlite)
    expected = r"Route '/health/ready': No database named 'report' .*'default', 'reports'"
    with pytest.raises(DatabaseNotInstalledError, match=expected):
        await start_and_stop(app)


def test_what_cannot_be_meant_is_refused_at_once() -> None:
    """A wrong policy, time or check raises an error that explains it when the router is made."""
    unknown: Any = "optional"
    with pytest.raises(ValueError, match="'optional' of database 'reports ' is no policy"):
        health_router(databases={"reports ": unknown})
    for seconds in 0, -1, float("inf"), float("nan"):
        for name in "timeout", "max_age", "down_after", "wedged_after", "restart_after":
            given: Any = {name: seconds}
            with pytest.raises(ValueError, match=f"{name} must be above 0 seconds"):
                health_router(**given)
        with pytest.raises(ValueError, match="timeout of check 'x' must be above 0 seconds"):
            health_router(checks={"x": ReadinessCheck(lambda: True, timeout=seconds)})
    word: Any = "5"
    with pytest.raises(TypeError, match="max_age must be a number of seconds, not str"):
        health_router(max_age=word)
    nothing: Any = True
    with pytest.raises(TypeError, match=r"Check 'x' must be a function .* not bool"):
        health_router(checks={"x": nothing})
    two: Any = lambda app, other: True  # noqa: E731
    with pytest.raises(
        TypeError, match=r"Check 'x' must be a function that takes the application or nothing"
    ):
        health_router(checks={"x": two})


# --- the application's own checks ---


class AsyncObject:
    """A check that is an object with an async `__call__`, and a method that is another."""

    def __init__(self, result: object) -> None:
        self.result = result

    async def __call__(self) -> Any:
        await asyncio.sleep(0)
        return self.result

    async def check(self, app: Starlette) -> Any:
        return await asynchronous(app) and self.result


async def asynchronous(app: Starlette) -> bool:
    return isinstance(app, FastAPI) and app.title == "mine"


def synchronous(app: Starlette) -> bool:
    return isinstance(app, FastAPI) and app.title == "mine" and not on_the_loop()


def on_the_loop() -> bool:
    return threading.current_thread() is threading.main_thread()


async def equal(one: object, other: object) -> bool:
    return one == other


@pytest.mark.parametrize(
    "check",
    [
        asynchronous,
        synchronous,
        lambda: not on_the_loop(),
        lambda: asynchronous(FastAPI(title="mine")),
        AsyncObject(True),
        AsyncObject(True).check,
        functools.partial(equal, 1, 1),
        functools.partial(AsyncObject(True)),
        functools.partial(synchronous),
        lambda: CheckResult(True, "up"),
        ReadinessCheck(synchronous, timeout=5),
    ],
    ids=[
        "async",
        "sync",
        "of-nothing",
        "coroutine-from-lambda",
        "object",
        "method",
        "partial",
        "partial-of-object",
        "partial-of-sync",
        "result",
        "readiness-check",
    ],
)
async def test_a_check_may_be_any_callable(check: Any) -> None:
    """A check may be a function, method, object or partial; it takes the application or nothing."""
    app = healthy(checks={"mine": check})
    app.title = "mine"
    async with running(app) as client:
        assert await ready(client) == (200, report(mine="up"))


def raising() -> bool:
    raise RuntimeError("the cache is away")


async def raising_async() -> bool:
    raise RuntimeError("the cache is away")


async def cancelling() -> bool:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("check", "cause"),
    [
        (raising, "RuntimeError: the cache is away"),
        (raising_async, "RuntimeError: the cache is away"),
        (cancelling, "CancelledError"),
        (lambda: None, "Check 'mine' returned NoneType"),
        (lambda: 1, "Check 'mine' returned int"),
        (lambda: "yes", "Check 'mine' returned str"),
        (lambda: {"ready": True}, "Check 'mine' returned dict"),
        (AsyncObject(None), "Check 'mine' returned NoneType"),
        (lambda: CheckResult("no", "fine"), "Check 'mine' returned"),  # type: ignore[arg-type]
        (lambda: CheckResult(True, None), "Check 'mine' returned"),  # type: ignore[arg-type]
        (lambda: False, None),
    ],
)
async def test_a_check_that_says_nothing_sensible_is_down(
    check: Any, cause: str | None, log: pytest.LogCaptureFixture
) -> None:
    """A check is down unless it returns `True` or a valid `CheckResult`, and the log says so once.

    The log also has the cause, unless the check returned `False`.
    """
    async with running(healthy(checks={"mine": check})) as client:
        for _ in range(3):
            assert await ready(client) == (503, report("not_ready", mine="down"))
    [record] = log.records
    assert record.getMessage() == "Check 'mine' is down."
    assert (record.exc_info is not None) == (cause is not None)
    assert cause is None or cause in log.text


async def test_a_check_tells_its_state_in_a_word() -> None:
    """Readiness shows the state of a `CheckResult`, whether that is ready or not."""
    results = [CheckResult(False, "behind"), CheckResult(True, "warming")]
    async with running(healthy(checks={"marker": results.pop})) as client:
        assert await ready(client) == (200, report(marker="warming"))
        assert await ready(client) == (503, report("not_ready", marker="behind"))


async def test_a_check_that_is_not_required_is_reported() -> None:
    """With `required=False`, a failing check degrades the application, which stays ready."""
    check = ReadinessCheck(raising, required=False)
    async with running(healthy(checks={"cache": check})) as client:
        assert await ready(client) == (200, report("degraded", cache="down"))


async def test_a_check_that_hangs_costs_one_thread_at_most() -> None:
    """A hanging sync check is not called again before it returns, and blocks one thread at most."""
    go_on = threading.Event()
    called: list[int] = []

    def hanging() -> bool:
        called.append(1)
        return go_on.wait(20)

    before = probing_threads()
    check = ReadinessCheck(hanging, timeout=0.1)
    # A thread that probes a synchronous database may outlive its answer, so use an async one.
    async with running(healthy(async_sqlite(), checks={"cache": check})) as client:
        for _ in range(5):
            assert await ready(client) == (503, report("not_ready", cache="down"))
        assert len(called) == 1
        assert len(probing_threads() - before) <= 1
        go_on.set()
        await until(lambda: probing_threads() <= before)
        async with asyncio.timeout(PATIENT):
            while (await ready(client))[0] != 200:
                pass  # the thread may take longer to start than the check's timeout
    assert len(called) >= 2


async def test_an_async_check_that_hangs_is_cancelled() -> None:
    """A hanging async check is cancelled at its timeout, and the next probe calls it again.

    No task is left.
    """
    cancelled: list[int] = []

    async def hanging() -> bool:
        try:
            return await asyncio.Event().wait()
        finally:
            cancelled.append(1)

    check = ReadinessCheck(hanging, timeout=0.05)
    async with running(healthy(checks={"cache": check})) as client:
        before = asyncio.all_tasks()
        for _ in range(3):
            assert await ready(client) == (503, report("not_ready", cache="down"))
        await turns()
        assert asyncio.all_tasks() == before
    assert len(cancelled) == 3


async def test_a_probe_of_an_async_database_is_cancelled() -> None:
    """A probe that hangs on an async database is cancelled, and the next one connects again.

    No task is left.
    """
    cancelled: list[int] = []

    async def hanging() -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(1)

    engine = create_async_engine("sqlite+aiosqlite://", async_creator=hanging)
    async with running(healthy(engine, down_after=0.05)) as client:
        before = asyncio.all_tasks()
        for _ in range(3):
            assert await ready(client) == (503, report("not_ready", {"default": "down"}))
        await turns()
        assert asyncio.all_tasks() == before
    assert len(cancelled) == 3


async def test_an_async_check_that_will_not_be_cancelled_is_called_once() -> None:
    """An async check that swallows its cancellation is not called again while it still runs."""
    go_on = asyncio.Event()
    called: list[int] = []

    async def stubborn() -> bool:
        called.append(1)
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go_on.wait()
        return True

    check = ReadinessCheck(stubborn, timeout=0.05)
    async with running(healthy(checks={"cache": check})) as client:
        for _ in range(4):
            assert await ready(client) == (503, report("not_ready", cache="down"))
        assert len(called) == 1
        go_on.set()
        async with asyncio.timeout(PATIENT):
            while (await ready(client))[0] != 200:
                pass


async def test_a_check_has_a_time_of_its_own() -> None:
    """A check's own timeout ends it long before the router's, and the database is still up."""

    async def hanging() -> bool:
        return await asyncio.Event().wait()

    check = ReadinessCheck(hanging, timeout=0.05)
    async with running(healthy(timeout=60, checks={"slow": check})) as client:
        async with asyncio.timeout(50):
            assert await ready(client) == (503, report("not_ready", slow="down"))


async def test_the_deadline_is_one_for_everything() -> None:
    """Twenty hanging checks share the router's timeout, even if their own timeouts are longer."""

    async def hanging() -> bool:
        return await asyncio.Event().wait()

    checks: dict[str, Any] = {
        str(number): ReadinessCheck(hanging, timeout=60) for number in range(20)
    }
    async with running(healthy(timeout=0.3, checks=checks)) as client:
        async with asyncio.timeout(50):
            assert (await ready(client))[0] == 503


async def test_a_check_survives_a_process_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync check is down while no thread can be started, and up once one can."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def asynchronous() -> bool:
        return True

    checks = {"cache": lambda: True, "own": asynchronous}
    app = healthy(async_sqlite(), checks=checks)
    async with running(app) as client:
        both_up = 200, report(cache="up", own="up")
        assert await ready(client) == both_up  # from here on, aiosqlite has its thread
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            assert (await ready(client))[1]["checks"] == {"cache": "down", "own": "up"}
        assert await ready(client) == both_up


async def test_a_check_is_logged_when_it_changes(log: pytest.LogCaptureFixture) -> None:
    """A check is logged when its state changes, and not while its state stays the same."""
    results = [True, True, False, False, True, CheckResult(True, "warm"), CheckResult(True, "warm")]
    following = iter(results)
    async with running(healthy(checks={"mine": lambda: next(following)})) as client:
        for _ in results:
            await ready(client)
    assert [(each.levelname, each.getMessage()) for each in log.records] == [
        ("WARNING", "Check 'mine' is down."),
        ("INFO", "Check 'mine' is up."),
        ("INFO", "Check 'mine' is warm."),
    ]


# --- OpenAPI ---


async def test_the_openapi_document_has_typed_answers() -> None:
    """The OpenAPI document is valid, has distinct operations, and has a schema for both answers."""
    app = healthy()
    app.include_router(health_router(prefix="/internal"))
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always")
        document = app.openapi()
    assert noticed == []
    validate_openapi(document)
    paths = document["paths"]
    prefixed = [
        f"{prefix}/{each}" for prefix in ("/health", "/internal") for each in ("live", "ready")
    ]
    assert set(paths) == set(prefixed)
    assert all(set(each) == {"get"} for each in paths.values())
    for code in "200", "503":
        answer = paths["/health/ready"]["get"]["responses"][code]
        schema = answer["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ReadinessReport"}
    states = document["components"]["schemas"]["DatabaseState"]["enum"]
    assert states == ["up", "saturated", "read_only", "wedged", "down"]


async def test_the_routes_can_be_hidden() -> None:
    """With `include_in_schema=False`, the routes work but are not in the OpenAPI document."""
    app = healthy(include_in_schema=False, prefix="/-")
    assert app.openapi()["paths"] == {}
    async with running(app) as client:
        assert await ready(client, "/-/ready") == (200, report())


# --- applications: mounted, several, started twice, not started ---


async def test_mounted_databases_count_above_and_below() -> None:
    """Readiness covers the databases of mounted applications, and of those above a mounted one."""
    inmost, middle = healthy(), FastAPI()
    install_database(inmost, name="deep", engine=broken_sqlite)
    middle.mount("/inmost", inmost)
    app = FastAPI()
    install_database(app, name="top", engine=async_sqlite)
    app.include_router(health_router(max_age=FRESH, timeout=PATIENT))
    app.mount("/middle", middle)
    expected = (503, report("not_ready", {"top": "up", "default": "up", "deep": "down"}))
    async with running(app) as client:
        assert await ready(client) == expected
        assert await ready(client, "/middle/inmost/health/ready") == expected


async def test_the_worst_of_one_name_is_reported() -> None:
    """If an application and a mounted one share a database name, the worse state is reported."""
    for above, below in (sqlite, broken_sqlite), (broken_sqlite, sqlite):
        app, mounted = FastAPI(), FastAPI()
        install_database(app, engine=above)
        install_database(mounted, engine=below)
        app.include_router(health_router(timeout=PATIENT))
        app.mount("/sub", mounted)
        async with running(app) as client:
            assert await ready(client) == (503, report("not_ready", {"default": "down"}))


async def test_one_router_serves_two_applications() -> None:
    """A router that two applications include reports on each of them separately."""
    called: list[str] = []

    def check(app: FastAPI) -> bool:
        called.append(app.title)
        return True

    router = health_router(checks={"mine": check}, max_age=60, timeout=PATIENT)
    well, ill = FastAPI(title="well"), FastAPI(title="ill")
    for app, engine in (well, sqlite), (ill, broken_sqlite):
        install_database(app, engine=engine)
        app.include_router(router)
    async with running(well) as one, running(ill) as other:
        for _ in range(2):
            assert await ready(one) == (200, report(mine="up"))
            assert (await ready(other))[0] == 503
    assert called == ["well", "ill"]


async def test_two_routers_of_one_application_answer_each_in_its_way() -> None:
    """Two routers of one application each apply their own policies.

    One may be strict, for a load balancer, and the other lenient, for a dashboard.
    """
    app = healthy()
    install_database(app, name="reports", engine=broken_sqlite)
    app.include_router(
        health_router(prefix="/lenient", databases={"reports": "ignored"}, timeout=PATIENT)
    )
    async with running(app) as client:
        assert (await ready(client))[0] == 503
        assert (await ready(client, "/lenient/ready"))[0] == 200


async def test_an_application_that_starts_again_is_asked_again() -> None:
    """A stopped application is not ready, and its next run is probed anew whatever `max_age` is."""
    opened: list[int] = []

    def build() -> AsyncEngine:
        opened.append(1)
        return async_sqlite()

    app = FastAPI()
    install_database(app, engine=build)
    app.include_router(health_router(max_age=60, timeout=PATIENT))
    for run in 1, 2, 3:
        async with running(app) as client:
            assert await ready(client) == (200, report())
        async with client_of(app) as client:
            code, body = await ready(client)
            assert (code, body["databases"]) == (503, {})
        assert len(opened) == run


async def test_each_run_asks_the_engine_of_its_own() -> None:
    """After a restart, probes use the new engine and not the first one, which is disposed of."""
    opened: list[int] = []
    builds = itertools.count()

    def build() -> Engine:
        number = next(builds)
        engine = create_engine("sqlite://", poolclass=QueuePool)
        event.listen(engine, "connect", lambda *_: opened.append(number))
        return engine

    app = FastAPI()
    install_database(app, engine=build)
    app.include_router(health_router(max_age=FRESH, timeout=PATIENT))
    for runs in [0], [0, 1]:
        async with running(app) as client:
            assert await ready(client) == (200, report())
        assert opened == runs


def test_an_application_runs_on_another_event_loop() -> None:
    """An application with a health router can run again on a different event loop."""
    app = healthy(max_age=60)

    async def ask() -> tuple[int, Any]:
        async with running(app) as client:
            return await ready(client)

    for _ in range(2):
        assert asyncio.run(ask()) == (200, report())


async def test_an_application_that_has_not_started_is_not_ready() -> None:
    """Without a lifespan, as behind a bare ASGITransport, an application is alive but not ready."""
    async with client_of(healthy()) as client:
        assert await ready(client) == (
            503,
            {"status": "not_started", "databases": {}, "checks": {}},
        )
        assert await ready(client, "/health/live") == (200, {"status": "alive"})


async def test_an_application_without_a_database_is_not_ready() -> None:
    """An application without a database is not ready, and its checks are not called."""
    app = FastAPI()
    app.include_router(health_router(checks={"mine": lambda: True}))
    async with running(app) as client:
        assert await ready(client) == (
            503,
            {"status": "not_started", "databases": {}, "checks": {}},
        )


async def test_an_application_that_failed_to_start_is_not_ready() -> None:
    """An application whose own lifespan fails at start-up is not ready."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if installed_databases(app):
            raise RuntimeError("no")
        yield

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=async_sqlite)
    app.include_router(health_router(timeout=PATIENT))
    with pytest.raises(RuntimeError, match="no"):
        await start_and_stop(app)
    async with client_of(app) as client:
        assert (await ready(client))[0] == 503


async def test_a_run_that_has_ended_is_not_remembered() -> None:
    """A router with checks that outlives an application does not keep the application alive."""
    checks = {"mine": lambda app: isinstance(app, FastAPI)}
    router = health_router(max_age=60, timeout=PATIENT, checks=checks)

    async def use(app: FastAPI) -> None:
        install_database(app, engine=async_sqlite)
        app.include_router(router)
        async with running(app) as client:
            assert await ready(client) == (200, report(mine="up"))

    assert not await is_kept(use)


# --- draining, in this process ---


async def test_draining_shows_at_once(log: pytest.LogCaptureFixture) -> None:
    """After `start_draining`, ready fails at once despite `max_age`, and requests still work."""
    app = healthy(max_age=60)
    asked: list[object] = []

    def note(app: FastAPI) -> bool:
        asked.append(app)
        return True

    app.include_router(health_router(prefix="/other", checks={"mine": note}))

    @app.get("/work")
    def work(session: Annotated[Session, Depends(get_db())]) -> Any:
        return session.scalar(text("SELECT 7"))

    async with running(app) as client:
        assert await ready(client) == (200, report())
        start_draining(app)
        start_draining(app)
        draining = {"status": "draining", "databases": {}, "checks": {}}
        assert await ready(client) == (503, draining)
        assert await ready(client, "/other/ready") == (503, draining)
        assert asked == []
        assert await ready(client, "/health/live") == (200, {"status": "alive"})
        assert (await client.get("/work")).json() == 7
    assert len(log.records) == 1
    async with running(app) as client:
        assert await ready(client) == (200, report())


async def test_draining_while_probes_wait() -> None:
    """A probe that began before the draining does not report ready after it."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def check() -> bool:
        started.set()
        return await go_on.wait()

    app = healthy(timeout=20, checks={"check": check})
    async with running(app) as client:
        probe = asyncio.create_task(ready(client))
        await started.wait()
        start_draining(app)
        go_on.set()
        code, body = await probe
        assert (code, body["status"]) == (503, "draining")


async def test_mounted_applications_drain_with_the_one_above() -> None:
    """A mounted application can drain alone, and draining the application above drains both."""
    app, mounted = healthy(), healthy()
    app.mount("/sub", mounted)
    async with running(app) as client:
        start_draining(mounted)
        assert (await ready(client))[0] == 200
        assert (await ready(client, "/sub/health/ready"))[0] == 503
    async with running(app) as client:
        assert (await ready(client, "/sub/health/ready"))[0] == 200
        start_draining(app)
        assert (await ready(client))[0] == 503
        assert (await ready(client, "/sub/health/ready"))[0] == 503


async def test_draining_before_the_start_is_forgotten() -> None:
    """An application that was told to drain before its start is ready once it has started."""
    app = healthy()
    start_draining(app)
    async with client_of(app) as client:
        assert (await ready(client))[0] == 503
    async with running(app) as client:
        assert await ready(client) == (200, report())


# --- live ---


async def test_live_needs_neither_thread_nor_connection(make_engine: MakeEngine) -> None:
    """With every thread and connection in use, live answers and ready reports saturation."""
    engine = make_engine(pool_size=1, max_overflow=0)
    limiter = anyio.to_thread.current_default_thread_limiter()
    async with running(healthy(engine)) as client, held(engine):
        holders = [object() for _ in range(int(limiter.available_tokens))]
        for holder in holders:
            limiter.acquire_on_behalf_of_nowait(holder)
        try:
            assert await ready(client, "/health/live") == (200, {"status": "alive"})
            assert await ready(client) == (200, report(databases={"default": "saturated"}))
        finally:
            for holder in holders:
                limiter.release_on_behalf_of(holder)


async def test_live_asks_no_database_and_no_check() -> None:
    """Live connects to no database and calls no check."""
    called: list[object] = []

    def check() -> bool:
        called.append(1)
        return True

    engine = async_sqlite()
    event.listen(engine.sync_engine, "connect", lambda *_arguments: called.append(1))
    app = healthy(engine, checks={"mine": check})
    async with running(app) as client:
        for _ in range(3):
            assert (await ready(client, "/health/live"))[0] == 200
    assert called == []


@pytest.mark.driver_decides
async def test_a_first_probe_leaves_no_dialect_half_ready(
    kind: Kind, make_engine: MakeEngine
) -> None:
    """A query during the first probe uses a dialect that is fully initialized."""
    engine = make_engine()
    app = healthy(engine)

    def ask(inner: Engine) -> object:
        with inner.connect():
            return inner.dialect.default_schema_name

    loop, connecting = asyncio.get_running_loop(), asyncio.Event()

    def note(*_arguments: object) -> None:
        loop.call_soon_threadsafe(connecting.set)

    async with running(app) as client:
        database = installed_databases(app)["default"]
        event.listen(sync_engine(database.engine), "do_connect", note)
        probe = asyncio.create_task(client.get("/health/ready"))
        await connecting.wait()
        asked = [asyncio.create_task(run_on_engine(database.engine, ask)) for _ in range(3)]
        assert await asyncio.gather(*asked) == ["public"] * 3
        assert (await probe).status_code == 200


@pytest.mark.driver_decides
@pytest.mark.parametrize("places", [1, 2], ids=["full", "free"])
async def test_a_first_probe_beside_a_first_query_leaves_no_dialect_half_ready(
    kind: Kind, make_engine: MakeEngine, places: int
) -> None:
    """A query that began before the first probe uses a dialect that is fully initialized."""
    engine = make_engine(pool_size=places, max_overflow=0)
    app = healthy(engine)
    loop, connecting, connected = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def connect_slowly(dialect: Any, _record: object, given: Any, options: Any) -> Any:
        made = dialect.connect(*given, **options)
        if not connecting.is_set():
            loop.call_soon_threadsafe(connecting.set)
            if kind.asynchronous:
                await_only(asyncio.to_thread(connected.wait, 0.2))
            else:
                connected.wait(0.2)
        return made

    def ask(inner: Engine) -> object:
        with inner.connect():
            return inner.dialect.default_schema_name

    async with running(app) as client:
        inner = sync_engine(installed_databases(app)["default"].engine)
        event.listen(inner, "do_connect", connect_slowly)
        # Runs before the listener that initializes the dialect. The probe may wait for the query.
        event.listen(inner, "connect", lambda *_: connected.set(), insert=True)
        asked = asyncio.create_task(run_on_engine(engine, ask))
        await connecting.wait()
        assert (await client.get("/health/ready")).status_code == 200
        assert await asked == "public"


async def test_a_policy_may_name_a_database_of_a_mounted_application() -> None:
    """A policy may name a database that is installed in a mounted application."""
    mounted = FastAPI()
    install_database(mounted, name="reports", engine=broken_sqlite)
    app = healthy(databases={"reports": "degraded"})
    app.mount("/sub", mounted)
    async with running(app) as client:
        assert await ready(client) == (
            200,
            report("degraded", {"default": "up", "reports": "down"}),
        )


@pytest.mark.driver_decides
async def test_a_probe_that_outlives_the_application_leaves_no_connection(
    kind: Kind, make_engine: MakeEngine
) -> None:
    """A readiness query that ends after the shutdown closes its connection."""
    engine = make_engine()
    app = healthy(engine, timeout=0.1)
    inner, stopped, closed = sync_engine(engine), threading.Event(), threading.Event()

    def connect_slowly(*_: object) -> None:
        if kind.asynchronous:
            await_only(asyncio.to_thread(stopped.wait, PATIENT))
        else:
            stopped.wait(PATIENT)

    event.listen(inner, "do_connect", connect_slowly)
    event.listen(inner, "close", lambda *_: closed.set())
    async with running(app) as client:
        assert (await client.get("/health/ready")).status_code == 503
    stopped.set()
    assert await asyncio.to_thread(closed.wait, PATIENT)
