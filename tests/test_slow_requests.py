"""`deadline`: a request that is too slow is answered with 504, and none of its work is stored."""

import asyncio
import gc
import itertools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any

import anyio
import anyio.to_thread
import httpx
import pytest
import sqlalchemy
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine, event, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.middleware.base import BaseHTTPMiddleware

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    Database,
    cancellation,
    dependencies,
    get_database_handle,
    get_db,
    install_database,
    install_error_handlers,
    installed_databases,
    reader,
    transactional,
)
from fastapi_sqlnative._sessions import finishing
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.cancellation import cancel_on_disconnect, deadline
from fastapi_sqlnative.exceptions import CommitOutcomeUnknownError, DeadlineExceededError
from tests.conftest import MakeEngine, asynchronous, synchronous
from tests.in_process import quiet, running, turns
from tests.proxy import Fault, Proxy
from tests.serving import NO_TLS, Item, Kind, Rows, few_threads, route, serve

pytestmark = pytest.mark.anyio
# A wait that only a cancellation can end within a test's duration.
SLOW = text("SELECT pg_sleep(60)")
SOON = 0.2
Transaction = Annotated[AsyncSession, Depends(transactional())]


def slow(session: Session) -> None:
    session.add(Item(name="a"))
    session.flush()
    session.execute(SLOW)


def slow_and_swallow(session: Session) -> None:
    with suppress(DBAPIError, asyncio.CancelledError):
        slow(session)


@pytest.fixture
def app(engine: Engine | AsyncEngine) -> FastAPI:
    """Return an application whose database has only one connection."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app


async def assert_clean(app: FastAPI, rows: Rows) -> None:
    """Assert that no connection is in use, no statement runs and nothing is stored."""
    pool: Any = installed_databases(app)["default"].engine.pool
    assert pool.checkedout() == 0
    await quiet(rows)
    assert rows.names == []


# -- where and how it is declared ------------------------------------------------------------


def on_the_route(app: FastAPI, kind: Kind, dependency: Any) -> None:
    route(app, kind, "/", transactional(), slow, dependencies=[dependency])


def on_a_router(app: FastAPI, kind: Kind, dependency: Any) -> None:
    router = APIRouter(dependencies=[dependency])
    route(router, kind, "/", transactional(), slow)  # type: ignore[arg-type] # it has post() too
    app.include_router(router)


def on_the_app(app: FastAPI, kind: Kind, dependency: Any) -> None:
    app.router.dependencies.append(dependency)
    route(app, kind, "/", transactional(), slow)


def after_the_session(app: FastAPI, kind: Kind, dependency: Any) -> None:
    """Add a route whose session is opened and used before the deadline begins."""

    async def look(session: Annotated[Any, Depends(get_db())]) -> None:
        if kind.asynchronous:
            await session.execute(text("SELECT 1"))

    route(app, kind, "/", transactional(), slow, dependencies=[Depends(look), dependency])


# The place of the declaration does not change the effect of the scope.
@pytest.mark.parametrize(
    ("add", "scope"),
    [
        *itertools.product([on_the_route, after_the_session], [None, "function", "request"]),
        (on_a_router, None),
        (on_the_app, None),
    ],
)
async def test_a_slow_query_is_ended(
    kind: Kind, app: FastAPI, rows: Rows, add: Callable[..., None], scope: Any
) -> None:
    """A slow query is ended on the server, its connection is returned, and the client gets 504."""
    add(app, kind, Depends(deadline(SOON), scope=scope))
    async with running(app) as client:
        answer = await client.post("/")
        assert (answer.status_code, answer.json()) == (
            504,
            {"detail": "The service took too long to answer."},
        )
        await assert_clean(app, rows)


async def test_a_fastapi_without_a_stack_of_its_own(
    kind: Kind,
    app: FastAPI,
    engine: Engine | AsyncEngine,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a generator ends the session, the deadline is over before that as well.

    That is the case with a FastAPI that has no function stack.
    """
    monkeypatch.setattr(dependencies, "HAS_FUNCTION_STACK", False)
    soon = SOON * 1.001  # a dependency is created once for each time
    name = f"without a stack {kind.id}"  # and for each name
    install_database(app, name=name, engine=engine)
    options = {"dependencies": [Depends(deadline(soon), scope="request")]}
    route(app, kind, "/", transactional(name), slow, **options)
    route(app, kind, "/swallowing", transactional(name), slow_and_swallow, **options)
    options = {"dependencies": [Depends(deadline(60 * 1.001), scope="request")]}
    route(app, kind, "/quick", transactional(name), lambda s: s.add(Item(name="b")), **options)
    async with running(app) as client:
        for path in "/", "/swallowing":
            assert (await client.post(path)).status_code == 504
            await assert_clean(app, rows)
        assert (await client.post("/quick")).status_code == 201
    assert rows.names == ["b"]


