"""What `install_database` accepts, and when databases start and stop."""

import asyncio
import functools
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from starlette.testclient import TestClient

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    get_db,
    health_router,
    install_database,
    installed_databases,
    transactional,
)
from fastapi_sqlnative._lifespan.running import installations_of
from fastapi_sqlnative.exceptions import (
    ApplicationAlreadyStartedError,
    DatabaseAlreadyInstalledError,
    DatabaseNotInstalledError,
    DatabaseNotStartedError,
)
from fastapi_sqlnative.testing import async_client
from tests.in_process import (
    async_sqlite,
    client_of,
    dispose,
    note_disposal,
    noting,
    running,
    sqlite,
    start_and_stop,
    turns,
)
from tests.serving import Kind, Rows, items, until

pytestmark = pytest.mark.anyio

BUILDERS: dict[str, Callable[[], Engine | AsyncEngine]] = {
    "Engine": sqlite,
    "AsyncEngine": async_sqlite,
}


@pytest.fixture(params=BUILDERS.values(), ids=list(BUILDERS))
def build(request: pytest.FixtureRequest) -> Callable[[], Engine | AsyncEngine]:
    """Return a function that builds an engine, for each colour in turn."""
    found: Callable[[], Engine | AsyncEngine] = request.param
    return found


async def ask(database: object) -> None:
    """Send a statement through a handle of either colour, while its application runs."""
    if isinstance(database, AsyncDatabase):
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
    else:
        assert isinstance(database, Database)
        with database.session() as session:
            session.execute(text("SELECT 1"))


# --- engines and factories ---


class CallableFactory:
    """A factory that is an object."""

    def __init__(self, build: Callable[[], Engine | AsyncEngine]) -> None:
        self.build = build

    async def __call__(self) -> Engine | AsyncEngine:
        await asyncio.sleep(0)
        return self.build()


def awaited(build: Callable[[], Engine | AsyncEngine]) -> Callable[[], Awaitable[Any]]:
    async def factory() -> Engine | AsyncEngine:
        await asyncio.sleep(0)
        return build()

    return factory


