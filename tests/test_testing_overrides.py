"""`override_database`: another engine wherever a database is looked up by name."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from fastapi_sqlnative import (
    get_database_handle,
    health_router,
    install_database,
    installed_databases,
    transactional,
)
from fastapi_sqlnative.exceptions import DatabaseNotInstalledError
from fastapi_sqlnative.testing import IsolationError, async_client, isolated, override_database
from tests.conftest import MakeEngine
from tests.in_process import async_sqlite, note_disposal, sqlite, start_and_stop
from tests.serving import Item, Kind, Rows, route

Handle = Annotated[Any, Depends(get_database_handle())]


def add(session: Session) -> None:
    session.add(Item(name="added"))


def names(session: Session) -> list[str]:
    return list(session.scalars(select(Item.name)))


async def add_by_handle(handle: Any, name: str) -> None:
    if isinstance(handle.engine, AsyncEngine):
        async with handle.transaction() as session:
            session.add(Item(name=name))
    else:
        with handle.transaction() as session:
            session.add(Item(name=name))


def make_app(kind: Kind, engine: Any, **options: Any) -> FastAPI:
    app, mounted = FastAPI(), FastAPI()
    install_database(app, engine=engine, **options)
    route(app, kind, "/add", transactional(), add)
    route(app, kind, "/names", transactional(), names)
    route(mounted, kind, "/names", transactional(), names)
    app.mount("/mounted", mounted)

    @app.post("/background", status_code=201)
    async def background(handle: Handle, tasks: BackgroundTasks) -> None:
        tasks.add_task(add_by_handle, handle, "background")

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, handle: Handle) -> None:
        await websocket.accept()
        await add_by_handle(handle, "socket")
        await websocket.close()

    return app


@pytest.fixture
def own(make_engine: MakeEngine) -> Engine | AsyncEngine:
    return make_engine()


@pytest.fixture
def app(kind: Kind, own: Engine | AsyncEngine) -> FastAPI:
    return make_app(kind, own, shutdown=own.dispose)


@pytest.fixture
def build(make_engine: MakeEngine) -> Callable[[], Engine | AsyncEngine]:
    return lambda: make_engine(second=True)


def use_all(client: TestClient) -> None:
    assert client.post("/add").status_code == 201
    assert client.post("/background").status_code == 201
    with client.websocket_connect("/socket") as socket:
        assert socket.receive()["type"] == "websocket.close"  # a disconnect would cancel it
    everything = {"added", "background", "socket"}
    assert set(client.post("/names").json()) == everything
    assert set(client.post("/mounted/names").json()) == everything


def test_everything_follows(app: FastAPI, build: Any, rows: Rows, second_rows: Rows) -> None:
    """An override applies to routes, handles, background tasks, websockets and mounted apps."""
    rows.add("own")
    with override_database(app, "default", build), TestClient(app) as client:
        use_all(client)
    with TestClient(app) as client:
        assert client.post("/names").json() == ["own"]
    assert len(second_rows.names) == 3


def test_everything_follows_while_the_application_runs(
    app: FastAPI, build: Any, kind: Kind, rows: Rows, second_rows: Rows
) -> None:
    """A ready engine can override a database of a running application, even an isolated one.

    A factory raises IsolationError then.
    """
    rows.add("own")
    engine = build()
    with TestClient(app) as client:
        with pytest.raises(IsolationError, match="enter it first"):
            override_database(app, "default", build).__enter__()
        before = installed_databases(app)["default"]
        with isolated(app), override_database(app, "default", engine):
            assert installed_databases(app)["default"] is not before
            use_all(client)
        assert second_rows.names == []
        with override_database(app, "default", engine):
            use_all(client)
        assert installed_databases(app)["default"] is before
        assert client.post("/names").json() == ["own"]
        assert client.portal is not None
        client.portal.call(engine.dispose) if kind.asynchronous else engine.dispose()
    assert len(second_rows.names) == 3


def test_who_builds_closes(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """An override leaves a ready engine open, but disposes of an engine that a factory built.

    The application's shutdown hook runs once.
    """
    log: list[str] = []
    own, ready = make_engine(), make_engine(second=True)
    note_disposal(own, log, "own")
    note_disposal(ready, log, "ready")

    def build() -> Any:
        built = make_engine(second=True)
        note_disposal(built, log, "built")
        return built

    app = make_app(kind, own, shutdown=own.dispose)
    with override_database(app, "default", build), TestClient(app) as client:
        client.post("/names")
    assert log == ["own", "built"]
    log.clear()
    with override_database(app, "default", ready), TestClient(app) as client:
        client.post("/names")
        assert client.portal is not None
        disposal: Any = ready.dispose
        client.portal.call(disposal) if kind.asynchronous else disposal()
    assert log == ["ready", "own"]


def test_a_factory_of_the_application_is_not_called(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """An application that starts with an override calls its own factory only at a later start."""
    built: list[str] = []

    def own() -> Any:
        built.append("own")
        return make_engine()

    app = make_app(kind, own)
    override = override_database(app, "default", lambda: make_engine(second=True))
    with override, TestClient(app) as client:
        client.post("/add")
    assert built == []
    with TestClient(app) as client:
        assert client.post("/names").json() == []
    assert built == ["own"]
    assert second_rows.names == ["added"]


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("postgresql+psycopg://host/shop", "postgresql+psycopg2://me@host:5432/shop"),
        ("postgresql+psycopg://host:1/shop", "postgresql+psycopg:///shop?host=host&port=1"),
        ("mysql+pymysql://host/shop", "mysql+pymysql://host:3306/shop"),
    ],
)
def test_the_same_address_is_refused(own: str, other: str) -> None:
    """An override with the installed database is refused, however its address is written."""
    app = FastAPI()
    install_database(app, engine=create_engine(own))
    refused = pytest.raises(ValueError, match="the very database")
    with refused, override_database(app, "default", create_engine(other)):
        pytest.fail("it was accepted")


def test_the_same_database_is_refused(
    app: FastAPI, kind: Kind, make_engine: MakeEngine, own: Any, rows: Rows
) -> None:
    """An override with the installed database raises ValueError, however its engine is given."""
    for engine in own, make_engine(pool_size=1), lambda: make_engine(pool_size=1):
        refused = pytest.raises(ValueError, match="the very database")
        with refused, override_database(app, "default", engine), TestClient(app):
            pass


def test_mistakes_are_named(app: FastAPI, kind: Kind) -> None:
    """An unknown name, a URL or an engine of the other colour raises an error."""
    other: Any = (
        create_engine("sqlite://")
        if kind.asynchronous
        else create_async_engine("sqlite+aiosqlite://")
    )
    with pytest.raises(DatabaseNotInstalledError, match="'nowhere'"):
        override_database(app, "nowhere", other).__enter__()
    url: Any = "sqlite://"
    with pytest.raises(TypeError, match=r"not str\. Create an engine from the URL"):
        override_database(app, "default", url).__enter__()
    with pytest.raises(TypeError, match="cannot stand in"):
        override_database(app, "default", other).__enter__()


@pytest.mark.anyio
async def test_on_an_event_loop(app: FastAPI, build: Any, rows: Rows, second_rows: Rows) -> None:
    """The application awaits an override's factory that is `async def`."""
    second_rows.add("second")

    async def build_slowly() -> Any:
        await asyncio.sleep(0)
        return build()

    with override_database(app, "default", build_slowly):
        async with async_client(app) as client:
            assert (await client.post("/names")).json() == ["second"]


