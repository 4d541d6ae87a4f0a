"""The holders of connections, in a pool's timeout error, `pool_status()` and the log."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Response
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    PoolStatus,
    get_db,
    install_database,
    installed_databases,
    transactional,
)
from tests.conftest import MakeEngine
from tests.in_process import dispose, running
from tests.serving import Item, Kind, Rows, pid_of, route, until

pytestmark = pytest.mark.anyio


def status_of(app: FastAPI) -> PoolStatus:
    return installed_databases(app)["default"].pool_status()


def wait(session: Session) -> None:
    session.execute(text("SELECT pg_advisory_xact_lock(7)"))


async def test_a_closed_proxy_disturbs_nobody(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """`pool_status()` counts a session whose connection has been closed behind its back."""
    served, engine, held = FastAPI(), make_engine(), list[int]()
    install_database(served, engine=engine, shutdown=engine.dispose)

    def body(session: Session) -> None:
        session.connection().connection.invalidate()
        held.extend(each.connections for each in status_of(served).holders)
        raise HTTPException(409)

    route(served, kind, "/", get_db(), body)
    async with running(served) as client:
        assert (await client.post("/")).status_code == 409
    assert held == [1]


async def test_a_route_is_named_without_what_a_proxy_adds(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """The name of a route has the path of its mount, but not the server's `root_path`."""
    app, below = FastAPI(), FastAPI()
    engine, named = make_engine(), list[str | None]()
    install_database(app, engine=engine, shutdown=engine.dispose)
    app.mount("/below", below)

    def body(session: Session) -> None:
        session.execute(text("SELECT 1"))
        named.extend(each.route for each in status_of(app).holders)

    route(below, kind, "/items", get_db(), body)
    behind = httpx.ASGITransport(app, root_path="/api/v1")
    async with running(app), httpx.AsyncClient(transport=behind, base_url="http://app") as client:
        assert (await client.post("/api/v1/below/items")).status_code == 201
    assert named == ["POST /below/items"]


@pytest.mark.parametrize(("isolation_level", "idle"), [("SERIALIZABLE", 1), ("AUTOCOMMIT", 0)])
def test_the_status_asks_no_driver(isolation_level: Any, idle: int) -> None:
    """`pool_status()` does not read the driver's `autocommit`.

    A driver that asks its server for it, as mysql.connector does, would disturb a statement that is
    running.
    """
    asked: list[str] = []

    class Asking(sqlite3.Connection):
        @property
        def autocommit(self) -> bool:
            asked.append("autocommit")
            return False

    engine = create_engine(
        "sqlite://", connect_args={"factory": Asking}, isolation_level=isolation_level
    )
    database = Database(engine)
    with database.session() as session:
        session.execute(text("SELECT 1"))
        asked.clear()
        (holder,) = database.pool_status().holders
    engine.dispose()
    assert (holder.connections, holder.idle_in_transaction, asked) == (1, idle, [])


@asynccontextmanager
async def held(
    app: FastAPI, rows: Rows, client: httpx.AsyncClient, *paths: str
) -> AsyncGenerator[None]:
    """Make requests wait for a lock, each with a connection, until the block ends."""
    with rows.locked(7):
        requests = [asyncio.create_task(client.post(path)) for path in paths]
        await until(lambda: len(requests) == rows.backends("active"))
        yield
    answers = await asyncio.gather(*requests)
    assert {each.status_code for each in answers} == {201}


@pytest.fixture
def app(kind: Kind, make_engine: MakeEngine, rows: Rows) -> FastAPI:
    """Return an application with three connections, and a waiting route under two prefixes."""
    app = FastAPI()
    engine = make_engine(pool_size=2, max_overflow=1, pool_timeout=0.1)
    install_database(app, engine=engine, shutdown=engine.dispose)
    router = APIRouter(prefix="/orders")
    route(router, kind, "/{id}", transactional(), wait)  # type: ignore[arg-type] # it has post() too
    for prefix in "/api", "/api/v2":
        app.include_router(router, prefix=prefix)
    route(app, kind, "/waiting", get_db(), wait)
    return app


async def test_the_pool_says_who_has_its_connections(app: FastAPI, rows: Rows) -> None:
    """`pool_status()` lists the routes that hold connections, how many and for how long."""
    async with running(app) as client:
        assert status_of(app).holders == ()
        async with held(app, rows, client, "/api/orders/1", "/api/orders/2", "/api/v2/orders/3"):
            found = {each.route: each for each in status_of(app).holders}
            assert set(found) == {"POST /api/orders/{id}", "POST /api/v2/orders/{id}"}
            orders = found["POST /api/orders/{id}"]
            assert (orders.connections, orders.idle_in_transaction) == (2, 0)
            assert orders.seconds > 0
            oldest = [each.seconds for each in status_of(app).holders]
            assert oldest == sorted(oldest, reverse=True)
        assert status_of(app).holders == ()


