"""`override_database`: another engine, wherever the name is looked up."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
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
from fastapi_sqlnative.testing import async_client, override_database
from tests.conftest import MakeEngine
from tests.in_process import note_disposal
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
    with client.websocket_connect("/socket"):
        pass
    everything = {"added", "background", "socket"}
    assert set(client.post("/names").json()) == everything
    assert set(client.post("/mounted/names").json()) == everything


def test_everything_follows_while_the_application_runs(
    app: FastAPI, build: Any, rows: Rows, second_rows: Rows
) -> None:
    """Routes, handles, background work, websockets and mounted applications use the engine."""
    rows.add("own")
    with TestClient(app) as client:
        with override_database(app, "default", build):
            use_all(client)
        assert client.post("/names").json() == ["own"]
    assert len(second_rows.names) == 3


def test_everything_follows_from_the_start(
    app: FastAPI, build: Any, rows: Rows, second_rows: Rows
) -> None:
    """Entered before start-up it is the same, and the lifespan may end inside of the block."""
    with override_database(app, "default", build), TestClient(app) as client:
        use_all(client)
    rows.add("own")
    with TestClient(app) as client:
        assert client.post("/names").json() == ["own"]


def test_the_block_may_end_first(app: FastAPI, build: Any, rows: Rows, second_rows: Rows) -> None:
    """Entered before start-up and left while it runs, the application's own engine is back."""
    second_rows.add("second")
    rows.add("own")
    block = override_database(app, "default", build)
    block.__enter__()
    with TestClient(app) as client:
        assert client.post("/names").json() == ["second"]
        block.__exit__(None, None, None)
        assert client.post("/names").json() == ["own"]


def test_it_ends_when_the_block_raises(
    app: FastAPI, build: Any, rows: Rows, second_rows: Rows
) -> None:
    """Whatever happens, and however they are nested, each one takes itself out."""
    second_rows.add("second")
    with TestClient(app) as client:

        def use() -> None:
            with override_database(app, "default", build):
                assert client.post("/names").json() == ["second"]
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            use()
        assert client.post("/names").json() == []


def test_who_builds_closes(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """The test's engine is left alone, a factory's is disposed of, the hook runs once."""
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
    with TestClient(app) as client:
        with override_database(app, "default", build):
            client.post("/names")
        assert log == ["built"]
        with override_database(app, "default", ready):
            client.post("/names")
        assert log == ["built"]
        assert client.portal is not None
        disposal: Any = ready.dispose
        client.portal.call(disposal) if kind.asynchronous else disposal()
    assert log == ["built", "ready", "own"]


def test_a_factory_of_the_application_is_not_called(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """An application that starts overridden builds no engine of its own; later it does."""
    built: list[str] = []

    def own() -> Any:
        built.append("own")
        return make_engine()

    app = make_app(kind, own)
    block = override_database(app, "default", lambda: make_engine(second=True))
    block.__enter__()
    with TestClient(app) as client:
        client.post("/add")
        assert built == []
        block.__exit__(None, None, None)
        assert built == ["own"]
        assert client.post("/names").json() == []
    assert second_rows.names == ["added"]


def test_the_same_database_is_refused(
    app: FastAPI, kind: Kind, make_engine: MakeEngine, own: Any, rows: Rows
) -> None:
    """Tests never write to the installed database, however it is spelt."""
    for engine in own, make_engine(pool_size=1), lambda: make_engine(pool_size=1):
        with TestClient(app), pytest.raises(ValueError, match="the very database"):
            override_database(app, "default", engine).__enter__()


def test_mistakes_are_named(app: FastAPI, kind: Kind) -> None:
    """An unknown name, and an engine of the other kind, are refused."""
    other: Any = (
        create_engine("sqlite://")
        if kind.asynchronous
        else create_async_engine("sqlite+aiosqlite://")
    )
    with pytest.raises(DatabaseNotInstalledError, match="'nowhere'"):
        override_database(app, "nowhere", other)
    with pytest.raises(TypeError, match="cannot stand in"):
        override_database(app, "default", other).__enter__()


@pytest.mark.anyio
async def test_on_the_applications_loop(
    app: FastAPI, build: Any, rows: Rows, second_rows: Rows, kind: Kind
) -> None:
    """`async with` awaits what is done there; `with` would have to block the loop."""
    second_rows.add("second")

    async def build_slowly() -> Any:
        await asyncio.sleep(0)
        return build()

    async with async_client(app) as client:
        with pytest.raises(RuntimeError, match="write `async with"):
            override_database(app, "default", build_slowly).__enter__()
        async with override_database(app, "default", build_slowly):
            assert (await client.post("/names")).json() == ["second"]
        engine = build()
        async with override_database(app, "default", engine):
            assert (await client.post("/names")).json() == ["second"]
        await engine.dispose() if kind.asynchronous else engine.dispose()
        assert (await client.post("/names")).json() == []


def test_a_mounted_application_has_its_own(
    kind: Kind, make_engine: MakeEngine, build: Any, rows: Rows, second_rows: Rows
) -> None:
    """A name that is installed on a mounted application is found through the outer one."""
    outer, inner = FastAPI(), FastAPI()
    engine = make_engine()
    install_database(inner, name="inner", engine=engine, shutdown=engine.dispose)
    other = make_engine()
    install_database(outer, name="outer", engine=other, shutdown=other.dispose)
    route(inner, kind, "/add", transactional("inner"), add)
    outer.mount("/inner", inner)
    with TestClient(outer) as client, override_database(outer, "inner", build):
        client.post("/inner/add")
    assert (rows.names, second_rows.names) == ([], ["added"])


def test_handles_fetched_before_do_not_follow(
    app: FastAPI, build: Any, rows: Rows, second_rows: Rows
) -> None:
    """What code has fetched before the block is still the application's own."""
    with TestClient(app):
        before = installed_databases(app)["default"]
        with override_database(app, "default", build):
            assert installed_databases(app)["default"] is not before
        assert installed_databases(app)["default"] is before


def test_health_follows(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """Readiness asks the engine that stands in."""
    app.include_router(health_router(max_age=0.001))

    def nowhere() -> Any:
        make = create_async_engine if kind.asynchronous else create_engine
        return make(f"postgresql+{kind.driver}://nobody@127.0.0.1:1/none")

    with TestClient(app) as client:
        assert client.get("/health/ready").status_code == 200
        with override_database(app, "default", nowhere):
            assert client.get("/health/ready").status_code == 503
        assert client.get("/health/ready").status_code == 200
