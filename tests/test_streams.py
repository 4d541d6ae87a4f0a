"""Rules 11 and 12: work that outlives the response gets a clear error, or uses the handle."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import Engine, ForeignKey, create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from starlette.background import BackgroundTask

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    get_database_handle,
    get_db,
    install_database,
    transactional,
)
from fastapi_sqlnative._drivers import results
from fastapi_sqlnative.exceptions import DatabaseDependencyError, UncommittedChangesError
from tests.conftest import MakeEngine
from tests.in_process import ask, async_sqlite, sqlite
from tests.serving import SQLITE, Item, Kind, Rows, items, make_app, route, serve, using, wait_until

EventSourceResponse: Any = None
with contextlib.suppress(ModuleNotFoundError):  # before FastAPI 0.135
    from fastapi.sse import EventSourceResponse
needs_generator_endpoints = pytest.mark.skipif(
    EventSourceResponse is None, reason="this FastAPI has no generator endpoints"
)


class Base(DeclarativeBase):
    pass


class Node(Base):
    """Map the tests' table once more, with something to load lazily."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(deferred=True)
    position: Mapped[int | None] = mapped_column(ForeignKey("item.id"))
    parts: Mapped[list["Node"]] = relationship(viewonly=True)


# -- the finished session --------------------------------------------------------------------

LATE: dict[str, Callable[[Session, Node], Any]] = {
    "execute": lambda session, _: session.execute(text("SELECT 1")),
    "scalars": lambda session, _: session.scalars(select(Item)).all(),
    "get": lambda session, _: session.get(Item, 1),
    "connection": lambda session, _: session.connection(),
    "add": lambda session, _: session.add(Item(name="late")),
    "add_all": lambda session, _: session.add_all([Item(name="late")]),
    "merge": lambda session, row: session.merge(row),
    "delete": lambda session, row: session.delete(row),
    "refresh": lambda session, row: session.refresh(row),
    "begin": lambda session, _: session.begin(),
    "begin_nested": lambda session, _: session.begin_nested(),
    "commit": lambda session, _: session.commit(),
}
DETACHED: dict[str, Callable[[Session, Node], Any]] = {
    "relationship": lambda _, row: row.parts,
    "deferred": lambda _, row: row.name,
}


def errors_of(session: Session, row: Node) -> dict[str, list[str]]:
    """Try everything with a finished session, and note what it says."""
    found: dict[str, list[str]] = {}
    for name, attempt in (LATE | DETACHED).items():
        try:
            attempt(session, row)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            found[name] = [type(error).__name__, str(error)]
        else:
            found[name] = ["nothing", ""]
    return found


Found = dict[str, list[str]]
Answer = Callable[[Session, Node, "list[Found]"], Any]


def by_stream(session: Session, row: Node, found: list[Found]) -> Any:
    """Try it in the generator of a StreamingResponse, which runs in a thread."""

    def body() -> Iterator[bytes]:
        found.append(errors_of(session, row))
        yield b"end"

    return StreamingResponse(body())


def by_async_stream(session: Session, row: Node, found: list[Found]) -> Any:
    """Try it in an async generator."""

    async def body() -> AsyncIterator[bytes]:
        found.append(errors_of(session, row))
        yield b"end"

    return StreamingResponse(body())


def by_background_task(session: Session, row: Node, found: list[Found]) -> Any:
    """Try it in a task that runs after the response, in a thread."""
    task = BackgroundTask(lambda: found.append(errors_of(session, row)))
    return JSONResponse({}, background=task)


def by_async_background_task(session: Session, row: Node, found: list[Found]) -> Any:
    """Try it in a task on the event loop."""

    async def task() -> None:
        found.append(errors_of(session, row))

    return JSONResponse({}, background=BackgroundTask(task))