def test_a_mounted_application_has_its_own(
    kind: Kind, make_engine: MakeEngine, build: Any, rows: Rows, second_rows: Rows
) -> None:
    """A database of a mounted application can be overridden through the outer application."""
    outer, inner = FastAPI(), FastAPI()
    engine = make_engine()
    install_database(inner, name="inner", engine=engine, shutdown=engine.dispose)
    other = make_engine()
    install_database(outer, name="outer", engine=other, shutdown=other.dispose)
    route(inner, kind, "/add", transactional("inner"), add)
    outer.mount("/inner", inner)
    with override_database(outer, "inner", build), TestClient(outer) as client:
        client.post("/inner/add")
    assert (rows.names, second_rows.names) == ([], ["added"])


def test_health_follows(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """Readiness checks the overriding engine."""
    app.include_router(health_router(max_age=0.001, timeout=20))

    make: Any = create_async_engine if kind.asynchronous else create_engine
    nowhere = make(f"postgresql+{kind.driver}://nobody@127.0.0.1:1/none")
    with TestClient(app) as client:
        assert client.get("/health/ready").status_code == 200
        with override_database(app, "default", nowhere):
            assert client.get("/health/ready").status_code == 503
        assert client.get("/health/ready").status_code == 200


@pytest.mark.anyio
async def test_a_ready_engine_is_left_to_the_test() -> None:
    """A ready engine that does not fit the session options fails the start and stays open."""
    app, log, engine = FastAPI(), list[str](), sqlite()
    install_database(app, engine=async_sqlite, session_options={"class_": AsyncSession})
    note_disposal(engine, log)
    with override_database(app, "default", engine), pytest.raises(TypeError, match="class_"):
        await start_and_stop(app)
    assert log == []
    engine.dispose()
