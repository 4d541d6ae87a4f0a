"""Database handles: their sessions and transactions, outside an application and in one."""

import asyncio
import contextlib
import gc
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import (
    AssertionPool,
    Engine,
    NullPool,
    SingletonThreadPool,
    StaticPool,
    create_engine,
    event,
    insert,
    make_url,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    PoolStatus,
    get_database_handle,
    install_database,
)
from fastapi_sqlnative.exceptions import SessionFinishedError, TransactionAbortedError
from tests.conftest import MakeEngine
from tests.in_process import dispose, turns
from tests.serving import Item, Kind, Rows, add, items, names, probing_threads, serve, until

pytestmark = pytest.mark.anyio
Body = Callable[[Session], Any]
add_a = add("a", flush=True)


def handle_of(engine: Any, **options: Any) -> Any:
    if isinstance(engine, AsyncEngine):
        return AsyncDatabase(engine, **options)
    return Database(engine, **options)


@pytest.fixture
async def database(engine: Any) -> AsyncIterator[Any]:
    """Yield a handle outside an application, on a pool of one connection."""
    yield handle_of(engine)
    await dispose(engine)


async def in_session(database: Any, body: Body) -> Any:
    """Run a body in the handle's `session()`, in a thread if it would block the event loop."""
    if isinstance(database, AsyncDatabase):
        async with database.session() as session:
            return await session.run_sync(body)

    def work() -> Any:
        with database.session() as session:
            return body(session)

    return await anyio.to_thread.run_sync(work)


async def in_transaction(database: Any, body: Body, **options: Any) -> Any:
    """Run a body in the handle's `transaction()`, in a thread if it would block the event loop."""
    if isinstance(database, AsyncDatabase):
        async with database.transaction(**options) as session:
            return await session.run_sync(body)

    def work() -> Any:
        with database.transaction(**options) as session:
            return body(session)

    return await anyio.to_thread.run_sync(work)


async def ping(database: Any, timeout: float) -> None:
    if isinstance(database, AsyncDatabase):
        await database.ping(timeout)
    else:
        await anyio.to_thread.run_sync(database.ping, timeout)


def add_and_fail(session: Session) -> None:
    add_a(session)
    raise ZeroDivisionError


def add_and_commit(session: Session) -> None:
    add_a(session)
    session.commit()


def swallow(session: Session) -> None:
    session.execute(insert(items).values(name="a"))
    with pytest.raises(IntegrityError):
        session.execute(insert(items).values(name="a"))


def clean(database: Any, rows: Rows) -> bool:
    """Return whether the pool has no connection in use and the server no open transaction."""
    in_transaction = rows.backends("idle in transaction%")
    return bool(database.engine.pool.checkedout() == 0 and in_transaction == 0)


# -- sessions and transactions ---------------------------------------------------------------


async def test_a_session_never_commits(database: Any, rows: Rows) -> None:
    """session() rolls back uncommitted work and frees its connection, however the block ends."""
    await in_session(database, add_a)
    assert (rows.names, clean(database, rows)) == ([], True)
    with pytest.raises(ZeroDivisionError):
        await in_session(database, add_and_fail)
    assert (rows.names, clean(database, rows)) == ([], True)
    await in_session(database, add_and_commit)
    assert (rows.names, clean(database, rows)) == (["a"], True)


@pytest.mark.driver_decides
async def test_a_transaction_commits_or_rolls_back(database: Any, rows: Rows) -> None:
    """transaction() commits at the end of its block, and rolls back on any exception."""
    with pytest.raises(ZeroDivisionError):
        await in_transaction(database, add_and_fail)
    assert (rows.names, clean(database, rows)) == ([], True)
    await in_transaction(database, add_a)
    assert (rows.names, clean(database, rows)) == (["a"], True)
    with pytest.raises(IntegrityError):
        await in_transaction(database, lambda session: session.add(Item(name="a")))
    assert clean(database, rows)


@pytest.mark.driver_decides
async def test_a_transaction_refuses_a_swallowed_error(database: Any, rows: Rows) -> None:
    """A block that swallows an error raises TransactionAbortedError, and the next block works."""
    with pytest.raises(TransactionAbortedError, match="begin_nested") as caught:
        await in_transaction(database, swallow)
    assert isinstance(caught.value.__cause__, Exception)
    assert (rows.names, clean(database, rows)) == ([], True)
    await in_transaction(database, add_a)
    assert rows.names == ["a"]


async def test_a_block_may_commit_and_roll_back_itself(database: Any, rows: Rows) -> None:
    """An explicit commit in a block stores at once, whatever comes after it in the block."""

    def body(session: Session) -> None:
        add_a(session)
        session.commit()
        assert rows.names == ["a"]
        session.add(Item(name="rolled back"))
        session.flush()
        session.rollback()
        session.add(Item(name="lost"))
        session.flush()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await in_transaction(database, body)
    assert (rows.names, clean(database, rows)) == (["a"], True)


