"""Rule 13: a cancellation leaks nothing, and interrupts no COMMIT before its deadline."""

import asyncio
import gc
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import anyio.to_thread
import httpx
import psycopg
import pytest
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection, Engine, create_engine, event, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.middleware.base import BaseHTTPMiddleware

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    get_database_handle,
    install_database,
    reader,
    transactional,
)
from fastapi_sqlnative._sessions.completion import without_yielding
from fastapi_sqlnative._sessions.engines import sync_engine
from tests.conftest import MakeEngine, asynchronous
from tests.in_process import application, client_of, counted_waits, turns
from tests.proxy import Fault, Proxy
from tests.serving import KINDS, PSYCOPG_ASYNC, Item, Kind, Rows, add, items, route, serve, until

add_a = add("a")
pytestmark = pytest.mark.anyio
Cancel = Callable[["asyncio.Task[Any]", anyio.CancelScope], object]
CANCELS: dict[str, Cancel] = {
    "asyncio": lambda task, _scope: task.cancel(),
    "asyncio-twice": lambda task, _scope: (task.cancel(), task.cancel()),
    "anyio": lambda _task, scope: scope.cancel(),
}


@asynccontextmanager
async def running(
    engine: Engine | AsyncEngine, kind: Kind, body: Callable[[Session], Any], **options: Any
) -> AsyncGenerator[httpx.AsyncClient]:
    """Run an application with one transactional endpoint in this event loop and yield a client."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose, **options)
    route(app, kind, "/", transactional(), body)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


async def cancelled_request(
    client: httpx.AsyncClient, reached: Callable[[], bool], cancel: Cancel
) -> "asyncio.Task[Any]":
    """Send a request, and cancel it when `reached` returns true."""
    scope = anyio.CancelScope()

    async def request() -> None:
        with scope:
            await client.post("/")

    task = asyncio.create_task(request())
    await until(reached)
    cancel(task, scope)
    return task


async def ended(task: "asyncio.Task[Any]") -> None:
    """Wait for a cancelled task to end.

    The task of an anyio scope ends normally, because the scope swallows its own cancellation.
    """
    await asyncio.wait({task}, timeout=30)
    assert task.done()
    assert task.cancelled() or task.exception() is None


def add_and_commit(session: Session) -> None:
    add_a(session)
    session.commit()


def add_in_a_listener(session: Session) -> None:
    event.listen(session, "before_commit", add_a)


def add_in_a_listener_and_commit(session: Session) -> None:
    add_in_a_listener(session)
    session.commit()


# A thread goes on with its own COMMIT when asyncio cancels the task that waits for it.
OURS_AND_OWN = pytest.mark.parametrize(
    ("kind", "body"),
    [
        *(pytest.param(each, add_a, id=each.id) for each in KINDS),
        *(pytest.param(each, add_and_commit, id=f"{each.id}-own") for each in KINDS[:2]),
        pytest.param(KINDS[0], add_in_a_listener, id=f"{KINDS[0].id}-listener"),
        pytest.param(KINDS[0], add_in_a_listener_and_commit, id=f"{KINDS[0].id}-own-listener"),
    ],
    indirect=["kind"],
)


@pytest.mark.driver_decides
@OURS_AND_OWN
@pytest.mark.parametrize("cancel", CANCELS.values(), ids=CANCELS)
async def test_a_commit_is_awaited(
    kind: Kind,
    behind_proxy: Engine,
    proxy: Proxy,
    rows: Rows,
    cancel: Cancel,
    body: Callable[[Session], None],
) -> None:
    """A request that is cancelled during its COMMIT ends after the COMMIT, which is stored."""
    proxy.fault = Fault.STALLED
    async with running(behind_proxy, kind, body) as client:
        task = await cancelled_request(client, proxy.reached.is_set, cancel)
        await turns()
        assert not task.done()
        proxy.go_on.set()
        await ended(task)
        assert rows.names == ["a"]
        assert rows.backends("idle in transaction%") == 0


@asynchronous
async def test_a_flush_without_a_change_may_be_stored(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """The COMMIT runs in its own task if a mapper's listener may write for an unchanged object."""
    rows.add("there")
    tasks: list[object] = []

    def rename(_mapper: object, connection: Connection, _row: Item) -> None:
        tasks.append(asyncio.current_task())
        connection.execute(update(items).values(name="a"))

    def touch(session: Session) -> None:
        row = session.scalars(select(Item)).one()
        row.name = str(row.name)

    event.listen(Item, "before_update", rename)
    try:
        async with running(engine, kind, touch) as client:
            assert (await client.post("/")).status_code == 201
    finally:
        event.remove(Item, "before_update", rename)
    assert tasks != [asyncio.current_task()]
    assert rows.names == ["a"]