FACTORIES: dict[str, Callable[[Callable[[], Engine | AsyncEngine]], Callable[[], Any]]] = {
    "function": lambda build: build,
    "coroutine-function": awaited,
    "lambda-of-a-coroutine": lambda build: lambda: awaited(build)(),
    "object": CallableFactory,
    "partial": lambda build: functools.partial(build),
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
async def test_a_factory_is_called_once_per_start(
    build: Callable[[], Engine | AsyncEngine], factory: Callable[..., Callable[[], Any]]
) -> None:
    """A factory, sync or async, makes one engine per start, which is disposed of at the end."""
    log: list[str] = []

    def noted() -> Engine | AsyncEngine:
        engine = build()
        log.append("built")
        note_disposal(engine, log)
        return engine

    app = FastAPI()
    install_database(app, engine=factory(noted))
    assert log == []
    for _ in range(2):
        log.clear()
        async with running(app):
            await ask(installed_databases(app)["default"])
            await ask(installed_databases(app)["default"])
            assert log == ["built"]
        assert log == ["built", "disposed"]


async def test_an_engine_gives_sessions_of_its_colour(
    build: Callable[[], Engine | AsyncEngine],
) -> None:
    """`get_db` yields a session of the engine's colour, and the handle has that very engine."""
    engine = build()
    app = FastAPI()
    install_database(app, engine=engine)

    @app.get("/")
    async def show(session: Annotated[Any, Depends(get_db())]) -> list[str | bool]:
        asynchronous = isinstance(session, AsyncSession)
        assert asynchronous or isinstance(session, Session)
        return [type(session).__name__, asynchronous]

    async with running(app) as client:
        expected = "AsyncSession" if isinstance(engine, AsyncEngine) else "Session"
        assert (await client.get("/")).json() == [expected, isinstance(engine, AsyncEngine)]
        assert installed_databases(app)["default"].engine is engine


async def test_a_ready_engine_is_not_closed(build: Callable[[], Engine | AsyncEngine]) -> None:
    """A ready engine without a hook is not disposed of, because whoever built it closes it."""
    log: list[str] = []
    engine = build()
    note_disposal(engine, log)
    app = FastAPI()
    install_database(app, engine=engine)
    async with running(app):
        await ask(installed_databases(app)["default"])
    assert log == []
    await dispose(engine)


class CallableHook:
    """A hook that is an object."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __call__(self) -> None:
        note_thread(self.log)


class AsyncCallableHook(CallableHook):
    """An asynchronous hook that is an object."""

    async def __call__(self) -> None:  # type: ignore[override] # either is a hook
        await asyncio.sleep(0)
        note_thread(self.log)


def note_thread(log: list[str]) -> None:
    on_loop = threading.current_thread() is threading.main_thread()
    log.append("event loop" if on_loop else "thread")


async def note_thread_later(log: list[str]) -> None:
    await asyncio.sleep(0)
    note_thread(log)


HOOKS: dict[str, tuple[Callable[[list[str]], Callable[[], object]], str]] = {
    "function": (lambda log: lambda: note_thread(log), "thread"),
    "coroutine-function": (lambda log: functools.partial(note_thread_later, log), "event loop"),
    "lambda-of-a-coroutine": (lambda log: lambda: note_thread_later(log), "event loop"),
    "object": (CallableHook, "thread"),
    "async-object": (AsyncCallableHook, "event loop"),
    "bound-method": (lambda log: CallableHook(log).__call__, "thread"),
    "async-bound-method": (lambda log: AsyncCallableHook(log).__call__, "event loop"),
}


@pytest.mark.parametrize(("hook", "where"), HOOKS.values(), ids=HOOKS)
async def test_a_hook_runs_once_per_stop(
    hook: Callable[[list[str]], Callable[[], object]], where: str
) -> None:
    """A hook of any kind runs once per stop, and a sync hook runs in a thread, not on the loop."""
    log: list[str] = []
    app = FastAPI()
    install_database(app, engine=async_sqlite(), shutdown=hook(log))
    for run in 1, 2:
        async with running(app):
            assert log == [where] * (run - 1)
        assert log == [where] * run


async def test_the_engines_own_dispose_is_a_hook(
    build: Callable[[], Engine | AsyncEngine],
) -> None:
    """`shutdown=engine.dispose` closes a ready engine of either colour."""
    log: list[str] = []
    engine = build()
    note_disposal(engine, log)
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    async with running(app):
        await ask(installed_databases(app)["default"])
        assert log == []
    assert log == ["disposed"]


async def test_a_function_without_a_signature_is_a_hook() -> None:
    """A hook without a signature that Python can read, such as a C function, is called as well."""
    cache = {"key": "value"}
    app = FastAPI()
    install_database(app, engine=async_sqlite(), shutdown=cache.clear)
    await start_and_stop(app)
    assert cache == {}


# --- every way to declare a lifespan ---


def with_router(app: FastAPI, body: Callable[..., AsyncGenerator[Any]]) -> None:
    app.include_router(APIRouter(lifespan=asynccontextmanager(body)), prefix="/included")


class Handlers:
    """A start-up and a shutdown handler that run a lifespan body."""

    def __init__(self, app: FastAPI, body: Callable[..., AsyncGenerator[Any]]) -> None:
        self.app = app
        self.body = body

    async def start(self) -> None:
        self.running = self.body(self.app)
        await anext(self.running)

    async def stop(self) -> None:
        with pytest.raises(StopAsyncIteration):
            await anext(self.running)


DECLARATIONS = (
    "lifespan",
    "async-generator",
    "router-before",
    "router-after",
    "router-in-router",
    "on_startup",
    "on_startup-added-later",
    "set-on-the-router",
)


def declared(
    how: str, install: Callable[[FastAPI], None], body: Callable[..., AsyncGenerator[Any]]
) -> FastAPI:
    """Make an application that declares a lifespan in the given way, and install a database."""
    lifespans: dict[str, Any] = {"lifespan": asynccontextmanager(body), "async-generator": body}
    app = FastAPI(lifespan=lifespans.get(how))
    if how == "router-before":
        with_router(app, body)
    if how == "set-on-the-router":
        app.router.lifespan_context = asynccontextmanager(body)
    if how == "on_startup":
        handlers = Handlers(app, body)
        app = FastAPI(on_startup=[handlers.start], on_shutdown=[handlers.stop])
        handlers.app = app
    install(app)
    if how == "router-after":
        with_router(app, body)
    if how == "router-in-router":
        outer = APIRouter()
        outer.include_router(APIRouter(lifespan=asynccontextmanager(body)), prefix="/inner")
        app.include_router(outer, prefix="/outer")
    if how == "on_startup-added-later":
        handlers = Handlers(app, body)
        app.router.add_event_handler("startup", handlers.start)
        app.router.add_event_handler("shutdown", handlers.stop)
    return app


@pytest.mark.parametrize("how", DECLARATIONS)
def test_databases_are_up_around_the_application(how: str) -> None:
    """Databases can be used from the first line of the application's own lifespan to the last."""
    log: list[str] = []

    def factory() -> AsyncEngine:
        engine = async_sqlite()
        log.append("up")
        note_disposal(engine, log, "down")
        return engine

    async def body(app: FastAPI) -> AsyncGenerator[None]:
        await ask(installed_databases(app)["default"])
        log.append("start")
        yield
        await ask(installed_databases(app)["default"])
        log.append("stop")

    app = declared(how, lambda app: install_database(app, engine=factory), body)
    for _ in range(2):
        with TestClient(app):
            assert log == ["up", "start"]
        assert log == ["up", "start", "stop", "down"]
        log.clear()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_routers_startup_handlers_find_the_databases(before: bool) -> None:
    """The handlers of a router, included before or after the install, can use the databases."""
    log: list[str] = []

    async def note_answer(when: str) -> None:
        await ask(installed_databases(app)["default"])
        log.append(when)

    app = FastAPI()
    router = APIRouter(
        on_startup=[functools.partial(note_answer, "start")],
        on_shutdown=[functools.partial(note_answer, "stop")],
    )
    if before:
        app.include_router(router)
    install_database(app, engine=async_sqlite)
    if not before:
        app.include_router(router)
    with TestClient(app):
        assert set(log) == {"start"}
    assert set(log) == {"start", "stop"}


@pytest.mark.parametrize("how", ["lifespan", "async-generator", "router-before", "router-after"])
def test_the_applications_state_passes_through(how: str) -> None:
    """`request.state` contains what the application's lifespan yields, and nothing else."""
    given = {"answer": 42}

    async def body(app: FastAPI) -> AsyncGenerator[dict[str, int]]:
        yield given

    app = declared(how, lambda app: install_database(app, engine=async_sqlite()), body)

    @app.get("/")
    def show(request: Request) -> dict[str, Any]:
        return dict(request.scope["state"])

    with TestClient(app) as client:
        assert client.get("/").json() == given


async def test_the_applications_state_is_its_own_object() -> None:
    """The lifespan yields the application's own state, not a copy of it."""
    given = {"answer": 42}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, int]]:
        yield given

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=async_sqlite())
    async with app.router.lifespan_context(app) as state:
        assert state is given