async def test_a_request_in_time_is_untouched(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """A deadline that is not reached changes nothing."""
    route(
        app,
        kind,
        "/",
        transactional(),
        lambda session: session.add(Item(name="a")),
        dependencies=[Depends(deadline(60)), Depends(deadline(61))],
    )
    async with running(app) as client:
        assert (await client.post("/")).status_code == 201
    assert rows.names == ["a"]


# -- what a request waits for ----------------------------------------------------------------


@asynchronous
async def test_a_full_pool_is_not_waited_for(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """A request that waits for a connection stops waiting at its deadline."""
    route(app, kind, "/", get_db(), slow, dependencies=[Depends(deadline(SOON))])
    async with running(app) as client:
        database: Any = installed_databases(app)["default"]
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            assert (await client.post("/")).status_code == 504
        await assert_clean(app, rows)


# SQLAlchemy 2.0 may close asyncpg's connection before asyncpg has sent the cancel request. Then the
# server notices this only when it gets the lock.
DROPS_CANCELS = sqlalchemy.__version__.startswith("2.0.")


@pytest.mark.driver_decides
@asynchronous
async def test_a_lock_is_not_waited_for(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """A request that waits for a row that another transaction has locked stops at its deadline."""
    rows.add("locked")

    def take(session: Session) -> None:
        session.add(Item(name="a"))
        session.execute(text("SELECT * FROM item FOR UPDATE"))

    route(app, kind, "/", transactional(), take, dependencies=[Depends(deadline(SOON))])
    with rows.connection.transaction():
        rows.connection.execute("SELECT * FROM item FOR UPDATE")
        async with running(app) as client:
            assert (await client.post("/")).status_code == 504
            if not DROPS_CANCELS:
                await quiet(rows)
    await quiet(rows)
    assert rows.names == ["locked"]


@pytest.mark.driver_decides
@asynchronous
async def test_a_network_that_swallows_is_given_up(
    kind: Kind, behind_proxy: AsyncEngine, proxy: Proxy, rows: Rows
) -> None:
    """If not even a cancel request reaches the server, the connection is discarded."""
    app = FastAPI()
    install_database(app, engine=behind_proxy, shutdown=behind_proxy.dispose)

    def body(session: Session) -> None:
        session.add(Item(name="a"))
        session.flush()
        session.execute(text("SELECT 'COMMIT'"))  # the proxy holds back what says COMMIT

    proxy.fault = Fault.STALLED
    route(app, kind, "/", transactional(), body, dependencies=[Depends(deadline(SOON))])
    async with running(app) as client:
        assert (await client.post("/")).status_code == 504
        assert behind_proxy.pool.checkedout() == 0  # type: ignore[attr-defined] # it is a QueuePool
        proxy.fault = Fault.NONE
        proxy.go_on.set()
        await assert_clean(app, rows)


@pytest.mark.driver_decides
@asynchronous
async def test_a_connection_that_is_being_made_is_closed(
    kind: Kind, behind_proxy: AsyncEngine, proxy: Proxy, rows: Rows
) -> None:
    """A request that ends while it connects leaves no connection to the garbage collector."""
    app = FastAPI()
    install_database(app, engine=behind_proxy, shutdown=behind_proxy.dispose)
    proxy.fault = Fault.SWALLOWED
    route(app, kind, "/", transactional(), slow, dependencies=[Depends(deadline(SOON))])
    gc.disable()
    try:
        async with running(app) as client:
            assert (await client.post("/")).status_code == 504
            assert await anyio.to_thread.run_sync(proxy.left.wait, 5)
    finally:
        gc.enable()


@pytest.mark.driver_decides
@asynchronous
async def test_a_rollback_that_is_swallowed_is_given_up(
    kind: Kind,
    behind_proxy: AsyncEngine,
    proxy: Proxy,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A request does not wait for a ROLLBACK that gets no answer, and the log names no COMMIT.

    No COMMIT was sent.
    """
    app = FastAPI()
    install_database(app, engine=behind_proxy, shutdown=behind_proxy.dispose, shutdown_timeout=60)

    @app.post("/", dependencies=[Depends(deadline(1))])
    async def endpoint(session: Transaction) -> None:
        session.add(Item(name="a"))
        await session.flush()
        proxy.fault = Fault.FROZEN
        await asyncio.sleep(60)

    async with running(app) as client:
        assert (await client.post("/")).status_code == 504
        assert behind_proxy.pool.checkedout() == 0  # type: ignore[attr-defined] # it is a QueuePool
        proxy.fault = Fault.NONE
        proxy.go_on.set()
        await assert_clean(app, rows)
    assert "COMMIT" not in caplog.text


@synchronous
async def test_the_end_of_a_synchronous_session_is_waited_for(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a deadline a thread ends its session in its own time, and nothing is discarded."""
    monkeypatch.setattr(finishing, "_GRACE", 0)
    loop, closing, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    class Slow(Session):
        def close(self) -> None:
            loop.call_soon_threadsafe(closing.set)
            assert go_on.wait(30)
            super().close()

    app = FastAPI()
    options = {"class_": Slow}
    install_database(app, engine=engine, shutdown=engine.dispose, session_options=options)

    def work(session: Session) -> None:
        session.add(Item(name="a"))

    route(app, kind, "/", transactional(), work, dependencies=[Depends(deadline(0.001))])
    async with running(app) as client:
        request = asyncio.create_task(client.post("/"))
        await asyncio.wait_for(closing.wait(), 30)
        await turns()
        go_on.set()
        assert (await request).status_code == 504
        await assert_clean(app, rows)
    assert "did not finish" not in caplog.text


async def connect(app: FastAPI) -> None:
    """Open the connection before the deadline begins.

    On a busy machine, connecting may take as long as the deadline.
    """
    database: Any = installed_databases(app)["default"]
    async with database.session() as session:
        await session.execute(text("SELECT 1"))


async def status_after(
    app: FastAPI, rows: Rows, work: Callable[[AsyncSession], Awaitable[None]]
) -> int:
    """Return the status of a route with a deadline that writes and then does this work.

    Assert that the request leaves nothing behind.
    """

    @app.post("/", dependencies=[Depends(deadline(SOON))])
    async def endpoint(session: Transaction) -> None:
        session.add(Item(name="a"))
        await session.flush()
        await work(session)

    async with running(app) as client:
        await connect(app)
        status = (await client.post("/")).status_code
        await assert_clean(app, rows)
    return status


async def in_a_task_group() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(60))
        await asyncio.sleep(60)


async def in_anyios_task_group() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep, 60)


async def in_a_timeout_of_its_own() -> None:
    async with asyncio.timeout(60), asyncio.timeout(50):
        with anyio.fail_after(40):
            await asyncio.sleep(60)


async def in_a_shield() -> None:
    await asyncio.shield(asyncio.ensure_future(asyncio.sleep(0.5)))


@asynchronous
@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "BaseHTTPMiddleware"])
@pytest.mark.parametrize(
    "wait", [in_a_task_group, in_anyios_task_group, in_a_timeout_of_its_own, in_a_shield]
)
async def test_other_waits_are_ended(
    app: FastAPI, rows: Rows, wait: Callable[[], Awaitable[None]], middleware: bool
) -> None:
    """A wait for anything else is ended as well, inside any timeout, shield or task group."""

    async def pass_on(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    if middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    assert await status_after(app, rows, lambda _session: wait()) == 504


# -- how the endpoint reacts -----------------------------------------------------------------


@asynchronous
async def test_a_swallowed_cancellation_is_no_success(app: FastAPI, rows: Rows) -> None:
    """An endpoint that returns although it was cancelled is rolled back and answered with 504."""

    async def swallow(session: AsyncSession) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            session.add(Item(name="b"))
            await session.flush()

    assert await status_after(app, rows, swallow) == 504


@asynchronous
async def test_a_wait_that_goes_on_is_ended(app: FastAPI, rows: Rows) -> None:
    """An endpoint that waits again after it was cancelled is cancelled again."""

    async def wait_twice(_session: AsyncSession) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(60)

    assert await status_after(app, rows, wait_twice) == 504


async def test_an_answer_that_is_late_is_no_success(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """Work that cannot be cancelled runs to its end, and is then rolled back."""

    def body(session: Session) -> None:
        session.add(Item(name="a"))
        time.sleep(SOON)

    route(app, kind, "/", transactional(), body, dependencies=[Depends(deadline(SOON))])
    async with running(app) as client:
        assert (await client.post("/")).status_code == 504
        await assert_clean(app, rows)


@asynchronous
async def test_an_error_of_the_endpoints_own_stays(app: FastAPI, rows: Rows) -> None:
    """If an endpoint raises an HTTPException when it is cancelled, the client gets its status."""

    async def fail(_session: AsyncSession) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise HTTPException(418) from None

    assert await status_after(app, rows, fail) == 418


def fail_late(session: Session) -> None:
    session.execute(text("SELECT 1"))
    time.sleep(SOON)
    raise IntegrityError(None, None, ValueError())


def have_less_time(session: Session) -> None:
    session.execute(text("SET LOCAL statement_timeout = 50"))
    session.execute(SLOW)


@pytest.mark.parametrize(
    ("seconds", "body", "error"),
    [(SOON, fail_late, IntegrityError), (60, have_less_time, DBAPIError)],
)
async def test_a_database_error_of_the_endpoints_own_stays(
    kind: Kind,
    app: FastAPI,
    rows: Rows,
    seconds: float,
    body: Callable[[Session], None],
    error: type[Exception],
) -> None:
    """A database error that is not the deadline's timeout is raised unchanged.

    It may be late, or a timeout of the application's own.
    """
    route(app, kind, "/", transactional(), body, dependencies=[Depends(deadline(seconds))])
    async with running(app) as client:
        with pytest.raises(error):
            await client.post("/")


@asynchronous
async def test_what_a_cancelled_endpoint_commits_is_left_alone(app: FastAPI, rows: Rows) -> None:
    """A cancelled endpoint that has stored its work by its own commit is not answered with 504."""

    @app.post("/", dependencies=[Depends(deadline(SOON))])
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db())]) -> None:
        session.add(Item(name="a"))
        await session.flush()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await session.commit()
        # After the grace period, an endpoint that still waits would be cancelled again.
        await asyncio.sleep(cancellation._GRACE + SOON)

    async with running(app) as client:
        await connect(app)
        assert (await client.post("/")).status_code == 200
    assert rows.names == ["a"]


