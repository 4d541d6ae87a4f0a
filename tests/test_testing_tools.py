"""The small test tools: captured statements, the async client and the fixtures."""

# ruff: noqa: F811 - a parameter has the name of the fixture that it stands for

import contextlib
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from sqlalchemy import Engine, event, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from fastapi_sqlnative import get_db, install_database, installed_databases, reader, transactional
from fastapi_sqlnative.exceptions import DatabaseNotInstalledError
from fastapi_sqlnative.testing import (
    CapturedStatements,
    async_client,
    capture_statements,
    isolated,
)
from fastapi_sqlnative.testing.fixtures import (  # noqa: F401 - used by their names
    isolated_async_client,
    isolated_client,
    statements,
)
from tests.in_process import async_sqlite, sqlite
from tests.serving import Item, Kind, Rows, route


def add(session: Session) -> None:
    session.add(Item(name="added"))


def add_nested(session: Session) -> None:
    with session.begin_nested():
        session.add(Item(name="nested"))


def names(session: Session) -> list[str]:
    return list(session.scalars(select(Item.name)))


@pytest.fixture
def app(kind: Kind, engine: Engine | AsyncEngine) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/add", transactional(), add)
    route(app, kind, "/nested", transactional(), add_nested)
    route(app, kind, "/names", reader(), names)
    route(app, kind, "/db-names", get_db(), names)
    return app


@pytest.mark.parametrize("isolate", [False, True])
def test_statements_of_a_route(app: FastAPI, isolate: bool, rows: Rows) -> None:
    """A route's statements are captured in order, with those of transactions, isolated or not."""
    block: Any = isolated(app) if isolate else contextlib.nullcontext()
    with TestClient(app) as client, block:
        client.post("/names")  # SQLAlchemy's own queries on the first connection
        with capture_statements(app) as captured:
            client.post("/add")
        assert [each.split()[0] for each in captured.texts] == ["BEGIN", "INSERT", "COMMIT"]
        assert len(captured.queries) == 1
        assert captured[1].database == "default"
        with capture_statements(app) as captured:
            client.post("/nested")
        words = ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]
        assert [each.split()[0] for each in captured.texts] == words
        with capture_statements(app) as captured:
            client.post("/names")
            assert [each.sql.split()[0] for each in captured.queries] == ["SELECT"]
            assert isolate or len(captured) == 1
            captured.clear()
            client.post("/db-names")
        assert [each.split()[0] for each in captured.texts] == ["BEGIN", "SELECT", "ROLLBACK"]
        assert "1 queries" in repr(captured)
        client.post("/names")
        assert len(captured) == 3


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("commented", ["/* of a trace */ {}", "{} /* of a trace */"])
def test_statements_with_a_comment(
    app: FastAPI, engine: Engine | AsyncEngine, isolate: bool, commented: str, rows: Rows
) -> None:
    """A tracer's comment, before or after each statement, does not change the number of queries."""

    def comment(*call: Any) -> tuple[str, Any]:
        return commented.format(call[2]), call[3]

    inner = engine if isinstance(engine, Engine) else engine.sync_engine
    event.listen(inner, "before_cursor_execute", comment, retval=True)
    block: Any = isolated(app) if isolate else contextlib.nullcontext()
    with TestClient(app) as client, block:
        client.post("/names")  # SQLAlchemy's own queries on the first connection
        with capture_statements(app) as captured:
            client.post("/nested")
    assert (captured.texts[0], len(captured.queries), captured.texts[-1]) == ("BEGIN", 1, "COMMIT")


def test_statements_of_one_engine(engine: Engine | AsyncEngine, app: FastAPI, rows: Rows) -> None:
    """`capture_statements` also takes an engine or a handle, and raises without a database."""
    with TestClient(app) as client:
        database = installed_databases(app)["default"]
        with capture_statements(engine) as one, capture_statements(database) as other:
            client.post("/add")
    assert one == other != []
    with pytest.raises(DatabaseNotInstalledError), capture_statements(FastAPI()):
        pass