async def told_by(app: FastAPI) -> list[tuple[str, str]]:
    """Start and stop an application as a server without lifespan state, and return its messages."""
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[tuple[str, str]] = []

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append((message["type"], message.get("message", "")))

    with suppress(Exception):
        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    return sent


async def test_a_server_without_lifespan_state_will_do() -> None:
    """An application that yields no state starts and stops on a server without lifespan state."""
    app = FastAPI()
    install_database(app, engine=async_sqlite())
    told = await told_by(app)
    assert told == [("lifespan.startup.complete", ""), ("lifespan.shutdown.complete", "")]


# --- later starts, also on another event loop ---


def reading_app(engine: Engine | AsyncEngine, **options: Any) -> FastAPI:
    """Make an application whose route sends one statement."""
    app = FastAPI()
    install_database(app, engine=engine, **options)
    statement = text("SELECT 1")

    if isinstance(engine, AsyncEngine):

        @app.get("/")
        async def read(session: Annotated[AsyncSession, Depends(get_db())]) -> Any:
            return await session.scalar(statement)

    else:

        @app.get("/")
        def read_sync(session: Annotated[Session, Depends(get_db())]) -> Any:
            return session.scalar(statement)

    return app


def engine_of(kind: Kind, postgres: WorkerPostgres) -> Engine | AsyncEngine:
    return (create_async_engine if kind.asynchronous else create_engine)(postgres.url(kind.driver))


async def read_twice(app: FastAPI) -> None:
    """Start the application twice on this event loop, with a request each time."""
    for _ in range(2):
        async with running(app) as client:
            assert (await client.get("/")).json() == 1


def read_once(app: FastAPI) -> None:
    """Start the application on a new event loop, and send one request."""
    with TestClient(app) as client:
        assert client.get("/").json() == 1


@pytest.mark.driver_decides
def test_an_application_starts_again_on_another_event_loop(
    kind: Kind, postgres: WorkerPostgres
) -> None:
    """With `shutdown=engine.dispose`, an application can run again on another event loop."""
    engine = engine_of(kind, postgres)
    app = reading_app(engine, shutdown=engine.dispose)
    read_once(app)
    read_once(app)