@asynchronous
async def test_what_a_cancelled_endpoint_commits_and_raises_over_may_be_stored(
    app: FastAPI, rows: Rows
) -> None:
    """An endpoint that commits when cancelled and re-raises causes CommitOutcomeUnknownError."""

    @app.post("/", dependencies=[Depends(deadline(SOON))])
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db())]) -> None:
        session.add(Item(name="a"))
        try:
            await asyncio.sleep(60)
        finally:
            await session.commit()

    async with running(app) as client:
        await connect(app)
        with pytest.raises(CommitOutcomeUnknownError, match="POST /"):
            await client.post("/")
    assert rows.names == ["a"]


@asynchronous
async def test_a_timeout_of_the_endpoints_own_is_not_ours(app: FastAPI, rows: Rows) -> None:
    """The endpoint's own timeout, whether raised or handled, is not taken for the deadline."""

    @app.post("/", dependencies=[Depends(deadline(60))])
    async def endpoint(session: Transaction, handled: bool) -> bool:
        session.add(Item(name="a"))
        await session.flush()
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            if not handled:
                raise
        return handled

    async with running(app) as client:
        with pytest.raises(TimeoutError) as raised:
            await client.post("/", params={"handled": False})
        assert not isinstance(raised.value, DeadlineExceededError)
        await assert_clean(app, rows)
        assert (await client.post("/", params={"handled": True})).status_code == 200
    assert rows.names == ["a"]


