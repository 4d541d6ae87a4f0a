"""Rules 11 and 12: work that outlives the response raises a clear error, or uses the handle."""

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
    """The tests' table, mapped once more with attributes that are loaded lazily."""

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
if hasattr(Session, "delete_all"):  # SQLAlchemy 2.1 and later
    LATE["delete_all"] = lambda session, row: session.delete_all([row])
    LATE["merge_all"] = lambda session, _: session.merge_all([Node(name="late")])
DETACHED: dict[str, Callable[[Session, Node], Any]] = {
    "relationship": lambda _, row: row.parts,
    "deferred": lambda _, row: row.name,
}


def errors_of(session: Session, row: Node) -> dict[str, list[str]]:
    """Try every operation with a finished session, and return the errors by operation."""
    found: dict[str, list[str]] = {}
    for name, attempt in (LATE | DETACHED).items():
        try:
            attempt(session, row)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            found[name] = [type(error).__name__, str(error)]
        else:
            found[name] = ["nothing", ""]
    return found


Found = dict[str, list[str]]
Answer = Callable[[Session, Node, "list[Found]"], Any]


def by_stream(session: Session, row: Node, found: list[Found]) -> Any:
    """Use the session in the generator of a StreamingResponse, which runs in a thread."""

    def body() -> Iterator[bytes]:
        found.append(errors_of(session, row))
        yield b"end"

    return StreamingResponse(body())


def by_async_stream(session: Session, row: Node, found: list[Found]) -> Any:
    """Use the session in the async generator of a StreamingResponse."""

    async def body() -> AsyncIterator[bytes]:
        found.append(errors_of(session, row))
        yield b"end"

    return StreamingResponse(body())


def by_background_task(session: Session, row: Node, found: list[Found]) -> Any:
    """Use the session in a background task that runs after the response, in a thread."""
    task = BackgroundTask(lambda: found.append(errors_of(session, row)))
    return JSONResponse({}, background=task)


def by_async_background_task(session: Session, row: Node, found: list[Found]) -> Any:
    """Use the session in a background task on the event loop."""

    async def task() -> None:
        found.append(errors_of(session, row))

    return JSONResponse({}, background=BackgroundTask(task))


# The errors do not depend on how the session ended, so not every pair is needed.
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
    """Using a finished session raises an error that names the handle, and leaks nothing."""
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
    # The objects are detached and have no session, so they raise SQLAlchemy's error, with its link.
    assert {name: found[0][name][0] for name in DETACHED} == dict.fromkeys(
        DETACHED, "DetachedInstanceError"
    )
    assert rows.names == ["there"]


def test_a_session_that_was_never_used_is_finished_too(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A session that the request did not use is finished after the request like any other."""
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
    """Add generator endpoints, for JSON lines and for server-sent events."""

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
    """A generator endpoint with a session fails start-up, and the error names the handle.

    Such an endpoint runs after its session has ended.
    """
    app = make_app(engine)
    add_generator_endpoints(app, kind, lambda _session: {})
    with pytest.raises(DatabaseDependencyError, match=r"get_database_handle\('default'\)"):
        async with app.router.lifespan_context(app):
            raise AssertionError("it started")


SERIES = text("SELECT * FROM generate_series(1, 5000)")


@pytest.mark.driver_decides
def test_a_result_does_not_outlive_its_session(kind: Kind, engine: Engine, rows: Rows) -> None:
    """Fetching rows after the session has ended fails and does not touch another transaction."""
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
        except Exception as error:  # noqa: BLE001 - the test looks at it
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
    """A server error during a fetch fails the request, even if it is swallowed (rule 5)."""
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
    """A result that is left half read does not prevent the commit."""
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
    """Closing a stream after a rollback, of any kind, does not abort the next transaction."""
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
# psycopg warns as with SQLAlchemy alone: a cursor that the server has closed cannot be closed.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
async def test_a_stream_in_an_undone_savepoint_hides_no_write(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A stream in a savepoint that was rolled back does not hide a write.

    PostgreSQL has closed its cursor, and closing it again would abort the transaction around it.
    """

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
    """A request may close or invalidate the connection of a stream.

    Nothing is left to close then.
    """

    def body(session: Session) -> None:
        session.execute(SERIES, execution_options={"yield_per": 1}).fetchone()
        getattr(session.connection(), end)()

    assert await ask(engine, kind, get_db(), body) == 201


@pytest.mark.anyio
@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_a_stream_on_sqlite_goes_on_after_each_batch(kind: Kind, end: str) -> None:
    """A stream on SQLite can be read beyond a COMMIT or ROLLBACK, as in SQLite itself."""
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
    """Stream the stored names from a session of the handle."""

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
    """A stream that uses the handle reads what the request has committed before it."""
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
    """Generator endpoints and server-sent events can read what is stored with the handle."""
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
    """A background task reads the committed row, and stores another in its own transaction."""
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
    """The background task of a response runs after the commit, and not if the commit fails."""
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
    """A cursor that the server has closed is not closed again.

    That would fail and abort the transaction. The name of pg8000's cursor is its `ident`.
    """
    closed: list[str] = []
    engine = create_engine(postgres.url("psycopg"))
    with engine.connect() as connection:
        engine.dialect.driver = "pg8000"
        monkeypatch.setattr(results, "status_of", lambda _connection: None)  # it is unknown
        connection.execute(text("DECLARE there CURSOR FOR SELECT 1"))
        for name in "there", "gone":
            cursor = SimpleNamespace(ident=name, close=partial(closed.append, name))
            context: Any = SimpleNamespace(root_connection=connection, cursor=cursor)
            results.close_cursor(context)
    engine.dispose()
    assert closed == ["there"]
