"""`isolated`: what a test does is gone afterwards, and the application cannot tell."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from pathlib import Path
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from fastapi_sqlnative._lifespan.installations import installations_of as registry_of
from sqlalchemy import (
    Engine,
    NullPool,
    StaticPool,
    create_engine,
    event,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.testclient import TestClient

from fastapi_sqlnative import (
    DatabaseErrorKind,
    describe_database_error,
    get_database_handle,
    get_db,
    install_database,
    installed_databases,
    reader,
    transactional,
)
from fastapi_sqlnative.exceptions import CommitOutcomeUnknownError
from fastapi_sqlnative.testing import (
    IsolationError,
    async_client,
    isolated,
    override_database,
)
from tests.conftest import MakeEngine
from tests.serving import KINDS, Base, Item, Kind, Rows, items, route, serve

on_a_loop = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.asynchronous], ids=lambda kind: kind.id
)


def add(name: str, **columns: Any) -> Callable[[Session], None]:
    def body(session: Session) -> None:
        session.add(Item(name=name, **columns))

    return body


def names(session: Session) -> list[str]:
    return list(session.scalars(select(Item.name).order_by(Item.name)))


def fail(session: Session) -> None:
    add("failed")(session)
    session.flush()
    raise HTTPException(409)


def explicit(session: Session) -> None:
    add("kept")(session)
    session.commit()
    add("given-up")(session)
    session.flush()
    session.rollback()
    with session.begin_nested():
        add("nested")(session)
    inner = session.begin_nested()
    add("undone")(session)
    session.flush()
    inner.rollback()
    session.commit()


def make_app(kind: Kind, engine: Engine | AsyncEngine) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/add", transactional(), add("added"))
    route(app, kind, "/late", transactional(), add("late", position=1))
    route(app, kind, "/again", transactional(), add("again", position=1))
    route(app, kind, "/fail", transactional(), fail)
    route(app, kind, "/explicit", get_db(), explicit)
    route(app, kind, "/names", reader(), names)
    route(app, kind, "/db-names", get_db(), names)
    return app


@pytest.fixture
def app(kind: Kind, engine: Engine | AsyncEngine) -> FastAPI:
    return make_app(kind, engine)


@pytest.fixture(params=["running", "before"])
def client(app: FastAPI, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    """Isolate the database while the application runs, or before it starts."""
    if request.param == "running":
        with TestClient(app, raise_server_exceptions=False) as client, isolated(app):
            yield client
    else:
        with isolated(app), TestClient(app, raise_server_exceptions=False) as client:
            yield client


def test_what_is_committed_is_gone_afterwards(app: FastAPI, rows: Rows) -> None:
    """A request's commit is seen by the next one, by nobody else, and not after the block."""
    with TestClient(app) as client:
        with isolated(app):
            assert client.post("/add").status_code == 201
            assert client.post("/names").json() == ["added"]
            assert rows.names == []
        assert client.post("/names").json() == []
        assert client.post("/add").status_code == 201
    assert rows.names == ["added"]


def test_the_applications_own_commits(client: TestClient, rows: Rows) -> None:
    """Commits, rollbacks and savepoints of the application's do what they always do."""
    assert client.post("/explicit").status_code == 201
    assert client.post("/db-names").json() == ["kept", "nested"]
    assert rows.names == []


def test_an_error_takes_back_its_own_transaction_alone(client: TestClient) -> None:
    """A database error and a raised HTTPException leave what was committed before."""
    assert client.post("/add").status_code == 201
    assert client.post("/add").status_code == 500  # the name is unique
    assert client.post("/fail").status_code == 409
    assert client.post("/names").json() == ["added"]


def test_a_deferred_constraint_shows_at_the_commit(client: TestClient) -> None:
    """What PostgreSQL checks at COMMIT fails the request that broke it, and no other."""
    assert client.post("/late").status_code == 201
    assert client.post("/again").status_code == 500
    assert client.post("/names").json() == ["late"]
    assert client.post("/add").status_code == 201


# --- whatever goes past the sessions of a request ---


def both(handle: Any, sync_work: Callable[[Session], Any]) -> Callable[[], Any]:
    """Make a function that runs work in a transaction of a handle's, in the handle's colour."""

    async def asynchronous() -> Any:
        async with handle.transaction() as session:
            return await session.run_sync(sync_work)

    def synchronous() -> Any:
        with handle.transaction() as session:
            return sync_work(session)

    return asynchronous if isinstance(handle.engine, AsyncEngine) else synchronous