@pytest.mark.parametrize(
    ("outer", "middle", "inner"),
    [(SOON, 60, 61), (60, SOON, 61), (60, 61, SOON), (SOON, SOON * 1.01, SOON * 1.02)],
)
async def test_the_earliest_counts(
    kind: Kind, app: FastAPI, rows: Rows, outer: float, middle: float, inner: float
) -> None:
    """Of an application's, a router's and a route's deadlines, the earliest ends the request.

    The error names the route and this deadline. A synchronous request ends with its query, and by
    then nearly equal deadlines have all passed.
    """
    messages: list[str] = []

    async def note(_request: Request, error: DeadlineExceededError) -> JSONResponse:
        messages.append(str(error))
        return JSONResponse({}, 504)

    app.router.dependencies.append(Depends(deadline(outer)))
    app.add_exception_handler(DeadlineExceededError, note)  # type: ignore[arg-type] # a subclass
    router = APIRouter(prefix="/items", dependencies=[Depends(deadline(middle))])
    options = {"dependencies": [Depends(deadline(inner))]}
    route(router, kind, "/{id}", transactional(), slow, **options)  # type: ignore[arg-type] # as above
    app.include_router(router, prefix="/api")
    async with running(app) as client:
        assert (await client.post("/api/items/5")).status_code == 504
        await assert_clean(app, rows)
    (message,) = messages
    passed = {SOON} if kind.asynchronous else {outer, middle, inner} - {60, 61}
    missed = "POST /api/items/{{id}} missed its deadline of {:g} s and"
    assert message.startswith(tuple(map(missed.format, passed)))


