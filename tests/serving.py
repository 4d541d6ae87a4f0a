"""An application under test, written once for both colours and served by a real uvicorn."""

import asyncio
import contextlib
import os
import re
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import psycopg
import uvicorn
from anyio.to_thread import current_default_thread_limiter
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection, Engine, MetaData, Table, event, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.util import await_only
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_sqlnative import install_database
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.exceptions import (
    CommitOutcomeUnknownError,
    PartialCommitError,
    TransactionAbortedError,
    UncommittedChangesError,
)

# Without this, each client would load the system's certificates, which takes 20 ms.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Kind(NamedTuple):
    """A colour and a driver."""

    id: str
    driver: str
    asynchronous: bool


PSYCOPG_ASYNC = Kind("psycopg-async", "psycopg", True)
ASYNCPG = Kind("asyncpg", "asyncpg", True)
PSYCOPG = Kind("psycopg-sync", "psycopg", False)
KINDS = PSYCOPG_ASYNC, ASYNCPG, PSYCOPG
SQLITE = Kind("pysqlite", "pysqlite", False), Kind("aiosqlite", "aiosqlite", True)


class Base(DeclarativeBase):
    metadata = MetaData()


class Item(Base):
    """The table that tests write to, with a constraint on `position` that is checked at COMMIT."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    position: Mapped[int | None]


ANSWERED = (
    CommitOutcomeUnknownError,
    IntegrityError,
    PartialCommitError,
    TransactionAbortedError,
    UncommittedChangesError,
)
items: Table = Base.metadata.tables["item"]


SLOW_COMMIT = """
DROP TABLE IF EXISTS slow;
CREATE TABLE slow (id serial);
CREATE OR REPLACE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_sleep({}); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION take_time();
"""


# Of FastAPI's threads, of which there are forty, so that few requests need more.
THREADS = 8


@contextlib.asynccontextmanager
async def few_threads(_app: FastAPI) -> AsyncGenerator[None]:
    """Reduce the number of threads, as a lifespan."""
    current_default_thread_limiter().total_tokens = THREADS
    yield


def hold_connects(engine: Engine | AsyncEngine) -> None:
    """Make each new connection wait until the lock of `Rows.locked(3)` is free."""

    def hold(connection: Any, _record: object) -> None:
        connection.cursor().execute("SELECT pg_advisory_lock(3)")

    event.listen(sync_engine(engine), "connect", hold)


def pid_of(session: Session) -> int:
    """Return the process ID of the server's side of a session's connection."""
    return int(session.scalars(text("SELECT pg_backend_pid()")).one())


class Rows:
    """The stored rows, as seen through a connection that no application under test uses."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection
        self.clear()

    def clear(self, *names: str) -> None:
        """Delete all rows, and add rows with these names."""
        # TRUNCATE takes six times as long. Like LOCK, it would wait for other users of the table.
        self.connection.execute(
            "LOCK item; DELETE FROM item; SELECT setval('item_id_seq', 1, false)"
        )
        for name in names:
            self.add(name)

    def add(self, name: str, position: int | None = None) -> None:
        """Store one row."""
        self.connection.execute(
            "INSERT INTO item (name, position) VALUES (%s, %s)", (name, position)
        )

    @property
    def names(self) -> list[str]:
        """Return the stored names in order."""
        found = self.connection.execute("SELECT name FROM item ORDER BY name").fetchall()
        return [name for (name,) in found]

    @property
    def positions(self) -> dict[str, int | None]:
        """Return the position of each stored name."""
        return dict(self.connection.execute("SELECT name, position FROM item").fetchall())

    def lose(self, session: Session) -> None:
        """Terminate the server process of a session's connection."""
        self.connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid_of(session),))

    def backends(self, state: str = "%", application: str = "%", wait: str = "%") -> int:
        """Count this database's other connections, as `backends` does."""
        return backends(self.connection, state, application, wait)

    def make_commits_slow(self, seconds: float) -> None:
        """Create an empty table `slow`, in which committing a row takes this many seconds."""
        self.connection.execute(SLOW_COMMIT.format(seconds).encode())

    @contextlib.contextmanager
    def locked(self, key: int) -> Generator[None]:
        """Hold an advisory lock of the first database until the block ends."""
        self.connection.execute("SELECT pg_advisory_lock(%s)", (key,))
        try:
            yield
        finally:
            self.connection.execute("SELECT pg_advisory_unlock(%s)", (key,))

    def waits(self) -> bool:
        """Return whether exactly one other connection waits for a lock."""
        return self.backends(wait="Lock/%") == 1

    def sleeps(self) -> bool:
        """Return whether exactly one other connection is in `pg_sleep` and so can be cancelled.

        The server ignores a cancel request that arrives before it has read the statement of an
        active connection.
        """
        return self.backends(wait="%/PgSleep") == 1

    @property
    def at_work(self) -> list[tuple[str, str, str]]:
        """Return the state, wait event and query of each other connection that is not idle."""
        return self.connection.execute(
            "SELECT state, coalesce(wait_event, ''), left(query, 60) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend' AND state <> 'idle'"
        ).fetchall()