# A session that has ended does not know how.
@pytest.mark.parametrize(
    ("answer", "dependency"),
    [
        (by_stream, get_db()),
        (by_async_stream, get_db()),
        (by_background_task, get_db()),
        (by_async_background_task, get_db()),
        (by_stream, transactional()),
        (by_background_task, transactional()),
    ],
)
def test_a_finished_session_says_what_to_use(
    kind: Kind, engine: Engine, rows: Rows, answer: Answer, dependency: Callable[..., Any]
) -> None:
    """Whatever is tried with a finished session fails, names the handle, and leaks nothing."""
    rows.add("there")
    app = make_app(engine)
    found: list[Found] = []

    def body(session: Session) -> Any:
        return answer(session, session.scalars(select(Node)).one(), found)

    route(app, kind, "/", dependency, body)
    with serve(app) as served:
        assert served.post("/").status_code == 200
        wait_until(lambda: bool(found))
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # a QueuePool's
        assert rows.backends("idle in transaction%") == 0
    for name in LATE:
        assert found[0][name][0] == "SessionFinishedError"
        assert "get_database_handle('default')" in found[0][name][1]
    # The objects are detached: SQLAlchemy's own error, with its link, and no session behind it.
    assert {name: found[0][name][0] for name in DETACHED} == dict.fromkeys(
        DETACHED, "DetachedInstanceError"
    )
    assert rows.names == ["there"]


