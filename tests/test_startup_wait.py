"""`startup_wait` waits for a database that is not available yet, up to a limit."""

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import psycopg
import pytest
import sqlalchemy
from fastapi import FastAPI
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from conftest import PostgresDatabase, WorkerPostgres
from fastapi_sqlnative import install_database, installed_databases
from fastapi_sqlnative._lifespan import lifespan
from fastapi_sqlnative._sessions.engines import run_on_engine, sync_engine
from tests.conftest import MakeEngine
from tests.in_process import running, sqlite, start_and_stop
from tests.postgres_server import PostgresServer
from tests.serving import KINDS, Kind, Rows, hold_connects, holding, named, until, wait_until

pytestmark = pytest.mark.anyio

# --- a database that is not available yet ---

CANNOT_CONNECT_NOW = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"


class LatePort:
    """A port that misbehaves at first, and forwards to PostgreSQL after `come_up`."""

    def __init__(self, before: str, target: tuple[str, int]) -> None:
        self.before = before
        self.target = target
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))  # the port is reserved, and refuses until it listens
        self.silent: list[asyncio.StreamWriter] = []
        self.server: asyncio.Server | None = None

    async def listen(self) -> None:
        self.server = await asyncio.start_server(self.serve, sock=self.socket)

    async def come_up(self) -> None:
        self.before = ""
        for writer in self.silent:
            writer.close()
        if self.server is None:
            await self.listen()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.before == "stays silent":
            self.silent.append(writer)
            return
        if self.before == "is starting":
            await self.answer_not_yet(reader, writer)
        if not self.before:
            await self.pass_on(reader, writer)
        writer.close()

    async def answer_not_yet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        length, code = struct.unpack("!ii", await reader.readexactly(8))
        if code == 80877103:  # SSLRequest
            writer.write(b"N")
            (length, _) = struct.unpack("!ii", await reader.readexactly(8))
        await reader.readexactly(length - 8)
        writer.write(b"E" + struct.pack("!i", 4 + len(CANNOT_CONNECT_NOW)) + CANNOT_CONNECT_NOW)
        await writer.drain()

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self.target)
        both = asyncio.gather(copy(reader, back), copy(there, writer))
        with contextlib.suppress(ConnectionError):
            await both


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


@asynccontextmanager
async def late_port(before: str, postgres: WorkerPostgres) -> AsyncGenerator[LatePort]:
    url = make_url(postgres.dsn)
    assert url.host is not None
    port = LatePort(before, (url.host, url.port or 5432))
    if before != "refuses":
        await port.listen()
    try:
        yield port
    finally:
        await port.come_up()
        assert port.server is not None
        port.server.close()
        await port.server.wait_closed()


def engine_at(port: LatePort, kind: Kind, postgres: WorkerPostgres) -> Engine | AsyncEngine:
    """Build an engine that connects to the port, with a password to look for in the log."""
    url = make_url(postgres.url(kind.driver)).set(
        host="127.0.0.1", port=port.socket.getsockname()[1]
    )
    if url.password is None:
        url = url.set(password="seldom-seen")
    return (create_async_engine if kind.asynchronous else create_engine)(url)


def counted_attempts(engine: Engine | AsyncEngine) -> list[object]:
    """Record each attempt of the engine to connect."""
    attempts: list[object] = []
    event.listen(sync_engine(engine), "do_connect", lambda *given: attempts.append(given))
    return attempts


class Warnings(logging.Handler):
    """A handler that collects what the package logs, and sets an event when something arrives."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.arrived = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.arrived.set()


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    handler = Warnings()
    logger = logging.getLogger("fastapi_sqlnative")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


# --- starting with such a database ---


@pytest.mark.parametrize("before", ["refuses", "hangs up", "is starting", "stays silent"])
async def test_a_start_waits_for_a_database_that_comes_up_late(
    kind: Kind,
    postgres: WorkerPostgres,
    before: str,
    warnings: Warnings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `startup_wait`, a start tries until the database answers, and logs each failure."""
    monkeypatch.setattr(lifespan, "_ATTEMPT", 0.3)
    async with late_port(before, postgres) as port:
        engine = engine_at(port, kind, postgres)
        attempts = counted_attempts(engine)
        app = FastAPI()
        install_database(app, name="late", engine=engine, shutdown=engine.dispose, startup_wait=20)
        start = asyncio.create_task(start_and_stop(app))
        for tried in 1, 2:
            await asyncio.wait_for(warnings.arrived.wait(), 10)
            warnings.arrived.clear()
            assert (start.done(), len(warnings.messages)) == (False, tried)
        await port.come_up()
        await start
    assert len(warnings.messages) == len(attempts) - 1
    for message in warnings.messages:
        assert message.startswith("Database 'late' does not answer yet (")
        assert str(engine.url.password) not in message