async def test_a_block_may_close_its_session(database: Any, rows: Rows) -> None:
    """A block that commits and closes its session itself ends without an error."""

    def body(session: Session) -> None:
        add_a(session)
        session.commit()
        session.close()

    await in_transaction(database, body)
    assert (rows.names, clean(database, rows)) == (["a"], True)


async def test_an_untouched_block_connects_to_nothing(database: Any) -> None:
    """A block that sends nothing takes no connection, with or without autobegin."""
    never: list[Any] = []
    await in_session(database, never.append)
    await in_transaction(database, never.append)
    await in_transaction(handle_of(database.engine, session_options={"autobegin": False}), id)
    assert database.engine.pool.checkedin() == 0


async def test_a_transaction_has_options(database: Any, rows: Rows) -> None:
    """isolation_level and read_only apply on the server to one block, and not to the next."""
    shown = text(
        "SELECT current_setting('transaction_isolation'),"
        " current_setting('transaction_read_only'), pg_backend_pid()"
    )

    def show(session: Session) -> list[Any]:
        return list(session.execute(shown).one())

    options = {"isolation_level": "SERIALIZABLE", "read_only": True}
    level, read_only, backend = await in_transaction(database, show, **options)
    assert (level, read_only) == ("serializable", "on")
    assert await in_transaction(database, show) == ["read committed", "off", backend]
    with pytest.raises(DBAPIError, match="read-only"):
        await in_transaction(database, add_a, read_only=True)
    with pytest.raises(ValueError, match="is not an isolation level"):
        await in_transaction(database, add_a, isolation_level="AUTOCOMMIT")
    await in_transaction(database, add_a)
    assert rows.names == ["a"]


async def test_a_session_does_not_outlive_its_block(database: Any, rows: Rows) -> None:
    """A session used after its block raises SessionFinishedError and takes no connection."""
    for run in in_session, in_transaction:
        kept: list[Session] = []

        def keep(session: Session, kept: list[Session] = kept) -> None:
            names(session)
            kept.append(session)

        await run(database, keep)
        with pytest.raises(SessionFinishedError, match=r"request \(or block\).*has ended"):
            kept[0].execute(text("SELECT 1"))
        with pytest.raises(SessionFinishedError):
            add_a(kept[0])
        assert clean(database, rows)