async def test_an_idle_transaction_shows(kind: Kind, engine: Engine | AsyncEngine) -> None:
    """A transaction that is open while no statement runs counts as idle in transaction."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    seen: list[Any] = []

    def body(session: Session) -> None:
        session.execute(text("SELECT 1"))
        seen.append(status_of(app).holders)
        session.commit()
        seen.append(status_of(app).holders)

    route(app, kind, "/", get_db(), body)
    async with running(app) as client:
        await client.post("/")
    ((held,), after) = seen
    assert (held.route, held.connections, held.idle_in_transaction) == ("POST /", 1, 1)
    assert after == ()


async def test_a_handles_session_has_no_route(kind: Kind, engine: Engine | AsyncEngine) -> None:
    """A connection that a handle's session holds is listed without a route."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    async with running(app):
        database: Any = installed_databases(app)["default"]
        if kind.asynchronous:
            async with database.session() as session:
                await session.execute(text("SELECT 1"))
                (holder,) = database.pool_status().holders
        else:
            with database.session() as session:
                session.execute(text("SELECT 1"))
                (holder,) = database.pool_status().holders
    assert (holder.route, holder.connections) == (None, 1)


async def test_a_pool_that_times_out_says_who(
    kind: Kind, app: FastAPI, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """The error's note and one log line name the holders, however many requests time out."""
    errors: list[PoolTimeoutError] = []

    async def note(_request: Any, error: PoolTimeoutError) -> Response:
        errors.append(error)
        return Response(status_code=503)

    app.add_exception_handler(PoolTimeoutError, note)  # type: ignore[arg-type] # a subclass

    holding = "/api/orders/1", "/api/orders/2", "/waiting"
    async with running(app) as client, held(app, rows, client, *holding):
        answers = await asyncio.gather(*(client.post("/waiting") for _ in range(5)))
    assert [each.status_code for each in answers] == [503] * 5
    assert len(errors) == 5
    told = errors[0].__notes__[0]
    for error in errors:
        assert error.__notes__ == [told]
        assert told.startswith("The connections of database 'default' are held by ")
        assert "POST /api/orders/{id}: 2, up to " in told
        assert "POST /waiting: 1, up to " in told
        assert "idle" not in told
        assert "no one" not in told
    (line,) = [each for each in caplog.messages if "came back in time" in each]
    assert line.endswith(f": {told.partition(' held by ')[2]}")


async def test_the_note_names_sessions_of_a_handle(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """The note says which connections sessions of a handle hold, although these have no route."""
    engine: Any = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.1)

    async def use_two() -> None:
        if kind.asynchronous:
            database = AsyncDatabase(engine)
            async with database.session() as first, database.session() as second:
                await first.run_sync(pid_of)
                await second.run_sync(pid_of)
        else:
            other = Database(engine)
            with other.session() as holding, other.session() as waiting:
                pid_of(holding)
                pid_of(waiting)

    with pytest.raises(PoolTimeoutError) as raised:
        await use_two()
    await dispose(engine)
    (told,) = raised.value.__notes__
    assert " are held by sessions of the handle: 1, up to " in told


def autoflush(session: Session) -> None:
    """Make the flush within a query wait for the pool."""
    session.add(Item(name="a"))
    wait(session)


async def test_connections_of_others_are_counted(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """The note also counts, without a route, connections that the application itself has taken."""
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.1)
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/", get_db(), autoflush)
    async with running(app) as client:
        connection: Any = engine.connect()
        if kind.asynchronous:
            await connection.start()
        with pytest.raises(PoolTimeoutError) as raised:
            await client.post("/")
        closed = connection.close()
        if kind.asynchronous:
            await closed
    (told,) = raised.value.__notes__
    assert told.endswith(" connecting, or code outside fastapi-sqlnative: 1.")


@pytest.mark.parametrize(("limit", "warned"), [(0, True), (60, False), (None, False)])
async def test_a_connection_held_for_long_is_logged(
    kind: Kind,
    engine: Engine | AsyncEngine,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
    limit: float | None,
    warned: bool,
) -> None:
    """With `warn_held_after`, the log names the route when the connection is returned."""
    app = FastAPI()
    install_database(
        app, engine=engine, shutdown=engine.dispose, name="books", warn_held_after=limit
    )
    route(app, kind, "/books", transactional("books"), lambda s: s.add(Item(name="a")))
    async with running(app) as client:
        assert (await client.post("/books")).status_code == 201
    lines = [each for each in caplog.record_tuples if each[0] == "fastapi_sqlnative"]
    assert len(lines) == warned
    for _, level, message in lines:
        assert level == logging.WARNING
        assert message.startswith("POST /books held a connection of database 'books' for ")


@pytest.mark.parametrize(("value", "error"), [("1", TypeError), (-1, ValueError)])
def test_a_time_that_is_none_is_refused(value: Any, error: type[Exception]) -> None:
    """install_database() raises TypeError or ValueError for an invalid `warn_held_after`."""
    with pytest.raises(error, match="warn_held_after of database 'default'"):
        install_database(FastAPI(), engine=lambda: None, warn_held_after=value)  # type: ignore[arg-type,return-value] # never called