def in_test(client: TestClient, app: FastAPI, work: Callable[[Session], Any]) -> Any:
    """Do something in the test itself, through the handle."""
    function = both(installed_databases(app)["default"], work)
    assert client.portal is not None
    return client.portal.call(function)


def test_the_tests_own_rows_outlast_a_rolled_back_request(app: FastAPI) -> None:
    """What the test has stored through the handle is seen by requests, and survives their end."""
    with TestClient(app, raise_server_exceptions=False) as client, isolated(app):
        in_test(client, app, add("mine"))
        assert client.post("/fail").status_code == 409
        assert client.post("/names").json() == ["mine"]
        assert in_test(client, app, names) == ["mine"]


def test_core_is_isolated_too(kind: Kind, engine: Engine | AsyncEngine, rows: Rows) -> None:
    """The engine itself, and one with options that was made before, commit into the test alone."""
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")

    def core(session: Session) -> list[str]:
        connection = session.connection()
        connection.execute(items.insert().values(name="unseen"))
        session.rollback()
        return []

    async def asynchronous() -> None:
        assert isinstance(engine, AsyncEngine)
        assert isinstance(autocommit, AsyncEngine)
        async with engine.begin() as connection:
            await connection.execute(items.insert().values(name="core"))
        async with engine.connect() as connection:
            await connection.execute(items.insert().values(name="never"))
        async with autocommit.connect() as connection:
            await connection.execute(items.insert().values(name="single"))
            with pytest.raises(IntegrityError):
                await connection.execute(items.insert().values(name="single"))
            assert (await connection.execute(select(items.c.name))).all()

    def synchronous() -> None:
        assert isinstance(engine, Engine)
        assert isinstance(autocommit, Engine)
        with engine.begin() as connection:
            connection.execute(items.insert().values(name="core"))
        with engine.connect() as connection:
            connection.execute(items.insert().values(name="never"))
        with autocommit.connect() as connection:
            connection.execute(items.insert().values(name="single"))
            with pytest.raises(IntegrityError):
                connection.execute(items.insert().values(name="single"))
            assert connection.execute(select(items.c.name)).all()

    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/core", get_db(), core)
    route(app, kind, "/names", reader(), names)
    app.post("/engine")(asynchronous if kind.asynchronous else synchronous)
    with TestClient(app) as client, isolated(app):
        client.post("/engine")
        client.post("/core")
        assert client.post("/names").json() == ["core", "single"]
        assert rows.names == []
    assert rows.names == []


def test_a_swallowed_error_is_refused_as_always(kind: Kind, engine: Engine | AsyncEngine) -> None:
    """The package's own rules see what they see in production."""

    def swallow(session: Session) -> None:
        add("first")(session)
        session.flush()
        with contextlib.suppress(DBAPIError):
            session.execute(text("SELECT 1/0"))

    app = make_app(kind, engine)
    route(app, kind, "/swallow", transactional(), swallow)
    route(app, kind, "/forgotten", get_db(), add("forgotten"))
    with TestClient(app, raise_server_exceptions=True) as client, isolated(app):
        with pytest.raises(RuntimeError, match="cannot be committed"):
            client.post("/swallow")
        with pytest.raises(RuntimeError, match="without a commit"):
            client.post("/forgotten")
        assert client.post("/names").json() == []


def test_options_of_a_transaction(kind: Kind, engine: Engine | AsyncEngine) -> None:
    """`read_only` is the server's own, for one transaction; another isolation level is refused."""
    app = make_app(kind, engine)
    route(app, kind, "/read-only", transactional(read_only=True), add("refused"))
    route(app, kind, "/level", transactional(isolation_level="SERIALIZABLE"), names)
    route(app, kind, "/own-level", transactional(isolation_level="READ COMMITTED"), names)
    with TestClient(app) as client, isolated(app):
        with pytest.raises(Exception, match="read-only transaction"):
            client.post("/read-only")
        assert client.post("/add").status_code == 201
        with pytest.raises(IsolationError, match="'SERIALIZABLE' was asked for"):
            client.post("/level")
        assert client.post("/own-level").json() == ["added"]
        assert client.post("/names").json() == ["added"]


