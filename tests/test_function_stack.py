"""Rule 1: when the session ends, with FastAPI's own stack, without one, and outside HTTP."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.dependencies.utils import get_dependant, solve_dependencies
from fastapi.requests import HTTPConnection
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_sqlnative import dependencies, get_db, install_database, reader, transactional
from fastapi_sqlnative.exceptions import (
    DatabaseDependencyError,
    ReadOnlySessionError,
    SessionFinishedError,
    UncommittedChangesError,
)
from tests.in_process import running
from tests.serving import Item, Kind, Rows, add, route, using

pytestmark = pytest.mark.anyio

Body = Callable[[Session], Any]


# -- an endpoint that calls the application ----------------------------------------------------


async def test_a_copy_of_the_scope_is_another_request(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A request made with a copy of an endpoint's scope commits or rolls back by itself."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)

    def fail(session: Session) -> None:
        add("lost", flush=True)(session)
        raise HTTPException(409)

    route(app, kind, "/failing", transactional(), fail)
    route(app, kind, "/inner", transactional(), add("inner"))
    seen: list[list[str]] = []

    async def look(message: Message) -> None:
        seen.append(rows.names)

    @app.post("/{path}-inside")
    async def outer(
        path: str, request: Request, session: Annotated[Any, Depends(transactional())]
    ) -> None:
        session.add(Item(name="outer"))
        await app({**request.scope, "path": f"/{path}"}, request.receive, look)
        if path == "inner":
            raise ZeroDivisionError

    async with running(app) as client:
        with pytest.raises(ZeroDivisionError):
            await client.post("/inner-inside")
        assert seen[0] == rows.names == ["inner"]
        assert (await client.post("/failing-inside")).status_code == 200
    assert rows.names == ["inner", "outer"]


# -- a library that resolves dependencies itself -------------------------------------------------


def read(session: Session) -> None:
    session.scalars(select(Item)).all()


def fail_to_write(session: Session) -> None:
    with pytest.raises(ReadOnlySessionError):
        session.execute(insert(Item).values(name="refused"))


async def test_a_session_from_a_librarys_cache_is_committed(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A session that was read with is committed if a later function is transactional.

    A later function's reader is a session of its own.
    fastapi-injectable gives each function a scope of its own, and all of them one cache.
    """
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    cache: dict[Any, Any] = {}
    async with running(app), AsyncExitStack() as stack:
        bodies = {
            get_db(): read,
            transactional(): add("stored", flush=True),
            reader(): fail_to_write,
        }
        for dependency, body in bodies.items():
            function = using(kind, Depends(dependency), body)
            scope = {"type": "http", "app": app, "headers": [], "query_string": b""}
            stacks = dict.fromkeys(("fastapi_inner_astack", "fastapi_function_astack"), stack)
            solved = await solve_dependencies(
                request=Request(scope | stacks),
                dependant=get_dependant(path="/", call=function),
                dependency_cache=cache,
                async_exit_stack=stack,
                embed_body_fields=False,
            )
            cache |= solved.dependency_cache
            if kind.asynchronous:
                await function(**solved.values)
            else:
                await run_sync(partial(function, **solved.values))
        assert rows.names == []
    assert rows.names == ["stored"]


# -- FastAPI without a stack -------------------------------------------------------------------