async def test_sessions_may_be_used_side_by_side(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """The commit of a transaction inside another remains when the outer one rolls back."""
    engine: Any = make_engine(pool_size=2)
    database = handle_of(engine)

    async def asynchronous() -> None:
        async with database.transaction() as outer:
            await outer.run_sync(add_a)
            async with database.transaction() as inner:
                inner.add(Item(name="b"))
            raise ZeroDivisionError

    def synchronous() -> None:
        with database.transaction() as outer:
            add_a(outer)
            with database.transaction() as inner:
                inner.add(Item(name="b"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await (asynchronous() if kind.asynchronous else anyio.to_thread.run_sync(synchronous))
    assert (rows.names, clean(database, rows)) == (["b"], True)
    await dispose(engine)


def test_threads_share_one_database(postgres: WorkerPostgres, rows: Rows) -> None:
    """Many threads can use one handle at the same time, each with its own session."""
    engine = create_engine(postgres.url("psycopg"), pool_size=4, max_overflow=0)
    database = Database(engine)
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait(10)
        for turn in range(5):
            with database.transaction(read_only=turn % 2 == 1) as session:
                names(session)
                if turn % 2 == 0:
                    session.add(Item(name=f"{number}.{turn}"))

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, number) for number in range(8)]:
            done.result(30)
    assert len(rows.names) == 8 * 3
    assert clean(database, rows)
    engine.dispose()


async def test_tasks_share_one_database(postgres: WorkerPostgres, rows: Rows) -> None:
    """Many tasks can use one handle at the same time, on a smaller pool."""
    engine = create_async_engine(postgres.url("asyncpg"), pool_size=4, max_overflow=0)
    database = AsyncDatabase(engine)

    async def work(number: int) -> None:
        async with database.transaction() as session:
            session.add(Item(name=str(number)))

    await asyncio.gather(*map(work, range(20)))
    assert len(rows.names) == 20
    assert clean(database, rows)
    await engine.dispose()


def test_the_wrong_colour_is_told() -> None:
    """A handle built with the wrong kind of engine, or a URL, raises TypeError with both types."""
    sync: Any = create_engine("sqlite://")
    asynchronous: Any = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(TypeError, match="Database 'x' takes an Engine, not AsyncEngine"):
        Database(asynchronous, name="x")
    with pytest.raises(TypeError, match="AsyncDatabase 'x' takes an AsyncEngine, not Engine"):
        AsyncDatabase(sync, name="x")
    url: Any = "sqlite://"
    with pytest.raises(TypeError, match=r"takes an Engine, not str.*create_engine\(url"):
        Database(url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_": AsyncSession}, "class_ must be a subclass of Session"),
        ({"class_": "Session"}, "class_ must be a subclass of Session"),
        ({"bind": None}, "'bind' is not allowed"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)
def test_wrong_session_options_are_told_at_once(options: Any, message: str) -> None:
    """A mistake in session_options raises TypeError when the handle is built, not in a request."""
    with pytest.raises(TypeError, match=message):
        Database(create_engine("sqlite://"), session_options=options)


# -- ping ------------------------------------------------------------------------------------


@pytest.mark.driver_decides
async def test_a_ping_that_is_answered(database: Any, rows: Rows) -> None:
    """ping() returns when the database answers, and returns its connection to the pool."""
    await ping(database, 5)
    assert clean(database, rows)


def elsewhere(kind: Kind, postgres: WorkerPostgres, **changes: Any) -> Any:
    url = make_url(postgres.url(kind.driver)).set(**changes)
    return (create_async_engine if kind.asynchronous else create_engine)(url)


@pytest.mark.driver_decides
async def test_a_ping_of_nobody_fails(kind: Kind, postgres: WorkerPostgres) -> None:
    """ping() on a port without a listener raises OperationalError at once, with every driver."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        engine = elsewhere(kind, postgres, host="127.0.0.1", port=unused.getsockname()[1])
        with pytest.raises(OperationalError):
            await ping(handle_of(engine), 5)
    assert engine.pool.checkedout() == 0


async def test_a_ping_with_a_wrong_name_fails(kind: Kind, postgres: WorkerPostgres) -> None:
    """ping() with a role that the server rejects raises the driver's error, not TimeoutError."""
    engine = elsewhere(kind, postgres, username="nobody", password="wrong")
    with pytest.raises(Exception, match="nobody") as caught:
        await ping(handle_of(engine), 5)
    assert not isinstance(caught.value, TimeoutError)
    assert engine.pool.checkedout() == 0


@asynccontextmanager
async def silence() -> AsyncGenerator[int]:
    """Listen on a port and accept connections, without ever sending anything."""
    accepted: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted.append(listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for each in accepted:
                each.close()


@pytest.mark.driver_decides
async def test_a_ping_of_a_silent_server_has_an_end(kind: Kind, postgres: WorkerPostgres) -> None:
    """ping() raises TimeoutError after its timeout if a connected server never answers."""
    async with silence() as port:
        engine = elsewhere(kind, postgres, host="127.0.0.1", port=port)
        with pytest.raises(TimeoutError, match=r"'default' did not answer within 0\.3 s"):
            await ping(handle_of(engine), 0.3)
        if kind.asynchronous:
            assert engine.pool.checkedout() == 0
    await threads_gone()
    assert engine.pool.checkedout() == 0


async def threads_gone() -> None:
    """Wait for the abandoned threads, each of which ends when its driver or pool stops waiting.

    A thread that still holds a connection when the engine is disposed of could not return it.
    """
    await until(lambda: not probing_threads())


async def test_a_ping_waits_for_the_pool_no_longer(database: Any, rows: Rows) -> None:
    """ping() raises TimeoutError if every connection is in use, and leaves none checked out."""
    async with holding(database.engine):
        with pytest.raises(TimeoutError, match=r"'default' did not answer within 0\.2 s"):
            await ping(database, 0.2)
    await threads_gone()
    assert clean(database, rows)
    await ping(database, 5)


@asynccontextmanager
async def holding(engine: Any) -> AsyncGenerator[None]:
    """Hold one of the application's connections during the block."""
    if isinstance(engine, AsyncEngine):
        async with engine.connect():
            yield
    else:
        with engine.connect():
            yield


def test_a_ping_raises_what_the_application_raises() -> None:
    """ping() raises the application's own error unchanged, such as one from fetching a token."""

    def connect() -> Any:
        raise LookupError("no token")

    with pytest.raises(LookupError, match="no token"):
        Database(create_engine("postgresql+psycopg://", creator=connect)).ping(5)


async def test_a_ping_that_is_cancelled_as_it_fails_loses_no_error() -> None:
    """A ping that fails as its caller is cancelled is only cancelled, and asyncio logs nothing."""
    lost: list[Any] = []
    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: lost.append(context))
    engine = create_async_engine("sqlite+aiosqlite://")

    @event.listens_for(engine.sync_engine, "do_connect")
    def fail(*_: object) -> None:
        tasks.pop().cancel()
        raise LookupError("no token")

    tasks.append(loop.create_task(AsyncDatabase(engine).ping(5)))
    (done,) = await asyncio.gather(tasks[0], return_exceptions=True)
    assert isinstance(done, asyncio.CancelledError)
    del done
    await turns()  # drops the loop's own references
    gc.collect()
    assert not lost


# -- pools -----------------------------------------------------------------------------------

UNKNOWN = PoolStatus(None, None, None, None, None)
POOLS: dict[str, tuple[dict[str, Any], PoolStatus, PoolStatus]] = {
    "queue": (
        {"pool_size": 1, "max_overflow": 2},
        PoolStatus(1, 2, 0, 0, 0),
        PoolStatus(1, 2, 2, 0, 1),
    ),
    "no-limit-of-overflow": (
        {"pool_size": 1, "max_overflow": -1},
        PoolStatus(1, None, 0, 0, 0),
        PoolStatus(1, None, 2, 0, 1),
    ),
    "no-limit": (
        {"pool_size": 0},
        PoolStatus(None, None, 0, 0, None),
        PoolStatus(None, None, 2, 0, None),
    ),
    "null": ({"poolclass": NullPool}, UNKNOWN, UNKNOWN),
    "static": ({"poolclass": StaticPool}, UNKNOWN, UNKNOWN),
    "singleton-thread": ({"poolclass": SingletonThreadPool}, UNKNOWN, UNKNOWN),
}


@pytest.mark.parametrize(("options", "idle", "busy"), POOLS.values(), ids=POOLS)
def test_a_pool_tells_what_it_knows(
    tmp_path: Path, options: dict[str, Any], idle: PoolStatus, busy: PoolStatus
) -> None:
    """pool_status() returns each pool's figures, and None instead of 0 if a figure is unknown."""
    engine = create_engine(f"sqlite:///{tmp_path}/file.db", **options)
    database = Database(engine)
    assert database.pool_status() == idle
    with engine.connect(), engine.connect():
        assert database.pool_status() == busy
    engine.dispose()
    assert database.pool_status() == idle


def test_a_pool_of_another_kind_is_unknown() -> None:
    """pool_status() returns None for every figure of a pool class that counts nothing."""
    engine = create_engine("sqlite://", poolclass=AssertionPool)
    assert Database(engine).pool_status() == UNKNOWN


async def test_an_async_pool_tells_the_same(database: Any) -> None:
    """pool_status() returns the same figures for an AsyncEngine's pool as for an Engine's."""
    before = database.pool_status()
    assert before == PoolStatus(size=1, max_overflow=0, checked_out=0, checked_in=0, overflow=0)
    during = await in_session(database, lambda session: (names(session), database.pool_status()))
    assert during[1] == PoolStatus(1, 0, 1, 0, 0)
    assert database.pool_status() == PoolStatus(1, 0, 0, 1, 0)


# -- in an application -----------------------------------------------------------------------


@pytest.fixture
def app(engine: Engine | AsyncEngine) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app


def test_the_handle_in_an_endpoint(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """get_database_handle returns a handle of the engine's colour, in both kinds of endpoints."""
    marker = Depends(get_database_handle(" default"))

    async def asynchronous(database: Annotated[AsyncDatabase, marker]) -> str:
        async with database.transaction() as session:
            session.add(Item(name="a"))
        return database.name

    def synchronous(database: Annotated[Database, marker]) -> str:
        with database.transaction() as session:
            session.add(Item(name="a"))
        return database.name

    @app.get("/handle")
    def handle(database: Annotated[Any, marker]) -> str:
        return f"{type(database).__name__} of {database.engine.pool.checkedout()}"

    app.post("/")(asynchronous if kind.asynchronous else synchronous)
    with serve(app) as served:
        assert served.post("/").json() == "default"
        assert rows.names == ["a"]
        expected = "AsyncDatabase of 0" if kind.asynchronous else "Database of 0"
        assert served.client.get("/handle").json() == expected
        assert served.post("/").status_code == 500
        assert rows.backends("idle in transaction%") == 0


def test_many_requests_with_a_sync_handle(postgres: WorkerPostgres, rows: Rows) -> None:
    """A sync handle in `def` endpoints serves more concurrent requests than it has connections."""
    engine = create_engine(postgres.url("psycopg"), pool_size=2, max_overflow=0)
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)

    @app.post("/{name}")
    def endpoint(name: str, database: Annotated[Database, Depends(get_database_handle())]) -> None:
        with database.transaction() as session:
            session.add(Item(name=name))

    with serve(app) as served, ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(lambda number: served.client.post(f"/{number}"), range(30)))
        assert {answer.status_code for answer in answers} == {200}
    assert len(rows.names) == 30