@pytest.mark.parametrize("driver", ["psycopg", "aiosqlite", "psycopg-sync", "asyncpg"])
def test_a_driver_that_knows_no_event_loop_needs_no_hook(
    driver: str, postgres: WorkerPostgres
) -> None:
    """psycopg, aiosqlite and sync drivers start again on another event loop without a hook.

    asyncpg does so with a pool that keeps no connections.
    """
    engine: Engine | AsyncEngine
    if driver == "aiosqlite":
        engine = async_sqlite()
    elif driver == "psycopg":
        engine = create_async_engine(postgres.url("psycopg"))
    elif driver == "asyncpg":
        engine = create_async_engine(postgres.url("asyncpg"), poolclass=NullPool)
    else:
        engine = create_engine(postgres.url("psycopg"))
    app = reading_app(engine)
    read_once(app)
    read_once(app)
    dispose = engine.dispose()
    if isinstance(engine, AsyncEngine):
        asyncio.run(dispose)  # type: ignore[arg-type] # a coroutine, for this colour


@pytest.mark.parametrize("new", [False, True], ids=["the-same-application", "a-new-application"])
def test_an_engine_bound_to_another_event_loop_is_refused(
    postgres: WorkerPostgres, new: bool
) -> None:
    """A ready asyncpg engine that was not disposed of cannot start on another event loop.

    The error says why. The engine can still start on its own event loop, and on another one after
    it was disposed of.
    """
    engine = create_async_engine(postgres.url("asyncpg"))
    app = reading_app(engine)
    with asyncio.Runner() as first:
        first.run(read_twice(app))
        again = reading_app(engine) if new else app
        with pytest.raises(
            DatabaseNotStartedError,
            match=r"'default' cannot start.*asyncpg.*event loop.*shutdown=engine\.dispose",
        ):
            asyncio.run(read_twice(again))
        first.run(read_twice(again))
        first.run(engine.dispose())
    with asyncio.Runner() as second:
        second.run(read_twice(again))
        second.run(engine.dispose())


@pytest.mark.driver_decides
async def test_an_engine_may_start_again_on_the_same_event_loop(
    kind: Kind, postgres: WorkerPostgres
) -> None:
    """An application with a ready engine and no hook can start again on the same event loop."""
    engine = engine_of(kind, postgres)
    await read_twice(reading_app(engine))
    await dispose(engine)


def test_an_application_runs_on_one_event_loop_at_a_time() -> None:
    """A running application cannot start on a second event loop, and its first run goes on."""
    engine = async_sqlite()
    app = reading_app(engine, shutdown=engine.dispose)
    with TestClient(app) as client:
        with pytest.raises(ApplicationAlreadyStartedError, match=r"another event loop.*factory"):
            asyncio.run(start_and_stop(app))
        assert client.get("/").json() == 1


async def test_a_lifespan_may_be_entered_twice_on_one_event_loop() -> None:
    """Databases stay up until the last of two overlapping lifespans has ended."""
    log: list[str] = []
    engine = async_sqlite()
    note_disposal(engine, log)
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    async with running(app):
        async with running(app):
            pass
        await ask(installed_databases(app)["default"])
        assert log == []
    assert log == ["disposed"]


@pytest.mark.parametrize("first", ["fails", "is cancelled", "shuts down"])
async def test_a_start_beside_one_that_ends_has_its_databases(first: str) -> None:
    """Starts that overlap one that fails, is cancelled or shuts down still start all databases.

    Each engine that was built is disposed of once, when the last run that uses it ends.
    """
    log: list[str] = []
    held, others_wait = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncEngine:
        if "slowly" not in log:
            log.append("slowly")
            await held.wait()
            if first == "fails":
                raise Wrong
        return noting(log, "second disposed")()

    async def hook() -> None:
        log.append("hook")
        await others_wait.wait()

    app = FastAPI()
    install_database(app, engine=noting(log, "first disposed"))
    install_database(app, name="second", engine=slowly, shutdown=hook)
    starting = asyncio.create_task(start_and_stop(app))
    await turns()
    if first == "shuts down":
        held.set()
        await until(lambda: "hook" in log)

    async def run() -> None:
        async with running(app):
            assert not installations_of(app).draining
            assert [*installed_databases(app).values()]  # raises if one is not started

    others = [asyncio.create_task(run()) for _ in range(2)]
    await turns()
    if first == "is cancelled":
        starting.cancel()
    held.set()
    others_wait.set()
    await asyncio.gather(*others)
    with suppress(Wrong, asyncio.CancelledError):
        await starting
    runs = 2 if first == "shuts down" else 1
    assert log == ["slowly", *["hook", "second disposed", "first disposed"] * runs]


# --- mistakes ---