# anyio is left out because FastAPI shields the exit of a dependency from it, and a cancellation
# that does not get through starts no deadline.
@pytest.mark.driver_decides
@OURS_AND_OWN
@pytest.mark.parametrize("cancel", [CANCELS["asyncio-twice"]], ids=["asyncio-twice"])
async def test_a_commit_that_hangs_is_given_up(
    kind: Kind,
    behind_proxy: Engine,
    proxy: Proxy,
    rows: Rows,
    cancel: Cancel,
    body: Callable[[Session], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An async connection whose COMMIT hangs past the deadline is discarded.

    The log says that the outcome is unknown.
    """
    if not kind.asynchronous:
        proxy.go_on.set()  # a sync COMMIT is awaited, bounded only by its driver's timeouts
    proxy.fault = Fault.STALLED
    async with running(behind_proxy, kind, body, shutdown_timeout=0.2) as client:
        task = await cancelled_request(client, proxy.reached.is_set, cancel)
        await ended(task)
    told = "whether a COMMIT took effect is unknown" in caplog.text
    assert told is kind.asynchronous


@pytest.mark.parametrize("kind", [KINDS[1]], indirect=True, ids=lambda kind: kind.id)
async def test_a_server_that_hangs_is_asked_nothing_more(
    kind: Kind,
    behind_proxy: Engine | AsyncEngine,
    proxy: Proxy,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a query right before COMMIT is given up, the package sends no query of its own."""

    def freeze(connection: Connection) -> None:
        proxy.fault = Fault.FROZEN
        connection.execute(text("SELECT 1"))

    event.listen(sync_engine(behind_proxy), "commit", freeze)
    async with running(behind_proxy, kind, add_a, shutdown_timeout=0.2) as client:
        task = await cancelled_request(client, proxy.reached.is_set, CANCELS["asyncio"])
        await ended(task)
    # One for the query, and one for SQLAlchemy's attempt to close the connection properly.
    assert caplog.text.count("did not finish within") == 2


@pytest.mark.driver_decides
@pytest.mark.parametrize("cancel", CANCELS.values(), ids=CANCELS)
async def test_a_query_is_interrupted(
    kind: Kind, make_engine: MakeEngine, rows: Rows, cancel: Cancel
) -> None:
    """A request that is cancelled during a query rolls back and frees its connection."""
    engine = make_engine(pool_size=1, max_overflow=0)

    def body(session: Session) -> None:
        add_a(session)
        session.flush()
        session.execute(text("SELECT pg_advisory_xact_lock(3)"))

    async with running(engine, kind, body) as client:
        with rows.locked(3):
            task = await cancelled_request(client, rows.waits, cancel)
            if kind.asynchronous:  # a thread goes on to the end of its query
                await ended(task)
        await ended(task)
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # a QueuePool's
    assert rows.names == []


@pytest.mark.parametrize("kind", [PSYCOPG_ASYNC], ids=lambda kind: kind.id)
@pytest.mark.parametrize(
    "switched",
    [
        pytest.param(
            True,
            id="into AUTOCOMMIT",
            marks=pytest.mark.skipif(
                "execution_options" not in inspect.signature(Session).parameters,
                reason="SQLAlchemy 2.0 leaves such a connection to the garbage collector",
            ),
        ),
        pytest.param(False, id="out of it"),
    ],
)
async def test_a_reader_may_be_cancelled_as_its_connection_is_switched(
    kind: Kind, engine: Engine, rows: Rows, switched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that is cancelled while its connection is switched does not use up the pool.

    The pool gets no connection back that is still in AUTOCOMMIT.
    """
    switch = psycopg.AsyncConnection.set_autocommit
    requests: list[asyncio.Task[Any]] = []

    async def switch_and_yield(connection: Any, value: bool) -> None:
        await switch(connection, value)
        if value is switched:
            requests[0].cancel()
        await asyncio.sleep(0)  # as psycopg does when the event loop has been busy

    app = application(engine, kind, reader(), lambda session: session.scalar(text("SELECT 1")))
    route(app, kind, "/store", transactional(), add_a)
    async with app.router.lifespan_context(app), client_of(app) as client:
        assert (await client.post("/")).status_code == 201
        with monkeypatch.context() as patched:
            patched.setattr(psycopg.AsyncConnection, "set_autocommit", switch_and_yield)
            requests.append(asyncio.create_task(client.post("/")))
            with pytest.raises(asyncio.CancelledError):
                await requests[0]
        assert (await client.post("/store")).status_code == 201
    assert rows.names == ["a"]


async def test_only_what_waits_can_be_cancelled() -> None:
    """Work that is kept from yielding is cancelled only where it waits, and may handle that."""
    passed: list[str] = []

    async def work() -> str:
        await asyncio.sleep(0)
        passed.append("yielded")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            passed.append("waited")
        await asyncio.sleep(0)
        return "done"

    async def run() -> str:
        task: Any = asyncio.current_task()
        asyncio.get_running_loop().call_soon(task.cancel)
        return await without_yielding(work())

    assert await asyncio.create_task(run()) == "done"
    assert passed == ["yielded", "waited"]


@pytest.mark.parametrize(
    ("cancel", "hangs"),
    [*((cancel, False) for cancel in CANCELS.values()), (CANCELS["anyio"], True)],
    ids=[*CANCELS, "hangs"],
)
@pytest.mark.parametrize("kind", KINDS[:2], indirect=True, ids=lambda kind: kind.id)
async def test_a_handles_commit_is_awaited_until_the_deadline(
    behind_proxy: AsyncEngine, proxy: Proxy, rows: Rows, cancel: Cancel, hangs: bool
) -> None:
    """A cancelled `transaction()` of a handle finishes its COMMIT, or gives up at the deadline."""
    database = AsyncDatabase(behind_proxy, shutdown_timeout=0.2 if hangs else 10)
    proxy.fault = Fault.STALLED
    scope = anyio.CancelScope()

    async def work() -> None:
        with scope:
            async with database.transaction() as session:
                session.add(Item(name="a"))

    task = asyncio.create_task(work())
    assert await anyio.to_thread.run_sync(proxy.reached.wait, 10)
    cancel(task, scope)
    if not hangs:
        proxy.go_on.set()
    await ended(task)
    assert rows.names == ([] if hangs else ["a"])
    await database.engine.dispose()


@pytest.mark.parametrize("kind", KINDS[:1], indirect=True, ids=lambda kind: kind.id)
async def test_waiting_for_a_commit_does_not_spin(
    behind_proxy: AsyncEngine, proxy: Proxy, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for a COMMIT is shielded from anyio, which cancels again at every await."""
    database = AsyncDatabase(behind_proxy)
    proxy.fault = Fault.STALLED
    waits = counted_waits(monkeypatch)
    async with anyio.create_task_group() as tasks:

        async def work() -> None:
            async with database.transaction() as session:
                session.add(Item(name="a"))

        tasks.start_soon(work)
        assert await anyio.to_thread.run_sync(proxy.reached.wait, 10)
        waits.clear()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await turns()
        proxy.go_on.set()
    assert len(waits) == 1
    assert rows.names == ["a"]
    await database.engine.dispose()


@pytest.mark.parametrize("second", ["asynchronous", "synchronous"])
@pytest.mark.parametrize("kind", [KINDS[1]], indirect=True, ids=lambda kind: kind.id)
async def test_a_database_that_hangs_holds_no_other(
    make_engine: MakeEngine,
    behind_proxy: AsyncEngine,
    proxy: Proxy,
    postgres: WorkerPostgres,
    rows: Rows,
    second: str,
) -> None:
    """If one database of a cancelled request hangs in COMMIT, the other's connection is freed."""
    app = FastAPI()
    other: Any = make_engine()
    if second == "synchronous":
        other = create_engine(postgres.url("psycopg"))
    hanging = {"shutdown_timeout": 0.2, "engine": behind_proxy, "shutdown": behind_proxy.dispose}
    install_database(app, name="hanging", **hanging)  # type: ignore[arg-type] # mixed values
    install_database(app, engine=other, shutdown=other.dispose, shutdown_timeout=0.2)

    @app.post("/")
    async def endpoint(
        hanging: Annotated[AsyncSession, Depends(transactional("hanging"))],
        session: Annotated[Any, Depends(transactional())],
    ) -> None:
        hanging.add(Item(name="a"))
        inner = getattr(session, "sync_session", session)
        inner.add(Item(name="b"))
        run = session.run_sync if session is not inner else None
        flush = run(Session.flush) if run else anyio.to_thread.run_sync(session.flush)
        await flush

    proxy.fault = Fault.STALLED
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        task = await cancelled_request(client, proxy.reached.is_set, CANCELS["asyncio"])
        await asyncio.wait({task}, timeout=30)
        assert task.done()
        assert other.pool.checkedout() == 0
    assert rows.names == []


# -- clients that disconnect -----------------------------------------------------------------

# With asyncpg on an old SQLAlchemy, one client of a hundred left a transaction open. For the other
# drivers it is enough that there are more clients than connections.
CLIENTS, ON_ASYNCPG = 20, 100
PATHS = "/query", "/commit", "/stream"
SERIES = text("SELECT generate_series(:page * 100, :page * 100 + 99)")


def disconnecting_app(engine: Engine | AsyncEngine, kind: Kind, *, paged: bool) -> FastAPI:
    """Build an application with a slow query, a slow commit and a slow stream.

    A paged stream holds no session while it is suspended. A generator that is abandoned there is
    closed only when it is garbage-collected, if it is sync or runs under BaseHTTPMiddleware.
    """
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)

    def query(session: Session) -> None:
        session.add(Item(name=f"q{threading.get_ident()}"))
        session.execute(text("SELECT pg_sleep(0.05)"))
        session.rollback()

    def slow_commit(session: Session) -> None:
        session.execute(text("INSERT INTO slow DEFAULT VALUES"))

    route(app, kind, "/query", transactional(), query)
    route(app, kind, "/commit", transactional(), slow_commit)
    handle = Depends(get_database_handle())

    async def asynchronous(database: Any = handle) -> StreamingResponse:
        async def numbers() -> AsyncGenerator[str]:
            async with database.session() as session:
                rows = await session.stream(text("SELECT generate_series(1, 20000)"))
                async for row in rows:
                    yield f"{row[0]}\n" * 50

        async def pages() -> AsyncGenerator[str]:
            for page in range(200):
                async with database.session() as session:
                    rows = (await session.scalars(SERIES, {"page": page})).all()
                yield "\n".join(map(str, rows)) * 50

        return StreamingResponse(pages() if paged else numbers())

    def synchronous(database: Any = handle) -> StreamingResponse:
        def pages() -> Generator[str]:
            for page in range(200):
                with database.session() as session:
                    rows = session.scalars(SERIES, {"page": page}).all()
                yield "\n".join(map(str, rows)) * 50

        return StreamingResponse(pages())

    app.post("/stream")(asynchronous if kind.asynchronous else synchronous)
    return app


async def pass_on(request: Request, call_next: Callable[[Request], Any]) -> Response:
    """Pass a request on and return its response unchanged.

    It is used as a middleware because BaseHTTPMiddleware cancels what it wraps.
    """
    response: Response = await call_next(request)
    return response


async def disconnect(url: str, path: str, started: bool) -> None:
    """Send a request and disconnect, at once or when the response has started."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
    await writer.drain()
    if started:
        await reader.read(100)
    else:
        await asyncio.sleep(0.01)  # a client cannot find out that its query is running
    writer.transport.abort()


nobody_cancels = pytest.mark.slow("2 s: without the middleware, such a request goes on to its end")


@pytest.mark.parametrize(
    ("path", "middleware"),
    [
        pytest.param("/query", False, marks=nobody_cancels, id="/query-plain"),
        pytest.param("/commit", False, marks=nobody_cancels, id="/commit-plain"),
        pytest.param("/stream", False, id="/stream-plain"),
        *(pytest.param(each, True, id=f"{each}-middleware") for each in PATHS),
    ],
)
async def test_clients_that_disconnect_leave_nothing(
    kind: Kind, make_engine: MakeEngine, rows: Rows, path: str, middleware: bool
) -> None:
    """After many clients have disconnected early, no connection is in use or in a transaction."""
    rows.make_commits_slow(0.05)
    engine = make_engine(pool_size=5, max_overflow=10)
    app = disconnecting_app(engine, kind, paged=middleware)
    if middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    with serve(app) as served:
        async with asyncio.TaskGroup() as clients:
            for _ in range(ON_ASYNCPG if kind.driver == "asyncpg" else CLIENTS):
                clients.create_task(disconnect(served.url, path, path == "/stream"))
        pool: Any = engine.pool

        def settled() -> bool:
            return pool.checkedout() == 0 and not rows.backends("%transaction%")

        try:
            await until(settled)
        except TimeoutError as error:
            error.add_note(f"{pool.status()}; in a transaction: {rows.at_work}")
            raise
        assert served.client.post("/query").status_code == 201
    # asyncpg leaves futures whose errors are never retrieved. Make asyncio log them here, instead
    # of in a later test that checks its log.
    gc.collect()