@pytest.mark.parametrize("before", ["refuses", "stays silent"])
async def test_a_start_does_not_wait_for_ever(
    kind: Kind, postgres: WorkerPostgres, before: str, warnings: Warnings
) -> None:
    """When the time is up, the start fails with SQLAlchemy's error or a TimeoutError.

    The error names the database.
    """
    async with late_port(before, postgres) as port:
        engine = engine_at(port, kind, postgres)
        app = FastAPI()
        install_database(
            app,
            name="late",
            engine=engine,
            shutdown=engine.dispose,
            startup_wait=0.5,
            shutdown_timeout=0.1,  # does not wait for a thread that still connects
        )
        errors = (SQLAlchemyError, TimeoutError)
        with pytest.raises(errors, match=r"Database 'late' did not answer in 0\.5 s"):
            await start_and_stop(app)
    assert len(warnings.messages) < 8  # there are pauses between attempts


async def test_without_startup_wait_nothing_connects(
    kind: Kind, postgres: WorkerPostgres, warnings: Warnings
) -> None:
    """Without `startup_wait`, an application starts even if its database is unavailable.

    Nothing connects at start-up.
    """
    async with late_port("refuses", postgres) as port:
        engine = engine_at(port, kind, postgres)
        app = FastAPI()
        install_database(app, engine=engine, shutdown=engine.dispose)
        async with running(app):
            assert installed_databases(app)["default"].pool_status().checked_in == 0
    assert warnings.messages == []


async def test_a_database_that_answers_is_asked_once(warnings: Warnings) -> None:
    """A database that answers at the first attempt, however slowly, is asked once.

    Nothing is logged.
    """
    app, engine = FastAPI(), sqlite()
    attempts = counted_attempts(engine)
    event.listen(engine, "do_connect", lambda *_: time.sleep(0.2))
    install_database(app, engine=engine, shutdown=engine.dispose, startup_wait=5)
    await start_and_stop(app)
    assert (len(attempts), warnings.messages) == (1, [])


async def test_a_mistake_fails_the_start_at_once(warnings: Warnings) -> None:
    """An error that is not a database error is raised unchanged, with a note about the database."""
    app, engine = FastAPI(), sqlite()

    def fail(*_: object) -> None:
        raise LookupError

    event.listen(engine, "do_connect", fail)
    install_database(app, engine=engine, startup_wait=20)
    with pytest.raises(LookupError) as raised:
        await start_and_stop(app)
    note = "Database 'default' answered with an error that waiting will not fix."
    assert raised.value.__notes__ == [note]
    assert warnings.messages == []


async def test_a_wait_can_be_cancelled(kind: Kind, postgres: WorkerPostgres) -> None:
    """A start that waits for its database can be cancelled, by anyio or by asyncio."""
    async with late_port("stays silent", postgres) as port:
        engine = engine_at(port, kind, postgres)
        app = FastAPI()
        install_database(
            app, engine=engine, shutdown=engine.dispose, startup_wait=60, shutdown_timeout=0.1
        )
        with anyio.move_on_after(0.3) as scope:
            await start_and_stop(app)
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(start_and_stop(app), 0.3)