async def make_engine_later() -> AsyncEngine:
    return async_sqlite()


class Wrong(Exception):  # noqa: N818
    """An arbitrary failure."""


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "engine-none": ({"engine": None}, TypeError, "'default' must be an Engine.*not NoneType"),
    "engine-url": ({"engine": "sqlite://"}, TypeError, "not str. Create.*URL: create_async_engine"),
    "engine-url-object": ({"engine": make_url("sqlite://")}, TypeError, "not URL"),
    "engine-session": ({"engine": Session()}, TypeError, "not Session. Pass the engine itself"),
    "engine-session-class": ({"engine": AsyncSession}, TypeError, "not AsyncSession. Pass the eng"),
    "engine-factory-of-sessions": (
        {"engine": sessionmaker(sqlite())},
        TypeError,
        r"not sessionmaker\. Pass the engine itself, .*session_options",
    ),
    "engine-async-factory": (
        {"engine": async_sessionmaker(async_sqlite(), autoflush=False)},
        TypeError,
        "not async_sessionmaker. Pass the engine itself",
    ),
    "engine-scoped-session": (
        {"engine": scoped_session(sessionmaker())},
        TypeError,
        "not scoped_session. Pass the engine itself",
    ),
    "engine-connection": (
        {"engine": async_sqlite().connect()},
        TypeError,
        "not AsyncConnection. Pass the engine itself",
    ),
    "engine-class": ({"engine": AsyncEngine}, TypeError, r"not AsyncEngine\(sync_engine"),
    "engine-parameter": (
        {"engine": create_async_engine},
        TypeError,
        r"function without parameters that makes one, not create_async_engine\(url",
    ),
    "name-number": ({"name": 7}, TypeError, "name of a database must be a string, not int"),
    "name-none": ({"name": None}, TypeError, "not NoneType"),
    "shutdown-called": ({"shutdown": "closed"}, TypeError, r"such as engine\.dispose \(no paren"),
    "shutdown-parameter": ({"shutdown": read_once}, TypeError, r"not read_once\(app: .*FastAPI"),
    "class-of-the-other-colour": (
        {"session_options": {"class_": Session}},
        TypeError,
        "subclass of AsyncSession, because the engine is an AsyncEngine",
    ),
    "class-of-no-colour": ({"session_options": {"class_": int}}, TypeError, "of AsyncSession"),
    "class-no-class": (
        {"session_options": {"class_": sessionmaker()}},
        TypeError,
        "of AsyncSession",
    ),
    "bind": ({"session_options": {"bind": sqlite()}}, TypeError, "'bind' is not allowed"),
    "option-unknown": ({"session_options": {"autoflsh": True}}, TypeError, "autoflsh"),
    "wait-negative": ({"startup_wait": -1}, ValueError, "startup_wait of .* above 0"),
    "wait-zero": ({"startup_wait": 0}, ValueError, "startup_wait of .* above 0"),
    "wait-text": ({"startup_wait": "30"}, TypeError, "startup_wait of .* seconds.*not str"),
    "wait-bool": ({"startup_wait": True}, TypeError, "startup_wait of .* seconds.*not bool"),
    "timeout-negative": ({"shutdown_timeout": -0.1}, ValueError, "shutdown_timeout of .* above 0"),
    "timeout-zero": ({"shutdown_timeout": 0}, ValueError, "shutdown_timeout of .* above 0"),
    "timeout-none": ({"shutdown_timeout": None}, TypeError, "shutdown_timeout of .*not NoneType"),
    "timeout-nan": ({"shutdown_timeout": float("nan")}, ValueError, "above 0"),
    "timeout-infinite": ({"shutdown_timeout": float("inf")}, ValueError, "shutdown_timeout"),
}


