"""Rule 15: mounted applications, which use the nearest installation."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import MagicMock

import anyio
import anyio.to_thread
import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket, routing
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from fastapi_sqlnative import (
    AsyncDatabase,
    get_database_handle,
    get_db,
    install_database,
    installed_databases,
    start_draining,
    transactional,
)
from fastapi_sqlnative._lifespan.running import installations_of, running_of
from fastapi_sqlnative.exceptions import (
    ApplicationAlreadyStartedError,
    DatabaseNotInstalledError,
    DatabaseNotStartedError,
)
from tests.in_process import (
    async_sqlite,
    client_of,
    note_disposal,
    noting,
    running,
    sqlite,
    start_and_stop,
)

pytestmark = pytest.mark.anyio


def install(app: Starlette, place: str, name: str = "default") -> None:
    """Install a database in memory that stores the place where it was installed."""

    async def build() -> AsyncEngine:
        engine = async_sqlite()
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE place (name TEXT)"))
            await connection.execute(text("INSERT INTO place VALUES (:name)"), {"name": place})
        return engine

    install_database(app, name=name, engine=build)


async def place_of(session: AsyncSession) -> str:
    """Return the place where a session's database was installed."""
    return str(await session.scalar(text("SELECT name FROM place")))


def showing(*names: str) -> FastAPI:
    """Make an application whose routes return the places where databases were installed."""
    app = FastAPI()
    for name in names or ("default",):

        @app.get(f"/{name}")
        async def show(session: Annotated[AsyncSession, Depends(get_db(name))]) -> str:
            return await place_of(session)

        @app.get(f"/{name}/handle")
        async def show_with_handle(
            database: Annotated[AsyncDatabase, Depends(get_database_handle(name))],
        ) -> str:
            async with database.session() as session:
                return await place_of(session)

    return app


async def ask(app: FastAPI, *paths: str) -> list[Any]:
    """Send requests to a running application, and return the JSON answers."""
    async with client_of(app) as client:
        return [(await client.get(path)).json() for path in paths]


async def test_a_mounted_application_sees_its_parents_database() -> None:
    """A mounted application without its own installation uses that of the application around it."""
    app, sub = showing(), showing()
    app.mount("/sub", sub)
    install(app, "root")
    async with running(app):
        assert await ask(app, "/default", "/sub/default", "/sub/default/handle") == ["root"] * 3


async def test_the_nearest_installation_wins() -> None:
    """If a root and a mounted application install the same name, each uses its own database."""
    app, sub = showing("a", "b"), showing("a", "b")
    app.mount("/sub", sub)
    install(app, "root", "a")
    install(app, "root", "b")
    install(sub, "sub", "b")
    async with running(app):
        assert await ask(app, "/a", "/b") == ["root", "root"]
        assert await ask(app, "/sub/a", "/sub/b", "/sub/b/handle") == ["root", "sub", "sub"]


async def test_nested_mounts_look_upwards_one_by_one() -> None:
    """A nested application looks for a database outwards, one application at a time."""
    apps = [showing("a", "b", "c") for _ in range(3)]
    apps[0].mount("/one", apps[1])
    apps[1].mount("/two", apps[2])
    for name in "abc":
        install(apps[0], "root", name)
    install(apps[1], "one", "b")
    install(apps[1], "one", "c")
    install(apps[2], "two", "c")
    async with running(apps[0]):
        assert await ask(apps[0], "/a", "/b", "/c") == ["root", "root", "root"]
        assert await ask(apps[0], "/one/a", "/one/b", "/one/c") == ["root", "one", "one"]
        paths = [f"/one/two/{name}" for name in "abc"]
        assert await ask(apps[0], *paths) == ["root", "one", "two"]


