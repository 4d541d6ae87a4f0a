"""Rule 14: many requests at once on a small pool, whatever opens their sessions."""

import asyncio
import functools
import inspect
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import pytest
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from starlette.types import Receive, Scope, Send

from fastapi_sqlnative import (
    Database,
    _unit_of_work,
    get_database_handle,
    get_db,
    install_database,
    reader,
)
from fastapi_sqlnative._lifespan.gate import Gate
from fastapi_sqlnative._lifespan.running import running_of
from fastapi_sqlnative._sessions.record import Record
from fastapi_sqlnative._unit_of_work import UnitOfWork
from tests.conftest import MakeEngine, synchronous
from tests.in_process import running, sqlite, turns
from tests.serving import Kind, Rows, few_threads, route, until, using

pytestmark = pytest.mark.anyio

Adding = Callable[[FastAPI, Kind], None]
CROWD = 12  # more than there are threads, of which there are more than connections


@pytest.fixture
def app(kind: Kind, make_engine: MakeEngine, rows: Rows) -> FastAPI:
    """Make an application whose requests share three connections and few threads."""
    app = FastAPI(lifespan=few_threads)
    engine = make_engine(pool_size=2, max_overflow=1, pool_timeout=30)
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app


async def crowd(client: httpx.AsyncClient) -> set[int]:
    """Send many requests at once, and return the set of their statuses."""
    answers = await asyncio.gather(*(client.post("/") for _ in range(CROWD)))
    return {answer.status_code for answer in answers}


def ask(session: Session) -> None:
    session.execute(text("SELECT pg_sleep(0.001)")).close()


def using_in_thread(session: Annotated[Session, Depends(get_db("sync"))]) -> None:
    session.execute(text("SELECT 1"))


def add_with_a_reader(app: FastAPI, kind: Kind, read: Callable[..., Any] = reader()) -> None:
    """Add a route whose requests hold a connection and need a second one, for a reader."""
    first = Depends(using(kind, Depends(get_db()), ask))
    route(app, kind, "/", read, ask, dependencies=[first])


def add_with_a_handle(app: FastAPI, kind: Kind) -> None:
    """Add a route whose requests hold a connection and open a session of the handle."""

    async def asynchronous(database: Annotated[Any, Depends(get_database_handle())]) -> None:
        async with database.session() as session:
            await session.run_sync(ask)

    def synchronous(database: Annotated[Any, Depends(get_database_handle())]) -> None:
        with database.session() as session:
            ask(session)

    first = Depends(using(kind, Depends(get_db()), ask))
    endpoint = asynchronous if kind.asynchronous else synchronous
    app.post("/", dependencies=[first], status_code=201)(endpoint)


def add_wrapped(app: FastAPI, kind: Kind) -> None:
    """Add a route and then replace its endpoint with a wrapper, as Sentry does."""
    add_with_a_reader(app, kind)
    found = app.routes[-1]
    assert isinstance(found, APIRoute)
    endpoint: Any = found.dependant.call

    @functools.wraps(endpoint)
    async def asynchronous(*args: Any, **kwargs: Any) -> Any:
        return await endpoint(*args, **kwargs)

    @functools.wraps(endpoint)
    def synchronous(*args: Any, **kwargs: Any) -> Any:
        return endpoint(*args, **kwargs)

    wrapper = asynchronous if inspect.iscoroutinefunction(endpoint) else synchronous
    found.dependant.call = wrapper


def add_decorated(app: FastAPI, kind: Kind) -> None:
    """Add a route whose reader is decorated, as by a library that converts API versions."""
    read = reader()

    @functools.wraps(read)
    async def decorated(*args: Any, **kwargs: Any) -> Any:
        return await read(*args, **kwargs)

    add_with_a_reader(app, kind, decorated)


def add_partial(app: FastAPI, kind: Kind) -> None:
    """Add a route whose reader is a partial."""
    add_with_a_reader(app, kind, functools.partial(reader()))


def add_unlisted(app: FastAPI, kind: Kind) -> None:
    """Serve the route from a router outside the application's routes, such as an API version's."""
    behind = FastAPI()
    add_with_a_reader(behind, kind)

    async def chosen(scope: Scope, receive: Receive, send: Send) -> None:
        await behind.router(scope, receive, send)

    app.mount("/", chosen)


