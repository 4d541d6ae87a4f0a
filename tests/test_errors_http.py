"""`http_errors` around a block, `install_error_handlers` around an application, and OpenAPI."""

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any

import anyio
import anyio.from_thread
import pytest
import starlette
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    FastAPI,
    HTTPException,
    Request,
    WebSocket,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from sqlalchemy import Engine, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, NoResultFound, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Route
from starlette.testclient import TestClient

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    DatabaseErrorKind,
    ErrorRule,
    _unit_of_work,
    error_responses,
    get_database_handle,
    get_db,
    http_errors,
    install_database,
    install_error_handlers,
    map_database_error,
    reader,
    transactional,
)
from fastapi_sqlnative.cancellation import deadline
from fastapi_sqlnative.errors._rules import ErrorMapping, ErrorRules
from fastapi_sqlnative.exceptions import ApplicationAlreadyStartedError, CommitOutcomeUnknownError
from tests.conftest import MakeEngine, asynchronous
from tests.in_process import run_in_transaction, running
from tests.proxy import Fault, Proxy
from tests.serving import KINDS, Item, Kind, Rows, add, items, route, using, validate_openapi

UNIQUE_NAME = "item_name_key"
PROBLEM = "application/problem+json"
Work = Callable[[Session], Any]


def make_app(engine: Engine | AsyncEngine, **handlers: Any) -> FastAPI:
    """Build an application with one database, and error handlers unless `handlers` is False."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    if handlers.pop("handlers", True):
        install_error_handlers(app, **handlers)
    return app


def call(app: FastAPI, kind: Kind, body: Work, dependency: Any = None) -> Any:
    """Run a body in a new route and return the response."""
    route(app, kind, "/", dependency or transactional(), body)
    with TestClient(app, raise_server_exceptions=False) as client:
        return client.post("/")


def add_and_flush(session: Session) -> None:
    session.add(Item(name="a"))
    session.flush()


# --- http_errors --------------------------------------------------------------------------------


def test_a_block_answers_in_the_applications_words(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A failure in a block becomes an HTTPException with the block's message and that cause."""
    rows.add("a")
    causes: list[BaseException | None] = []

    def body(session: Session) -> None:
        try:
            with http_errors(unique="Taken."):
                add_and_flush(session)
        except HTTPException as error:
            causes.append(error.__cause__)
            raise

    response = call(make_app(engine, handlers=False), kind, body)
    assert (response.status_code, response.json()) == (409, {"detail": "Taken."})
    assert isinstance(causes[0], IntegrityError)


def test_a_block_lets_everything_else_through(kind: Kind, engine: Engine) -> None:
    """An error that is no database failure leaves the block as the same, unchanged object."""
    mistake = LookupError()

    def body(_session: Session) -> None:
        with pytest.raises(LookupError) as raised, http_errors(unique="Taken."):
            raise mistake
        assert raised.value is mistake
        assert mistake.__context__ is None
        raise mistake

    app = make_app(engine, handlers=False)
    app.add_exception_handler(LookupError, lambda *_: JSONResponse(None, 418))
    assert call(app, kind, body).status_code == 418


class TakenError(Exception):
    """An application's own error."""