class Looking:
    """A wrapper that records the stored names when a response starts."""

    def __init__(self, app: ASGIApp, rows: Rows) -> None:
        self.app, self.rows = app, rows
        self.stored: list[list[str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def looking(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.stored.append(self.rows.names)
            await send(message)

        await self.app(scope, receive, looking)


@pytest.mark.parametrize("has_stack", [True, False], ids=["own stack", "generator"])
async def test_the_commit_comes_before_the_response(
    kind: Kind, engine: Engine, rows: Rows, has_stack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit comes before the response, whether FastAPI keeps a stack or not.

    Without a stack, a generator with function scope ends the session.
    """
    assert dependencies.HAS_FUNCTION_STACK, "this FastAPI keeps one"
    monkeypatch.setattr(dependencies, "HAS_FUNCTION_STACK", has_stack)
    name = f"{kind.id} {has_stack}"  # dependencies are cached by name
    rows.add("there", position=1)
    app = FastAPI()
    install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/", transactional(name), add("a"))
    route(app, kind, "/taken", transactional(name), add("b", position=1))
    route(app, kind, "/forgotten", get_db(name), add("c"))
    looking = Looking(app, rows)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(looking), base_url="http://app") as client,
    ):
        assert (await client.post("/")).status_code == 201
        assert looking.stored == [["a", "there"]]
        with pytest.raises(IntegrityError):
            await client.post("/taken")
        with pytest.raises(UncommittedChangesError):
            await client.post("/forgotten")
    assert rows.names == ["a", "there"]


# -- a frontend, whose dependencies end after its response -------------------------------------


def keep(session: Session) -> None:
    session.add(Item(name="kept"))
    session.commit()


@pytest.mark.skipif(not hasattr(FastAPI, "frontend"), reason="this FastAPI has no frontends")
async def test_no_commit_comes_after_a_frontend(
    kind: Kind, engine: Engine, rows: Rows, tmp_path: Path
) -> None:
    """On a frontend, `transactional` raises an error, and an explicit commit is stored."""
    (tmp_path / "index.html").write_text("home")
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    bodies = {"/late": (transactional(), add("late")), "/kept": (get_db(), keep)}
    for prefix, (dependency, body) in bodies.items():
        visit = Depends(using(kind, Depends(dependency), body))
        router = APIRouter(prefix=prefix, dependencies=[visit])
        router.frontend("/", directory=tmp_path)
        app.include_router(router)
    looking = Looking(app, rows)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(looking), base_url="http://app") as client,
    ):
        with pytest.raises(DatabaseDependencyError, match=r"commit\(\) on get_db\('default'\)"):
            await client.get("/late/")
        assert (await client.get("/kept/")).text == "home"
    assert looking.stored[-1] == rows.names == ["kept"]


@pytest.mark.skipif(not hasattr(FastAPI, "frontend"), reason="this FastAPI has no frontends")
async def test_a_frontend_does_not_fail_for_a_late_route(
    kind: Kind, engine: Engine, tmp_path: Path
) -> None:
    """A request for a frontend, which has no route, does not check a route added after start-up."""
    (tmp_path / "index.html").write_text("home")
    app = FastAPI(dependencies=[Depends(get_db())])
    install_database(app, engine=engine, shutdown=engine.dispose)
    app.frontend("/", directory=tmp_path)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client,
    ):
        app.get("/late", dependencies=[Depends(get_db("elsewhere"))])(lambda: None)
        assert (await client.get("/")).text == "home"


# -- a framework that brings its own scope -----------------------------------------------------


class BrokerMessage(HTTPConnection):
    """A broker's message, which FastStream passes to FastAPI's dependencies."""

    def __init__(self, app: FastAPI, stack: AsyncExitStack) -> None:
        self.scope = {"app": app, "fastapi_function_astack": stack}


async def consume(app: FastAPI, dependency: Any, body: Body) -> Any:
    """Handle a message as FastStream does: solve the dependency, then exit its stack."""
    async with AsyncExitStack() as stack:
        connection = BrokerMessage(app, stack)
        session: Any = await get_db()(connection=connection)
        if dependency is not get_db():
            session = await dependency(session=session, connection=connection)
        if isinstance(session, AsyncSession):
            await session.run_sync(body)
        else:
            await run_sync(body, session)
    return session


def fail(session: Session) -> None:
    session.add(Item(name="lost"))
    session.flush()
    raise ZeroDivisionError


async def test_a_message_has_a_session_as_a_request_has(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A session in a scope with only the application and the stack commits, rolls back and ends."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    async with app.router.lifespan_context(app):
        session = await consume(app, transactional(), add("a"))
        assert rows.names == ["a"]
        with pytest.raises(SessionFinishedError):
            session.add(Item(name="late"))
        with pytest.raises(ZeroDivisionError):
            await consume(app, transactional(), fail)
        with pytest.raises(UncommittedChangesError):
            await consume(app, get_db(), add("forgotten"))
        assert rows.backends("idle in transaction%") == 0
    assert rows.names == ["a"]
