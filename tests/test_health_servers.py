"""Readiness while the server is killed, stopped, full, slow or unreachable, and under load."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, QueuePool, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from conftest import PostgresDatabase
from fastapi_sqlnative import health_router, install_database
from fastapi_sqlnative._sessions.engines import sync_engine
from tests.in_process import dispose, running
from tests.postgres_server import PostgresServer
from tests.serving import KINDS, NO_TLS, Kind, backends, holding, probing_threads, serve, until

pytestmark = pytest.mark.anyio

AnyEngine = Engine | AsyncEngine
CONNECTIONS = 8  # that the server accepts
UP = (200, {"default": "up"})
SATURATED = (200, {"default": "saturated"})
DOWN = (503, {"default": "down"})

# Seconds: the router's timeout where the server hangs, its timeout elsewhere, and what a busy
# machine may add to an answer, which is less than the timeouts of the drivers and PATIENT.
TIMEOUT = 0.25
PATIENT = 20
WITHIN = 10


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Run a dedicated server with few connections and a verbose log."""
    settings = {
        "max_connections": str(CONNECTIONS),
        "superuser_reserved_connections": "0",
        "log_connections": "on",
        "log_statement": "all",
    }
    with PostgresServer(settings=settings) as server:
        yield server


@pytest.fixture
def threads_before() -> set[threading.Thread]:
    return probing_threads()


def engine_at(
    server: PostgresServer, kind: Kind, port: int | None = None, **options: Any
) -> AnyEngine:
    """Build an engine for the server, or for a port in front of it, without TLS."""
    url = make_url(PostgresDatabase(server.url).url(kind.driver)).set(port=port or server.port)
    plain: dict[str, Any] = (
        {"ssl": False}
        if kind.driver == "asyncpg"
        else {"sslmode": "disable", "connect_timeout": 15}
    )
    return (create_async_engine if kind.asynchronous else create_engine)(
        url, **{"connect_args": plain, **options}
    )


def healthy(engine: AnyEngine, **options: Any) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose, shutdown_timeout=0.5)
    app.include_router(
        health_router(
            **{
                "timeout": PATIENT,
                "max_age": 1e-9,
                "down_after": options.get("timeout", PATIENT),
                **options,
            }
        )
    )
    return app


async def ready(
    client: httpx.AsyncClient, within: float = TIMEOUT + WITHIN
) -> tuple[int, dict[str, str]]:
    """Request readiness, which must answer in time, and return the status and the databases."""
    async with asyncio.timeout(within):
        response = await client.get("/health/ready")
    return response.status_code, response.json()["databases"]


async def becomes(expected: tuple[int, dict[str, str]], client: httpx.AsyncClient) -> None:
    """Request readiness until it is as expected."""
    async with asyncio.timeout(30):
        while await ready(client) != expected:  # noqa: ASYNC110 - nothing notifies us
            await asyncio.sleep(0.02)


@asynccontextmanager
async def held(engine: AnyEngine, count: int = 1) -> AsyncGenerator[None]:
    """Hold connections of the engine's pool, as requests do."""
    async with AsyncExitStack() as holding:
        for _ in range(count):
            if isinstance(engine, AsyncEngine):
                asynchronous = await holding.enter_async_context(engine.connect())
                await asynchronous.execute(text("SELECT 1"))
            else:
                synchronous = await anyio.to_thread.run_sync(engine.connect)
                holding.push_async_callback(anyio.to_thread.run_sync, synchronous.close)
                await anyio.to_thread.run_sync(synchronous.execute, text("SELECT 1"))
        yield


def pool_of(engine: AnyEngine) -> QueuePool:
    pool = sync_engine(engine).pool
    assert isinstance(pool, QueuePool)
    return pool


async def nobody_is_connected(server: PostgresServer) -> None:
    """Wait until the server has no connection except the one that counts them."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        await until(lambda: backends(connection) == 0)


async def ended(before: set[asyncio.Task[Any]]) -> None:
    """Wait until all tasks have ended that were not running before.

    Drivers take some time to give up.
    """
    await until(lambda: not asyncio.all_tasks() - before)


@pytest.fixture(params=[KINDS[0], KINDS[2]], ids=lambda kind: kind.id)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return a kind of each colour.

    Tests that depend on the driver use `every_driver` instead.
    """
    found: Kind = request.param
    return found


