"""Rule 14: synchronous engines neither starve threads nor block the event loop."""

import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar, Token
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import Engine, Sequence, event, select, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from conftest import WorkerPostgres
from fastapi_sqlnative import get_db, install_database, reader, transactional
from fastapi_sqlnative.exceptions import BlockingSessionError
from tests.conftest import MakeEngine, synchronous
from tests.serving import Item, Rows, few_threads, flood, serve

pytestmark = [pytest.mark.anyio, synchronous]
Db = Annotated[Session, Depends(get_db())]
Transaction = Annotated[Session, Depends(transactional())]


class User(BaseModel):
    name: str


def current_user(session: Db) -> User:
    """Read from the database before the endpoint does, as a login would."""
    return User(name=session.scalars(text("SELECT 'ada' FROM pg_sleep(0.005)")).one())


def installed(engine: Engine | AsyncEngine) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app


async def test_many_requests_on_a_small_pool_all_succeed(
    make_engine: MakeEngine, rows: Rows
) -> None:
    """Many requests with a response model and a querying sub-dependency succeed on a small pool.

    There are more of them than threads and connections together.
    """
    app = FastAPI(lifespan=few_threads)
    engine = make_engine(pool_size=2, max_overflow=1, pool_timeout=10)
    install_database(app, engine=engine, shutdown=engine.dispose)

    @app.post("/", status_code=201)
    def endpoint(session: Transaction, user: Annotated[User, Depends(current_user)]) -> User:
        session.execute(text("SELECT pg_sleep(0.005)"))
        session.add(Item(name=f"{threading.get_ident()}-{id(session)}-{len(rows.names)}"))
        session.rollback()
        return user

    with serve(app) as served:
        assert set(await flood(served, "/")) == {201}


@asynccontextmanager
async def pool_held(engine: Engine) -> AsyncGenerator[None]:
    """Hold the only connection of a pool, as code outside the package might."""
    connection = await run_in_threadpool(engine.connect)
    try:
        yield
    finally:
        connection.close()


async def test_a_wait_for_the_pool_ends_as_the_pools_own_error(
    make_engine: MakeEngine, rows: Rows
) -> None:
    """If other code holds the pool, every request gets the pool's own timeout error.

    It makes no difference whether the request waits at the gate.
    """
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.2)
    assert isinstance(engine, Engine)
    app = installed(engine)
    codes: list[str | None] = []

    def busy(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, PoolTimeoutError)
        codes.append(error.code)
        return JSONResponse({}, 503)

    app.add_exception_handler(PoolTimeoutError, busy)

    @app.post("/")
    def endpoint(session: Db) -> None:
        session.execute(text("SELECT 1"))

    with serve(app) as served:
        async with pool_held(engine):
            assert set(await flood(served, "/")) == {503}
        assert await flood(served, "/", 1) == [200]
    assert set(codes) == {"3o7r"}


def query(session: Session) -> None:
    session.execute(text("SELECT 1"))


def add_and_flush(session: Session) -> None:
    session.add(Item(name="a"))
    session.flush()


def add_and_commit(session: Session) -> None:
    session.add(Item(name="a"))
    session.commit()


def advance(session: Session) -> None:
    session.scalar(Sequence("item_id_seq"))


@pytest.mark.parametrize("use", [query, add_and_flush, add_and_commit, advance])
async def test_the_event_loop_is_not_blocked(
    make_engine: MakeEngine, rows: Rows, use: Callable[[Session], None]
) -> None:
    """A sync session in an async endpoint raises BlockingSessionError before it waits.

    The error says what to do.
    """
    app = installed(make_engine())
    messages: list[str] = []

    def refused(_request: Request, error: Exception) -> JSONResponse:
        messages.append(str(error))
        return JSONResponse({}, 500)

    app.add_exception_handler(BlockingSessionError, refused)

    @app.post("/")
    async def endpoint(session: Transaction) -> None:
        use(session)

    with serve(app) as served:
        assert served.post("/").status_code == 500
    assert "`def`" in messages[0]
    assert "run_in_threadpool" in messages[0]
    assert rows.names == []


async def after_a_query(session: Session, end: str) -> None:
    """Run a query in a thread, then end the transaction on the event loop."""
    await run_in_threadpool(session.execute, text("SELECT 1"))
    getattr(session, end)()


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_a_transaction_is_not_ended_on_the_event_loop(
    make_engine: MakeEngine, rows: Rows, end: str
) -> None:
    """Ending a connected session's transaction on the event loop raises BlockingSessionError."""
    app = installed(make_engine())
    errors: list[Exception] = []

    def refused(_request: Request, error: Exception) -> JSONResponse:
        errors.append(error)
        return JSONResponse({}, 500)

    app.add_exception_handler(BlockingSessionError, refused)

    @app.post("/")
    async def endpoint(session: Db) -> None:
        await after_a_query(session, end)

    with serve(app) as served:
        assert served.post("/").status_code == 500
    assert len(errors) == 1
    assert rows.backends("idle in transaction%") == 0