async def test_a_mounted_application_starts_and_stops_with_its_root() -> None:
    """A mounted application's own database starts after the root's and stops before it."""
    log: list[str] = []

    def building(name: str) -> Any:
        def build() -> AsyncEngine:
            engine = async_sqlite()
            log.append(f"{name} up")
            note_disposal(engine, log, f"{name} down")
            return engine

        return build

    app, sub, inner = FastAPI(), FastAPI(), FastAPI()
    sub.mount("/inner", inner)
    app.mount("/sub", sub)
    for name, each in ("sub", sub), ("root", app), ("inner", inner):
        install_database(each, engine=building(name))
    for _ in range(2):
        async with running(app):
            assert log == ["root up", "sub up", "inner up"]
            assert list(installed_databases(inner)) == ["default"]
            assert isinstance(installed_databases(inner)["default"], AsyncDatabase)
        assert log[3:] == ["inner down", "sub down", "root down"]
        log.clear()


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def behind(app: FastAPI, how: str) -> FastAPI:
    """Mount an application in a new root in the given way, and return the root."""
    root = FastAPI()
    if how == "middleware":
        root.mount("/sub", BaseHTTPMiddleware(app, pass_on))
    elif how == "included-router":
        router = APIRouter()
        router.mount("/sub", app)
        root.include_router(router)
    elif how == "mounted-router":
        router = APIRouter()
        router.mount("/sub", app)
        root.mount("/", router)
    elif how == "starlette":
        between = Starlette()
        between.mount("/sub", app)
        root.mount("/", between)
    return root


# Older versions of FastAPI ignore mounts in included routers.
WAYS = ["middleware", "mounted-router", "starlette"]
if hasattr(routing, "iter_route_contexts"):
    WAYS.append("included-router")


@pytest.mark.parametrize("how", WAYS)
async def test_a_mount_is_found_wherever_it_is(how: str) -> None:
    """An application that is mounted indirectly uses the root's databases and its own."""
    sub = showing("root", "own")
    app = behind(sub, how)
    install(app, "root", "root")
    install(sub, "sub", "own")
    async with running(app):
        assert await ask(app, "/sub/root", "/sub/own") == ["root", "sub"]


async def test_a_mock_may_be_mounted() -> None:
    """A mounted mock of static files, which has every attribute, does not break an application."""
    app = showing("own")
    install(app, "root", "own")
    app.mount("/static", MagicMock())
    async with running(app):
        assert await ask(app, "/own") == ["root"]


async def test_middleware_at_the_root_changes_nothing() -> None:
    """Behind middleware of the root, a mounted application still uses the root's database."""
    app, sub = FastAPI(), showing()
    app.mount("/sub", sub)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    install(app, "root")
    async with running(app):
        assert await ask(app, "/sub/default") == ["root"]


def test_a_websocket_of_a_mounted_application_finds_the_parents_database() -> None:
    """A websocket route of a mounted application uses the root's database."""
    app, sub = FastAPI(), FastAPI()
    app.mount("/sub", sub)
    install(app, "root")

    @sub.websocket("/")
    async def talk(socket: WebSocket, session: Annotated[AsyncSession, Depends(get_db())]) -> None:
        await socket.accept()
        await socket.send_text(await place_of(session))
        await socket.close()

    with TestClient(app) as client, client.websocket_connect("/sub/") as connected:
        assert connected.receive_text() == "root"


async def test_an_application_may_be_mounted_twice() -> None:
    """An application that is mounted under two paths of a root uses its own database under both."""
    app, sub = FastAPI(), showing()
    app.mount("/one", sub)
    app.mount("/two", sub)
    install(sub, "sub")
    install(app, "root")
    async with running(app):
        assert await ask(app, "/one/default", "/two/default") == ["sub", "sub"]


# --- served in several ways ---


async def test_a_mounted_application_that_needs_its_root_is_not_served_alone() -> None:
    """Served alone, a mounted application cannot use the root's database, and its start fails."""
    app, sub = FastAPI(), showing("own")
    app.mount("/sub", sub)
    install(app, "root", "shared")
    install(sub, "sub", "own")

    @sub.get("/shared")
    async def show(
        database: Annotated[AsyncDatabase, Depends(get_database_handle("shared"))],
    ) -> str:
        async with database.session() as session:
            return await place_of(session)

    async with running(app):
        assert await ask(app, "/sub/own", "/sub/shared") == ["sub", "root"]
    with pytest.raises(DatabaseNotInstalledError, match=r"Route '/shared'.*'shared'.*'own'"):
        await start_and_stop(sub)