every_driver = pytest.mark.parametrize("kind", KINDS, indirect=True, ids=lambda kind: kind.id)

# --- killed, stopped ---


async def test_a_killed_server_is_down_and_comes_back(server: PostgresServer, kind: Kind) -> None:
    """A killed server is down, and the first probe after its restart is up despite a stale pool."""
    engine = engine_at(server, kind)
    async with running(healthy(engine)) as client:
        async with held(engine, 2):
            pass
        assert await ready(client) == UP
        server.kill()
        try:
            await becomes(DOWN, client)
            assert (await client.get("/health/live")).status_code == 200
        finally:
            server.start()
        assert await ready(client) == UP
        async with held(engine, 2):
            pass
        server.kill()
        server.start()  # without a probe in between
        assert await ready(client) == UP
        assert pool_of(engine).checkedout() == 0
    await nobody_is_connected(server)


@contextlib.contextmanager
def stopped(server: PostgresServer) -> Generator[None]:
    """Suspend the server with its children: the port accepts connections but never answers."""
    process = server._process
    assert process is not None
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    everyone = [process.pid, *map(int, found)]
    for each in everyone:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in reversed(everyone):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGCONT)


@every_driver
@pytest.mark.parametrize("idle", [0, 3], ids=["empty-pool", "idle-connections"])
async def test_a_server_that_hangs_is_down_and_leaves_nothing(
    server: PostgresServer, kind: Kind, idle: int, threads_before: set[threading.Thread]
) -> None:
    """Probes of a suspended server are answered in time, with one stuck thread at most.

    Nothing leaks. No connection is left either, even with the garbage collector disabled.
    """
    engine = engine_at(server, kind, pool_pre_ping=True)
    async with running(healthy(engine, timeout=TIMEOUT)) as client:
        async with held(engine, idle):
            pass
        if idle:
            await becomes(UP, client)
        tasks = asyncio.all_tasks()
        gc.collect()
        gc.disable()
        try:
            with stopped(server):
                for _ in range(6):
                    assert await ready(client) == DOWN
                    assert (await client.get("/health/live")).status_code == 200
                    stuck = probing_threads() - threads_before
                    assert len(stuck) <= (0 if kind.asynchronous else 1)
            await becomes(UP, client)
            await until(lambda: probing_threads() <= threads_before)
            await ended(tasks)
            assert pool_of(engine).checkedout() == 0
            await dispose(engine)
            await nobody_is_connected(server)
        finally:
            gc.enable()


async def test_a_server_that_stops_to_take_writes_is_not_ready(
    server: PostgresServer, kind: Kind
) -> None:
    """A server that turns read-only, as after a failover, is not ready until it turns back.

    Probes on an existing connection notice both changes.
    """
    engine = engine_at(server, kind)
    async with running(healthy(engine, databases={"default": "writable"})) as client:
        async with held(engine):
            pass
        with psycopg.connect(server.url, autocommit=True) as connection:
            for setting, expected in ("on", (503, {"default": "read_only"})), ("off", UP):
                connection.execute(
                    f"ALTER SYSTEM SET default_transaction_read_only = {setting}".encode()
                )
                connection.execute("SELECT pg_reload_conf()")
                await becomes(expected, client)


# --- full ---


@every_driver
async def test_a_full_server_is_not_down_while_the_pool_works(
    server: PostgresServer, kind: Kind
) -> None:
    """A full server is up if the pool has an idle connection, and saturated if all are in use."""
    engine = engine_at(server, kind, pool_size=2, max_overflow=3)
    async with running(healthy(engine)) as client:
        async with held(engine, 2):
            with holding(server.url, CONNECTIONS - 2):
                assert await ready(client) == SATURATED
                assert (pool_of(engine).checkedout(), pool_of(engine).checkedin()) == (2, 0)
        with holding(server.url, CONNECTIONS - 2):
            assert await ready(client) == UP
    await nobody_is_connected(server)