def test_a_second_session_is_refused_at_once(kind: Kind, engine: Engine | AsyncEngine) -> None:
    """Two at a time would be two connections: the message says so, and what to do."""
    app = make_app(kind, engine)

    first, second, handle = map(Depends, (get_db(), reader(), get_database_handle()))

    def writes(session: Session) -> None:
        add("beside")(session)
        session.flush()

    async def login_async(session: Any = first, other: Any = second) -> None:
        await other.run_sync(names)
        await session.run_sync(writes)
        await session.commit()
        assert await other.run_sync(names) == ["beside"]

    def login_sync(session: Any = first, other: Any = second) -> None:
        names(other)
        writes(session)
        session.commit()
        assert names(other) == ["beside"]

    async def unseen_async(session: Any = first, other: Any = second) -> None:
        await other.run_sync(names)
        await session.run_sync(writes)
        await other.run_sync(names)

    def unseen_sync(session: Any = first, other: Any = second) -> None:
        names(other)
        writes(session)
        names(other)

    app.post("/login")(login_async if kind.asynchronous else login_sync)
    app.post("/unseen")(unseen_async if kind.asynchronous else unseen_sync)

    async def reader_async(session: Any = first, other: Any = second) -> None:
        await session.run_sync(names)
        await other.run_sync(names)

    def reader_sync(session: Any = first, other: Any = second) -> None:
        names(session)
        names(other)

    async def handle_async(session: Any = first, database: Any = handle) -> None:
        await session.run_sync(names)
        await both(database, names)()

    def handle_sync(session: Any = first, database: Any = handle) -> None:
        names(session)
        both(database, names)()

    app.post("/reader")(reader_async if kind.asynchronous else reader_sync)
    app.post("/handle")(handle_async if kind.asynchronous else handle_sync)
    with TestClient(app) as client, isolated(app):
        for path in "/reader", "/handle", "/unseen":
            with pytest.raises(IsolationError, match="beside one that is in a transaction"):
                client.post(path)
        assert client.post("/login").status_code == 200
        assert client.post("/names").json() == ["beside"]


def test_a_second_session_is_refused_in_other_threads_and_tasks(
    kind: Kind, engine: Engine | AsyncEngine
) -> None:
    """A request is one, whatever it is spread over: it is not kept waiting for itself."""
    app = make_app(kind, engine)
    session, handle = map(Depends, (get_db(), get_database_handle()))

    async def in_task(session: Any = session, database: Any = handle) -> None:
        await session.run_sync(names)
        await asyncio.create_task(both(database, names)())

    async def in_thread(session: Any = session, database: Any = handle) -> None:
        await run_in_threadpool(names, session)
        leave = threading.Event()
        # The thread that was used last is taken first: now it is not there.
        holding = asyncio.create_task(run_in_threadpool(leave.wait, 20))
        try:
            await run_in_threadpool(both(database, names))
        finally:
            leave.set()
            await holding

    app.post("/elsewhere")(in_task if kind.asynchronous else in_thread)
    with TestClient(app) as client, isolated(app):
        with pytest.raises(IsolationError, match="beside one that is in a transaction"):
            client.post("/elsewhere")
        assert client.post("/names").json() == []


def test_requests_take_turns(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """Many at once are served one after the other, each of them whole."""
    engine = make_engine(pool_size=5, max_overflow=0)
    app = make_app(kind, engine)

    def numbered(session: Session) -> int:
        before = len(names(session))
        session.execute(text("SELECT pg_sleep(0.002)"))
        add(f"row-{before:03}")(session)
        session.flush()
        return before

    route(app, kind, "/numbered", transactional(), numbered)
    with TestClient(app) as client, isolated(app), ThreadPoolExecutor(20) as threads:
        answers = threads.map(lambda _: client.post("/numbered").json(), range(60))
        assert sorted(answers) == list(range(60))
    assert rows.names == []


def test_requests_on_two_databases_take_turns(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """Requests that use two databases in opposite order do not wait for each other for ever."""
    app = FastAPI()
    for name, second in ("a", False), ("b", True):
        engine = make_engine(second=second, pool_timeout=5)
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)

    def use(session: Session) -> None:
        session.execute(text("SELECT pg_sleep(0.01)"))

    def endpoint(one: str, other: str) -> Callable[..., Any]:
        first, then = Depends(get_db(one)), Depends(get_db(other))

        async def asynchronous(session: Any = first, second: Any = then) -> None:
            await session.run_sync(use)
            await second.run_sync(use)

        def synchronous(session: Any = first, second: Any = then) -> None:
            use(session)
            use(second)

        return asynchronous if kind.asynchronous else synchronous

    app.post("/0")(endpoint("a", "b"))
    app.post("/1")(endpoint("b", "a"))
    with TestClient(app) as client, isolated(app), ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda number: client.post(f"/{number % 2}").status_code, range(24))
        assert list(answers) == [200] * 24