def test_a_session_that_was_never_used_is_finished_too(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A session that the request did not touch is as finished as any other after it."""
    app = make_app(engine)
    found: list[Found] = []

    def body(session: Session) -> Any:
        return by_stream(session, Node(id=1), found)

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 200
    assert {found[0][name][0] for name in LATE} == {"SessionFinishedError"}
    assert rows.backends("idle in transaction%") == 0


def add_generator_endpoints(app: FastAPI, kind: Kind, tell: Callable[[Any], Any]) -> None:
    """Add endpoints that are generators themselves: as JSON lines and as server-sent events."""

    async def asynchronous(session: Annotated[AsyncSession, Depends(get_db())]) -> Any:
        yield await session.run_sync(tell)

    def synchronous(session: Annotated[Session, Depends(get_db())]) -> Any:
        yield tell(session)

    endpoint = asynchronous if kind.asynchronous else synchronous
    app.get("/lines")(endpoint)
    app.get("/events", response_class=EventSourceResponse)(endpoint)


@pytest.mark.anyio
@needs_generator_endpoints
async def test_an_endpoint_that_yields_over_a_session_fails_the_start(
    kind: Kind, engine: Engine
) -> None:
    """An endpoint that yields runs after its session: start-up refuses it, and names the fix."""
    app = make_app(engine)
    add_generator_endpoints(app, kind, lambda _session: {})
    with pytest.raises(DatabaseDependencyError, match=r"get_database_handle\('default'\)"):
        async with app.router.lifespan_context(app):
            raise AssertionError("it started")


SERIES = text("SELECT * FROM generate_series(1, 5000)")


@pytest.mark.driver_decides
def test_a_result_does_not_outlive_its_session(kind: Kind, engine: Engine, rows: Rows) -> None:
    """Rows fetched after the end touch no connection: another request's transaction is safe."""
    app = make_app(engine)
    told: list[str] = []

    def body(session: Session) -> Any:
        result = session.execute(SERIES, execution_options={"yield_per": 5})
        partitions = result.scalars().partitions(5)
        assert next(partitions) == [1, 2, 3, 4, 5]
        late.append(partitions)
        return JSONResponse({})

    late: list[Any] = []

    def interfere(session: Session) -> None:
        session.add(Item(name="a"))
        session.flush()
        try:
            next(late[0])
        except Exception as error:  # noqa: BLE001 - looked at by the test
            told.append(f"{type(error).__name__}: {error}")
        session.add(Item(name="b"))

    route(app, kind, "/", get_db(), body)
    route(app, kind, "/next", transactional(), interfere)
    with serve(app) as served:
        assert served.post("/").status_code == 200
        assert served.post("/next").status_code == 201
    assert told[0].startswith("SessionFinishedError")
    assert "get_database_handle('default')" in told[0]
    assert rows.names == ["a", "b"]


@pytest.mark.driver_decides
def test_an_error_in_the_middle_of_a_stream_aborts(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A server error while rows are fetched, if swallowed, is no success either (rule 5)."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)

    def body(session: Session) -> None:
        session.add(Item(name="lost"))
        session.flush()
        statement = text("SELECT 1 / (300 - n) FROM generate_series(1, 5000) n")
        result = session.execute(statement, execution_options={"yield_per": 100})
        with pytest.raises(Exception, match="division by zero"):
            result.all()

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 500
    assert rows.names == []


@pytest.mark.driver_decides
def test_a_stream_inside_the_request_commits(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A result that is read, or left half read, before the end is no hindrance to the commit."""
    app = make_app(engine)

    def half(session: Session) -> int:
        result = session.execute(SERIES, execution_options={"yield_per": 5})
        for count, _ in enumerate(result, 1):
            if count % 4 == 0:
                with session.begin_nested():
                    session.add(Item(name=str(count)))
            if count == 12:
                return count
        return 0

    route(app, kind, "/", transactional(), half)
    with serve(app) as served:
        assert served.post("/").json() == 12
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # a QueuePool's
    assert rows.names == ["12", "4", "8"]


Stream = Callable[[], Any]


def roll_back(session: Session, stream: Stream) -> Any:
    result = stream()
    session.rollback()
    return result


def roll_transaction_back(session: Session, stream: Stream) -> Any:
    transaction = session.begin()
    result = stream()
    transaction.rollback()
    return result


def fail_in_a_block(session: Session, stream: Stream) -> Any:
    begun = session.begin()
    result = stream()
    with contextlib.suppress(ZeroDivisionError), begun:
        raise ZeroDivisionError
    return result


@pytest.mark.anyio
@pytest.mark.parametrize("end", [roll_back, roll_transaction_back, fail_in_a_block])
async def test_a_stream_ends_with_its_transaction(
    kind: Kind, engine: Engine, rows: Rows, end: Callable[[Session, Stream], Any]
) -> None:
    """However it is rolled back: closing what is left of it cannot abort the next transaction."""
    rows.clear("a", "b", "c")

    def body(session: Session) -> None:
        def stream() -> Any:
            result = session.execute(select(items), execution_options={"yield_per": 1})
            result.fetchone()
            return result

        result = end(session, stream)
        session.add(Item(name="next"))
        session.flush()
        result.close()

    assert await ask(engine, kind, transactional(), body) == 201
    assert rows.names == ["a", "b", "c", "next"]


@pytest.mark.anyio
@pytest.mark.driver_decides
# psycopg's own, as with SQLAlchemy alone: nobody can close a cursor that the server has closed.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
async def test_a_stream_in_an_undone_savepoint_hides_no_write(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """PostgreSQL has closed it, and closing it again would abort the transaction around it."""

    def body(session: Session) -> None:
        session.add(Item(name="a"))
        savepoint = session.begin_nested()
        session.execute(SERIES, execution_options={"yield_per": 1}).fetchone()
        savepoint.rollback()

    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), body)
    assert await ask(engine, kind, transactional(), body) == 201
    assert rows.names == ["a"]


@pytest.mark.anyio
@pytest.mark.driver_decides
@pytest.mark.parametrize("end", ["close", "invalidate"])
async def test_a_stream_may_lose_its_connection(kind: Kind, engine: Engine, end: str) -> None:
    """Nothing is left to close if the application has given up the connection itself."""

    def body(session: Session) -> None:
        session.execute(SERIES, execution_options={"yield_per": 1}).fetchone()
        getattr(session.connection(), end)()

    assert await ask(engine, kind, get_db(), body) == 201


@pytest.mark.anyio
@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_a_stream_on_sqlite_goes_on_after_each_batch(kind: Kind, end: str) -> None:
    """SQLite's rows can be read beyond a COMMIT or ROLLBACK, so they can be here too."""
    engine = async_sqlite() if kind.asynchronous else sqlite()
    read: list[str] = []

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text)"))
        session.execute(text("INSERT INTO item VALUES ('a'), ('b'), ('c')"))
        session.commit()
        names = session.scalars(select(items.c.name), execution_options={"yield_per": 1})
        for name in names:
            read.append(name)
            getattr(session, end)()

    assert await ask(engine, kind, transactional(), body) == 201
    assert read == ["a", "b", "c"]


# -- with the handle -------------------------------------------------------------------------


Handle = Annotated[Any, Depends(get_database_handle())]


def names_by_handle(kind: Kind, database: Any) -> Any:
    """Stream the names stored, from a session of the handle's."""

    async def asynchronous(database: AsyncDatabase) -> AsyncIterator[str]:
        async with database.session() as session:
            for name in await session.scalars(select(Item.name).order_by(Item.name)):
                yield f"{name} "

    def synchronous(database: Database) -> Iterator[str]:
        with database.session() as session:
            for name in session.scalars(select(Item.name).order_by(Item.name)):
                yield f"{name} "

    return asynchronous(database) if kind.asynchronous else synchronous(database)


def test_the_handle_serves_streams(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """With the handle a stream reads what the request has committed before it."""
    app = make_app(make_engine(pool_size=1, max_overflow=0))

    @app.post("/stream")
    async def stream(
        database: Handle, session: Annotated[Any, Depends(transactional())]
    ) -> StreamingResponse:
        session.add(Item(name="b"))
        return StreamingResponse(names_by_handle(kind, database))

    rows.add("a")
    with serve(app) as served:
        assert served.post("/stream").text == "a b "
        assert rows.backends("idle in transaction%") == 0


@needs_generator_endpoints
def test_the_handle_serves_generator_endpoints(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """With the handle a generator endpoint and server-sent events read what is stored."""
    app = make_app(make_engine(pool_size=1, max_overflow=0))

    async def asynchronous(database: Handle) -> Any:
        async for name in names_by_handle(kind, database):
            yield name

    def synchronous(database: Handle) -> Any:
        yield from names_by_handle(kind, database)

    endpoint = asynchronous if kind.asynchronous else synchronous
    app.post("/lines")(endpoint)
    app.post("/events", response_class=EventSourceResponse)(endpoint)
    rows.add("a")
    rows.add("b")
    with serve(app) as served:
        assert served.post("/lines").text.split() == ['"a', '"', '"b', '"']
        assert served.post("/events").text.count("data:") == 2
        assert rows.backends("idle in transaction%") == 0


def test_the_handle_serves_background_tasks(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A background task sees the committed row, and stores more in a transaction of its own."""
    app = make_app(engine)

    async def asynchronous(database: AsyncDatabase) -> None:
        async with database.transaction() as session:
            (row,) = await session.scalars(select(Item))
            session.add(Item(name=f"after {row.name}"))

    def synchronous(database: Database) -> None:
        with database.transaction() as session:
            (row,) = session.scalars(select(Item))
            session.add(Item(name=f"after {row.name}"))

    def enqueue(
        tasks: BackgroundTasks, database: Annotated[Any, Depends(get_database_handle())]
    ) -> None:
        task: Any = asynchronous if kind.asynchronous else synchronous
        tasks.add_task(task, database)

    def add(session: Session) -> None:
        session.add(Item(name="a"))

    depends = [Depends(enqueue)]
    route(app, kind, "/", transactional(), add, dependencies=depends)
    with serve(app) as served:
        assert served.post("/").status_code == 201
        wait_until(lambda: rows.names == ["a", "after a"])
        assert served.post("/").status_code == 409
    assert rows.names == ["a", "after a"]


def test_a_task_of_the_response_waits_for_the_commit(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A task that a returned response carries runs after the commit, and not when that fails."""
    rows.add("taken", position=1)
    app = make_app(engine)
    seen: list[list[str]] = []

    def body(position: int) -> Callable[[Session], Any]:
        def add(session: Session) -> Any:
            session.execute(items.insert().values(name=str(position), position=position))
            return JSONResponse({}, background=BackgroundTask(lambda: seen.append(rows.names)))

        return add

    for position in 1, 2:
        app.post(f"/{position}")(using(kind, Depends(transactional()), body(position)))
    with serve(app) as served:
        assert served.post("/1").status_code == 409
        assert served.post("/2").status_code == 200
    assert seen == [["2", "taken"]]


def test_a_cursor_that_the_server_has_closed_is_not_closed_again(
    postgres: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure would abort the transaction; pg8000's cursor has its name as `ident`."""
    closed: list[str] = []
    engine = create_engine(postgres.url("psycopg"))
    with engine.connect() as connection:
        engine.dialect.driver = "pg8000"
        monkeypatch.setattr(results, "status_of", lambda _connection: None)  # it doesn't know
        connection.execute(text("DECLARE there CURSOR FOR SELECT 1"))
        for name in "there", "gone":
            cursor = SimpleNamespace(ident=name, close=partial(closed.append, name))
            context: Any = SimpleNamespace(root_connection=connection, cursor=cursor)
            results.close_cursor(context)
    engine.dispose()
    assert closed == ["there"]