def test_an_error_that_the_application_has_made_of_one_is_its_own(
    kind: Kind, engine: Engine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A block's exception raised `from` a failure reaches the application's handler unmapped."""
    rows.add("a")

    def body(session: Session) -> None:
        with http_errors(unique="Nobody reads this."):
            try:
                add_and_flush(session)
            except IntegrityError as error:
                raise TakenError from error

    app = make_app(engine)
    app.add_exception_handler(TakenError, lambda *_: JSONResponse("taken", 418))
    assert call(app, kind, body).json() == "taken"
    assert caplog.records == []


Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]


def test_a_task_group_with_one_failure_is_answered(postgres: WorkerPostgres, rows: Rows) -> None:
    """A group with one failure is answered like that failure, in a block and app-wide.

    A group with two errors stays a group.
    """
    rows.add("a")
    app = make_app(create_async_engine(postgres.url("psycopg")))

    async def add_a(database: AsyncDatabase) -> None:
        async with asyncio.TaskGroup() as tasks, database.transaction() as session:
            await tasks.create_task(session.run_sync(add_and_flush))

    @app.post("/block")
    async def block(database: Handle) -> None:
        with http_errors(unique="Taken."):
            await add_a(database)

    @app.post("/app")
    async def everywhere(database: Handle) -> None:
        await add_a(database)

    @app.post("/two")
    async def two() -> None:
        raise ExceptionGroup("tasks", [DBAPIError("", None, Exception()), LookupError()])

    groups_are_answered = starlette.__version__ >= "0.46"
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/block").json() == {"detail": "Taken."}
        assert client.post("/app").status_code == (409 if groups_are_answered else 500)
        assert client.post("/two").status_code == 500


def test_a_block_can_stand_where_it_is_imported() -> None:
    """`http_errors` without a session keeps no state, so one object serves many blocks at once."""
    block = http_errors(unique="Taken.")
    with block, block:
        pass
    with pytest.raises(ValueError, match="inner"), block, block:
        raise ValueError("inner")


def in_a_savepoint(session: Session, work: Work, **rules: Any) -> None:
    with http_errors(session, **rules):
        work(session)


def test_an_addition_fails_at_the_end_of_its_block(kind: Kind, engine: Engine, rows: Rows) -> None:
    """An object that a block adds fails at the block's end, without a flush, and not at COMMIT."""
    rows.add("a")
    reached: list[str] = []

    def body(session: Session) -> None:
        in_a_savepoint(session, add("a"), unique="Taken.")
        reached.append("the line after it")

    response = call(make_app(engine, handlers=False), kind, body)
    assert (response.status_code, response.json()) == (409, {"detail": "Taken."})
    assert reached == []


@pytest.mark.parametrize("failing", [add("a"), add_and_flush], ids=["at-the-end", "inside"])
def test_a_transaction_goes_on_after_a_block_that_failed(
    kind: Kind, engine: Engine, rows: Rows, failing: Work
) -> None:
    """The savepoint undoes what a failed block did, and the rest of the request is stored."""
    rows.add("a")

    def body(session: Session) -> None:
        session.add(Item(name="before"))
        with pytest.raises(HTTPException):
            in_a_savepoint(session, failing, unique="Taken.")
        in_a_savepoint(session, add("in another block"))
        session.add(Item(name="behind"))

    assert call(make_app(engine, handlers=False), kind, body).status_code == 201
    assert rows.names == ["a", "before", "behind", "in another block"]


def test_a_block_is_not_blamed_for_what_was_added_before(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """Changes that are pending when a block begins fail with the default message."""
    rows.add("a")

    def body(session: Session) -> None:
        session.add(Item(name="a"))
        in_a_savepoint(session, add("b"), unique="The name b is taken.")

    response = call(make_app(engine, handlers=False), kind, body)
    assert (response.status_code, response.json()["detail"]) == (
        409,
        "This conflicts with something that exists.",
    )


def of(colour: bool) -> pytest.MarkDecorator:
    kinds = [kind for kind in KINDS if kind.asynchronous == colour]
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.id)


@of(True)
def test_a_block_of_an_async_session_is_async(kind: Kind, engine: AsyncEngine, rows: Rows) -> None:
    """For an AsyncSession, `async with` flushes, maps and goes on, as `with` does for a Session."""
    rows.add("a")
    app = make_app(engine, handlers=False)

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(transactional())]) -> str:
        with pytest.raises(HTTPException, match="Taken"):
            async with http_errors(session, unique="Taken."):
                session.add(Item(name="a"))
        async with http_errors(session):
            session.add(Item(name="b"))
        return "done"

    @app.post("/before")
    async def added_before(session: Annotated[AsyncSession, Depends(transactional())]) -> None:
        session.add(Item(name="a"))
        async with http_errors(session, unique="The name b is taken."):
            session.add(Item(name="b"))

    with TestClient(app) as client:
        assert client.post("/").json() == "done"
        response = client.post("/before")
    assert (response.status_code, "This conflicts" in response.text) == (409, True)
    assert rows.names == ["a", "b"]


@pytest.mark.anyio
@of(True)
async def test_a_block_of_the_other_colour_is_refused(kind: Kind, engine: AsyncEngine) -> None:
    """`with` an AsyncSession, `async with` a Session and any other object raise TypeError."""
    session = AsyncSession(engine)
    with pytest.raises(TypeError, match="context manager"), http_errors(session):  # type: ignore[attr-defined] # what is tested
        pass
    with pytest.raises(TypeError, match="context manager"):
        async with http_errors(Session()):  # type: ignore[attr-defined] # what is tested
            pass
    not_a_session: Any = engine
    with pytest.raises(TypeError, match="Session or an AsyncSession"):
        http_errors(not_a_session)


# --- app-wide -----------------------------------------------------------------------------------


