"""What a shutdown closes, in which order, and how long it may take."""

import asyncio
import functools
import logging
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    get_database_handle,
    get_db,
    health_router,
    install_database,
    installed_databases,
)
from fastapi_sqlnative._lifespan import lifespan
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.databases import AnyDatabase, sessions_of
from fastapi_sqlnative.exceptions import DatabaseNotStartedError
from tests.conftest import MakeEngine
from tests.in_process import (
    async_sqlite,
    client_of,
    counted_waits,
    noting,
    running,
    sqlite,
    start_and_stop,
    turns,
)
from tests.serving import NO_TLS, Kind, Rows, hold_connects, named, serve, until, wait_until

pytestmark = pytest.mark.anyio


class HookError(Exception):
    """The error of a failing hook."""


# --- order and failures ---


async def test_databases_close_in_reverse_order() -> None:
    """Databases close in reverse order of installation, each with its hook and then its engine."""
    log: list[str] = []
    app = FastAPI()
    for name in "first", "second", "third":
        hook = functools.partial(log.append, f"{name} hook")
        install_database(app, name=name, engine=noting(log, f"{name} engine"), shutdown=hook)
    await start_and_stop(app)
    assert log == [
        f"{name} {part}" for name in ("third", "second", "first") for part in ("hook", "engine")
    ]


def fail() -> None:
    raise HookError("sync")


async def fail_later() -> None:
    await asyncio.sleep(0)
    raise HookError("async")


async def time_out_by_itself() -> None:
    raise TimeoutError("the flush of the outbox")


async def await_what_was_cancelled() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    await task


async def fail_as_a_group() -> None:
    raise ExceptionGroup("several", [HookError("in a group")])


FAILURES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "sync": (fail, HookError, "sync"),
    "async": (fail_later, HookError, "async"),
    "its-own-timeout": (time_out_by_itself, TimeoutError, "the flush of the outbox"),
    "cancelled-task": (await_what_was_cancelled, RuntimeError, "CancelledError, although"),
    "group": (fail_as_a_group, ExceptionGroup, "several"),
}


@pytest.mark.parametrize(("hook", "kind", "message"), FAILURES.values(), ids=FAILURES)
async def test_a_hook_that_fails_does_not_stop_the_others(
    hook: Callable[[], object], kind: type[Exception], message: str
) -> None:
    """If a hook fails, all other databases still close, and the error names the hook's database.

    The engine that a factory built is disposed of even if the hook before it has failed.
    """
    log: list[str] = []
    app = FastAPI()
    install_database(app, name="first", engine=sqlite(), shutdown=lambda: log.append("first"))
    install_database(app, name="bad", engine=noting(log), shutdown=hook)
    install_database(app, name="last", engine=sqlite(), shutdown=lambda: log.append("last"))
    with pytest.raises(ExceptionGroup, match="Databases failed to shut down") as raised:
        await start_and_stop(app)
    assert log == ["last", "disposed", "first"]
    [error] = raised.value.exceptions
    assert isinstance(error, kind)
    assert message in str(error)
    assert error.__notes__ == ["In the shutdown hook of database 'bad'."]
    with pytest.raises(DatabaseNotStartedError):
        installed_databases(app)["bad"]


async def test_all_failures_are_raised_together() -> None:
    """Several failures are raised as one group, in the order in which they happened."""
    app = FastAPI()
    for name, hook in ("first", fail), ("second", fail_later), ("third", fail):
        install_database(app, name=name, engine=sqlite(), shutdown=hook)
    with pytest.raises(ExceptionGroup) as raised:
        await start_and_stop(app)
    assert [str(error) for error in raised.value.exceptions] == ["sync", "async", "sync"]


async def test_an_application_starts_again_after_a_failed_shutdown() -> None:
    """An application whose shutdown hook failed once can start again."""
    failures = [fail]
    app = FastAPI()
    install_database(
        app,
        engine=async_sqlite(),
        shutdown=lambda: failures and failures.pop()(),
    )
    with pytest.raises(ExceptionGroup):
        await start_and_stop(app)
    await start_and_stop(app)