def backends(
    connection: psycopg.Connection, state: str = "%", application: str = "%", wait: str = "%"
) -> int:
    """Count a database's other connections by state, application name and wait event.

    A state is, for example, `idle in transaction`. The server is late to notice connections that
    were closed without a message, so wait for the expected count.
    """
    # Within a transaction, the server would otherwise repeat its first answer.
    connection.execute("SELECT pg_stat_clear_snapshot()")
    found = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        " AND state LIKE %s AND application_name LIKE %s"
        " AND concat(wait_event_type, '/', wait_event) LIKE %s",
        (state, application, wait),
    ).fetchone()
    assert found is not None
    return int(found[0])


def named(driver: str, application: str) -> dict[str, Any]:
    """Return the connect_args that set the application name of a driver's connections."""
    settings = {"application_name": application}
    return {"server_settings": settings} if driver == "asyncpg" else settings


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds that the server, another thread or a process brings about.

    The time limit only catches conditions that never hold: on a busy machine, anything may take a
    while.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds, without blocking the event loop."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing notifies us
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def holding(url: str, count: int) -> Generator[None]:
    """Hold `count` connections, which must be all that the server has left.

    Other connections may still be closing, so each attempt is repeated until it succeeds.
    """
    with contextlib.ExitStack() as held:

        def connects() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                held.enter_context(psycopg.connect(url))
                return True
            return False

        for _ in range(count):
            wait_until(connects)
        yield


def probing_threads() -> set[threading.Thread]:
    """Return the threads that the package has started for calls that may hang."""
    return {each for each in threading.enumerate() if each.name == "fastapi_sqlnative"}


def using(kind: Kind, marker: Any, body: Callable[[Session], Any]) -> Callable[..., Any]:
    """Make a dependency or an endpoint with one session, in the kind's colour."""

    async def asynchronous(session: Annotated[AsyncSession, marker]) -> Any:
        return await session.run_sync(body)

    def synchronous(session: Annotated[Session, marker]) -> Any:
        return body(session)

    return asynchronous if kind.asynchronous else synchronous


def route(
    app: FastAPI,
    kind: Kind,
    path: str,
    dependency: Callable[..., Any],
    body: Callable[[Session], Any],
    **options: Any,
) -> None:
    """Add `POST path`: an `async def` endpoint for async kinds, a `def` endpoint for sync ones."""
    endpoint = using(kind, Depends(dependency), body)
    # A response model, even `Any`, accounts for half of a route's cost.
    app.post(path, **{"status_code": 201, "response_model": None, **options})(endpoint)


def of_the_transaction(session: Session) -> list[Connection]:
    """Return the connections of the session's transaction."""
    # `connections` exists since SQLAlchemy 2.1.7.
    found = getattr(session.get_transaction(), "connections", None)
    return [session.connection()] if found is None else list(found)


def copy(session: Session, *names: str) -> None:
    """Write rows with COPY, through the driver's own connection."""
    driver: Any = session.connection().connection.driver_connection
    if hasattr(driver, "copy_records_to_table"):
        records = [(name,) for name in names]
        await_only(driver.copy_records_to_table("item", records=records, columns=["name"]))
        return
    copying = driver.cursor().copy("COPY item (name) FROM STDIN")
    if isinstance(driver, psycopg.Connection):
        with copying as copied:
            for name in names:
                copied.write_row([name])
    else:
        await_only(_copy(copying, names))


async def _copy(copying: Any, names: Sequence[str]) -> None:
    async with copying as copied:
        for name in names:
            await copied.write_row([name])