@pytest.mark.parametrize(("options", "kind", "match"), MISTAKES.values(), ids=MISTAKES)
async def test_a_wrong_argument_is_refused_at_once(
    options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    """A wrong argument fails at the call, and nothing is installed.

    The error names the database, the argument and what belongs there.
    """
    app = FastAPI()
    with pytest.raises(kind, match=match):
        install_database(app, **{"engine": async_sqlite(), **options})
    assert list(installed_databases(app)) == []
    await start_and_stop(app)


# The names are for type checkers only. From Python 3.14 on, such a module needs no future import.
HIDDEN = f"""{"" if sys.version_info >= (3, 14) else "from __future__ import annotations"}
from sqlalchemy.ext.asyncio import AsyncSession
from tests.in_process import async_sqlite

def make(settings: Settings | None = None) -> Hidden:
    return async_sqlite()

def wants(settings: Settings) -> Hidden: ...

async def hook(settings: Settings | None = None) -> Hidden:
    log.append("hook")

async def queue(app: Settings) -> Hidden:
    return True

class Audited(AsyncSession):
    async def commit(self, reason: Settings | None = None) -> Hidden:
        await super().commit()
"""


async def test_an_annotation_may_name_what_is_imported_for_type_checkers() -> None:
    """A factory, hook, check or override may have annotations that do not exist at run time."""
    names: dict[str, Any] = {"log": []}
    exec(compile(HIDDEN, "hidden.py", "exec", dont_inherit=True), names)
    app = FastAPI()
    options = {"class_": names["Audited"]}
    hook = names["hook"]
    install_database(app, engine=names["make"], shutdown=hook, session_options=options)
    app.include_router(health_router(checks={"queue": names["queue"]}))
    with pytest.raises(TypeError, match=r"without parameters.* wants\(settings: 'Settings'\)"):
        install_database(app, name="other", engine=names["wants"])
    async with running(app) as client:
        ready = await client.get("/health/ready")
    assert ready.json()["checks"] == {"queue": "up"}
    assert names["log"] == ["hook"]


async def test_a_hook_that_has_been_called_is_refused() -> None:
    """`shutdown=engine.dispose()` passes a coroutine, and the TypeError names the parentheses."""
    engine = async_sqlite()
    called = engine.dispose()
    with pytest.raises(TypeError, match=r"shutdown of .*\(no parentheses\), not coroutine"):
        install_database(FastAPI(), engine=engine, shutdown=called)  # type: ignore[arg-type] # the mistake
    await called


async def test_a_factory_that_has_been_called_is_refused() -> None:
    """`engine=make_engine()` passes an async factory's coroutine, and the TypeError says so."""
    called = make_engine_later()
    with pytest.raises(TypeError, match="It is a coroutine: pass the function itself"):
        install_database(FastAPI(), engine=called)  # type: ignore[arg-type] # the mistake
    await called


def test_only_an_application_takes_a_database() -> None:
    """A router raises a TypeError that asks for a FastAPI application."""
    with pytest.raises(TypeError, match="takes a FastAPI application, not APIRouter"):
        install_database(APIRouter(), engine=sqlite())  # type: ignore[arg-type] # the mistake


@pytest.mark.parametrize(
    ("first", "second"),
    [("default", ""), ("default", " default "), ("  ", "default"), ("a", " a"), ("a", "a")],
)
async def test_a_name_is_taken_once(first: str, second: str) -> None:
    """A second install under the same name raises, however it is spelt, and the first one stays."""
    app = FastAPI()
    engine = async_sqlite()
    install_database(app, name=first, engine=engine)
    name = first.strip() or "default"
    with pytest.raises(DatabaseAlreadyInstalledError, match=f"'{name}' is already .*another name"):
        install_database(app, name=second, engine=async_sqlite())
    async with running(app):
        assert installed_databases(app)[name].engine is engine


def test_an_install_into_a_served_application_is_refused() -> None:
    """An install raises ApplicationAlreadyStartedError while an application runs and after that."""
    app = FastAPI()
    late = pytest.raises(ApplicationAlreadyStartedError, match=r"started.*before it is served")
    with TestClient(app), late:
        install_database(app, engine=sqlite())
    with pytest.raises(ApplicationAlreadyStartedError):
        install_database(app, engine=sqlite())


async def test_an_install_in_the_lifespan_is_refused() -> None:
    """An install in the application's own lifespan body is too late and fails start-up."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        install_database(app, engine=async_sqlite())
        yield

    [(kind, traceback)] = await told_by(FastAPI(lifespan=lifespan))
    assert kind == "lifespan.startup.failed"
    assert "ApplicationAlreadyStartedError" in traceback
    assert "To build the engine at start-up, pass install_database a function" in traceback


async def test_a_server_is_told_what_fails_the_start() -> None:
    """The message that the server logs contains the error of a failed start-up check."""
    app = FastAPI()
    app.get("/", dependencies=[Depends(get_db("oders"))])(lambda: None)
    install_database(app, name="orders", engine=async_sqlite())
    [(kind, traceback)] = await told_by(app)
    assert kind == "lifespan.startup.failed"
    assert "Route '/': No database named 'oders' is installed" in traceback
    assert "Installed: 'orders'." in traceback


@pytest.mark.parametrize("mounted", [False, True], ids=["the-application", "a-mounted-one"])
async def test_an_install_beside_running_databases_is_refused(mounted: bool) -> None:
    """While a lifespan runs, an install on the application or on a mounted one raises."""
    app, sub = FastAPI(), FastAPI()
    app.mount("/sub", sub)
    install_database(app, engine=async_sqlite())
    async with running(app):
        with pytest.raises(ApplicationAlreadyStartedError):
            install_database(sub if mounted else app, name="late", engine=async_sqlite())
        assert list(installed_databases(app)) == ["default"]
    assert list(installed_databases(sub)) == []


NOT_STARTED = pytest.raises(
    DatabaseNotStartedError,
    match=r"'default' .*not started.*`with TestClient\(app\) as client`.*ASGITransport, "
    r"`async with async_client\(app\) as client` from fastapi_sqlnative\.testing",
)


async def test_a_request_without_a_lifespan_says_what_is_missing() -> None:
    """A request through a bare ASGITransport fails, and the client that the error names works."""
    engine = async_sqlite()
    app = reading_app(engine, shutdown=engine.dispose)
    async with client_of(app) as bare:
        with NOT_STARTED:
            await bare.get("/")
        async with async_client(app) as client:
            assert (await client.get("/")).json() == 1
        with NOT_STARTED:
            await bare.get("/")


def test_a_test_client_outside_of_a_block_says_what_is_missing() -> None:
    """A request of a TestClient outside a block fails, and the block that the error names works."""
    engine = sqlite()
    app = reading_app(engine, shutdown=engine.dispose)
    with NOT_STARTED:
        TestClient(app).get("/")
    with TestClient(app) as client:
        assert client.get("/").json() == 1


async def test_a_request_without_an_install_says_so() -> None:
    """A request to an application without an install raises an error with the missing call."""
    app = FastAPI()
    app.get("/", dependencies=[Depends(get_db("orders"))])(lambda: None)
    async with running(app) as client:
        with pytest.raises(
            DatabaseNotInstalledError, match=r"'orders'.*install_database\(app, name='orders'"
        ):
            await client.get("/")


# --- a start that fails ---


async def fail() -> AsyncEngine:
    raise Wrong("no engine today")


async def yield_engine() -> AsyncGenerator[AsyncEngine]:
    yield async_sqlite()


BAD_FACTORIES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "raises": (fail, Wrong, "no engine today"),
    "nothing": (lambda: None, TypeError, "'bad' must return an Engine.*returned NoneType"),
    "url": (lambda: "sqlite://", TypeError, "it returned str"),
    "session": (lambda: Session(), TypeError, "it returned Session"),
    "generator": (yield_engine, TypeError, "async_generator. Return the engine instead of yield"),
    "factory": (lambda: async_sqlite, TypeError, "it returned function"),
}


@pytest.mark.parametrize(("factory", "kind", "match"), BAD_FACTORIES.values(), ids=BAD_FACTORIES)
async def test_a_factory_that_fails_unwinds_the_start(
    factory: Callable[[], Any], kind: type[Exception], match: str
) -> None:
    """If a factory fails, the databases before it are closed and those after it are not touched."""
    log: list[str] = []

    def build() -> AsyncEngine:
        engine = async_sqlite()
        note_disposal(engine, log, "first disposed")
        return engine

    app = FastAPI()
    install_database(app, name="first", engine=build, shutdown=lambda: log.append("first hook"))
    install_database(app, name="bad", engine=factory, shutdown=lambda: log.append("bad hook"))
    install_database(app, name="last", engine=sqlite(), shutdown=lambda: log.append("last hook"))
    with pytest.raises(kind, match=match):
        await start_and_stop(app)
    assert log == ["first hook", "first disposed"]
    with pytest.raises(DatabaseNotStartedError):
        installed_databases(app)["first"]


async def test_an_engine_that_its_options_do_not_fit_is_disposed_of() -> None:
    """A factory's engine of the wrong colour for `class_` fails start-up and is disposed of."""
    log: list[str] = []
    app = FastAPI()
    install_database(app, engine=noting(log), session_options={"class_": Session})
    with pytest.raises(TypeError, match="class_ must be a subclass of AsyncSession"):
        await start_and_stop(app)
    assert log == ["disposed"]


async def test_a_start_may_fail_and_then_succeed() -> None:
    """A start can succeed after an earlier one has failed."""
    failing = [True]

    async def factory() -> AsyncEngine:
        if failing:
            raise Wrong
        return async_sqlite()

    app = FastAPI()
    install_database(app, engine=factory)
    with pytest.raises(Wrong):
        await start_and_stop(app)
    failing.clear()
    async with running(app):
        await ask(installed_databases(app)["default"])


@pytest.mark.parametrize("when", ["startup", "shutdown"])
async def test_a_lifespan_that_raises_closes_the_databases(when: str) -> None:
    """An error in an application's lifespan reaches the server, and the databases are closed."""
    log: list[str] = []
    engine = async_sqlite()
    note_disposal(engine, log)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if when == "startup":
            raise Wrong
        yield
        raise Wrong

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    with pytest.raises(Wrong):
        await start_and_stop(app)
    assert log == ["disposed"]


# --- installed_databases ---


async def test_installed_databases_is_a_mapping() -> None:
    """The mapping has names, in order, from the install on, and handles while the lifespan runs."""
    app = FastAPI()
    databases = installed_databases(app)
    assert (list(databases), len(databases)) == ([], 0)
    install_database(app, name="one", engine=async_sqlite())
    install_database(app, name="two", engine=sqlite())
    assert (list(databases), len(databases)) == (["one", "two"], 2)
    assert "one" in databases
    assert "three" not in databases
    assert repr(databases) == "<installed databases: one, two>"
    with pytest.raises(DatabaseNotStartedError):
        databases["one"]
    async with running(app):
        assert [type(each) for each in databases.values()] == [AsyncDatabase, Database]
        assert databases["one"].name == "one"
        assert databases.get("three") is None
        asynchronous = installed_databases(app, AsyncDatabase)
        assert asynchronous["one"].name == "one"
        with pytest.raises(TypeError, match="'two' is Database, not AsyncDatabase"):
            asynchronous["two"]
    with pytest.raises(DatabaseNotStartedError):
        databases["one"]


async def test_an_unknown_name_is_a_key_error_that_lists_the_known() -> None:
    """An unknown name raises a KeyError whose message lists the names that exist."""
    app = FastAPI()
    install_database(app, name="orders", engine=async_sqlite())
    with pytest.raises(KeyError, match=r"'oders'.*'orders'"):
        installed_databases(app)["oders"]


def test_installed_databases_is_read_only() -> None:
    """`installed_databases` returns a mapping that supports no assignment and no deletion."""
    databases: Any = installed_databases(FastAPI())
    with pytest.raises(TypeError, match="does not support item assignment"):
        databases["default"] = None
    with pytest.raises(TypeError, match="support item deletion"):
        del databases["default"]


async def test_a_handle_belongs_to_one_run() -> None:
    """A handle kept from an earlier run raises an error, even while the application runs again."""
    app = FastAPI()
    install_database(app, engine=async_sqlite)
    async with running(app):
        kept = installed_databases(app)["default"]
    async with running(app):
        with pytest.raises(DatabaseNotStartedError, match="'default' is stopped"):
            await ask(kept)
        await ask(installed_databases(app)["default"])


# --- several applications and names ---


async def test_several_applications_in_one_process() -> None:
    """Two applications with a database of the same name each use only their own database."""
    engines = [async_sqlite(), async_sqlite()]
    apps = [FastAPI(), FastAPI()]
    for app, engine in zip(apps, engines, strict=True):
        install_database(app, engine=engine, shutdown=engine.dispose)

        @app.get("/")
        async def show(session: Annotated[AsyncSession, Depends(get_db())]) -> int:
            return id(session.bind)

    async with running(apps[0]) as first:
        async with running(apps[1]) as second:
            answers = [(await client.get("/")).json() for client in (first, second)]
            assert answers == [id(engine) for engine in engines]
        assert (await first.get("/")).json() == id(engines[0])
        with pytest.raises(DatabaseNotStartedError):
            installed_databases(apps[1])["default"]


async def test_one_engine_under_two_names(kind: Kind, postgres: WorkerPostgres, rows: Rows) -> None:
    """One engine under two names has two sessions in one request, and both commit."""
    engine = engine_of(kind, postgres)
    app = FastAPI()
    for name in "one", "two":
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    one, two = Depends(transactional("one")), Depends(transactional("two"))

    def insert(name: str) -> Any:
        return items.insert().values(name=name)

    if kind.asynchronous:

        @app.post("/")
        async def write(
            first: Annotated[AsyncSession, one], second: Annotated[AsyncSession, two]
        ) -> bool:
            await first.execute(insert("one"))
            await second.execute(insert("two"))
            return first is second

    else:

        @app.post("/")
        def write_sync(first: Annotated[Session, one], second: Annotated[Session, two]) -> bool:
            first.execute(insert("one"))
            second.execute(insert("two"))
            return first is second

    async with running(app) as client:
        assert (await client.post("/")).json() is False
    assert rows.names == ["one", "two"]