async def test_a_database_stays_up_for_all_who_serve_it() -> None:
    """The database of an application served alone and mounted at once is up until both end."""
    app, sub = FastAPI(), showing()
    app.mount("/sub", sub)
    install(app, "root", "other")
    install(sub, "sub")
    async with AsyncExitStack() as alone, AsyncExitStack() as mounted:
        await mounted.enter_async_context(app.router.lifespan_context(app))
        await alone.enter_async_context(sub.router.lifespan_context(sub))
        assert await ask(app, "/sub/default") == await ask(sub, "/default") == ["sub"]
        await mounted.aclose()
        assert await ask(sub, "/default") == ["sub"]
        await mounted.enter_async_context(app.router.lifespan_context(app))
        await alone.aclose()
        assert await ask(app, "/sub/default") == ["sub"]
    with pytest.raises(DatabaseNotStartedError):
        installed_databases(sub)["default"]


async def test_two_roots_with_one_mounted_application() -> None:
    """An application mounted in two running roots uses the database of the root that is called."""
    roots = [FastAPI(), FastAPI()]
    sub = showing()
    for number, root in enumerate(roots):
        root.mount("/sub", sub)
        install(root, f"root {number}")
    async with running(roots[0]):
        async with running(roots[1]):
            assert await ask(roots[0], "/sub/default") == ["root 0"]
            assert await ask(roots[1], "/sub/default") == ["root 1"]
        assert await ask(roots[0], "/sub/default") == ["root 0"]