# -- COMMIT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["ours", "the endpoint's own"])
async def test_no_commit_is_interrupted(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows, own: bool
) -> None:
    """A COMMIT that is running at the deadline ends normally, and the client gets a success."""
    app = FastAPI()
    install_database(app, engine=behind_proxy, shutdown=behind_proxy.dispose)

    def body(session: Session) -> None:
        session.add(Item(name="a"))
        if own:
            session.commit()

    dependency = get_db() if own else transactional()
    route(app, kind, "/", dependency, body, dependencies=[Depends(deadline(2))])
    route(app, kind, "/before", get_db(), lambda session: session.scalar(text("SELECT 1")))
    async with running(app) as client:
        assert (await client.post("/before")).status_code == 201  # connects before the deadline
        proxy.fault = Fault.STALLED
        request = asyncio.create_task(client.post("/"))
        assert await anyio.to_thread.run_sync(proxy.reached.wait, 30)
        done, _ = await asyncio.wait({request}, timeout=2.2)
        assert not done
        proxy.go_on.set()
        assert (await request).status_code == 201
        assert rows.names == ["a"]
        assert rows.backends("idle in transaction%") == 0


@pytest.mark.driver_decides
@asynchronous
async def test_a_commit_that_is_about_to_begin_is_cancelled(app: FastAPI, rows: Rows) -> None:
    """An endpoint that becomes ready when its time is over does not reach its own commit()."""

    async def commit_late(session: AsyncSession) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        # When the loop runs again, both are due: first this call, and then the deadline.
        loop.call_later(SOON / 10, ready.set)
        loop.call_soon(time.sleep, 2 * SOON)
        await ready.wait()
        await session.commit()

    assert await status_after(app, rows, commit_late) == 504