@pytest.mark.skipif(
    sqlalchemy.__version__.startswith("2.0"),
    reason="SQLAlchemy 2.0 leaves the connection whose `connect` event is cancelled",
)
@pytest.mark.parametrize("kind", KINDS[:2], indirect=True, ids=lambda kind: kind.id)
async def test_a_wait_that_is_cancelled_leaves_no_connection(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """A cancelled start closes what it has connected by then.

    A synchronous driver is not interrupted, so it is not tested.
    """
    name = f"cancelled start {kind.id}"
    engine = make_engine(connect_args=named(kind.driver, name))
    hold_connects(engine)
    app = FastAPI()
    install_database(
        app, engine=engine, shutdown=engine.dispose, startup_wait=60, shutdown_timeout=0.1
    )
    with rows.locked(3):
        starting = asyncio.create_task(start_and_stop(app))
        await until(lambda: rows.backends("active", name) == 1)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await until(lambda: rows.backends(application=name) == 0)


# --- a database that refuses, or that is full ---

RULES = """
host  all  clerk     127.0.0.1/32  scram-sha-256
host  all  stranger  127.0.0.2/32  trust
host  all  postgres,ghost,retired  127.0.0.1/32  trust
host  all  porter    127.0.0.1/32  trust
"""
PREPARATION = """
CREATE ROLE clerk LOGIN PASSWORD 'right';
CREATE ROLE stranger LOGIN;
CREATE ROLE porter LOGIN;
CREATE ROLE retired;
CREATE DATABASE closed;
REVOKE CONNECT ON DATABASE closed FROM PUBLIC;
"""
CONNECTIONS = 12  # more than the closed connections that the server may not have noticed yet
DRIVERS = (*KINDS, Kind("psycopg2", "psycopg2", False))
each_driver = pytest.mark.parametrize("driver", DRIVERS, ids=lambda kind: kind.id)


@pytest.fixture(scope="module")
def strict_server() -> Iterator[PostgresServer]:
    """Run a server with few connections, which does not accept every user."""
    settings = {"max_connections": str(CONNECTIONS), "superuser_reserved_connections": "0"}
    with PostgresServer(settings=settings) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            for statement in PREPARATION.strip().splitlines():
                connection.execute(statement.encode())
            (server._data / "pg_hba.conf").write_text(RULES)
            connection.execute("SELECT pg_reload_conf()")
        wait_until(lambda: not lets_in(server, "stranger"))
        yield server


def lets_in(server: PostgresServer, user: str) -> bool:
    try:
        psycopg.connect(server.url, user=user).close()
    except psycopg.OperationalError:
        return False
    return True


def strict_engine(server: PostgresServer, driver: Kind, **parts: Any) -> Engine | AsyncEngine:
    url = make_url(PostgresDatabase(server.url).url(driver.driver)).set(**parts)
    return (create_async_engine if driver.asynchronous else create_engine)(url)


@each_driver
@pytest.mark.parametrize(
    "parts",
    [
        {"username": "clerk", "password": "seldom-seen"},
        {"username": "clerk"},
        {"username": "ghost"},
        {"username": "retired"},
        {"username": "stranger"},
        {"database": "nowhere"},
        {"username": "porter", "database": "closed"},
    ],
    ids=[
        "wrong-password",
        "no-password",
        "unknown-role",
        "no-login",
        "no-rule",
        "unknown-database",
        "no-privilege",
    ],
)
async def test_a_refusal_fails_the_start_at_once(
    strict_server: PostgresServer, driver: Kind, parts: dict[str, str], warnings: Warnings
) -> None:
    """A failure that waiting cannot fix ends start-up at once, and the error says so."""
    engine = strict_engine(strict_server, driver, **parts)
    app = FastAPI()
    install_database(app, name="desk", engine=engine, shutdown=engine.dispose, startup_wait=60)
    expected = "Database 'desk' answered with an error that waiting will not fix"
    with pytest.raises(Exception, match=expected) as failed:
        await start_and_stop(app)
    assert "seldom-seen" not in str(failed.value)
    assert warnings.messages == []


@each_driver
async def test_a_right_password_starts(
    strict_server: PostgresServer, driver: Kind, warnings: Warnings
) -> None:
    """A start with the right password succeeds on the same server."""
    engine = strict_engine(strict_server, driver, username="clerk", password="right")
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose, startup_wait=60)
    await start_and_stop(app)
    assert warnings.messages == []


@each_driver
async def test_a_start_waits_for_a_full_server(
    strict_server: PostgresServer, driver: Kind, warnings: Warnings
) -> None:
    """A start waits for a full server, because a connection may be free soon."""
    engine = strict_engine(strict_server, driver)
    app = FastAPI()
    install_database(app, name="desk", engine=engine, shutdown=engine.dispose, startup_wait=60)
    with holding(strict_server.url, CONNECTIONS):
        start = asyncio.create_task(start_and_stop(app))
        await warnings.arrived.wait()
        assert not start.done()
    await start
    assert warnings.messages[0].startswith("Database 'desk' does not answer yet (")


async def test_a_start_waits_for_a_busy_pool(
    kind: Kind, make_engine: MakeEngine, warnings: Warnings
) -> None:
    """A start waits for an engine whose connections are in use, because one may be free soon."""
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.05)
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose, startup_wait=60)
    held = await run_on_engine(engine, Engine.connect)
    start = asyncio.create_task(start_and_stop(app))
    await asyncio.wait_for(warnings.arrived.wait(), 10)
    await run_on_engine(engine, lambda _: held.close())
    await start