async def test_two_roots_that_start_at_the_same_time() -> None:
    """The second of two roots waits for a mounted database that the first root is starting."""
    building, may_go_on = asyncio.Event(), asyncio.Event()

    async def build() -> AsyncEngine:
        building.set()
        await may_go_on.wait()
        return async_sqlite()

    sub = FastAPI()
    install_database(sub, engine=build)

    @sub.get("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db())]) -> None: ...

    async with AsyncExitStack() as lifespans, asyncio.TaskGroup() as starting:
        for _ in range(2):
            root = FastAPI()
            engine = async_sqlite()  # ready, so the mounted one is the first to be waited for
            install_database(root, name="own", engine=engine, shutdown=engine.dispose)
            root.mount("/sub", sub)
            lifespan = root.router.lifespan_context(root)
            starting.create_task(lifespans.enter_async_context(lifespan))
            await building.wait()
        await anyio.wait_all_tasks_blocked()
        may_go_on.set()


def test_two_roots_that_start_at_the_same_time_once_more() -> None:
    """Two roots of one mounted application can start at the same time again on another event loop.

    The other event loop is like that of a second test.
    """

    async def build() -> AsyncEngine:
        await anyio.wait_all_tasks_blocked()  # until the other root waits, too
        return async_sqlite()

    sub = FastAPI()
    install_database(sub, engine=build)

    async def start() -> None:
        async with anyio.create_task_group() as starting:
            for _ in range(2):
                root = FastAPI()
                engine = async_sqlite()
                install_database(root, name="own", engine=engine, shutdown=engine.dispose)
                root.mount("/sub", sub)
                starting.start_soon(start_and_stop, root)

    for _ in range(2):
        anyio.run(start)


async def test_two_roots_that_end_at_the_same_time() -> None:
    """If two roots end at the same time, the database of their mounted application closes once."""
    log: list[str] = []
    sub = FastAPI()
    install_database(sub, engine=noting(log, "sub"), shutdown=lambda: log.append("hook"))
    async with anyio.create_task_group() as ending:
        for _ in range(2):
            root = FastAPI()
            install_database(root, name="own", engine=noting(log, "root"))
            root.mount("/sub", sub)
            ending.start_soon(start_and_stop, root)
    assert sorted(log) == ["hook", "root", "root", "sub"]


def test_two_event_loops_with_one_mounted_application() -> None:
    """An application without its own databases may be mounted in roots on several event loops."""
    sub = showing()
    roots = [FastAPI(), FastAPI()]
    for number, root in enumerate(roots):
        root.mount("/sub", sub)
        install(root, f"root {number}")
    with TestClient(roots[0]) as first, TestClient(roots[1]) as second:
        assert first.get("/sub/default").json() == "root 0"
        assert second.get("/sub/default").json() == "root 1"


def test_an_event_loop_does_not_wait_for_one_that_ends() -> None:
    """An application without databases can start on one event loop while it ends on another."""
    sub, roots = FastAPI(), [FastAPI(), FastAPI()]
    for root in roots:
        root.mount("/sub", sub)
    install(roots[1], "root")

    def hook() -> None:
        asyncio.run(asyncio.wait_for(start_and_stop(roots[1]), 5))

    install_database(roots[0], engine=sqlite, shutdown=hook)
    asyncio.run(start_and_stop(roots[0]))
    assert installations_of(sub).runs == []


@pytest.mark.parametrize("own", [True, False])
async def test_a_second_root_does_not_end_the_draining(own: bool) -> None:
    """A mounted application, with or without its own database, drains until all its roots end."""
    sub, roots = FastAPI(), [FastAPI(), FastAPI()]
    if own:
        install(sub, "sub")
    for root in roots:
        root.mount("/sub", sub)
        install(root, "root")
    for _ in range(2):
        async with running(roots[0]):
            assert not running_of(sub).is_draining()
            start_draining(sub)
            await start_and_stop(roots[1])
            assert running_of(sub).is_draining()


def test_a_mounted_database_belongs_to_one_event_loop() -> None:
    """An application with its own database cannot run on two event loops, and the error says so."""
    sub = showing()
    install(sub, "sub")
    roots = [FastAPI(), FastAPI()]
    for root in roots:
        root.mount("/sub", sub)
        install(root, "root")
    with TestClient(roots[0]) as client:
        with pytest.raises(ApplicationAlreadyStartedError, match=r"mounted in.*another event loop"):
            asyncio.run(start_and_stop(roots[1]))
        assert client.get("/sub/default").json() == "sub"


async def test_a_root_without_installations_does_not_start_what_is_mounted() -> None:
    """A root without installations does not start the database of a mounted application.

    The error names the database and says what starts it.
    """
    app, sub = FastAPI(), showing()
    app.mount("/sub", sub)
    install(sub, "sub")
    async with running(app):
        with pytest.raises(
            DatabaseNotStartedError,
            match=r"'default' is installed but not started.*mounted application starts with the",
        ):
            await ask(app, "/sub/default")


async def test_a_lifespan_that_another_package_replaced_is_named() -> None:
    """If another package replaces the lifespan after the install, the error says so.

    Databases that are installed later than that start.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield

    late, early = showing(), showing()
    install(early, "early")
    for app in (late, early):
        app.router.lifespan_context = lifespan
    install(late, "late")
    async with running(early):
        with pytest.raises(DatabaseNotStartedError, match=r"replaced app\.router\.lifespan"):
            await ask(early, "/default")
    async with running(late):
        assert await ask(late, "/default") == ["late"]


async def test_a_root_without_installations_may_run_the_mounted_lifespan() -> None:
    """A root that runs a mounted application's lifespan in its own starts the mounted databases."""
    sub = showing()
    install(sub, "sub")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with sub.router.lifespan_context(sub):
            yield

    app = FastAPI(lifespan=lifespan)
    app.mount("/sub", sub)
    async with running(app):
        assert await ask(app, "/sub/default") == ["sub"]


async def test_a_mounted_application_of_a_root_that_is_not_running() -> None:
    """If no lifespan runs, a mounted application's error points to the application around it."""
    app, sub = FastAPI(), showing()
    app.mount("/sub", sub)
    install(app, "root")
    for _ in range(2):
        with pytest.raises(DatabaseNotInstalledError, match="the application around it"):
            await ask(app, "/sub/default")
        await start_and_stop(app)


async def test_an_application_that_is_mounted_too_late() -> None:
    """If an application is mounted after the start, its error says when to mount it instead."""
    app = FastAPI()
    install(app, "root")
    async with running(app):
        app.mount("/sub", showing())
        with pytest.raises(DatabaseNotInstalledError, match="mount it before that starts"):
            await ask(app, "/sub/default")


# --- commits, overrides, checks ---


ORDERS = [("root", "sub", "deep"), ("deep", "sub", "root"), ("sub", "root", "deep")]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
async def test_a_parents_database_commits_first(order: tuple[str, str, str]) -> None:
    """In a request to a mounted application, the databases around it commit before its own."""
    log: list[str] = []

    def building(name: str) -> Any:
        def build() -> Engine:
            engine = create_engine("sqlite://")
            event.listen(engine, "commit", lambda _connection: log.append(name))
            return engine

        return build

    apps = {name: FastAPI() for name in ("root", "sub", "deep")}
    apps["root"].mount("/sub", apps["sub"])
    apps["sub"].mount("/deep", apps["deep"])
    for name in order:
        install_database(apps[name], name=name, engine=building(name))

    @apps["deep"].post("/")
    def write(
        one: Annotated[Session, Depends(transactional(order[0]))],
        two: Annotated[Session, Depends(transactional(order[1]))],
        three: Annotated[Session, Depends(transactional(order[2]))],
    ) -> None:
        for session in one, two, three:
            session.execute(text("CREATE TABLE item (name TEXT)"))

    async with running(apps["root"]) as client:
        assert (await client.post("/sub/deep/")).status_code == 200
    assert log == ["root", "sub", "deep"]


async def test_the_roots_gate_stands_before_what_is_mounted(tmp_path: Path) -> None:
    """Requests to a root and to a mounted application do not starve the sync pool (rule 14)."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        limiter = anyio.to_thread.current_default_thread_limiter()
        tokens, limiter.total_tokens = limiter.total_tokens, 4
        yield
        limiter.total_tokens = tokens

    app, sub = FastAPI(lifespan=lifespan), FastAPI()
    app.mount("/sub", sub)
    engine = create_engine(
        f"sqlite:///{tmp_path}/file", pool_size=1, max_overflow=0, pool_timeout=5
    )
    install_database(app, engine=engine, shutdown=engine.dispose)

    def user(session: Annotated[Session, Depends(get_db())]) -> int:
        return session.scalar(text("SELECT 1")) or 0

    @app.get("/")
    @sub.get("/")
    def show(
        user: Annotated[int, Depends(user)], session: Annotated[Session, Depends(get_db())]
    ) -> int:
        return user + (session.scalar(text("SELECT 1")) or 0)

    async with running(app) as client:
        answers = await asyncio.gather(*(client.get(path) for path in ("/", "/sub/") * 10))
    assert [each.json() for each in answers] == [2] * 20


async def test_a_mounted_applications_own_overrides_apply() -> None:
    """`sub.dependency_overrides[get_db()]` applies only to the mounted application's routes."""
    app, sub = showing(), FastAPI()
    app.mount("/sub", sub)
    install(app, "root")

    @sub.get("/")
    async def show(session: Annotated[Any, Depends(transactional())]) -> str:
        return str(session)

    sub.dependency_overrides[get_db()] = lambda: "overridden"
    async with running(app):
        assert await ask(app, "/default", "/sub/") == ["root", "overridden"]


async def test_a_mounted_applications_annotation_is_checked_against_the_parents_engine() -> None:
    """A mounted application's annotation must match the root's engine, or the start fails."""
    app, sub = FastAPI(), showing()
    app.mount("/sub", sub)
    install_database(app, engine=sqlite())
    with pytest.raises(Exception, match="annotated with AsyncSession, but database 'default'"):
        await start_and_stop(app)


async def test_a_mounted_applications_exception_handler_finds_its_databases() -> None:
    """`installed_databases(request.app)` works in handlers of a root and a mounted application."""
    root, child = FastAPI(), FastAPI()
    install(root, "root")
    install(child, "child", "own")

    async def answer(request: Request, _error: Exception) -> Response:
        places = {}
        for name, database in installed_databases(request.app).items():
            assert isinstance(database, AsyncDatabase)
            async with database.session() as session:
                places[name] = await place_of(session)
        return JSONResponse(places, 409)

    async def fail() -> None:
        raise ZeroDivisionError

    for app in root, child:
        app.add_exception_handler(ZeroDivisionError, answer)
        app.add_api_route("/fails", fail)
    root.mount("/child", child)
    async with running(root):
        found = await ask(root, "/fails", "/child/fails")
    assert found == [{"default": "root"}, {"own": "child", "default": "root"}]
