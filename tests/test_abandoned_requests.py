"""`cancel_on_disconnect`: the work of a request ends when its client disconnects."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any

import anyio
import anyio.to_thread
import pytest
from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.middleware.base import BaseHTTPMiddleware

from fastapi_sqlnative import get_db, install_database, transactional
from fastapi_sqlnative.cancellation import cancel_on_disconnect, deadline
from fastapi_sqlnative.exceptions import (
    ClientDisconnectedError,
    DeadlineExceededError,
    RequestCancelledError,
)
from tests.conftest import MakeEngine, asynchronous
from tests.in_process import quiet, running, turns
from tests.proxy import Fault, Proxy
from tests.serving import Item, Kind, Rows, Served, few_threads, serve, until, using

pytestmark = pytest.mark.anyio
SLOW = text("SELECT pg_sleep(60)")
SELECT_1 = text("SELECT 1")
EVERY = cancel_on_disconnect(methods=["GET", "POST"])
Db = Annotated[AsyncSession, Depends(get_db())]


def slow(session: Session) -> None:
    session.add(Item(name="a"))
    session.flush()
    session.execute(SLOW)


def make_app(engine: Engine | AsyncEngine, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app


@pytest.fixture
def app(engine: Engine | AsyncEngine) -> FastAPI:
    """Make an application whose requests share one database connection."""
    return make_app(engine)


async def pass_on(request: Request, call_next: Callable[[Request], Any]) -> Any:
    return await call_next(request)


async def leave(
    served: Served, when: Callable[[], bool], request: str = "GET /", body: bytes = b""
) -> None:
    """Send a request, and disconnect when a condition is met."""
    host, port = served.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"{request} HTTP/1.1\r\nHost: {host}\r\n"
    if body:
        head += f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}\r\n".encode() + body)
    await writer.drain()
    await until(when)
    writer.transport.abort()


@pytest.mark.driver_decides
@asynchronous
@pytest.mark.parametrize("scope", [None, "function", "request"])
@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "BaseHTTPMiddleware"])
async def test_an_abandoned_query_ends(
    kind: Kind, app: FastAPI, rows: Rows, scope: Any, middleware: bool
) -> None:
    """When the client disconnects, its query ends on the server and nothing is stored.

    The connection returns to the pool of one, which serves the next request at once.
    """
    options: Any = {"dependencies": [Depends(cancel_on_disconnect(), scope=scope)]}
    app.get("/", **options)(using(kind, Depends(transactional()), slow))
    app.get("/next")(using(kind, Depends(get_db()), lambda session: session.scalar(SELECT_1)))
    if middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    with serve(app) as served:
        served.client.get("/next")  # the first connect sends queries, too
        await leave(served, rows.sleeps)
        await quiet(rows)
        assert served.client.get("/next").status_code == 200
    assert rows.names == []


@asynchronous
async def test_the_log_says_nothing(
    kind: Kind, app: FastAPI, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A disconnected client leaves one log line at DEBUG, and none at a higher level."""
    options: Any = {"dependencies": [Depends(cancel_on_disconnect())]}
    app.get("/things/{id}", **options)(using(kind, Depends(get_db()), slow))
    with caplog.at_level(logging.DEBUG), serve(app, access_log=True) as served:
        await leave(served, rows.sleeps, "GET /things/5")
        await quiet(rows)
    (line,) = [each for each in caplog.records if each.name == "fastapi_sqlnative"]
    assert line.levelno == logging.DEBUG
    assert line.message.startswith("The client of GET /things/{id} disconnected")
    assert [each for each in caplog.records if each.levelno > logging.DEBUG] == []