def test_statements_around_an_isolated_block(app: FastAPI, rows: Rows) -> None:
    """An inner isolated block is not captured itself, and its statements look the same."""
    with capture_statements(app) as captured:
        with isolated(app), TestClient(app) as client:
            client.post("/names")
            captured.clear()
            client.post("/add")
        assert [each.split()[0] for each in captured.texts] == ["BEGIN", "INSERT", "COMMIT"]


def test_statements_before_the_start() -> None:
    """A ready engine's statements are captured even if the application has not started."""
    app, engine = FastAPI(), sqlite()
    install_database(app, engine=engine, shutdown=engine.dispose)
    with capture_statements(app) as captured, engine.connect() as connection:
        connection.execute(select(1)).close()
    assert [each.split()[0] for each in captured.texts] == ["BEGIN", "SELECT", "ROLLBACK"]
    engine.dispose()


def test_the_fixtures(
    isolated_client: TestClient, statements: CapturedStatements, rows: Rows
) -> None:
    """`isolated_client` calls the running, isolated app, and `statements` has what it sends."""
    assert isolated_client.post("/add").status_code == 201
    assert isolated_client.post("/names").json() == ["added"]
    assert rows.names == []
    assert [each.sql.split()[0] for each in statements.queries[-2:]] == ["INSERT", "SELECT"]


@pytest.mark.anyio
async def test_the_asynchronous_fixture(
    isolated_async_client: httpx.AsyncClient, rows: Rows
) -> None:
    """On the event loop, `isolated_async_client` calls the running, isolated application."""
    assert (await isolated_async_client.post("/add")).status_code == 201
    assert (await isolated_async_client.post("/names")).json() == ["added"]
    assert rows.names == []


@pytest.mark.anyio
async def test_the_async_client_runs_the_lifespan() -> None:
    """`async_client` runs the lifespan around its block and passes the lifespan's state on."""
    log: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[dict[str, str]]:
        log.append("up")
        yield {"greeting": "hello"}
        log.append("down")

    app = FastAPI(lifespan=lifespan)
    engine = async_sqlite()
    install_database(app, engine=engine, shutdown=engine.dispose)

    @app.get("/")
    async def greet(request: Request) -> str:
        greeting: str = request.state.greeting
        request.state.greeting = "changed"  # for this request alone
        return greeting

    @app.get("/wrong")
    async def wrong() -> None:
        raise ZeroDivisionError

    async with async_client(app, headers={"x-test": "1"}) as client:
        assert log == ["up"]
        assert [(await client.get("/")).json() for _ in range(2)] == ["hello"] * 2
        assert client.headers["x-test"] == "1"
        with pytest.raises(ZeroDivisionError):
            await client.get("/wrong")
    assert log == ["up", "down"]
    async with async_client(app, raise_app_exceptions=False) as client:
        assert (await client.get("/wrong")).status_code == 500


@pytest.mark.anyio
async def test_a_lifespan_that_fails_fails_the_client() -> None:
    """An error at the start, in the block or at the end of `async_client` is raised in the test."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if app.state.fails == "start":
            raise ZeroDivisionError
        yield
        if app.state.fails == "end":
            raise ZeroDivisionError

    for fails in "start", "end":
        app = FastAPI(lifespan=lifespan)
        app.state.fails = fails
        with pytest.raises(ZeroDivisionError):
            async with async_client(app):
                assert fails == "end"
    app = FastAPI(lifespan=lifespan)
    app.state.fails = ""
    with pytest.raises(LookupError):
        async with async_client(app):
            raise LookupError


@pytest.mark.anyio
async def test_httpx2_does_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without httpx, `async_client` uses its successor, httpx2."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    app = FastAPI()
    app.get("/")(lambda: "hello")
    async with async_client(app) as client:
        assert type(client).__module__.startswith("httpx2")
        assert [(await client.get("/")).json() for _ in range(2)] == ["hello"] * 2