@every_driver
async def test_a_full_server_is_down_for_whoever_has_no_connection(
    server: PostgresServer, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    """If the server is full and the pool is empty, readiness fails, and the log has the cause."""
    engine = engine_at(server, kind)
    async with running(healthy(engine)) as client:
        with holding(server.url, CONNECTIONS):
            assert await ready(client) == DOWN
        assert "too many clients already" in caplog.text
        await becomes(UP, client)
    await nobody_is_connected(server)


@every_driver
async def test_a_full_server_is_down_if_the_pools_connections_are_lost(
    server: PostgresServer, kind: Kind
) -> None:
    """If the server is full and the pool's idle connections have died, readiness fails."""
    engine = engine_at(server, kind)
    async with running(healthy(engine)) as client:
        async with held(engine):
            pass
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        await nobody_is_connected(server)
        with holding(server.url, CONNECTIONS):
            assert await ready(client) == DOWN
    await nobody_is_connected(server)


@every_driver
@pytest.mark.parametrize("role_limit", [True, False], ids=["role", "database"])
async def test_a_limit_of_the_role_or_database_is_full_too(
    server: PostgresServer, kind: Kind, role_limit: bool
) -> None:
    """A role or database at its connection limit is saturated, not down, while the pool works."""
    limited = "ROLE clerk" if role_limit else "DATABASE desk"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("CREATE ROLE clerk LOGIN")
        connection.execute("CREATE DATABASE desk")
        connection.execute(f"ALTER {limited} CONNECTION LIMIT 1".encode())
    url = make_url(PostgresDatabase(server.url).url(kind.driver))
    engine = (create_async_engine if kind.asynchronous else create_engine)(
        url.set(username="clerk", database="desk")
    )
    try:
        async with running(healthy(engine)) as client, held(engine):
            assert await ready(client) == SATURATED
    finally:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("DROP DATABASE desk WITH (FORCE)")
            connection.execute("DROP ROLE clerk")


# --- unreachable, slow ---


@contextlib.contextmanager
def out_of_reach(way: str) -> Generator[int]:
    """Yield a port that accepts connections and never answers, or does not even accept them."""
    with contextlib.ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0 if way == "unanswered" else 100)
        port: int = listener.getsockname()[1]
        if way == "unanswered":
            # With a full backlog, the kernel drops all further packets, as if the host were off.
            for _ in range(2):
                filler = open_sockets.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
        yield port


@pytest.mark.parametrize("way", ["silent", "unanswered"])
@every_driver
async def test_a_host_out_of_reach_is_down_in_time(
    server: PostgresServer, kind: Kind, way: str, threads_before: set[threading.Thread]
) -> None:
    """A port that never answers is down in time, and costs no task and at most one stuck thread."""
    with contextlib.ExitStack() as away:
        engine = engine_at(server, kind, away.enter_context(out_of_reach(way)))
        async with running(healthy(engine, timeout=TIMEOUT)) as client:
            tasks = asyncio.all_tasks()
            for _ in range(5):
                assert await ready(client) == DOWN
                assert len(probing_threads() - threads_before) <= (0 if kind.asynchronous else 1)
            away.close()  # drivers notice this; otherwise they would wait for their own timeout
            await ended(tasks)
    await until(lambda: probing_threads() <= threads_before)


@asynccontextmanager
async def slow_port(server: PostgresServer, delay: list[float]) -> AsyncGenerator[int]:
    """Yield a port in front of the server that delays each piece of data by `delay[0]` seconds."""

    ends: list[asyncio.StreamWriter] = []
    passing: set[asyncio.Task[Any] | None] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await asyncio.sleep(delay[0])
                writer.write(data)
        writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing.add(asyncio.current_task())
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, back), copy(there, writer))

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as listener:
        yield listener.sockets[0].getsockname()[1]
        delay[0] = 0
        for each in ends:
            each.transport.abort()
        await asyncio.gather(*filter(None, passing))


async def test_a_slow_server_is_up_while_it_is_faster_than_the_deadline(
    server: PostgresServer, kind: Kind, threads_before: set[threading.Thread]
) -> None:
    """A server is down only if it takes longer than `down_after`, however short the timeout is.

    This holds for connections in the pool and outside it.
    """
    delay = [0.0]
    async with slow_port(server, delay) as port:
        engine = engine_at(server, kind, port, pool_size=1, max_overflow=0)
        async with running(healthy(engine)) as client:
            # Connecting takes several round trips, and so does the query.
            delay[0] = 0.02
            assert (await client.get("/health/ready")).json()["databases"] == UP[1]
        async with running(healthy(engine, timeout=TIMEOUT, down_after=PATIENT)) as client:
            delay[0] = 0
            await becomes(UP, client)
            delay[0] = 1.2 * TIMEOUT  # a log-in over a network of 75 ms, or a PgBouncer that queues
            for _ in range(2):
                assert await ready(client) == UP
            async with held(engine):
                assert (await ready(client))[0] == 200
            delay[0] = 0
        async with running(healthy(engine, timeout=TIMEOUT)) as client:
            async with held(engine):
                pass
            delay[0] = 0.01
            await becomes(UP, client)
            delay[0] = 2 * TIMEOUT
            for _ in range(2):
                assert await ready(client) == DOWN
            delay[0] = 0
            await becomes(UP, client)
            await until(lambda: probing_threads() <= threads_before)
            assert pool_of(engine).checkedout() == 0
    await nobody_is_connected(server)