@asynchronous
async def test_a_write_goes_on_unless_it_is_asked_for(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """A POST whose client disconnects runs to its end, but is cancelled if `methods` names POST."""
    reached = threading.Event()

    @app.post("/default", dependencies=[Depends(cancel_on_disconnect())])
    async def default(
        request: Request, session: Annotated[AsyncSession, Depends(transactional())]
    ) -> None:
        session.add(Item(name="default"))
        await session.flush()
        reached.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        await turns()  # enough for a cancellation to arrive

    @app.post("/named", dependencies=[Depends(EVERY)])
    async def named(session: Annotated[AsyncSession, Depends(transactional())]) -> None:
        session.add(Item(name="named"))
        await session.flush()
        await session.execute(SLOW)

    with serve(app) as served:
        await leave(served, reached.is_set, "POST /default")
        await quiet(rows)
        await leave(served, rows.sleeps, "POST /named")
        await quiet(rows)
    assert rows.names == ["default"]


class Thing(BaseModel):
    """A request body."""

    name: str


@asynchronous
async def test_a_body_is_not_taken_from_the_endpoint(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """FastAPI or the endpoint, whichever reads the body, receives all of it, even an empty one."""
    options: Any = {"dependencies": [Depends(EVERY)]}

    @app.post("/model", **options)
    async def model(thing: Thing, session: Db) -> str:
        await session.execute(SELECT_1)
        return thing.name

    @app.api_route("/raw", methods=["GET", "POST"], **options)
    async def raw(request: Request, session: Db) -> int:
        await session.execute(SELECT_1)
        return len(await request.body())

    @app.api_route("/stream", methods=["GET", "POST"], **options)
    async def stream(request: Request, session: Db) -> int:
        await session.execute(SELECT_1)
        return sum([len(chunk) async for chunk in request.stream()])

    big = b"a" * 300_000

    def chunks() -> Any:
        yield from (big, big)

    with serve(app) as served:
        client = served.client
        assert client.post("/model", json={"name": "a"}).json() == "a"
        for path in "/raw", "/stream":
            assert client.post(path, content=big).json() == len(big)
            assert client.post(path, content=chunks()).json() == 2 * len(big)
            assert client.get(path).json() == 0


async def test_a_body_that_is_still_sent_is_not_collected() -> None:
    """An endpoint that streams a body receives each part as it arrives, as uploads may be large."""
    app, sent = FastAPI(), list[int]()

    async def parts() -> AsyncGenerator[bytes]:
        for number in 1, 2:
            sent.append(number)
            yield b"a"

    @app.post("/", dependencies=[Depends(EVERY)])
    async def endpoint(request: Request) -> list[int]:
        return [len(sent) async for _ in request.stream()]

    async with running(app) as client:
        for headers in {}, {"content-length": "2"}:
            sent.clear()
            answer = await client.post("/", content=parts(), headers=headers)
            assert answer.json()[:2] == [1, 2]


async def test_a_client_that_has_gone_before_is_noticed() -> None:
    """A client that disconnects before the endpoint begins ends the request with a 499."""
    app, sent = FastAPI(), list[Any]()

    @app.get("/", dependencies=[Depends(cancel_on_disconnect())])
    async def endpoint() -> None:
        await asyncio.sleep(60)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert sent[0]["status"] == 499


@asynchronous
async def test_a_read_body_is_no_hindrance(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """A request whose body FastAPI has already read is cancelled, too."""

    @app.post("/", dependencies=[Depends(EVERY)])
    async def endpoint(thing: Thing, session: Db) -> None:
        await session.execute(SLOW)

    with serve(app) as served:
        await leave(served, rows.sleeps, "POST /", b'{"name": "a"}')
        await quiet(rows)


async def test_no_commit_is_interrupted(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows
) -> None:
    """A COMMIT that is in progress when the client disconnects is not interrupted."""
    app = make_app(behind_proxy)
    options: Any = {"dependencies": [Depends(EVERY)]}
    app.post("/", **options)(using(kind, Depends(transactional()), add))
    proxy.fault = Fault.STALLED
    with serve(app) as served:
        await leave(served, proxy.reached.is_set, "POST /")
        state = served.server.server_state
        await until(lambda: not state.connections)
        nothing = asyncio.run_coroutine_threadsafe(turns(), served.server.loop)  # time to cancel it
        await asyncio.wrap_future(nothing)
        proxy.go_on.set()
        await until(lambda: not state.tasks)
        assert rows.names == ["a"]
        assert rows.backends("idle") == 1  # the connection is intact


def add(session: Session) -> None:
    session.add(Item(name="a"))


@asynchronous
async def test_a_swallowed_cancellation_is_no_success(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """An endpoint that swallows its cancellation and returns is rolled back."""
    reached, swallowed = threading.Event(), threading.Event()

    @app.get("/", dependencies=[Depends(cancel_on_disconnect())])
    async def endpoint(session: Annotated[AsyncSession, Depends(transactional())]) -> None:
        session.add(Item(name="a"))
        await session.flush()
        try:
            reached.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            swallowed.set()

    with serve(app) as served:
        await leave(served, reached.is_set)
        assert await anyio.to_thread.run_sync(swallowed.wait, 30)
        await quiet(rows)
    assert rows.names == []


@asynchronous
async def test_a_request_beside_a_deadline(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """A disconnect or a deadline, whichever comes first, ends a request that depends on both."""
    ended: list[type[Exception]] = []

    async def answer(_request: Request, error: Exception) -> Response:
        ended.append(type(error))
        return Response(status_code=getattr(error, "status_code", 500))

    app.add_exception_handler(Exception, answer)
    app.add_exception_handler(RequestCancelledError, answer)
    for path, seconds in ("/short", 0.2), ("/long", 60):
        dependencies = [Depends(deadline(seconds)), Depends(cancel_on_disconnect())]
        options: Any = {"dependencies": dependencies}
        app.get(path, **options)(using(kind, Depends(transactional()), slow))
    with serve(app) as served:
        assert served.client.get("/short").status_code == 504
        await quiet(rows)
        await leave(served, rows.sleeps, "GET /long")
        await until(lambda: len(ended) == 2)
        await quiet(rows)
    assert ended == [DeadlineExceededError, ClientDisconnectedError]
    assert rows.names == []


@asynchronous
async def test_what_the_application_sees(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """A dependency with `yield` and a handler receive ClientDisconnectedError, of status 499."""
    seen: list[object] = []

    async def handle(_request: Request, error: Exception) -> Response:
        seen.append(type(error))
        return Response(status_code=499)

    app.add_exception_handler(ClientDisconnectedError, handle)

    async def outer() -> Any:
        try:
            yield
        except ClientDisconnectedError as error:
            seen.append(error.status_code)
            raise

    options: Any = {"dependencies": [Depends(outer), Depends(cancel_on_disconnect())]}
    app.get("/", **options)(using(kind, Depends(get_db()), slow))
    with serve(app) as served:
        await leave(served, rows.sleeps)
        await until(lambda: seen == [499, ClientDisconnectedError])
        await quiet(rows)


async def test_a_client_that_stays_is_served(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """In process, where no client can disconnect, a request is answered normally."""
    options: Any = {"dependencies": [Depends(cancel_on_disconnect())]}
    app.get("/", **options)(using(kind, Depends(get_db()), lambda s: s.scalar(SELECT_1)))
    async with running(app) as client:
        assert (await client.get("/")).json() == 1


@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "BaseHTTPMiddleware"])
async def test_a_storm_leaves_the_pool_whole(
    kind: Kind, make_engine: MakeEngine, rows: Rows, middleware: bool
) -> None:
    """After twenty clients of five connections leave, no connection is in use and no query runs."""
    # When an attempt to connect is abandoned, SQLAlchemy's pool wakes none of its waiters. A waiter
    # looks again only after its timeout.
    engine = make_engine(pool_size=3, max_overflow=2, pool_timeout=5 if kind.asynchronous else 50)
    app = make_app(engine, lifespan=few_threads)
    options: Any = {"dependencies": [Depends(deadline(50)), Depends(cancel_on_disconnect())]}

    # Twenty queries of ten seconds would take forty seconds. If a busy machine needs a second
    # to cancel a query on the server, its connection is abandoned and the query runs on.
    seconds = 10 if kind.asynchronous else 0.2

    def body(session: Session) -> None:
        session.add(Item(name=f"{threading.get_ident()}"))
        session.execute(text(f"SELECT pg_sleep({seconds})"))

    app.get("/", **options)(using(kind, Depends(get_db()), body))
    app.get("/next", **options)(using(kind, Depends(get_db()), lambda s: s.scalar(SELECT_1)))
    if middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    pool: Any = engine.pool
    with serve(app) as served:
        async with asyncio.TaskGroup() as clients:
            for _ in range(20):
                clients.create_task(leave(served, lambda: True))
        await until(lambda: pool.checkedout() == 0)
        await quiet(rows)
        assert served.client.get("/next").json() == 1
    assert rows.names == []