def test_whoever_waits_too_long_is_refused(kind: Kind, make_engine: MakeEngine) -> None:
    """A request that waits for another one is told so, instead of waiting for ever."""
    engine = make_engine(pool_size=5, pool_timeout=0.2)
    app = make_app(kind, engine)
    entered, leave = threading.Event(), threading.Event()

    async def hold_async(session: Any = Depends(get_db())) -> None:
        await session.run_sync(names)
        entered.set()
        await run_in_threadpool(leave.wait, 20)

    def hold_sync(session: Any = Depends(get_db())) -> None:
        names(session)
        entered.set()
        leave.wait(20)

    app.post("/hold")(hold_async if kind.asynchronous else hold_sync)
    with TestClient(app) as client, isolated(app), ThreadPoolExecutor(1) as threads:
        holding = threads.submit(client.post, "/hold")
        entered.wait(20)
        try:
            with pytest.raises(IsolationError, match="requests take turns"):
                client.post("/names")
            with pytest.raises(IsolationError, match="requests take turns"):
                in_test(client, app, names)
        finally:
            leave.set()
        assert holding.result().status_code == 200
        assert client.post("/names").json() == []


def test_blocks_within_blocks(app: FastAPI, rows: Rows) -> None:
    """An inner block keeps what the outer one has, and takes back only its own."""
    with TestClient(app, raise_server_exceptions=False) as client, isolated(app):
        assert client.post("/add").status_code == 201
        with isolated(app):
            assert client.post("/explicit").status_code == 201
            assert client.post("/add").status_code == 500
            assert client.post("/names").json() == ["added", "kept", "nested"]
        assert client.post("/names").json() == ["added"]
        assert client.post("/again").status_code == 201
        assert client.post("/names").json() == ["added", "again"]
    assert rows.names == []