async def test_two_servers_are_asked_together(server: PostgresServer, kind: Kind) -> None:
    """Servers that hang do not affect the state of another, and their timeouts do not add up."""
    engine = engine_at(server, kind)
    with contextlib.ExitStack() as ports:
        app = healthy(engine, timeout=3)
        for name in "first", "second", "third":
            away = engine_at(server, kind, ports.enter_context(out_of_reach("silent")))
            install_database(
                app, name=name, engine=away, shutdown=away.dispose, shutdown_timeout=0.1
            )
        async with running(app) as client:
            states = {"default": "up", "first": "down", "second": "down", "third": "down"}
            assert await ready(client, within=8) == (503, states)  # not three timeouts of 3 s


# --- many probes at once ---


async def test_a_storm_of_probes_is_one_question_in_the_servers_log(
    server: PostgresServer, kind: Kind
) -> None:
    """Many probes over HTTP cost one statement in the pool, or one connection outside it."""
    engine = engine_at(server, kind, pool_size=1, max_overflow=0)
    app = healthy(engine, timeout=30, max_age=60)
    app.include_router(health_router(prefix="/again", timeout=30, max_age=60))

    @app.get("/hold")
    async def hold() -> None:
        holding = held(engine)
        await holding.__aenter__()
        app.state.release = lambda: holding.__aexit__(None, None, None)

    @app.get("/release")
    async def release() -> None:
        await app.state.release()

    with serve(app) as served:
        served.client.get("/hold")
        served.client.get("/release")
        mark = len(server.log.read_text())
        await storm(served.url, "/health/ready", "up")
        said = server.log.read_text()[mark:]
        assert said.count(": SELECT 1") == 1
        assert said.count("connection authorized") == 0
        served.client.get("/hold")
        mark = len(server.log.read_text())
        await storm(served.url, "/again/ready", "saturated")
        assert server.log.read_text()[mark:].count("connection authorized") == 1
        served.client.get("/release")


async def storm(url: str, path: str, state: str) -> None:
    """Send sixty probes, twenty at a time, each on its own connection."""
    address = httpx.URL(url)
    request = f"GET {path} HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n".encode()
    at_a_time = asyncio.Semaphore(20)

    async def probe() -> bool:
        async with at_a_time:
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(request)
            answer = await reader.read()
            writer.close()
        return answer.startswith(b"HTTP/1.1 200 OK") and f'"default":"{state}"'.encode() in answer

    assert all(await asyncio.gather(*(probe() for _ in range(60))))


async def test_live_answers_while_every_request_hangs(server: PostgresServer, kind: Kind) -> None:
    """Live answers while the server is suspended and all requests wait for it or for the pool."""
    engine = engine_at(server, kind, pool_size=1, max_overflow=0, pool_timeout=2)
    app = healthy(engine, timeout=TIMEOUT)

    if isinstance(engine, AsyncEngine):

        @app.get("/work")
        async def work_async() -> None:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))

    else:

        @app.get("/work")
        def work() -> None:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))

    with serve(app) as served:
        assert served.client.get("/work").status_code == 200
        with stopped(server):
            async with httpx.AsyncClient(base_url=served.url, timeout=30, verify=NO_TLS) as client:
                hanging = [asyncio.create_task(client.get("/work")) for _ in range(60)]
                await until(lambda: pool_of(engine).checkedout() == 1)
                assert (await client.get("/health/live")).status_code == 200
                assert await ready(client) == DOWN
                assert (await client.get("/health/live")).status_code == 200
                for each in hanging:
                    each.cancel()
                await asyncio.wait(hanging)
    await nobody_is_connected(server)