def make_app(
    engine: Engine | AsyncEngine,
    *,
    answered: Iterable[type[Exception]] = ANSWERED,
    status: int = 409,
    **options: Any,
) -> FastAPI:
    """Make an application with one database, whose error responses name the exception's class."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose, **options)

    def answer(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": type(error).__name__}, status)

    for failure in answered:
        app.add_exception_handler(failure, answer)
    return app


def add(
    name: str, position: int | None = None, *, flush: bool = False
) -> Callable[[Session], dict[str, str]]:
    """Make a body that adds one row."""

    def body(session: Session) -> dict[str, str]:
        session.add(Item(name=name, position=position))
        if flush:
            session.flush()
        return {"name": name}

    return body


def names(session: Session) -> list[str]:
    """Return the stored names in order, as a body."""
    return list(session.scalars(select(Item.name).order_by(Item.name)))


def validate_openapi(document: Any) -> None:
    """Fail unless the OpenAPI document is valid."""
    from openapi_spec_validator import validate  # takes 0.1 s, and most workers do not need it

    validate(document)


RUNNING = re.compile(r"http://127\.0\.0\.1:\d+")


@dataclass
class Served:
    """A running server: its client, its address and the status of each response it has started."""

    client: httpx.Client
    url: str
    server: "_Server"
    starts: list[int]

    def post(self, path: str, **options: Any) -> httpx.Response:
        """Send one request, and assert that exactly one response was started."""
        self.starts.clear()
        response = self.client.post(path, **options)
        assert len(self.starts) == 1
        return response


class _CountStarts:
    """A middleware that records each `http.response.start` that reaches the server."""

    def __init__(self, app: ASGIApp, starts: list[int]) -> None:
        self.app = app
        self.starts = starts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.starts.append(message["status"])
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)


class _Server(uvicorn.Server):
    """A server that signals when it is ready, stops at an event, and leaves signals to pytest."""

    ready: threading.Event

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.loop, self.ending = asyncio.get_running_loop(), asyncio.Event()
        self.ready.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.ending.wait()  # uvicorn polls ten times a second

    def end(self) -> None:
        """Shut down gracefully, from any thread."""
        self.loop.call_soon_threadsafe(self.ending.set)

    async def shutdown(self, sockets: Any = None) -> None:
        """Shut down as uvicorn does, without its pause of a tenth of a second."""
        if self.config.timeout_graceful_shutdown is not None:
            await super().shutdown(sockets)
            return
        for server in self.servers:
            server.close()
        for connection in [*self.server_state.connections]:
            connection.shutdown()
        await until(lambda: not (self.server_state.connections or self.server_state.tasks))
        await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@contextlib.contextmanager
def serve(app: ASGIApp, **options: Any) -> Generator[Served]:
    """Run the application under uvicorn on a free port, and stop it gracefully."""
    starts: list[int] = []
    config = uvicorn.Config(
        _CountStarts(app, starts), port=0, log_level="error", lifespan="on", **options
    )
    server = _Server(config)
    server.ready = threading.Event()
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.ready.wait(0.05):
        assert thread.is_alive(), "the application did not start"
    try:
        host, port = server.servers[0].sockets[0].getsockname()
        url = f"http://{host}:{port}"
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=url, timeout=20, limits=limits, verify=NO_TLS) as client:
            yield Served(client, url, server, starts)
    finally:
        server.end()
        thread.join(20)
    assert not thread.is_alive()


async def flood(served: Served, path: str, times: int = 45) -> list[int]:
    """Send more requests at once than there are threads, and return the status of each."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=served.url, limits=limits, timeout=50, verify=NO_TLS
    ) as client:
        responses = await asyncio.gather(*(client.post(path) for _ in range(times)))
    return [response.status_code for response in responses]


@contextlib.contextmanager
def launch(
    command: Sequence[str], directory: Path, **environment: str
) -> Generator[tuple["subprocess.Popen[str]", httpx.Client]]:
    """Run uvicorn on port 0 as a process, and yield it with a client for the port that it chose."""
    with subprocess.Popen(
        command, cwd=directory, env=os.environ | environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        try:
            while (found := RUNNING.search(said)) is None:
                line = process.stderr.readline()
                assert line, said
                said += line
            with httpx.Client(base_url=found[0], timeout=10, verify=NO_TLS) as client:
                yield process, client
        finally:
            process.kill()