# The connections that a request needs are counted from its route's dependencies, whenever the route
# was added. For the wrapped endpoint, they are counted in another way.
@pytest.mark.parametrize(
    ("add", "late"),
    [
        pytest.param(add_with_a_reader, False, id="reader"),
        pytest.param(add_with_a_handle, False, id="handle"),
        pytest.param(add_wrapped, False, id="wrapped"),
        pytest.param(add_decorated, False, id="decorated"),
        pytest.param(add_partial, False, id="partial"),
        pytest.param(add_unlisted, False, id="unlisted"),
        pytest.param(add_wrapped, True, id="wrapped, while running"),
    ],
)
async def test_a_crowd_is_served(kind: Kind, app: FastAPI, add: Adding, late: bool) -> None:
    """Requests that hold a connection and need another all succeed, even on a route added late."""
    if not late:
        add(app, kind)
    async with running(app) as client:
        if late:
            add(app, kind)
        assert await crowd(client) == {201}


async def test_a_crowd_of_a_mounted_application_is_served_too(kind: Kind, app: FastAPI) -> None:
    """Requests of a root and a mounted application share one gate, and all of them succeed."""
    below = FastAPI()
    for each in app, below:
        add_with_a_reader(each, kind)
    app.mount("/below", below)
    async with running(app) as client:
        paths = ["/", "/below/"] * (CROWD // 2)
        answers = await asyncio.gather(*(client.post(path) for path in paths))
    assert {answer.status_code for answer in answers} == {201}


async def test_requests_with_one_session_wait_for_no_place(kind: Kind, app: FastAPI) -> None:
    """Three requests use all three connections at once, even beside a route that needs two each."""
    add_with_a_reader(app, kind)
    together = asyncio.Barrier(3)

    async def endpoint(session: Annotated[Any, Depends(get_db())]) -> None:
        await (session.run_sync(ask) if kind.asynchronous else run_sync(ask, session))
        async with asyncio.timeout(10):
            await together.wait()

    app.post("/one", status_code=201)(endpoint)
    async with running(app) as client:
        if kind.asynchronous:
            running_of(app).gate._threads.total_tokens = 1  # these need no thread
        answers = await asyncio.gather(*(client.post("/one") for _ in range(3)))
    assert {answer.status_code for answer in answers} == {201}


# -- places of idle requests -------------------------------------------------------------------


@asynccontextmanager
async def idling(
    app: FastAPI, client: httpx.AsyncClient, times: int, *, used: bool
) -> AsyncGenerator[None]:
    """Send requests that hold no connection until the block ends, and then go on."""
    arrived, leave = asyncio.Semaphore(0), asyncio.Event()

    async def work(*sessions: Any) -> None:
        for step in ask, Session.commit:
            for session in sessions:
                if isinstance(session, AsyncSession):
                    await session.run_sync(step)
                else:
                    await run_sync(step, session)  # releases its thread, not its connection

    async def endpoint(
        first: Annotated[Any, Depends(get_db())], second: Annotated[Any, Depends(reader())]
    ) -> None:
        if used:
            await work(first, second)
        arrived.release()
        await leave.wait()
        await work(first, second)

    app.post("/idle")(endpoint)
    waiting = [asyncio.create_task(client.post("/idle")) for _ in range(times)]
    for _ in range(times):
        await first_of(arrived.acquire(), *waiting)
    yield
    leave.set()
    assert {(await each).status_code for each in waiting} == {200}


async def first_of(wanted: Awaitable[Any], *others: "asyncio.Task[Any]") -> None:
    """Await `wanted`, and raise the error of any other task that ends first."""
    task = asyncio.ensure_future(wanted)
    done, _ = await asyncio.wait([task, *others], return_when=asyncio.FIRST_COMPLETED)
    for each in done:
        each.result()
    assert task in done


@pytest.mark.parametrize("used", [True, False], ids=["after a commit", "before a statement"])
async def test_idle_requests_keep_nobody_out(
    kind: Kind, app: FastAPI, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crowd without a connection leaves room for another request, and then resumes together."""
    monkeypatch.setattr(_unit_of_work, "_IDLE", 0.005)
    add_with_a_reader(app, kind)
    async with running(app) as client, idling(app, client, CROWD, used=used):
        assert (await client.post("/")).status_code == 201


async def test_two_sessions_come_back_together(
    kind: Kind, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sessions of an idle request, used at once, wait for their request's place and get it."""
    monkeypatch.setattr(_unit_of_work, "_IDLE", 0)
    idle, leave = asyncio.Event(), asyncio.Event()

    async def endpoint(
        first: Annotated[Any, Depends(get_db())], second: Annotated[Any, Depends(reader())]
    ) -> None:
        idle.set()
        await leave.wait()
        asking = (
            session.run_sync(ask) if kind.asynchronous else run_sync(ask, session)
            for session in (first, second)
        )
        await asyncio.gather(*asking)

    app.post("/", status_code=201)(endpoint)
    async with running(app) as client:
        request = asyncio.create_task(client.post("/"))
        await first_of(idle.wait(), request)
        await turns()  # run what opening the sessions has scheduled
        places = running_of(app).gate._connections
        assert places.borrowed_tokens == 0
        places.total_tokens = 1
        await places.acquire_on_behalf_of(app)
        leave.set()
        await until(lambda: places.statistics().tasks_waiting == 1)
        await turns()
        places.release_on_behalf_of(app)
        assert (await request).status_code == 201
        assert places.borrowed_tokens == 0


async def test_an_idle_request_stands_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that waits for a thread and one that also holds a connection both complete.

    Each has an asynchronous session and a synchronous one, for which it needs a thread.
    """
    monkeypatch.setattr(_unit_of_work, "_IDLE", 0)
    app, held, leave = FastAPI(), asyncio.Event(), threading.Event()
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 10}
    for name, make in ("sync", create_engine), ("async", create_async_engine):
        driver = "pysqlite" if name == "sync" else "aiosqlite"
        engine: Any = make(f"sqlite+{driver}:///{tmp_path / name}", **options)
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    loop = asyncio.get_running_loop()

    def hold(session: Annotated[Session, Depends(get_db("sync"))]) -> None:
        loop.call_soon_threadsafe(held.set)
        leave.wait(30)

    async def first(
        session: Annotated[AsyncSession, Depends(get_db("async"))], uses: bool
    ) -> AsyncSession:
        if uses:
            await session.execute(text("SELECT 1"))
        return session

    async def endpoint(
        session: Annotated[AsyncSession, Depends(first)],
        second: Annotated[Session, Depends(using_in_thread)],
    ) -> None:
        await session.execute(text("SELECT 1"))

    app.get("/hold")(hold)
    app.get("/")(endpoint)
    async with running(app) as client:
        gate = running_of(app).gate
        gate._threads.total_tokens = 1

        def waiting() -> int:
            limiters = gate._threads, gate._connections
            return sum(each.statistics().tasks_waiting for each in limiters)

        requests = [asyncio.create_task(client.get("/hold"))]
        await first_of(held.wait(), *requests)
        for uses in False, True:
            requests.append(asyncio.create_task(client.get("/", params={"uses": uses})))
            await until(lambda: waiting() == len(requests) - 1)
            await turns()
            monkeypatch.setattr(_unit_of_work, "_IDLE", 60)  # from now on no request counts as idle
        leave.set()
        assert [(await each).status_code for each in requests] == [200] * 3


@synchronous
async def test_an_idle_request_comes_back_in_any_thread(
    kind: Kind, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of an idle request works in a thread that is not AnyIO's."""
    monkeypatch.setattr(_unit_of_work, "_IDLE", 0)

    async def endpoint(session: Annotated[Any, Depends(get_db())]) -> None:
        await turns()  # run what opening the session has scheduled
        assert running_of(app).gate._threads.borrowed_tokens == 0
        await asyncio.to_thread(ask, session)
        assert running_of(app).gate._threads.borrowed_tokens == 1

    app.post("/", status_code=201)(endpoint)
    async with running(app) as client:
        assert (await client.post("/")).status_code == 201


@synchronous
async def test_a_request_whose_thread_connects_meanwhile_keeps_its_place(
    kind: Kind, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that seems idle keeps its place if a thread's session connects at that moment."""
    monkeypatch.setattr(_unit_of_work, "_IDLE", 0)
    session: Any = None
    comes_back = UnitOfWork._return

    def ask_meanwhile(self: UnitOfWork) -> Callable[[Record], None]:
        if not session.in_transaction():
            thread = threading.Thread(target=ask, args=[session])
            thread.start()
            thread.join()
        return functools.partial(comes_back, self)

    async def endpoint(given: Annotated[Any, Depends(get_db())]) -> None:
        nonlocal session
        session = given
        await turns()  # run what opening the session has scheduled
        assert session.in_transaction()
        assert running_of(app).gate._threads.borrowed_tokens == 1
        await run_sync(ask, session)  # comes back, although it has not left

    app.post("/", status_code=201)(endpoint)
    monkeypatch.setattr(UnitOfWork, "_return", property(ask_meanwhile))
    async with running(app) as client:
        assert (await client.post("/")).status_code == 201


async def test_a_request_may_leave_as_soon_as_its_session_is_idle(
    kind: Kind, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request leaves its place after a commit, however soon the loop's thread looks."""
    monkeypatch.setattr(UnitOfWork, "_released", UnitOfWork._leave_if_idle)

    async def endpoint(
        session: Annotated[Any, Depends(get_db())], second: Annotated[Any, Depends(reader())]
    ) -> None:
        for step, places in (ask, 1), (Session.commit, 0):
            await (session.run_sync(step) if kind.asynchronous else run_sync(step, session))
            assert running_of(app).gate._connections.borrowed_tokens == places

    app.post("/", status_code=201)(endpoint)
    async with running(app) as client:
        assert (await client.post("/")).status_code == 201


@synchronous
async def test_a_thread_that_waits_keeps_its_place(
    kind: Kind, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `def` endpoint that waits after its commit keeps its place, because it holds a thread."""
    monkeypatch.setattr(_unit_of_work, "_IDLE", 0)
    committed, leave = threading.Event(), threading.Event()

    def body(session: Session) -> None:
        ask(session)
        session.commit()
        committed.set()
        leave.wait(30)

    route(app, kind, "/", get_db(), body)
    async with running(app) as client:
        request = asyncio.create_task(client.post("/"))
        assert await run_sync(committed.wait, 30)
        await turns()  # run what the commit has scheduled
        assert running_of(app).gate._threads.borrowed_tokens == 1
        leave.set()
        assert (await request).status_code == 201


@synchronous
@pytest.mark.parametrize("in_time", [True, False])
async def test_a_thread_that_comes_back_after_its_request_takes_no_place(
    kind: Kind, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    """A request that is cancelled while its thread waits for places keeps none of them.

    The thread needs two places. It gets the first after the request has ended, and the second in
    time or never.
    """
    app, engine = FastAPI(), make_engine(pool_size=2, pool_timeout=30 if in_time else 0.2)
    install_database(app, engine=engine, shutdown=engine.dispose)
    monkeypatch.setattr(_unit_of_work, "_IDLE", 0)
    idle, leave, waits, done = asyncio.Event(), asyncio.Event(), asyncio.Event(), threading.Event()
    enter = Gate.enter

    async def observed(*args: Any) -> None:
        waits.set()  # the test goes on once this waits for a place
        await enter(*args)

    def come_back(session: Session) -> None:
        try:
            ask(session)
        finally:
            done.set()

    async def endpoint(
        session: Annotated[Any, Depends(get_db())], second: Annotated[Any, Depends(reader())]
    ) -> None:
        idle.set()
        await leave.wait()
        await asyncio.to_thread(come_back, session)

    app.post("/")(endpoint)
    async with running(app) as client:
        request = asyncio.create_task(client.post("/"))
        await first_of(idle.wait(), request)
        await turns()  # run what opening the sessions has scheduled
        gate = running_of(app).gate
        places = gate._connections, gate._threads
        for each in places:
            each.total_tokens = 1
            await each.acquire_on_behalf_of(app)
        monkeypatch.setattr(Gate, "enter", observed)
        leave.set()
        await first_of(waits.wait(), request)
        request.cancel()
        await asyncio.wait({request})
        places[0].release_on_behalf_of(app)
        if in_time:
            places[1].release_on_behalf_of(app)
        assert await run_sync(done.wait, 30)
        assert [each.borrowed_tokens for each in places] == [0, 0 if in_time else 1]


async def test_a_place_that_is_given_back_while_another_is_waited_for() -> None:
    """A request that gives up its first place while it waits for the second loses neither place."""
    gate, database = Gate(), Database(sqlite())

    async def endpoint() -> None: ...

    uses_two = APIRoute("/", endpoint)
    gate.register(uses_two, Counter({database: 2}))
    places = [gate._connections, gate._threads]
    places[1].total_tokens = 1
    await places[1].acquire_on_behalf_of("another")
    limiters = gate.limiters(uses_two, database)
    entering = asyncio.create_task(gate.enter("request", limiters, database))
    await anyio.wait_all_tasks_blocked()
    gate.leave("request")
    places[1].release_on_behalf_of("another")
    await entering
    gate.leave("request")
    assert [each.borrowed_tokens for each in places] == [0, 0]