@asynchronous
async def test_a_reader_of_a_function_has_stored_nothing(
    kind: Kind, app: FastAPI, rows: Rows
) -> None:
    """A reader is in AUTOCOMMIT, but its function call does not switch the deadline off."""

    def body(session: Session) -> None:
        session.execute(text("SELECT quote_nullable('x')")).close()
        session.execute(SLOW)

    route(app, kind, "/", reader(), body, dependencies=[Depends(deadline(SOON))])
    async with running(app) as client:
        assert (await client.post("/")).status_code == 504
        await assert_clean(app, rows)


async def test_a_thread_is_waited_for(postgres: WorkerPostgres, rows: Rows) -> None:
    """A `def` endpoint runs to its end, so its handle's work is stored when the 504 is sent."""
    app = FastAPI()
    engine = create_engine(postgres.url("psycopg"))
    install_database(app, engine=engine, shutdown=engine.dispose)

    @app.post("/", dependencies=[Depends(deadline(SOON))])
    def endpoint(database: Annotated[Database, Depends(get_database_handle())]) -> None:
        with database.transaction() as session:
            session.execute(text("SELECT pg_sleep(0.6)"))
            session.add(Item(name="a"))

    async with running(app) as client:
        assert (await client.post("/")).status_code == 504
        assert rows.names == ["a"]


@asynchronous
async def test_what_is_stored_at_once_is_left_alone(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """On an engine in AUTOCOMMIT, a request that has already stored a write does not get 504."""
    engine = make_engine(isolation_level="AUTOCOMMIT")
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)

    def body(session: Session) -> None:
        session.execute(insert(Item).values(name="a"))
        session.execute(text("SELECT pg_sleep(0.6)"))

    route(app, kind, "/", get_db(), body, dependencies=[Depends(deadline(SOON))])
    async with running(app) as client:
        await connect(app)
        assert (await client.post("/")).status_code == 201
    assert rows.names == ["a"]