async def test_a_sync_session_works_in_an_async_endpoint_through_threads(
    make_engine: MakeEngine, rows: Rows
) -> None:
    """Through run_in_threadpool(), a sync session works in an async endpoint and commits."""
    app = installed(make_engine())

    @app.post("/", status_code=201)
    async def endpoint(session: Transaction) -> None:
        session.add(Item(name="a"))
        await run_in_threadpool(session.flush)

    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["a"]


async def test_the_applications_own_use_of_its_engine_is_untouched(
    make_engine: MakeEngine, rows: Rows
) -> None:
    """The engine and the application's own sessions still work on the event loop.

    Only the package's sessions are watched.
    """
    engine = make_engine()
    assert isinstance(engine, Engine)
    app = installed(engine)

    @app.post("/")
    async def endpoint(session: Db) -> Any:
        with engine.begin() as connection, Session(engine) as own:
            own.scalar(select(1))
            return connection.scalar(select(1))

    with serve(app) as served:
        assert served.post("/").json() == 1


async def test_an_untouched_sync_session_costs_no_thread(
    make_engine: MakeEngine, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unused session is opened and finished on the event loop, without a thread."""
    app = installed(make_engine())
    hops: list[object] = []

    @app.post("/")
    async def endpoint(session: Transaction) -> None:
        hops.append(session)

    import anyio.to_thread

    async def no_hop(*_: object, **__: object) -> None:
        raise AssertionError("a thread hop")

    with serve(app) as served:
        monkeypatch.setattr(anyio.to_thread, "run_sync", no_hop)
        assert served.post("/").status_code == 200
        monkeypatch.undo()
    assert len(hops) == 1


@pytest.mark.parametrize("first", ["synchronous", "asynchronous"])
async def test_beside_an_asynchronous_session_the_commit_runs_in_a_thread(
    make_engine: MakeEngine, postgres: WorkerPostgres, rows: Rows, second_rows: Rows, first: str
) -> None:
    """Beside an asynchronous session, a synchronous session commits outside of the event loop.

    Both are committed, and the synchronous session's listeners run in one context.
    """
    engine = make_engine()
    other = create_async_engine(postgres.second.url("psycopg"))
    app = FastAPI()
    given = [("synchronous", engine), ("asynchronous", other)]
    for name, each in given if first == "synchronous" else reversed(given):
        install_database(app, name=name, engine=each, shutdown=each.dispose)
    threads: list[int] = []
    event.listen(engine, "commit", lambda _: threads.append(threading.get_ident()))
    variable, tokens = ContextVar[bool]("flushed"), list[Token[bool]]()

    @app.post("/")
    async def endpoint(
        session: Annotated[Session, Depends(transactional("synchronous"))],
        beside: Annotated[AsyncSession, Depends(transactional("asynchronous"))],
    ) -> int:
        event.listen(session, "before_flush", lambda *_: tokens.append(variable.set(True)))
        event.listen(session, "after_commit", lambda _: variable.reset(tokens.pop()))
        session.add(Item(name="a"))
        beside.add(Item(name="b"))
        return threading.get_ident()

    with serve(app) as served:
        loop = served.post("/").json()
    assert (rows.names, second_rows.names) == (["a"], ["b"])
    assert len(threads) == 1
    assert loop not in threads


async def test_a_pool_that_lets_nobody_wait_admits_who_need_not(
    make_engine: MakeEngine, rows: Rows
) -> None:
    """With pool_timeout=0, a request is served as long as the pool has a connection for it."""
    app = installed(make_engine(pool_timeout=0))

    @app.post("/")
    def endpoint(session: Db) -> None:
        session.execute(text("SELECT 1"))

    with serve(app) as served:
        assert served.post("/").status_code == 200


@pytest.mark.parametrize("two_databases", [False, True])
async def test_no_more_wait_at_the_gate_than_could_deadlock(
    make_engine: MakeEngine, rows: Rows, two_databases: bool
) -> None:
    """Four requests with several sessions run at a time, if four cannot hold all connections.

    A small pool of other requests makes no difference.
    """
    app = FastAPI()
    for name, size in ("default", 5), ("second", 2), ("other", 1):
        engine = make_engine(second=name != "default", pool_size=size, max_overflow=0)
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    others = [Depends(reader()), *([Depends(get_db("second"))] if two_databases else [])]
    barrier = threading.Barrier(4, timeout=30)
    app.post("/other", dependencies=[Depends(get_db("other"))])(lambda: 7)

    @app.post("/", dependencies=others)
    def endpoint(session: Db) -> None:
        barrier.wait()

    with serve(app) as served:
        assert await flood(served, "/", 4) == [200] * 4