@pytest.mark.driver_decides
def test_a_failed_commit_is_answered(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A deferred constraint that fails at COMMIT is answered like an immediate constraint."""
    rows.add("a", position=1)
    response = call(make_app(engine), kind, add("b", position=1))
    assert response.status_code == 409
    assert rows.names == ["a"]


@of(True)
def test_a_connection_that_asyncpg_cannot_make_is_a_503(
    kind: Kind, make_engine: MakeEngine
) -> None:
    """A bare OSError of a driver that cannot connect is a 503 like other connection errors."""
    engine = make_engine(connect_args={"host": "127.0.0.1", "port": 1})
    response = call(make_app(engine), kind, lambda session: session.execute(select(items)))
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


@of(True)
def test_a_failure_in_a_stream_from_the_server_is_answered(kind: Kind, engine: AsyncEngine) -> None:
    """An asyncpg error that SQLAlchemy does not wrap while it fetches rows is answered too."""
    app = make_app(engine)

    @app.get("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db())]) -> None:
        stream = await session.stream(
            text("SELECT 100 / (5000 - n) FROM generate_series(1, 9999) n")
        )
        async for _ in stream:
            pass

    with TestClient(app) as client:
        response = client.get("/")
    assert (response.status_code, list(response.json())) == (500, ["detail"])


def test_a_forgotten_commit_is_a_500(
    kind: Kind, engine: Engine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """The package's own errors are answered and logged, and only the log says how to fix them."""
    response = call(make_app(engine), kind, add("b"), get_db())
    assert (response.status_code, "get_db" in response.text) == (500, False)
    assert "get_db" in caplog.text


def test_a_swallowed_failure_is_a_500_and_no_conflict(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A swallowed failure is answered as the nearest error, not as the ignored conflict."""
    rows.add("a")

    def body(session: Session) -> None:
        session.execute(insert(items).values(name="lost"))
        with contextlib.suppress(IntegrityError):
            session.execute(insert(items).values(name="a"))

    assert call(make_app(engine), kind, body).status_code == 500


@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.ANSWER_LOST], ids=lambda fault: fault.name)
def test_an_unknown_outcome_tells_nobody_to_repeat(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows, fault: Fault
) -> None:
    """A connection that is lost during COMMIT is a 500 without Retry-After, stored or not."""
    proxy.fault = fault
    response = call(make_app(behind_proxy), kind, add("a"))
    assert (response.status_code, "retry-after" in response.headers) == (500, False)
    assert "may or may not" in response.json()["detail"]


PASSING = "RAISE EXCEPTION 'in the way' USING ERRCODE = "


REFUSING = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE 'not now' USING ERRCODE = NEW.name; END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse()
"""


def add_and_commit(session: Session) -> None:
    session.add(Item(name="40001"))
    session.commit()


def add_over_connection(session: Session) -> None:
    session.connection().execute(items.insert().values(name="40001"))


@pytest.mark.parametrize(
    ("dependency", "body"),
    [
        (transactional(), add("40001")),
        (transactional(), add_over_connection),
        (get_db(), add_and_commit),
    ],
    ids=["transactional", "over the connection", "own commit"],
)
def test_a_refused_commit_may_be_repeated(
    kind: Kind, engine: Engine, rows: Rows, dependency: Any, body: Any
) -> None:
    """A transient failure that refuses a COMMIT stays a 503, because nothing was stored."""
    rows.connection.execute(REFUSING)
    try:
        response = call(make_app(engine), kind, body, dependency)
    finally:
        rows.connection.execute("DROP FUNCTION refuse CASCADE")
    assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
    assert rows.names == []


def test_a_refused_second_commit_tells_nobody_to_repeat(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A transient failure that refuses a COMMIT is a 500 if the session has committed before."""

    def body(session: Session) -> None:
        session.execute(insert(items).values(name="a"))
        session.commit()
        rows.connection.execute(REFUSING)
        session.execute(insert(items).values(name="40001"))

    try:
        response = call(make_app(engine), kind, body)
    finally:
        rows.connection.execute("DROP FUNCTION refuse CASCADE")
    assert (response.status_code, "retry-after" in response.headers) == (500, False)
    assert rows.names == ["a"]


# Handlers and blocks use the same function to find out whether something is stored.
@pytest.mark.parametrize(
    ("mapped", "autocommit"),
    [("handlers", False), ("handlers", True), ("block", False)],
    ids=["commit", "AUTOCOMMIT", "commit, block"],
)
@pytest.mark.parametrize("failure", ["lost", "40001", "55P03", "57014"])
def test_what_fails_after_something_is_stored_tells_nobody_to_repeat(
    kind: Kind, make_engine: MakeEngine, rows: Rows, autocommit: bool, failure: str, mapped: str
) -> None:
    """A transient failure is a 500 without Retry-After if a retry would store something twice."""

    def fail(session: Session) -> None:
        if failure == "lost":
            rows.lose(session)
        session.execute(text(f"DO $$BEGIN {PASSING}'{failure}'; END$$"))

    def body(session: Session) -> None:
        session.execute(insert(items).values(name="a"))
        if not autocommit:
            session.commit()
        with contextlib.nullcontext() if mapped == "handlers" else http_errors():
            fail(session)

    engine = make_engine(isolation_level="AUTOCOMMIT") if autocommit else make_engine()
    response = call(make_app(engine, handlers=mapped == "handlers"), kind, body, get_db())
    assert (response.status_code, "retry-after" in response.headers) == (500, False)
    assert "may or may not" in response.json()["detail"]
    assert rows.names == ["a"]


@pytest.mark.parametrize("end", ["release", "rollback", "raw"])
def test_a_block_that_fails_outside_the_session_after_a_commit_tells_nobody_to_repeat(
    kind: Kind, engine: Engine, rows: Rows, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """A connection lost at the end of a block's savepoint is a 500 if something is stored.

    The same is true of a statement on the session's connection. The log names the database.
    """

    def body(session: Session) -> None:
        session.execute(insert(items).values(name="a"))
        session.commit()
        with http_errors(session):
            connection = session.connection()
            rows.lose(session)
            if end == "raw":
                connection.execute(text("SELECT 1"))
            if end == "rollback":
                raise HTTPException(409)

    response = call(make_app(engine, handlers=False), kind, body, get_db())
    assert (response.status_code, "retry-after" in response.headers) == (500, False)
    assert "may or may not" in response.json()["detail"]
    assert "A failure of database 'default' (unavailable" in caplog.text
    assert rows.names == ["a"]


@pytest.mark.parametrize(
    "grouped",
    [
        pytest.param(False, id="alone"),
        pytest.param(
            True,
            id="group",
            marks=pytest.mark.skipif(
                starlette.__version__ < "0.46", reason="this Starlette answers no groups"
            ),
        ),
    ],
)
def test_a_handles_failure_after_the_requests_commit_tells_nobody_to_repeat(
    kind: Kind, make_engine: MakeEngine, rows: Rows, grouped: bool
) -> None:
    """A handle's failure after the request's own commit is a 500 without Retry-After."""
    engine = make_engine()
    app = make_app(engine)

    def store(session: Session) -> None:
        session.execute(insert(items).values(name="a"))
        session.commit()

    def fail(session: Session) -> None:
        session.execute(text(f"DO $$BEGIN {PASSING}'55P03'; END$$"))

    @app.post("/", dependencies=[Depends(using(kind, Depends(get_db()), store))])
    async def endpoint() -> None:
        if not grouped:
            await run_in_transaction(engine, fail)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run_in_transaction(engine, fail))

    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.post("/")
    assert (response.status_code, "retry-after" in response.headers) == (500, False)
    assert "may or may not" in response.json()["detail"]
    assert rows.names == ["a"]


@pytest.mark.anyio
@asynchronous
async def test_no_place_in_the_gate_after_a_commit_tells_nobody_to_repeat(
    kind: Kind, make_engine: MakeEngine, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that gets no place in the gate after a commit is a 500 without Retry-After.

    A client must not repeat what a dependency has stored before its request waits for a place
    again.
    """
    monkeypatch.setattr(_unit_of_work, "_IDLE", 0)
    # Enough for one request at a time that needs two connections.
    app = make_app(make_engine(pool_size=2, max_overflow=0, pool_timeout=0.3))
    stored, taken, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def store(session: Annotated[AsyncSession, Depends(get_db())]) -> None:
        session.add(Item(name="a"))
        await session.commit()
        stored.set()
        await taken.wait()

    @app.get("/hold", dependencies=[Depends(reader())])
    async def hold(session: Annotated[AsyncSession, Depends(get_db())]) -> None:
        await session.execute(text("SELECT 1"))
        taken.set()
        await answered.wait()

    @app.post("/", dependencies=[Depends(store), Depends(reader())])
    async def late() -> None: ...

    async with running(app) as client, asyncio.timeout(30):
        asking = asyncio.create_task(client.post("/"))
        await stored.wait()
        holding = asyncio.create_task(client.get("/hold"))
        response = await asking
        answered.set()
        assert (await holding).status_code == 200
    assert (response.status_code, "retry-after" in response.headers) == (500, False)
    assert "may or may not" in response.json()["detail"]
    assert rows.names == ["a"]


@pytest.mark.parametrize(
    ("statement", "status"),
    [("INSERT INTO item (name) VALUES ('a') /* COMMIT */", 500), ("SELECT 1 /* COMMIT */", 503)],
    ids=["write", "read"],
)
# Not asyncpg, which sends the text that triggers the proxy before it executes the statement.
@pytest.mark.parametrize("kind", KINDS[::2], indirect=True, ids=lambda kind: kind.id)
def test_a_lost_answer_in_autocommit_tells_nobody_to_repeat_a_write(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows, statement: str, status: int
) -> None:
    """In AUTOCOMMIT, a lost answer is a 500 for a write, which is stored, and a 503 for a read."""
    autocommit = behind_proxy.execution_options(isolation_level="AUTOCOMMIT")

    def body(session: Session) -> None:
        session.execute(text("SELECT 1")).close()
        proxy.fault = Fault.ANSWER_LOST
        session.execute(text(statement)).close()

    response = call(make_app(autocommit), kind, body, get_db())
    assert (response.status_code, "retry-after" in response.headers) == (status, status == 503)
    assert rows.names == ["a"] * (status == 500)


def test_a_refused_write_in_autocommit_may_be_repeated(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """A transient failure of a write in AUTOCOMMIT stays a 503, because nothing was stored."""

    def body(session: Session) -> None:
        session.execute(text("SET lock_timeout = 1"))
        session.execute(insert(items).values(name="a"))

    app = make_app(make_engine(isolation_level="AUTOCOMMIT"))
    with rows.connection.transaction(force_rollback=True):
        rows.add("a")
        response = call(app, kind, body, get_db())
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    assert rows.names == []


def test_a_partial_commit_tells_nobody_to_repeat(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """A partial commit is a 500 without Retry-After, although the second COMMIT had a conflict."""
    second_rows.add("a", position=1)
    app = make_app(make_engine())
    second = make_engine(second=True)
    install_database(app, name="second", engine=second, shutdown=second.dispose)

    @app.post("/")
    async def endpoint(
        first: Annotated[Any, Depends(transactional())],
        other: Annotated[Any, Depends(transactional("second"))],
    ) -> None:
        first.add(Item(name="a"))
        other.add(Item(name="b", position=1))

    with TestClient(app) as client:
        response = client.post("/")
    assert (response.status_code, "retry-after" in response.headers) == (500, False)
    assert "part" in response.json()["detail"]
    assert (rows.names, second_rows.names) == (["a"], ["a"])


@pytest.mark.parametrize("error", [OSError("disk"), NoResultFound("bug")], ids=repr)
def test_what_is_no_failure_is_raised_again(
    kind: Kind, engine: Engine, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """An application's OSError, or a bug, reaches the server as the same object, unlogged."""

    def body(_session: Session) -> None:
        raise error

    app = make_app(engine)
    route(app, kind, "/", transactional(), body)
    with TestClient(app) as client, pytest.raises(type(error)) as raised:
        client.post("/")
    assert raised.value is error
    assert caplog.records == []


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_handlers_of_the_application_stay(
    kind: Kind, engine: Engine, rows: Rows, first: bool
) -> None:
    """The application's handler for the same or a more specific class wins, whenever added."""
    rows.add("a")
    app = make_app(engine, handlers=False)

    async def own(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(type(error).__name__, 418)

    def add_own() -> None:
        app.add_exception_handler(IntegrityError, own)
        app.add_exception_handler(CommitOutcomeUnknownError, own)
        app.add_exception_handler(SQLAlchemyError, functools.partial(own))

    if first:
        add_own()
    install_error_handlers(app)
    if not first:
        add_own()

    def miss(_session: Session) -> None:
        raise NoResultFound

    def lose(_session: Session) -> None:
        raise CommitOutcomeUnknownError

    route(app, kind, "/lose", transactional(), lose)
    route(app, kind, "/add", transactional(), add_and_flush)
    route(app, kind, "/miss", transactional(), miss)
    with TestClient(app) as client:
        assert client.post("/miss").json() == "NoResultFound"
        assert client.post("/lose").json() == "CommitOutcomeUnknownError"
        assert client.post("/add").json() == "IntegrityError"


@pytest.mark.parametrize("key", [409, HTTPException], ids=["status", "class"])
def test_failures_look_like_the_applications_other_errors(
    kind: Kind, engine: Engine, rows: Rows, key: Any
) -> None:
    """The application's own handler of HTTPExceptions formats database failures as well."""
    rows.add("a")
    app = make_app(engine)

    @app.exception_handler(key)
    def worded(_request: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": {"message": error.detail}}, error.status_code)

    assert call(app, kind, add_and_flush).json() == {
        "error": {"message": "This conflicts with something that exists."}
    }


@of(True)
def test_a_websocket_is_left_alone(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A failure in a websocket, which has no response, is raised as if there were no handlers."""
    rows.add("a")
    app = make_app(engine)

    @app.websocket("/")
    async def endpoint(
        socket: WebSocket, session: Annotated[AsyncSession, Depends(transactional())]
    ) -> None:
        await socket.accept()
        await session.run_sync(add_and_flush)

    with (
        TestClient(app) as client,
        pytest.raises(IntegrityError),
        client.websocket_connect("/") as ws,
    ):
        ws.receive_text()


def test_handlers_are_installed_once_and_before_the_start(kind: Kind, engine: Engine) -> None:
    """Installing the handlers twice or after the start raises an error instead of doing nothing."""
    app = make_app(engine)
    with pytest.raises(RuntimeError, match="once"):
        install_error_handlers(app)
    app = make_app(engine, handlers=False)
    with TestClient(app), pytest.raises(ApplicationAlreadyStartedError):
        install_error_handlers(app)


def test_what_fails_after_the_response_is_nobody_elses(kind: Kind, engine: Engine) -> None:
    """An OSError from a background task or a stream reaches the server unchanged."""
    app = make_app(engine)

    @app.get("/task")
    async def task(tasks: BackgroundTasks) -> None:
        tasks.add_task(open, "/nowhere/report.csv")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncGenerator[bytes]:
            yield b"one"
            raise TimeoutError

        return StreamingResponse(chunks())

    with TestClient(app) as client:
        with pytest.raises(FileNotFoundError):
            client.get("/task")
        # Older versions of Starlette wrap an error from a stream in a group.
        with pytest.raises((TimeoutError, ExceptionGroup)):
            client.get("/stream")


def mount(app: FastAPI, kind: Kind, path: str) -> FastAPI:
    """Mount an application with a route that adds a row."""
    mounted = FastAPI()
    route(mounted, kind, "/", transactional(), add_and_flush)
    app.mount(path, mounted)
    return mounted


async def plain(_request: Request) -> Response:
    raise StaleDataError


def test_mounted_applications_are_covered(kind: Kind, engine: Engine, rows: Rows) -> None:
    """One call covers the applications mounted by then at any depth, and keeps their handlers."""
    rows.add("a")
    app = make_app(engine, handlers=False)
    deep = mount(mount(app, kind, "/one"), kind, "/two")
    install_error_handlers(deep, unique="Taken in two.")
    third = mount(deep, kind, "/three")
    third.add_exception_handler(IntegrityError, lambda *_: JSONResponse("own", 418))
    app.mount("/plain", Starlette(routes=[Route("/", plain)]))  # it has no OpenAPI document
    install_error_handlers(app, problem_details=True, unique="Taken.")
    mount(app, kind, "/late")
    with TestClient(app) as client:
        assert client.post("/one/").json()["title"] == "Conflict"
        assert client.post("/one/two/").json() == {"detail": "Taken in two."}
        assert client.post("/one/two/three/").json() == "own"
        assert client.get("/plain/").json()["title"] == "Conflict"
        # Starlette's error for an exception that was already answered with a 500.
        with pytest.raises(RuntimeError, match="already started"):
            client.post("/late/")


def test_a_read_only_server_is_away_if_the_application_says_so(
    kind: Kind, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """With one option, writes that a standby refuses are answered and logged as an outage."""

    def body(session: Session) -> None:
        session.execute(text("SET TRANSACTION READ ONLY"))
        add_and_flush(session)

    app = make_app(engine, read_only=ErrorRule("Read only.", 503, retry_after=5))
    response = call(app, kind, body)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert [each.levelname for each in caplog.records] == ["WARNING"]


# --- the log ------------------------------------------------------------------------------------


def test_what_passes_is_one_line_in_the_log(
    kind: Kind, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A transient failure is one line in the log, however often it comes, without a traceback.

    The line has its kind, code, database, status and route.
    """

    def body(session: Session) -> None:
        try:
            session.execute(text("DO $$ BEGIN RAISE SQLSTATE '55P03'; END $$"))
        except DBAPIError as error:
            error.database_name = "stock"  # type: ignore[attr-defined] # the session's to set
            raise

    app = make_app(engine)
    route(app, kind, "/items/{name}", transactional(), body)
    with TestClient(app) as client:
        assert {client.post(f"/items/{n}").status_code for n in range(20)} == {503}
    (record,) = caplog.records
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert record.getMessage() == (
        "A failure of database 'stock' (lock_not_available, code 55P03) is answered with 503 "
        "on POST /items/{name}."
    )


def test_the_log_names_the_constraint(
    kind: Kind, engine: Engine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A conflict is one line of INFO in the log, with the constraint and without the value."""
    rows.add("Jane")
    app = make_app(engine)
    route(app, kind, "/", transactional(), lambda session: session.add(Item(name="Jane")))
    with TestClient(app) as client, caplog.at_level("INFO", "fastapi_sqlnative"):
        assert client.post("/").status_code == 409
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        (
            "INFO",
            "A failure of database 'default' (unique, code 23505, constraint 'item_name_key') is "
            "answered with 409 on POST /.",
        )
    ]


def test_the_log_names_the_route_in_full(
    kind: Kind, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names a route with its mount and prefixes, also if a router is included twice."""

    def fail(session: Session) -> None:
        session.execute(text("SELECT nothing"))

    app = make_app(engine)
    router, mounted = APIRouter(), make_app(engine)
    router.add_api_route("/items", using(kind, Depends(get_db()), fail), methods=["GET"])
    for prefix in "/v1", "/v2":
        app.include_router(router, prefix=prefix)
    mounted.include_router(router, prefix="/v3")
    app.mount("/mounted", mounted)
    with TestClient(app) as client:
        for path in "/v1/items", "/v2/items", "/mounted/v3/items":
            assert client.get(path).status_code == 500
            assert caplog.records[-1].getMessage().endswith(f" on GET {path}.")


BUG, READ_ONLY = "SELECT nothing", "DO $$BEGIN RAISE SQLSTATE '25006'; END$$"


@pytest.mark.parametrize(
    ("rules", "statement", "status"),
    [
        ({"other": ErrorRule("Later.", 503)}, BUG, 503),
        ({}, READ_ONLY, 500),
    ],
)
def test_what_a_developer_must_see_is_an_error_in_the_log(
    kind: Kind,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
    rules: dict[str, Any],
    statement: str,
    status: int,
) -> None:
    """A bug, whatever its status, and any 500 are logged with a traceback each time."""
    app = make_app(engine, **rules)
    route(app, kind, "/", transactional(), lambda session: session.execute(text(statement)))
    with TestClient(app, raise_server_exceptions=False) as client:
        assert {client.post("/").status_code for _ in range(3)} == {status}
    assert [each.levelname for each in caplog.records] == ["ERROR"] * 3
    assert all(each.exc_info for each in caplog.records)


def test_repeats_are_told_at_the_end_of_their_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the window, the number of repeats is logged once and logging starts anew."""
    due: list[Callable[[], None]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        later = lambda _delay, run, *args: due.append(lambda: run(*args))  # noqa: E731 - a fake
        monkeypatch.setattr(loop, "call_later", later)
        mapping = ErrorMapping({}, window=60)
        for _ in range(4):
            mapping.map(PoolTimeoutError())
        due.pop()()
        mapping.map(PoolTimeoutError())
        due.pop()()

    asyncio.run(main())
    first, repeats, again = [each.getMessage() for each in caplog.records]
    what = "A failure (pool_timeout) is answered with 503"
    assert first == again == f"{what}."
    assert repeats == f"{what}: 3 times more in 60s."


# --- problem details ----------------------------------------------------------------------------

E_MAIL = ErrorRule("E-mail already registered.", pointer="#/email")


@pytest.mark.parametrize("where", ["app", "route"])
def test_problem_details_name_the_field_that_the_application_has_named(
    kind: Kind, engine: Engine, rows: Rows, where: str
) -> None:
    """A constraint that is mapped to a field has a pointer, in a block and app-wide."""
    rows.add("a")
    constraints = {UNIQUE_NAME: E_MAIL}

    def body(session: Session) -> None:
        with http_errors(constraints=constraints):
            add_and_flush(session)

    on_app = constraints if where == "app" else None
    app = make_app(engine, problem_details=True, constraints=on_app)
    response = call(app, kind, add_and_flush if where == "app" else body)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {
        "type": "about:blank",
        "title": "Conflict",
        "status": 409,
        "detail": "E-mail already registered.",
        "errors": [{"detail": "E-mail already registered.", "pointer": "#/email"}],
    }


def test_problem_details_guess_no_field(kind: Kind, engine: Engine, rows: Rows) -> None:
    """Problem details have no `errors` unless the application names a field, even with metadata."""
    rows.add("a")
    app = make_app(engine, problem_details=True, metadata=Item.metadata)
    assert "errors" not in call(app, kind, add_and_flush).json()


def test_other_errors_are_no_problem_details(kind: Kind, engine: Engine) -> None:
    """An HTTPException that does not come from a database failure keeps FastAPI's format."""

    def body(_session: Session) -> None:
        raise HTTPException(404, "nowhere")

    response = call(make_app(engine, problem_details=True), kind, body)
    assert (response.headers["content-type"], response.json()) == (
        "application/json",
        {"detail": "nowhere"},
    )


class Body(BaseModel):
    tags: dict[str, int]


def problems(app: FastAPI) -> FastAPI:
    """Add routes that fail with FastAPI's own kinds of error."""

    @app.post("/invalid")
    def invalid(body: Body, page: int = 1) -> None: ...

    @app.get("/missing")
    def missing() -> None:
        raise HTTPException(404, "Nowhere.", {"X-Own": "1"})

    @app.get("/context")
    def context() -> None:
        raise HTTPException(400, {"needs": "admin"})

    @app.get("/unchanged")
    def unchanged() -> None:
        raise HTTPException(304)

    return app


def test_every_error_can_be_a_problem() -> None:
    """With `every_error`, the application's other errors use this format and keep their texts."""
    app = problems(FastAPI())
    install_error_handlers(app, problem_details=True, every_error=True)
    validate_openapi(app.openapi())
    documented = app.openapi()["paths"]["/invalid"]["post"]["responses"]["422"]
    with TestClient(app) as client:
        missing = client.get("/missing")
        assert (missing.headers["content-type"], missing.headers["x-own"]) == (PROBLEM, "1")
        assert missing.json()["detail"] == "Nowhere."
        assert client.get("/nowhere").json()["title"] == "Not Found"
        assert client.get("/context").json()["context"] == {"needs": "admin"}
        assert client.get("/unchanged").content == b""
        invalid = client.post("/invalid?page=x", json={"tags": {"a/b": "x"}})
        no_json = client.post(
            "/invalid", content=b"{", headers={"content-type": "application/json"}
        )
    assert (invalid.status_code, invalid.headers["content-type"]) == (422, PROBLEM)
    where = [each.get("pointer") or each["parameter"] for each in invalid.json()["errors"]]
    assert where == ["page", "#/tags/a~1b"]
    assert no_json.json()["errors"][0]["pointer"] == "#"
    assert list(documented["content"]) == [PROBLEM]
    assert documented["description"].startswith("Unprocessable")


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (["plain"], {"detail": "plain"}),
        ([{"loc": (), "msg": "Whole."}], {"detail": "Whole."}),
        ([{"loc": ("a", 0), "msg": "Own."}], {"detail": "Own.", "parameter": "0"}),
        ([{"loc": ("a",), "msg": "Own."}], {"detail": "Own.", "parameter": "a"}),
        ([{"loc": ("body", "a"), "msg": "Own."}], {"detail": "Own.", "pointer": "#/a"}),
        ([{"loc": ("body", "a", 0), "msg": "Own."}], {"detail": "Own.", "pointer": "#/a/0"}),
    ],
)
def test_an_invalid_request_of_the_application_s_own_is_a_problem(
    errors: list[Any], said: dict[str, str]
) -> None:
    """A RequestValidationError of the application is answered with a 422, whatever it contains."""
    app = FastAPI()
    install_error_handlers(app, problem_details=True, every_error=True)

    @app.get("/")
    def refuse() -> None:
        raise RequestValidationError(errors)

    with TestClient(app) as client:
        answer = client.get("/")
    assert (answer.status_code, answer.json()["errors"]) == (422, [said])


def test_every_error_leaves_handlers_of_the_application() -> None:
    """`every_error` leaves the application's own handlers alone and requires problem details."""
    app = problems(FastAPI())
    app.add_exception_handler(StarletteHTTPException, lambda *_: JSONResponse("own", 418))
    install_error_handlers(app, problem_details=True, every_error=True)
    with TestClient(app) as client:
        assert client.get("/missing").json() == "own"
    with pytest.raises(ValueError, match="problem_details=True"):
        install_error_handlers(FastAPI(), every_error=True)


def test_a_failure_that_is_mapped_at_a_route_is_logged_once(
    kind: Kind, engine: Engine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure is logged once, where it is mapped, although blocks and handlers surround it."""
    rows.add("a")

    def body(session: Session) -> None:
        with http_errors(), http_errors(unique="Taken."):
            try:
                add_and_flush(session)
            except IntegrityError as error:
                raise map_database_error(error) from error

    with caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        assert call(make_app(engine, problem_details=True), kind, body).status_code == 409
    assert len(caplog.records) == 1


# --- OpenAPI ------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem_details", [False, True], ids=["json", "problem"])
def test_the_document_with_error_responses_is_valid(problem_details: bool) -> None:
    """With `error_responses`, every status, media type, header and kind of 422 is valid OpenAPI."""
    app = FastAPI()

    @app.post("/", responses=error_responses(problem_details=problem_details))
    def endpoint(number: int) -> None: ...

    document = app.openapi()
    validate_openapi(document)
    responses = document["paths"]["/"]["post"]["responses"]
    assert set(responses) == {"200", "403", "409", "422", "500", "503", "504"}
    media = "application/problem+json" if problem_details else "application/json"
    assert set(responses["409"]["content"]) == {media}
    required = responses["409"]["content"][media]["schema"]["required"]
    assert required == (["type", "title", "status", "detail"] if problem_details else ["detail"])
    assert set(responses["422"]["content"]) == {media, "application/json"}
    detail = responses["422"]["content"]["application/json"]["schema"]["properties"]["detail"]
    types = [each["type"] for each in detail["anyOf"]]
    assert types == (["array"] if problem_details else ["string", "array"])
    assert "Retry-After" in responses["503"]["headers"]
    assert "headers" not in responses["409"]


@pytest.mark.parametrize("problem_details", [False, True], ids=["json", "problem"])
def test_routes_with_a_database_document_a_conflict_and_an_outage(problem_details: bool) -> None:
    """Routes with a database document a 503 and, if they write, a 409, whenever they were added.

    Their own descriptions of these statuses are kept.
    """
    app = FastAPI()
    router = APIRouter(prefix="/in", dependencies=[Depends(get_db())])

    async def through(session: Annotated[AsyncSession, Depends(transactional())]) -> None: ...

    @app.post("/early")
    def early(_: Annotated[None, Depends(through)]) -> None: ...

    install_error_handlers(app, problem_details=problem_details)

    @app.get("/without")
    def without() -> None: ...

    @app.websocket("/without")
    @app.post("/without")
    @app.post("/deep")
    def deep(_: Annotated[None, Depends(through)]) -> None: ...

    @app.get("/number")
    def number(number: int) -> None: ...

    @router.get("/reading", responses={503: {"description": "Own words."}})
    @router.post("/reading")
    def reading() -> None: ...

    app.include_router(router)
    document = app.openapi()
    validate_openapi(document)
    paths = document["paths"]
    assert set(paths["/without"]["get"]["responses"]) == {"200"}
    assert list(paths["/number"]["get"]["responses"]["422"]["content"]) == ["application/json"]
    assert set(paths["/early"]["post"]["responses"]) == {"200", "409", "503"}
    assert set(paths["/deep"]["post"]["responses"]) == {"200", "409", "503"}
    assert set(paths["/in/reading"]["get"]["responses"]) == {"200", "503"}
    assert paths["/in/reading"]["get"]["responses"]["503"]["description"] == "Own words."
    assert set(paths["/in/reading"]["post"]["responses"]) == {"200", "409", "503"}
    media = PROBLEM if problem_details else "application/json"
    assert list(paths["/deep"]["post"]["responses"]["409"]["content"]) == [media]
    assert app.openapi() == document


def test_error_responses_are_those_asked_for() -> None:
    """`error_responses` documents only the statuses of the given kinds, also of replaced rules."""
    rule = ErrorRule("Later.", 429, retry_after=3)
    found = error_responses(DatabaseErrorKind.CHECK, "unique", deadlock=rule)
    assert list(found) == [409, 422, 429]
    mixed = error_responses("unavailable", stale=ErrorRule(status=503))
    assert "Retry-After" in mixed[503]["headers"]
    with pytest.raises(TypeError, match="uniqe"):
        error_responses("uniqe")


def test_every_kind_has_a_rule_and_a_keyword() -> None:
    """Every kind has a rule in the table and a keyword in the signature."""
    for kind in DatabaseErrorKind:
        assert len(error_responses(kind)) == 1
    assert set(ErrorRules.__annotations__) == set(DatabaseErrorKind)


def test_a_handler_of_the_application_s_that_may_wait_gets_a_thread(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A `def` handler for HTTPException runs in a thread, as it does in Starlette."""
    rows.add("a")
    app = make_app(engine)
    threads: list[int] = []

    def handle(_request: Request, error: Exception) -> JSONResponse:
        threads.append(threading.get_ident())
        anyio.from_thread.run(anyio.sleep, 0)
        return JSONResponse("own", 418)

    app.add_exception_handler(HTTPException, handle)
    assert call(app, kind, add_and_flush).json() == "own"
    assert threads != []


def test_only_routes_with_a_database_document_its_failures(engine: Engine) -> None:
    """A route with only a deadline, and the application's own OpenAPI document, stay unchanged."""
    app = make_app(engine)
    app.router.dependencies.append(Depends(deadline(30)))

    @app.get("/nothing")
    def nothing() -> None: ...

    document = app.openapi()
    assert list(document["paths"]["/nothing"]["get"]["responses"]) == ["200"]
    app = FastAPI()
    app.openapi = lambda: {"paths": {"/own": {"summary": "", "post": {"operationId": "own"}}}}  # type: ignore[method-assign] # FastAPI's own way to replace it
    install_error_handlers(app, problem_details=True, every_error=True)
    app.post("/own")(nothing)
    assert app.openapi()["paths"]["/own"]["post"] == {"operationId": "own"}