@synchronous
async def test_the_servers_timeout_spares_commit(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """PostgreSQL's statement timeout does not limit the work that it does at COMMIT."""
    rows.make_commits_slow(2.2)

    def body(session: Session) -> None:
        session.execute(text("INSERT INTO slow DEFAULT VALUES"))

    route(app, kind, "/", transactional(), body, dependencies=[Depends(deadline(2))])
    async with running(app) as client:
        assert (await client.post("/")).status_code == 201
    assert rows.connection.execute("SELECT count(*) FROM slow").fetchall() == [(1,)]


# -- synchronous engines ---------------------------------------------------------------------


@synchronous
async def test_the_servers_timeout_ends_with_the_first_commit(
    kind: Kind, app: FastAPI, rows: Rows
) -> None:
    """Statements after the endpoint's own COMMIT have no limit, because a 504 would be false."""

    def body(session: Session) -> None:
        session.add(Item(name="stored"))
        session.commit()
        session.execute(text("SELECT pg_sleep(0.6)"))

    route(app, kind, "/", get_db(), body, dependencies=[Depends(deadline(0.5))])
    async with running(app) as client:
        assert (await client.post("/")).status_code == 201


@synchronous
@pytest.mark.parametrize(
    ("set_by_the_application", "expected"), [("0", range(50_000, 60_001)), ("250ms", [250])]
)
async def test_the_server_keeps_the_time_of_a_transaction(
    kind: Kind,
    make_engine: MakeEngine,
    rows: Rows,
    set_by_the_application: str,
    expected: Any,
) -> None:
    """A synchronous transaction's statement timeout is the time left until the deadline.

    A shorter timeout of the application's own is kept.
    """
    options = f"-cstatement_timeout={set_by_the_application}"
    engine = make_engine(pool_size=1, max_overflow=0, connect_args={"options": options})
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    setting = text("SELECT setting::int FROM pg_settings WHERE name = 'statement_timeout'")
    seen: list[Any] = []

    def body(session: Session) -> None:
        seen.append(session.scalar(setting))

    route(app, kind, "/", get_db(), body, dependencies=[Depends(deadline(60))])
    route(app, kind, "/without", get_db(), body)
    async with running(app) as client:
        await client.post("/")
        await client.post("/without")
    assert seen[0] in expected
    assert seen[1] == int(set_by_the_application.removesuffix("ms"))


@pytest.mark.driver_decides
async def test_a_reader_beside_a_deadline_sends_its_queries_alone(
    kind: Kind, engine: Engine | AsyncEngine, app: FastAPI, rows: Rows
) -> None:
    """A reader with a deadline sends only its queries.

    In AUTOCOMMIT there is no transaction to begin or to set a timeout for.
    """
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    def body(session: Session) -> None:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        session.connection()
        asked = "SELECT query FROM pg_stat_activity WHERE pid = %s"
        sent.extend(*rows.connection.execute(asked, (pid,)))

    event.listen(sync_engine(engine), "before_cursor_execute", note)
    route(app, kind, "/", reader(), body, dependencies=[Depends(deadline(60))])
    async with running(app) as client:
        assert (await client.post("/")).status_code == 201
    assert sent == ["SELECT pg_backend_pid()"] * 2


# -- the response and the log ----------------------------------------------------------------


def answer_504(app: FastAPI) -> None:
    app.add_exception_handler(504, lambda *_: PlainTextResponse("by status", 504))


def answer_http_exception(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, lambda *_: PlainTextResponse("by class", 504))


def answer_both(app: FastAPI) -> None:
    install_error_handlers(app)
    answer_504(app)


HANDLERS: dict[str, tuple[Callable[[FastAPI], None], str]] = {
    "none": (lambda _: None, '{"detail":"The service took too long to answer."}'),
    "504": (answer_504, "by status"),
    "HTTPException": (answer_http_exception, "by class"),
    "install_error_handlers": (
        lambda app: install_error_handlers(app, statement_timeout="Too slow."),
        '{"detail":"Too slow."}',
    ),
    "problem_details": (
        lambda app: install_error_handlers(app, problem_details=True),
        '{"type":"about:blank","title":"Gateway Timeout","status":504,'
        '"detail":"The service took too long to answer."}',
    ),
    "both": (answer_both, "by status"),
}


@pytest.mark.parametrize(("install", "expected"), HANDLERS.values(), ids=HANDLERS)
async def test_the_applications_handlers_answer(
    kind: Kind, app: FastAPI, rows: Rows, install: Callable[[FastAPI], None], expected: str
) -> None:
    """The 504 passes through the application's handlers like any other HTTPException."""
    route(app, kind, "/", transactional(), slow, dependencies=[Depends(deadline(SOON))])
    install(app)
    async with running(app) as client:
        answer = await client.post("/")
    assert (answer.status_code, answer.text) == (504, expected)


async def test_the_log_has_one_line(
    kind: Kind, app: FastAPI, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """With install_error_handlers, the log has one line for a missed deadline, and no traceback."""
    route(app, kind, "/slow", transactional(), slow, dependencies=[Depends(deadline(SOON))])
    install_error_handlers(app)
    with caplog.at_level(logging.INFO, logger="fastapi_sqlnative"):
        async with running(app) as client:
            await client.post("/slow")
    ((_, level, message),) = caplog.record_tuples
    assert level == logging.WARNING
    assert message == "A failure (statement_timeout) is answered with 504 on POST /slow."
    assert caplog.records[0].exc_info is None


# -- what it does not reach ------------------------------------------------------------------


@asynchronous
async def test_a_body_that_is_sent_is_not_cut(app: FastAPI, rows: Rows) -> None:
    """A stream whose response has begun continues after the deadline."""

    async def numbers() -> AsyncGenerator[str]:
        for number in range(3):
            await asyncio.sleep(SOON)
            yield f"{number}\n"

    @app.get("/", dependencies=[Depends(deadline(SOON))])
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db())]) -> StreamingResponse:
        await session.execute(text("SELECT 1"))
        return StreamingResponse(numbers())

    async with running(app) as client:
        await connect(app)
        answer = await client.get("/")
    assert (answer.status_code, answer.text) == (200, "0\n1\n2\n")