async def test_an_error_of_the_application_is_not_lost() -> None:
    """If the application's lifespan and a hook both fail, the errors of both can be read."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield
        raise ZeroDivisionError

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=sqlite(), shutdown=fail)
    with pytest.raises(ExceptionGroup) as raised:
        await start_and_stop(app)
    assert isinstance(raised.value.__context__, ZeroDivisionError)


# --- deadlines ---


class Hanging:
    """A hook that does not end by itself."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.over = asyncio.Event()

    def end(self) -> None:
        self.go_on.set()
        self.over.set()

    def block(self) -> None:
        self.go_on.wait()

    async def sleep(self) -> None:
        await asyncio.Event().wait()

    async def sleep_whatever_comes(self) -> None:
        while not self.over.is_set():
            with suppress(asyncio.CancelledError):
                await self.over.wait()

    async def sleep_shielded(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.sleep_whatever_comes()

    def wait_for_a_coroutine(self) -> Any:
        return self.sleep()


HANGING: dict[str, Callable[[Hanging], Callable[[], object]]] = {
    "sync": lambda hook: hook.block,
    "async": lambda hook: hook.sleep,
    "lambda-of-a-coroutine": lambda hook: hook.wait_for_a_coroutine,
    "refuses-to-be-cancelled": lambda hook: hook.sleep_whatever_comes,
    "shielded": lambda hook: hook.sleep_shielded,
}


@pytest.mark.parametrize("chosen", HANGING.values(), ids=HANGING)
async def test_a_hook_that_hangs_ends_at_its_deadline(
    chosen: Callable[[Hanging], Callable[[], object]],
) -> None:
    """A hook that hangs is given up at its deadline and named, and the other hooks still run."""
    log: list[str] = []
    hook = Hanging()
    app = FastAPI()
    install_database(app, name="first", engine=sqlite(), shutdown=lambda: log.append("first"))
    install_database(
        app, name="hanging", engine=sqlite(), shutdown=chosen(hook), shutdown_timeout=0.1
    )
    before = asyncio.all_tasks()
    with pytest.raises(ExceptionGroup) as raised:
        await start_and_stop(app)
    hook.end()
    [error] = raised.value.exceptions
    assert isinstance(error, TimeoutError)
    assert "did not end within 0.1 s" in str(error)
    assert error.__notes__ == ["In the shutdown hook of database 'hanging'."]
    assert log == ["first"]
    await asyncio.gather(*asyncio.all_tasks() - before, return_exceptions=True)  # left behind


async def test_a_hook_within_its_deadline_is_awaited() -> None:
    """The shutdown waits for a slow hook that ends within its deadline."""
    slow = Slow()
    app = FastAPI()
    install_database(app, engine=sqlite(), shutdown=slow)
    stopping = asyncio.create_task(start_and_stop(app))
    await slow.started.wait()
    await turns()
    assert not stopping.done()
    slow.go_on.set()
    await stopping
    assert slow.log == ["hook"]


class Slow:
    """A hook that ends when `go_on` is set."""

    def __init__(self) -> None:
        self.started, self.go_on = asyncio.Event(), asyncio.Event()
        self.log: list[str] = []

    async def __call__(self) -> None:
        self.started.set()
        await self.go_on.wait()
        self.log.append("hook")


async def test_the_time_for_all_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hanging hooks share the longest of their timeouts, and later hooks get a short minimum."""
    monkeypatch.setattr(lifespan, "_LEAST", 0.1)
    hook = Hanging()
    app = FastAPI()
    for name, seconds in ("a", 0.5), ("b", 0.6), ("c", 0.5):
        install_database(
            app, name=name, engine=sqlite(), shutdown=hook.sleep, shutdown_timeout=seconds
        )
    with pytest.raises(ExceptionGroup) as raised:
        await start_and_stop(app)
    first, *others = (re.findall(r"[\d.]+\d", str(each))[0] for each in raised.value.exceptions)
    assert 0.1 < float(first) <= 0.5
    assert others == ["0.1", "0.1"]  # what the first has left of 0.6, and the minimum


def test_a_hook_that_hangs_does_not_keep_the_process() -> None:
    """A blocking hook that never returns does not keep the process from ending."""
    program = """
        import asyncio, threading
        from fastapi import FastAPI
        from sqlalchemy import create_engine
        from fastapi_sqlnative import install_database

        app = FastAPI()
        engine, hang = create_engine("sqlite://"), threading.Event().wait
        install_database(app, engine=engine, shutdown=hang, shutdown_timeout=0.1)

        async def main():
            async with app.router.lifespan_context(app):
                pass

        try:
            asyncio.run(main())
        except* TimeoutError:
            print("given up")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "given up\n"


# --- connections still in use ---


class Held:
    """A task of the application that holds a connection across the end of the lifespan."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()

    async def start(self, app: FastAPI) -> None:
        self.task = asyncio.create_task(self.hold(installed_databases(app)["default"]))
        await self.entered.wait()

    async def hold(self, database: object) -> None:
        assert isinstance(database, AsyncDatabase)
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            self.entered.set()
            await self.go_on.wait()
            await session.execute(text("SELECT 2"))


@asynccontextmanager
async def shutting_down(app: FastAPI) -> AsyncGenerator[AsyncDatabase]:
    """Hold an application in its shutdown, which waits for a session until the block ends."""
    held = Held()

    async def run() -> None:
        async with app.router.lifespan_context(app):
            await held.start(app)

    stopping = asyncio.create_task(run())
    await held.entered.wait()
    kept = installed_databases(app)["default"]
    assert isinstance(kept, AsyncDatabase)
    await until(lambda: is_refusing(kept))  # there is no event for the start of a shutdown
    yield kept
    held.go_on.set()
    await stopping
    await held.task


def is_refusing(database: AsyncDatabase) -> bool:
    try:
        sessions_of(database).open()
    except DatabaseNotStartedError:
        return True
    return False


async def test_a_shutdown_waits_for_connections_in_use(postgres: WorkerPostgres) -> None:
    """A shutdown calls no hook while a connection is in use, and the work that uses it goes on."""
    engine = create_async_engine(postgres.url("psycopg"))
    called = asyncio.Event()

    async def shutdown() -> None:
        called.set()
        await engine.dispose()

    app = FastAPI()
    install_database(app, engine=engine, shutdown=shutdown)
    async with shutting_down(app):
        await turns()
        assert not called.is_set()
    assert called.is_set()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_a_stranded_connection_is_logged(
    postgres: WorkerPostgres, rows: Rows, caplog: pytest.LogCaptureFixture, driver: str
) -> None:
    """After the deadline, a session in use is logged, runs no more statements and is closed."""
    name = f"stranded-{driver}-{threading.get_native_id()}"
    engine = create_async_engine(postgres.url(driver), connect_args=named(driver, name))
    held = Held()
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose, shutdown_timeout=0.1)
    with caplog.at_level(logging.WARNING, "fastapi_sqlnative"):
        async with running(app):
            await held.start(app)
    assert "Database 'default' is closed with 1 connection(s) still in use" in caplog.text
    held.go_on.set()
    with pytest.raises(DatabaseNotStartedError, match="'default' is stopped"):
        await held.task
    wait_until(lambda: rows.backends(application=name) == 0)


async def test_a_session_that_connects_after_the_shutdown_is_refused(
    kind: Kind, make_engine: MakeEngine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A session that first connects after the shutdown raises, sends nothing and is closed."""
    name = f"late {kind.id}"
    engine = make_engine(connect_args=named(kind.driver, name))
    hold_connects(engine)
    sent: list[object] = []
    event.listen(sync_engine(engine), "before_cursor_execute", lambda *said: sent.append(said))
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    with rows.locked(3):
        async with running(app):
            database = installed_databases(app)["default"]
            late = asyncio.create_task(executing(database, "CREATE TABLE late (id int)"))
            await until(lambda: rows.backends("active", name) == 1)
    with pytest.raises(DatabaseNotStartedError, match="'default' is stopped"):
        await late
    await until(lambda: rows.backends(application=name) == 0)
    assert sent == []
    assert "fastapi_sqlnative" not in caplog.text


async def executing(database: AnyDatabase, statement: str) -> None:
    """Execute and commit a statement through a handle, in a thread if the handle is sync."""
    if isinstance(database, AsyncDatabase):
        async with database.transaction() as session:
            await session.execute(text(statement))
        return

    def work() -> None:
        with database.transaction() as session:
            session.execute(text(statement))

    await asyncio.to_thread(work)


async def test_the_longest_time_counts_for_all(
    postgres: WorkerPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """A database's short timeout does not shorten the time that the sessions of others have."""
    engine = create_async_engine(postgres.url("psycopg"))
    app = FastAPI()
    install_database(app, name="short", engine=sqlite, shutdown_timeout=0.01)
    install_database(app, engine=engine, shutdown=engine.dispose)
    async with shutting_down(app):
        await asyncio.sleep(0.1)  # longer than the short timeout
    assert "still in use" not in caplog.text


async def test_a_shutdown_does_not_wait_for_another_application(
    kind: Kind, make_engine: MakeEngine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A shutdown does not wait for another application's sessions on the same engine."""
    engine, ours, other = make_engine(), FastAPI(), FastAPI()
    install_database(other, engine=engine, shutdown=engine.dispose)
    install_database(ours, engine=engine, shutdown_timeout=600)  # longer than the test
    async with running(other):
        database = installed_databases(other)["default"]
        if isinstance(database, AsyncDatabase):
            async with database.session() as held:
                await held.execute(text("SELECT 1"))
                await start_and_stop(ours)
                assert await held.scalar(text("SELECT 7")) == 7
        else:
            with database.session() as session:
                session.execute(text("SELECT 1"))
                await start_and_stop(ours)
                assert session.scalar(text("SELECT 7")) == 7
    assert "still in use" not in caplog.text


async def test_a_session_asked_for_during_a_shutdown_is_refused(postgres: WorkerPostgres) -> None:
    """From the start of a shutdown, neither requests nor handles get a new session.

    A mounted application raises the same error, not that of a missing name. Readiness fails.
    """
    engine = create_async_engine(postgres.url("psycopg"))
    app, sub = FastAPI(), FastAPI()
    for each in app, sub:
        each.get("/")(reading)
    app.mount("/sub", sub)
    install_database(app, engine=engine, shutdown=engine.dispose)
    app.include_router(health_router())
    async with shutting_down(app) as kept, client_of(app) as client:
        readiness = await client.get("/health/ready")
        assert (readiness.status_code, readiness.json()["status"]) == (503, "draining")
        for path in "/", "/sub/":
            with pytest.raises(DatabaseNotStartedError, match="'default' is shutting down"):
                await client.get(path)
        with pytest.raises(DatabaseNotStartedError, match="'default' is shutting down"):
            async with kept.transaction():
                pytest.fail("it was handed out")
    with pytest.raises(DatabaseNotStartedError, match="'default' is stopped"):
        async with kept.session():
            pytest.fail("it was handed out")
    with pytest.raises(DatabaseNotStartedError):
        await kept.ping()


async def reading(session: Annotated[AsyncSession, Depends(get_db())]) -> int:
    await session.execute(text("SELECT 1"))
    return 1


# --- a cancelled shutdown ---


@pytest.mark.parametrize("again", [False, True], ids=["once", "again-and-again"])
async def test_a_cancelled_shutdown_still_closes(again: bool) -> None:
    """A shutdown that is cancelled closes everything before it passes the cancellation on."""
    slow = Slow()
    app = FastAPI()
    install_database(app, name="first", engine=sqlite(), shutdown=lambda: slow.log.append("first"))
    install_database(app, engine=async_sqlite(), shutdown=slow)
    stopping = asyncio.create_task(start_and_stop(app))
    await slow.started.wait()
    for _ in range(5 if again else 1):
        stopping.cancel()
        await turns()
    assert not stopping.done()
    slow.go_on.set()
    while again and not stopping.done():
        stopping.cancel()
        await turns()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert slow.log == ["hook", "first"]


async def test_a_cancelled_scope_still_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shutdown in a cancelled anyio scope closes everything, without spinning."""
    log: list[str] = []
    app = FastAPI()

    async def slow() -> None:
        scope.cancel()
        await turns()
        log.append("hook")

    install_database(app, engine=async_sqlite(), shutdown=slow)
    waits = counted_waits(monkeypatch)
    with anyio.CancelScope() as scope:
        await start_and_stop(app)
    assert scope.cancelled_caught
    assert log == ["hook"]
    assert len(waits) < 10


@pytest.mark.parametrize("when", ["factory", "lifespan", "running"])
async def test_a_cancelled_lifespan_closes_what_was_open(when: str) -> None:
    """A lifespan that is cancelled at start-up or while it runs leaves no database open."""
    log: list[str] = []
    reached = asyncio.Event()

    async def stay(here: str) -> None:
        if when == here:
            reached.set()
            await asyncio.Event().wait()

    async def build_later() -> AsyncEngine:
        await stay("factory")
        return async_sqlite()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        await stay("lifespan")
        yield

    async def run() -> None:
        async with app.router.lifespan_context(app):
            await stay("running")

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=noting(log))
    install_database(app, name="second", engine=build_later)
    serving = asyncio.create_task(run())
    await reached.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert log == ["disposed"]


# --- a server that cancels its requests and shuts down at once ---


@pytest.mark.parametrize("clients", [1, 20])
@pytest.mark.parametrize("handle", [False, True], ids=["get_db", "handle"])
def test_a_server_that_cancels_strands_no_connection(
    kind: Kind, make_engine: MakeEngine, rows: Rows, clients: int, handle: bool
) -> None:
    """If uvicorn cancels its requests and shuts down at once, no server-side connection stays."""
    name = f"stranded-{kind.id}-{threading.get_native_id()}"
    connect_args = named(kind.driver, name)
    engine = make_engine(pool_size=20, max_overflow=0, connect_args=connect_args)
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    add_waiting_route(app, kind, handle)

    key = 4711
    rows.connection.execute("SELECT pg_advisory_lock(%s)", (key,))
    requests: list[threading.Thread] = []
    try:
        with serve(app, timeout_graceful_shutdown=0.1) as served:

            def call() -> None:
                with suppress(httpx.HTTPError):
                    httpx.get(f"{served.url}/wait/{key}", timeout=20, verify=NO_TLS)

            requests = [threading.Thread(target=call) for _ in range(clients)]
            for request in requests:
                request.start()
            wait_until(lambda: rows.backends("active", name) == clients)
            if not kind.asynchronous:
                # A thread cannot be cancelled: its statement ends after the server has given up.
                threading.Timer(
                    0.6,
                    lambda: rows.connection.execute("SELECT pg_advisory_unlock(%s)", (key,)),
                ).start()
        wait_until(lambda: rows.backends(application=name) == 0)
    finally:
        rows.connection.execute("SELECT pg_advisory_unlock_all()")
        for request in requests:
            request.join(20)


def add_waiting_route(app: FastAPI, kind: Kind, handle: bool) -> None:
    """Add a route that waits in the database for a lock that it does not get."""
    lock = text("SELECT pg_advisory_xact_lock_shared(:key)")
    if kind.asynchronous and handle:

        @app.get("/wait/{key}")
        async def wait_with_handle(
            key: int, database: Annotated[AsyncDatabase, Depends(get_database_handle())]
        ) -> None:
            async with database.transaction() as session:
                await session.execute(lock, {"key": key})

    elif kind.asynchronous:

        @app.get("/wait/{key}")
        async def wait(key: int, session: Annotated[AsyncSession, Depends(get_db())]) -> None:
            await session.execute(lock, {"key": key})

    elif handle:

        @app.get("/wait/{key}")
        def wait_with_sync_handle(
            key: int, database: Annotated[Database, Depends(get_database_handle())]
        ) -> None:
            with database.transaction() as session:
                session.execute(lock, {"key": key})

    else:

        @app.get("/wait/{key}")
        def wait_sync(key: int, session: Annotated[Session, Depends(get_db())]) -> None:
            session.execute(lock, {"key": key})