def test_a_factorys_engine(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """An engine that is built at the start is isolated as soon as there is one."""
    app = FastAPI()
    install_database(app, engine=lambda: make_engine(pool_size=1, max_overflow=0))
    route(app, kind, "/add", transactional(), add("added"))
    route(app, kind, "/names", reader(), names)
    for _ in range(2):
        with isolated(app), TestClient(app) as client:
            assert client.post("/add").status_code == 201
            assert client.post("/names").json() == ["added"]
        with TestClient(app) as client, isolated(app):
            assert client.post("/add").status_code == 201
            assert client.post("/names").json() == ["added"]
        assert rows.names == []


def test_a_start_again_within_a_block(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """A synchronous engine keeps what it has; an event loop's connection ends with the loop."""
    with isolated(app):
        with TestClient(app) as client:
            assert client.post("/add").status_code == 201
        with TestClient(app) as client:
            assert client.post("/names").json() == ([] if kind.asynchronous else ["added"])
            assert client.post("/late").status_code == 201
    assert rows.names == []


def test_several_databases(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """All of them are isolated, those of mounted applications too, or those that are named."""
    app, mounted = FastAPI(), FastAPI()
    app.mount("/mounted", mounted)
    first, second = make_engine(), make_engine(second=True)
    install_database(app, name="first", engine=first, shutdown=first.dispose)
    install_database(app, name="alias", engine=first)
    install_database(mounted, name="second", engine=second, shutdown=second.dispose)
    route(app, kind, "/first", transactional("first"), add("first"))
    route(app, kind, "/alias", transactional("alias"), names)
    route(mounted, kind, "/second", transactional("second"), add("second"))
    with TestClient(app) as client:
        with isolated(app):
            client.post("/first")
            client.post("/mounted/second")
            assert client.post("/alias").json() == ["first"]
        assert (rows.names, second_rows.names) == ([], [])
        with isolated(app, "second"):
            client.post("/first")
            client.post("/mounted/second")
        assert (rows.names, second_rows.names) == (["first"], [])


def test_two_engines_on_one_database_are_refused(kind: Kind, make_engine: MakeEngine) -> None:
    """They would not see each other's commits; nothing is left behind by the refusal."""
    app = FastAPI()
    for name in "one", "two":
        engine = make_engine()
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/one", transactional("one"), add("one"))
    route(app, kind, "/two", transactional("two"), names)
    with TestClient(app) as client:
        with pytest.raises(IsolationError, match="one database with two engines"), isolated(app):
            pass
        one = installed_databases(app)["one"].engine
        with isolated(app, "one"), override_database(app, "two", one):
            client.post("/one")
            assert client.post("/two").json() == ["one"]
        assert client.post("/two").json() == []


def test_what_would_end_the_block_is_refused(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """COMMIT as text, and a connection that is lost for real, do not pass for isolated."""

    def commit(session: Session) -> None:
        session.execute(text(" commit; "))

    def lose(session: Session) -> None:
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    route(app, kind, "/commit", transactional(), commit)
    route(app, kind, "/lose", transactional(), lose)
    with TestClient(app, raise_server_exceptions=True) as client:
        with isolated(app):
            with pytest.raises(IsolationError, match="sent as text"):
                client.post("/commit")
            assert client.post("/add").status_code == 201
        block = isolated(app).__enter__()
        with pytest.raises(DBAPIError):
            client.post("/lose")
        with pytest.raises(IsolationError, match="connection was lost"):
            client.post("/names")
        with pytest.raises(IsolationError, match="connection was lost"):
            block.__exit__(None, None, None)
        assert client.post("/names").json() == []
    assert rows.names == []


def test_a_session_that_is_left_open_is_cut_off(
    kind: Kind, app: FastAPI, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """What outlives the block cannot go on to commit, and the block says so."""
    with TestClient(app) as client:
        assert client.portal is not None
        database: Any = installed_databases(app)["default"]
        session = database.open()

        async def use() -> None:
            await session.run_sync(add("left"))
            await session.flush()

        async def commit() -> None:
            await session.commit()

        def use_sync() -> None:
            add("left")(session)
            session.flush()

        with pytest.raises(IsolationError, match="still in use"), isolated(app):
            client.portal.call(use if kind.asynchronous else use_sync)
        with contextlib.suppress(CommitOutcomeUnknownError):  # asyncpg's adapter has no transaction
            client.portal.call(commit if kind.asynchronous else session.commit)
        client.portal.call(session.close)
        assert client.post("/names").json() == []
    assert rows.names == []


@pytest.mark.anyio
async def test_on_the_tests_own_event_loop(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """`async with` goes around an async client or into it; `with` is refused where it must wait."""
    async with async_client(app) as client:
        async with isolated(app):
            assert (await client.post("/add")).status_code == 201
            assert (await client.post("/names")).json() == ["added"]
        assert (await client.post("/names")).json() == []
        if kind.asynchronous:
            with pytest.raises(RuntimeError, match="write `async with"):
                isolated(app).__enter__()
        else:
            with isolated(app):
                assert (await client.post("/add")).status_code == 201
    async with isolated(app):
        async with async_client(app) as client:
            assert (await client.post("/add")).status_code == 201
        async with async_client(app) as client:
            assert (await client.post("/names")).json() == ["added"]
    assert rows.names == []


@pytest.mark.anyio
async def test_concurrent_requests_on_one_loop(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """Requests that are sent together wait for each other; the test's own transaction does not."""
    app = make_app(kind, make_engine(pool_size=5))
    async with async_client(app) as client, isolated(app):
        answers = await asyncio.gather(*(client.post("/names") for _ in range(20)))
        assert [each.json() for each in answers] == [[]] * 20
        if kind.asynchronous:
            database: Any = installed_databases(app)["default"]
            async with database.transaction() as session:
                await session.run_sync(names)
                with pytest.raises(IsolationError, match="would wait for itself"):
                    await client.post("/names")
        assert (await client.post("/add")).status_code == 201
    await installed_engine_disposed(app)
    assert rows.names == []


async def installed_engine_disposed(app: FastAPI) -> None:
    """Nothing is left of the isolation: the engine is what it was."""
    engine: Any = registry_of(app).installations["default"].engine
    inner = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    assert type(inner.pool).__module__.startswith("sqlalchemy.")
    assert type(inner.dialect).__module__.startswith("sqlalchemy.")


@pytest.mark.anyio
async def test_nobody_comes_between(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """Whoever waits gets the connection when the last of those who share it has given it back."""
    app = make_app(kind, make_engine(pool_size=5))
    async with async_client(app), isolated(app):
        database: Any = installed_databases(app)["default"]
        autocommit = database.engine.execution_options(isolation_level="AUTOCOMMIT")
        if not kind.asynchronous:
            with ThreadPoolExecutor(1) as thread:
                with autocommit.connect() as single:
                    single.execute(select(1))
                    transaction = database.engine.begin()
                    connection = transaction.__enter__()
                    connection.execute(items.insert().values(name="beside"))
                waiting = thread.submit(both(database, names))
                with contextlib.suppress(FuturesTimeoutError):
                    waiting.result(0.2)
                assert not waiting.done()
                transaction.__exit__(None, None, None)
                assert waiting.result() == ["beside"]
            return
        async with autocommit.connect() as single:
            await single.execute(select(1))
            transaction = database.engine.begin()
            connection = await transaction.__aenter__()
            await connection.execute(items.insert().values(name="beside"))
        task = asyncio.create_task(both(database, names)())
        await asyncio.wait({task}, timeout=0.2)
        assert not task.done()
        await transaction.__aexit__(None, None, None)
        assert await task == ["beside"]
    assert rows.names == []


def test_a_served_application(app: FastAPI, rows: Rows) -> None:
    """It is the same over HTTP, with the application in another thread."""
    with serve(app) as served:
        with isolated(app):
            assert served.client.post("/add").status_code == 201
            assert served.client.post("/add").status_code == 500
            assert served.client.post("/names").json() == ["added"]
            assert rows.names == []
        assert served.client.post("/names").json() == []


@pytest.mark.anyio
async def test_an_application_on_another_loop(app: FastAPI, rows: Rows) -> None:
    """An asynchronous test may isolate an application that runs in another thread."""
    with TestClient(app) as client:
        async with isolated(app):
            assert (await run_in_threadpool(client.post, "/add")).status_code == 201
            assert (await run_in_threadpool(client.post, "/names")).json() == ["added"]
        assert (await run_in_threadpool(client.post, "/names")).json() == []


@on_a_loop
def test_code_on_another_loop_is_refused(kind: Kind, app: FastAPI) -> None:
    """The connection belongs to the application's event loop: the message has the remedy."""

    async def use() -> None:
        database: Any = installed_databases(app)["default"]
        async with database.session() as session:
            await session.run_sync(names)

    with TestClient(app) as client, isolated(app):
        with pytest.raises(IsolationError, match=r"client\.portal\.call"):
            asyncio.run(use())
        assert client.post("/add").status_code == 201
        with pytest.raises(IsolationError, match=r"client\.portal\.call"):
            asyncio.run(use())
        assert client.post("/names").json() == ["added"]


def test_the_applications_pool_listeners_are_told(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """What an application does at each checkout and checkin is still done."""
    engine = make_engine()
    inner = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    log: list[str] = []
    event.listen(inner, "checkout", lambda *_: log.append("checkout"))
    event.listen(inner, "checkin", lambda *_: log.append("checkin"))
    app = make_app(kind, engine)
    with TestClient(app) as client, isolated(app):
        client.post("/add")
        log.clear()
        client.post("/names")
        assert log == ["checkout", "checkin"]


LOCAL = (
    text("SET LOCAL app.tenant = 'ada'"),
    text("SELECT set_config('app.tenant', 'ada', true)"),
    select(func.set_config("app.tenant", "ada", True)),
    text("SELECT set_config(:name, :value, true)").bindparams(name="app.tenant", value="ada"),
)


@pytest.mark.parametrize("statement", LOCAL, ids=range(len(LOCAL)))
def test_a_transactions_settings_end_with_it(
    kind: Kind, engine: Engine | AsyncEngine, statement: Any
) -> None:
    """A tenant or a role that a transaction has set is not the next one's."""
    app = make_app(kind, engine)

    def set_tenant(session: Session) -> list[Any]:
        session.execute(statement)
        session.execute(text("SET LOCAL statement_timeout = '7s'"))
        return settings(session)

    def settings(session: Session) -> list[Any]:
        names = "app.tenant", "statement_timeout", "app.kept"
        return [session.scalar(select(func.current_setting(name, True))) or "" for name in names]

    def keep(session: Session) -> None:
        session.execute(select(func.set_config("app.kept", "kept", False)))

    route(app, kind, "/set", transactional(), set_tenant)
    route(app, kind, "/keep", transactional(), keep)
    route(app, kind, "/settings", transactional(), settings)
    with TestClient(app) as client:
        before = client.post("/settings").json()
        for _ in range(2):
            with isolated(app):
                client.post("/keep")
                assert client.post("/set").json() == ["ada", "7s", "kept"]
                assert client.post("/settings").json() == [before[0], before[1], "kept"]
            assert client.post("/settings").json() == before


SETTINGS: dict[str, dict[str, Any]] = {
    "null-pool": {"poolclass": NullPool},
    "pre-ping": {"pool_pre_ping": True},
    "recycle": {"pool_recycle": 0},
    "no-reset": {"pool_reset_on_return": None},
    "level": {"isolation_level": "SERIALIZABLE"},
    "level-option": {"execution_options": {"isolation_level": "REPEATABLE READ"}},
    "autocommit": {"isolation_level": "AUTOCOMMIT"},
    "autocommit-option": {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_engines_of_every_setting(
    kind: Kind, make_engine: MakeEngine, rows: Rows, setting: str
) -> None:
    """Whatever the application has its engine do, it does in the block and after it."""
    app = make_app(kind, make_engine(**SETTINGS[setting]))
    with TestClient(app, raise_server_exceptions=False) as client:
        for _ in range(2):
            with isolated(app):
                assert client.post("/add").status_code == 201
                assert client.post("/add").status_code == 500
                assert client.post("/fail").status_code == 409
                failed = ["failed"] if setting.startswith("autocommit") else []
                assert client.post("/names").json() == ["added", *failed]
                assert client.post("/late").status_code == 201
                assert client.post("/again").status_code == 500
            assert rows.names == []
        assert client.post("/add").status_code == 201
        assert rows.names == ["added"]


def test_streams(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """Rows are streamed from a handle's session, and in AUTOCOMMIT."""
    app = make_app(kind, make_engine())
    query = select(Item.name).order_by(Item.name).execution_options(yield_per=1)

    async def stream_async(session: Any = Depends(reader())) -> list[str]:
        return [name async for name in await session.stream_scalars(query)]

    def stream_sync(session: Any = Depends(reader())) -> list[str]:
        return list(session.scalars(query))

    async def body_async(database: Any = Depends(get_database_handle())) -> StreamingResponse:
        async def lines() -> AsyncGenerator[str]:
            async with database.session() as session:
                async for name in await session.stream_scalars(query):
                    yield f"{name}\n"

        return StreamingResponse(lines())

    def body_sync(database: Any = Depends(get_database_handle())) -> StreamingResponse:
        def lines() -> Iterator[str]:
            with database.session() as session:
                yield from (f"{name}\n" for name in session.scalars(query))

        return StreamingResponse(lines())

    app.get("/stream")(stream_async if kind.asynchronous else stream_sync)
    app.get("/body", response_class=StreamingResponse)(
        body_async if kind.asynchronous else body_sync
    )
    with TestClient(app) as client, isolated(app):
        client.post("/explicit")
        assert client.get("/body").text == "kept\nnested\n"
        assert client.get("/stream").json() == ["kept", "nested"]
        assert client.post("/add").status_code == 201
    assert rows.names == []


@on_a_loop
@pytest.mark.anyio
async def test_a_cancelled_transaction_takes_back_its_own(
    make_engine: MakeEngine, kind: Kind, rows: Rows
) -> None:
    """A connection that SQLAlchemy discards keeps what was committed before."""
    app = make_app(kind, make_engine())

    async def slow() -> None:
        database: Any = installed_databases(app)["default"]
        async with database.transaction() as session:
            await session.run_sync(add("slow"))
            await session.flush()
            flushed.set()
            await session.execute(text("SELECT pg_sleep(30)"))

    async with async_client(app) as client, isolated(app):
        assert (await client.post("/add")).status_code == 201
        flushed = asyncio.Event()
        running = asyncio.create_task(slow())
        await flushed.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await client.post("/names")).json() == ["added"]
    assert rows.names == []


# --- SQLite ---


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN")


def _no_begin(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def create_tables(session: Session) -> None:
    Base.metadata.create_all(session.connection())


@pytest.mark.parametrize("recipe", [False, True], ids=["", "with-recipe"])
@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sqlite3", "aiosqlite"])
def test_sqlite(asynchronous: bool, where: str, recipe: bool, tmp_path: Path) -> None:
    """SQLite is isolated whichever way its driver begins transactions."""
    path = "" if where == "memory" else f"/{tmp_path}/file.db"
    if asynchronous:
        engine: Any = create_async_engine(f"sqlite+aiosqlite://{path}")
    elif where == "memory":
        engine = create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
    else:
        engine = create_engine(f"sqlite://{path}")
    inner: Engine = engine.sync_engine if asynchronous else engine
    if recipe:
        event.listen(inner, "connect", _no_begin)
        event.listen(inner, "begin", _begin)
    kind = Kind("", "", asynchronous)
    app = make_app(kind, engine)
    route(app, kind, "/create", transactional(), create_tables)
    route(app, kind, "/read-only", transactional(read_only=True), add("refused"))
    with TestClient(app, raise_server_exceptions=False) as client:
        client.post("/create")
        for _ in range(2):
            with isolated(app):
                assert client.post("/add").status_code == 201
                assert client.post("/explicit").status_code == 201
                assert client.post("/fail").status_code == 409
                assert client.post("/read-only").status_code == 500
                assert client.post("/names").json() == ["added", "kept", "nested"]
            assert client.post("/names").json() == []
        assert client.post("/add").status_code == 201
        assert client.post("/names").json() == ["added"]


def test_sqlite_that_only_one_thread_may_use() -> None:
    """It is refused by name, with the engine that can be isolated."""
    app = FastAPI()
    install_database(app, engine=create_engine("sqlite://"))
    with pytest.raises(IsolationError, match="StaticPool"), isolated(app):
        pass
    other = FastAPI()
    install_database(other, engine=create_engine("sqlite://", poolclass=StaticPool))
    route(other, Kind("", "", False), "/names", transactional(), names)
    refused = pytest.raises(IsolationError, match="StaticPool")
    with TestClient(other) as client, isolated(other), refused:
        client.post("/names")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sqlite3", "aiosqlite"])
def test_a_deferred_foreign_key_of_sqlite(asynchronous: bool, tmp_path: Path) -> None:
    """It is checked at the commit, with the error that SQLite has for it."""
    driver = "aiosqlite" if asynchronous else "pysqlite"
    engine: Any = (create_async_engine if asynchronous else create_engine)(
        f"sqlite+{driver}:///{tmp_path}/file.db"
    )
    kind, app = Kind("", driver, asynchronous), FastAPI()
    event.listen(engine.sync_engine if asynchronous else engine, "connect", _enforce)
    install_database(app, engine=engine, shutdown=engine.dispose)

    def create(session: Session) -> None:
        session.execute(text("CREATE TABLE parent (id INTEGER PRIMARY KEY)"))
        reference = "REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED"
        session.execute(text(f"CREATE TABLE child (parent_id INTEGER {reference})"))

    def orphan(session: Session) -> None:
        session.execute(text("INSERT INTO child VALUES (7)"))

    def family(session: Session) -> None:
        orphan(session)
        session.execute(text("INSERT INTO parent VALUES (7)"))

    def count(session: Session) -> Any:
        return session.scalar(text("SELECT count(*) FROM child"))

    for path, body in (("/create", create), ("/orphan", orphan), ("/family", family)):
        route(app, kind, path, transactional(), body)
    route(app, kind, "/count", transactional(), count)
    with TestClient(app) as client:
        client.post("/create")
        with isolated(app):
            with pytest.raises(IntegrityError) as raised:
                client.post("/orphan")
            failure = describe_database_error(raised.value)
            assert failure is not None
            assert failure.kind is DatabaseErrorKind.FOREIGN_KEY
            assert client.post("/family").status_code == 201
            assert client.post("/count").json() == 1
        assert client.post("/count").json() == 0


def _enforce(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON")


@pytest.mark.mariadb
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
def test_mariadb_commits_at_every_create(
    mariadb: str, driver: str, request: pytest.FixtureRequest
) -> None:
    """What cannot be taken back is an error at the end of the block; all else is taken back."""
    worker = getattr(request.config, "workerinput", {}).get("workerid", "main")
    server = make_url(mariadb).set(drivername=f"mysql+{driver}")
    name = f"sqlnative_isolation_{worker}"
    admin = create_engine(server.set(drivername="mysql+pymysql"))
    with admin.begin() as connection:
        connection.execute(text(f"CREATE OR REPLACE DATABASE {name}"))
        connection.execute(text(f"CREATE TABLE {name}.note (name VARCHAR(20)) ENGINE=InnoDB"))
    admin.dispose()
    url = server.set(database=name)
    engine: Any = (create_async_engine if driver == "asyncmy" else create_engine)(url)
    kind, app = Kind("", driver, driver == "asyncmy"), FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)

    def write(session: Session) -> None:
        session.execute(text("INSERT INTO note VALUES ('note')"))

    def count(session: Session) -> Any:
        return session.scalar(text("SELECT count(*) FROM note"))

    def create(session: Session) -> None:
        session.execute(text("CREATE TABLE another (id INT)"))

    for path, body in (("/write", write), ("/count", count), ("/create", create)):
        route(app, kind, path, transactional(), body)
    with TestClient(app, raise_server_exceptions=False) as client:
        with isolated(app):
            assert client.post("/write").status_code == 201
            assert client.post("/count").json() == 1
        assert client.post("/count").json() == 0
        block = isolated(app).__enter__()
        client.post("/create")
        with pytest.raises(IsolationError, match="has committed by itself"):
            block.__exit__(None, None, None)
        assert client.post("/count").json() == 0


def test_two_phases_are_refused(make_engine: MakeEngine, kind: Kind) -> None:
    """A prepared transaction would outlive the block; it is refused before it begins."""
    app = FastAPI()
    engine = make_engine()
    install_database(
        app, engine=engine, shutdown=engine.dispose, session_options={"twophase": True}
    )
    route(app, kind, "/names", transactional(), names)
    refused = pytest.raises(IsolationError, match="two-phase")
    with TestClient(app) as client, isolated(app), refused:
        client.post("/names")