@asynchronous
def test_a_websocket_has_no_deadline(app: FastAPI, rows: Rows) -> None:
    """An application's deadline does not apply to its websockets."""
    app.router.dependencies.append(Depends(deadline(SOON)))

    @app.websocket("/")
    async def echo(
        websocket: WebSocket, database: Annotated[Any, Depends(get_database_handle())]
    ) -> None:
        await websocket.accept()
        await asyncio.sleep(2 * SOON)
        async with database.session() as session:
            await websocket.send_json(await session.scalar(text("SELECT 1")))

    with TestClient(app) as client, client.websocket_connect("/") as websocket:
        assert websocket.receive_json() == 1


@pytest.mark.parametrize(("seconds", "error"), [(0, ValueError), ("2", TypeError)])
def test_a_time_that_is_none_is_refused(seconds: Any, error: type[Exception]) -> None:
    """deadline() raises ValueError or TypeError if its argument is not a time above zero."""
    with pytest.raises(error, match="deadline must be"):
        deadline(seconds)


async def test_a_cancellation_by_another_beside_its_own_is_passed_on() -> None:
    """A request cancelled from outside, as by a stopping server, is not answered with 504.

    Here, the deadline is due at the same time.
    """
    app = FastAPI()

    @app.get("/", dependencies=[Depends(deadline(0.01))])
    async def endpoint() -> None:
        asyncio.get_running_loop().call_later(0.01, asking.cancel)
        time.sleep(0.05)  # noqa: ASYNC251 - so that both are due at once
        await asyncio.sleep(60)

    async with running(app) as client:
        asking = asyncio.create_task(client.get("/"))
        await asyncio.wait({asking})
    assert asking.cancelled()


async def test_a_task_of_the_endpoints_own_is_passed_on() -> None:
    """An endpoint that awaits a cancelled task raises CancelledError and has missed no deadline."""
    app = FastAPI()

    @app.get("/", dependencies=[Depends(deadline(60))])
    async def endpoint() -> None:
        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await task

    async with running(app) as client:
        with pytest.raises(asyncio.CancelledError):
            await client.get("/")


async def test_a_clean_up_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one of two missed deadlines cancels a request, and none does after the request's end."""
    monkeypatch.setattr(cancellation, "_GRACE", 0.3)
    app, cleaned = FastAPI(), asyncio.Event()

    @app.get("/", dependencies=[Depends(deadline(0.05)), Depends(deadline(0.1))])
    async def endpoint() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            cleaned.set()

    async with running(app) as client:
        assert (await client.get("/")).status_code == 504
        assert cleaned.is_set()
        await asyncio.sleep(0.3)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr] # this is a task


def test_methods_in_one_string_are_refused() -> None:
    """cancel_on_disconnect() raises TypeError if its methods are one string.

    Each letter would be a method, and no request would ever be cancelled.
    """
    with pytest.raises(TypeError, match=r"pass methods=\('POST',\)"):
        cancel_on_disconnect(methods="POST")


def test_one_deadline_can_be_overridden() -> None:
    """deadline() returns one object for equal times, so that `dependency_overrides` finds it."""
    assert deadline(2) is deadline(2.0)


# -- storms ----------------------------------------------------------------------------------


async def test_a_storm_leaves_the_pool_whole(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """After twenty requests on five connections, most of them too slow, a request succeeds."""
    engine = make_engine(pool_size=3, max_overflow=2, pool_timeout=50)
    app = FastAPI(lifespan=few_threads)
    install_database(app, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/slow", transactional(), slow, dependencies=[Depends(deadline(0.3))])
    route(
        app,
        kind,
        "/quick",
        transactional(),
        lambda session: session.scalar(text("SELECT 1")),
        dependencies=[Depends(deadline(60))],
    )
    with serve(app) as served:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=served.url, timeout=60, limits=limits, verify=NO_TLS
        ) as client:
            paths = ["/slow" if place % 3 else "/quick" for place in range(20)]
            answers = await asyncio.gather(*(client.post(path) for path in paths))
        found = {(path, each.status_code) for path, each in zip(paths, answers, strict=True)}
        assert found == {("/slow", 504), ("/quick", 201)}
        await quiet(rows)
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # it is a QueuePool
        assert rows.names == []
        assert served.post("/quick").status_code == 201
