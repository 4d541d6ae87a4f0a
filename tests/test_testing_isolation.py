"""`isolated`: a test's work is undone afterwards, and the application behaves almost as usual."""

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext, suppress
from contextvars import copy_context
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Connection, Engine, StaticPool, create_engine, event, select, text
from sqlalchemy.exc import (
    IntegrityError,
    InvalidRequestError,
    PendingRollbackError,
    SQLAlchemyError,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import await_only
from starlette.responses import StreamingResponse
from starlette.routing import BaseRoute
from starlette.testclient import TestClient

from fastapi_sqlnative import (
    get_database_handle,
    get_db,
    install_database,
    installed_databases,
    reader,
    transactional,
)
from fastapi_sqlnative.exceptions import TransactionAbortedError, UncommittedChangesError
from fastapi_sqlnative.testing import (
    IsolationError,
    _turns,
    async_client,
    capture_statements,
    fail_next_checkout,
    fail_next_commit,
    fail_next_statement,
    isolated,
)
from tests.conftest import MakeEngine, asynchronous
from tests.in_process import session_class, sqlite
from tests.serving import (
    SQLITE,
    Base,
    Item,
    Kind,
    Rows,
    items,
    named,
    route,
    using,
    wait_until,
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


def instead(session: Session) -> None:
    add("again", position=1)(session)
    try:
        session.commit()
    except IntegrityError:
        session.rollback()
        add("instead")(session)
        session.commit()


def rename(session: Session) -> None:
    for item in session.scalars(select(Item)):
        item.name += "-renamed"


def swallow(session: Session) -> None:
    add("first")(session)
    session.flush()
    try:
        session.execute(text("SELECT 1/0"))
    except Exception:  # noqa: BLE001 - what the application should not do
        session.info["swallowed"] = True


@functools.cache
def routes(kind: Kind) -> list[BaseRoute]:
    """Make the routes once, because that takes longer than most of the tests."""
    app = FastAPI(openapi_url=None)
    bodies: list[tuple[str, Any, Callable[[Session], Any]]] = [
        ("/add", transactional(), add("added")),
        ("/late", transactional(), add("late", position=1)),
        ("/again", transactional(), add("again", position=1)),
        ("/fail", transactional(), fail),
        ("/rename", transactional(), rename),
        ("/explicit", get_db(), explicit),
        ("/instead", get_db(), instead),
        ("/swallow", transactional(), swallow),
        ("/forgotten", get_db(), add("forgotten")),
        ("/read-only", transactional(read_only=True), add("refused")),
        ("/read", transactional(read_only=True), names),
        ("/level", transactional(isolation_level="SERIALIZABLE"), names),
        ("/names", reader(), names),
        ("/db-names", get_db(), names),
    ]
    for path, dependency, body in bodies:
        route(app, kind, path, dependency, body)
    return app.routes


def make_app(kind: Kind, engine: Any) -> FastAPI:
    app = FastAPI(routes=routes(kind))
    install_database(app, engine=engine, shutdown=getattr(engine, "dispose", None))
    return app


@pytest.fixture
def app(kind: Kind, engine: Engine | AsyncEngine) -> FastAPI:
    return make_app(kind, engine)


@pytest.fixture(params=["running", "before"])
def block(app: FastAPI, request: pytest.FixtureRequest) -> Iterator[tuple[TestClient, Session]]:
    """Yield a client and a session, isolated while the application runs or before it starts."""
    client = TestClient(app, raise_server_exceptions=False)
    with ExitStack() as stack:
        if request.param == "running":
            stack.enter_context(client)
        session = stack.enter_context(isolated(app))
        if request.param == "before":
            stack.enter_context(client)
        yield client, session


def test_what_is_committed_is_gone_afterwards(app: FastAPI, rows: Rows) -> None:
    """A request's commit is visible to the next request, but not outside the block or after it."""
    with TestClient(app) as client:
        with isolated(app):
            assert client.post("/add").status_code == 201
            assert client.post("/names").json() == ["added"]
            assert rows.names == []
        assert client.post("/names").json() == []
        assert client.post("/add").status_code == 201
    assert rows.names == ["added"]


def test_requests_do_what_they_always_do(block: tuple[TestClient, Session], rows: Rows) -> None:
    """Commits, rollbacks, savepoints, errors and constraints at COMMIT work as usual."""
    client, _ = block
    assert client.post("/explicit").status_code == 201
    assert client.post("/add").status_code == 201
    assert client.post("/add").status_code == 500  # the name is unique
    assert client.post("/fail").status_code == 409
    assert client.post("/late").status_code == 201
    assert client.post("/again").status_code == 500  # the position is unique at COMMIT
    assert client.post("/read-only").status_code == 500
    for path in "/level", "/read":
        assert client.post(path).json() == ["added", "kept", "late", "nested"]
    for path in "/names", "/db-names":
        assert client.post(path).json() == ["added", "kept", "late", "nested"]
    assert rows.names == []


@pytest.mark.parametrize("around", [isolated, nullcontext])
def test_a_refused_commit_is_not_lost(app: FastAPI, rows: Rows, around: Any) -> None:
    """A loss planned after COMMIT does not happen if a deferred constraint fails the COMMIT."""
    with TestClient(app) as client, around(app):
        assert client.post("/late").status_code == 201
        with pytest.raises(IntegrityError), fail_next_commit(app, "connection_lost_after"):
            client.post("/again")
        assert client.post("/names").json() == ["late"]


@pytest.mark.parametrize("around", [isolated, nullcontext])
def test_a_commit_after_a_failed_read(app: FastAPI, kind: Kind, rows: Rows, around: Any) -> None:
    """A commit after a failed read stores nothing and succeeds, inside a block and outside."""

    def read(session: Session) -> None:
        with suppress(SQLAlchemyError):
            session.execute(text("SELECT 1/0"))
        session.commit()

    route(app, kind, "/read-and-commit", get_db(), read)
    with TestClient(app) as client, around(app):
        assert client.post("/read-and-commit").status_code == 201
        assert client.post("/names").json() == []


def test_a_handler_that_rolls_back_after_a_refused_commit(
    block: tuple[TestClient, Session], rows: Rows
) -> None:
    """A handler that rolls back a failed commit continues as in production, without a warning.

    What was stored before remains.
    """
    client, _ = block
    assert client.post("/late").status_code == 201
    assert client.post("/instead").status_code == 201
    assert client.post("/names").json() == ["instead", "late"]
    assert rows.names == []


@pytest.mark.skipif(
    "execution_options" not in inspect.signature(Session).parameters,
    reason="SQLAlchemy 2.1 and later",
)
def test_options_of_the_applications_sessions(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """Execution options that a transaction begins with are ignored, like its isolation level."""
    app, engine = FastAPI(), make_engine()
    given = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": False}
    options = {"execution_options": given}
    install_database(app, engine=engine, shutdown=engine.dispose, session_options=options)
    route(app, kind, "/add", transactional(isolation_level="SERIALIZABLE"), add("added"))
    route(app, kind, "/read", transactional(read_only=True), names)
    with TestClient(app) as client, isolated(app) as session:
        session.add(Item(name="mine"))
        assert client.post("/add").status_code == 201
        assert client.post("/read").json() == names(session) == ["added", "mine"]
    assert rows.names == []


def test_a_transaction_that_sets_its_own_level(app: FastAPI, kind: Kind, rows: Rows) -> None:
    """An isolation level from session.connection() is ignored, but AUTOCOMMIT raises an error.

    SQLAlchemy's documentation sets a level in this way.
    """

    def serializable(session: Session, name: str = "added") -> None:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        add(name)(session)

    def autocommit(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})

    route(app, kind, "/serializable", transactional(), serializable)
    route(app, kind, "/autocommit", get_db(), autocommit)
    with TestClient(app) as client, isolated(app) as session:
        assert client.post("/serializable").status_code == 201
        with pytest.raises(InvalidRequestError, match="isolation_level may not be altered"):
            client.post("/autocommit")
        serializable(session, "mine")
        assert names(session) == ["added", "mine"]
    assert rows.names == []


def test_each_transaction_has_its_own_execution_options(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """A request's execution options end with it, and an engine's apply to its name only.

    Both are as in production. Options for streaming are ignored, because SQLAlchemy would
    stream savepoints as well, which no driver can do.
    """
    app, engine = FastAPI(), make_engine()
    elsewhere: Any = {"schema_translate_map": {None: "elsewhere"}, "max_row_buffer": 7}
    elsewhere |= {"stream_results": True, "yield_per": 2}

    def set_options(session: Session) -> int:
        connection = session.connection(execution_options=elsewhere)
        assert session.connection() is connection
        return len(connection.get_execution_options())

    install_database(app, engine=engine, shutdown=engine.dispose)
    install_database(app, name="mapped", engine=engine.execution_options(**elsewhere))
    route(app, kind, "/options", get_db(), set_options)
    route(app, kind, "/names", get_db(), names)
    route(app, kind, "/reader", reader(), names)
    route(app, kind, "/readers_options", reader(), set_options)
    route(app, kind, "/mapped", get_db("mapped"), names)
    with TestClient(app) as client, isolated(app) as session:
        for path in "/names", "/reader":
            session.add(Item(name=path))
            assert client.post("/options").status_code == 201
            assert client.post("/readers_options").status_code == 201
            assert client.post(path).json() == names(session)
            with pytest.raises(SQLAlchemyError, match=r"elsewhere\.item"):
                client.post("/mapped")


def test_the_rules_hold(app: FastAPI, rows: Rows) -> None:
    """A swallowed error and a forgotten commit raise the same errors as in production."""
    with TestClient(app) as client, isolated(app):
        with pytest.raises(TransactionAbortedError):
            client.post("/swallow")
        with pytest.raises(UncommittedChangesError):
            client.post("/forgotten")
        assert client.post("/names").json() == []


def test_a_bulk_insert_after_a_failed_flush_is_not_forgotten_work(
    app: FastAPI, kind: Kind, rows: Rows
) -> None:
    """A bulk insert refused by SQLAlchemy until `rollback()` needs no commit, as in production."""

    def body(session: Session) -> None:
        session.add(Item(name="there"))
        with suppress(IntegrityError):
            session.flush()
        with pytest.raises(PendingRollbackError):
            session.bulk_insert_mappings(Item, [{"name": "late"}])

    rows.add("there")
    route(app, kind, "/bulk", get_db(), body)
    with TestClient(app) as client, isolated(app):
        assert client.post("/bulk").status_code == 201


def test_the_tests_own_session(block: tuple[TestClient, Session], rows: Rows) -> None:
    """The test's session stays open across requests, which see its changes, and it sees theirs."""
    client, session = block
    item = Item(name="mine")
    session.add(item)
    session.commit()
    session.refresh(item)  # begins another transaction
    assert client.post("/names").json() == ["mine"]
    assert client.post("/rename").status_code == 201
    assert session.get(Item, item.id) is item
    assert item.name == "mine-renamed"
    session.add(Item(name="unflushed"))
    assert client.post("/fail").status_code == 409
    assert client.post("/names").json() == ["mine-renamed", "unflushed"]
    session.rollback()  # does not undo what the requests stored
    assert names(session) == ["mine-renamed", "unflushed"]
    with pytest.raises(IntegrityError):
        session.execute(text("INSERT INTO item (name) VALUES ('unflushed')"))
    session.rollback()
    with session.begin(), session.begin_nested() as savepoint:
        session.add(Item(name="given-up"))
        savepoint.rollback()
    with session.begin():
        session.add(Item(name="begun"))
    assert client.post("/names").json() == ["begun", "mine-renamed", "unflushed"]
    assert rows.names == []


def test_a_request_after_a_savepoint_of_the_tests_own(block: tuple[TestClient, Session]) -> None:
    """The test's rollback does not undo a request, even if begin_nested() began the transaction."""
    client, session = block
    with session.begin_nested() as savepoint:
        session.add(Item(name="given-up"))
        savepoint.rollback()
    assert client.post("/explicit").status_code == 201
    session.rollback()
    assert names(session) == ["kept", "nested"]


def test_the_block_may_outlive_the_application(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """The block may outlive the application, even with a session in a transaction.

    The engine exists only while the application runs.
    """
    app = make_app(kind, make_engine)
    with isolated(app) as session:
        for use in names, add("early"):
            with pytest.raises(IsolationError, match="no engine before"):
                use(session)
        with capture_statements(app) as captured, TestClient(app) as client:
            session.add(item := Item(name="mine"))
            session.commit()
            session.refresh(item)
            captured.clear()
            assert client.post("/db-names").json() == ["mine"]
            assert [each.split()[0] for each in captured.texts[-3:]] == [
                "BEGIN",
                "SELECT",
                "ROLLBACK",
            ]
            assert names(session) == ["mine"]
        if not kind.asynchronous:
            assert names(session) == ["mine"]  # with an AsyncEngine the connection is gone
        session.close()
    assert rows.names == []


def test_a_second_run_of_the_application(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """In a second run, the test's savepoints are not mistaken for those of the first run."""
    app = make_app(kind, make_engine)
    with isolated(app) as session:
        with TestClient(app) as client:
            assert client.post("/add").status_code == 201
            assert names(session) == ["added"]  # begins a transaction
        with TestClient(app) as client:
            for name in "first", "second":
                session.add(Item(name=name))
                session.commit()
            assert {"first", "second"} <= {*client.post("/names").json()}
    assert rows.names == []


@pytest.mark.anyio
async def test_the_block_outlives_other_applications(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """The block's work remains when a client in it ends, of this application or another one."""
    app = make_app(kind, make_engine())
    async with in_block(app, kind) as session:
        session.add(Item(name="mine"))
        for each in app, app, make_app(kind, make_engine()):
            async with in_block(each, kind), async_client(each) as client:
                assert (await client.post("/add")).status_code == 201
                assert (await client.post("/names")).json() == ["added", "mine"]
    assert rows.names == []


class Executing(Session):
    """A session class with its own method, like SQLModel's `exec`."""

    def exec(self, statement: Any) -> Any:
        return super().execute(statement).scalars()


def test_sessions_of_the_applications_class(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """A session method that bypasses execute() is isolated, for `reader` and the test as well."""
    app = FastAPI()
    options = session_class(kind, Executing)
    install_database(app, engine=engine, shutdown=engine.dispose, session_options=options)
    read, write = Depends(reader()), Depends(transactional())

    def count(session: Any) -> int:
        return len(list(session.exec(select(Item))))

    async def read_async(before: Any = read, session: Any = write) -> list[int]:
        return [await each.run_sync(count) for each in (before, session, before)]

    def read_sync(before: Any = read, session: Any = write) -> list[int]:
        return [count(each) for each in (before, session, before)]

    app.get("/counts")(read_async if kind.asynchronous else read_sync)
    with TestClient(app) as client, isolated(app) as session:
        assert isinstance(session, Executing)
        session.exec(items.insert().values(name="mine").returning(items.c.id)).one()
        session.commit()
        assert client.get("/counts").json() == [1, 1, 1]
        assert session.exec(select(Item)).one().name == "mine"
    assert rows.names == []


def test_a_two_phase_transaction_has_one_phase(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """An application with two-phase sessions commits in one phase, on the single connection."""
    app = FastAPI()
    options = {"twophase": True}
    install_database(app, engine=engine, shutdown=engine.dispose, session_options=options)
    route(app, kind, "/", transactional(), add("kept"))
    with TestClient(app) as client, isolated(app) as session:
        assert client.post("/").status_code == 201
        assert names(session) == ["kept"]
    assert rows.names == []


def test_a_request_that_fails_to_begin(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """Without autobegin, only a statement outside a transaction fails, as it does in production."""
    engine = make_engine()
    app = FastAPI()
    options = {"autobegin": False}
    install_database(app, engine=engine, session_options=options, shutdown=engine.dispose)
    route(app, kind, "/", get_db(), names)
    with TestClient(app) as client, isolated(app) as session:
        with pytest.raises(InvalidRequestError, match="Autobegin is disabled"):
            client.post("/")
        with session.begin():
            assert names(session) == []


def test_the_tests_own_session_reads_in_batches(app: FastAPI, rows: Rows) -> None:
    """The test's session accepts yield_per and stream_results, also with an AsyncEngine."""
    with TestClient(app), isolated(app) as session:
        session.add_all([Item(name=f"{number}") for number in range(5)])
        assert len(list(session.query(Item).yield_per(2))) == 5
        for option in {"yield_per": 2}, {"stream_results": True}:
            assert len(list(session.execute(select(items).execution_options(**option)))) == 5


@pytest.mark.parametrize("whose", ["session", "statement"])
def test_the_tests_own_session_without_autoflush(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows, whose: str
) -> None:
    """Without autoflush, queries leave the test's changes as they are, else they load afresh."""
    app = FastAPI(routes=routes(kind))
    off = {"autoflush": False}
    options, given = (off, {}) if whose == "session" else ({}, off)
    install_database(app, engine=engine, shutdown=engine.dispose, session_options=options)
    with TestClient(app) as client, isolated(app) as session:
        session.add(item := Item(name="mine"))
        session.commit()
        session.refresh(item)
        assert client.post("/rename").status_code == 201
        assert session.scalars(select(Item)).one().name == "mine-renamed"
        item.name = "changed"
        assert session.scalars(select(Item), execution_options=given).one() is item
        assert session.get(Item, item.id, execution_options=given) is item
        session.commit()
        assert client.post("/names").json() == ["changed"]
    assert rows.names == []


def test_sessions_of_two_blocks_that_take_turns(app: FastAPI, rows: Rows) -> None:
    """A session's commit includes what another block's session began inside its transaction."""
    with TestClient(app), isolated(app) as outer, isolated(app) as inner:
        inner.add(Item(name="around"))
        inner.flush()
        outer.add(Item(name="inside"))
        outer.flush()
        inner.commit()
        outer.commit()
        assert names(outer) == names(inner) == ["around", "inside"]
        assert isinstance(inner.bind, Engine)
    assert rows.names == []


class Auditing(Session):
    """A session class with a listener that looks at the stored rows before each flush."""


@event.listens_for(Auditing, "before_flush")
def audit(session: Session, *_: object) -> None:
    session.scalars(select(Item)).all()


def test_a_listener_that_queries_before_a_flush(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """The test's changes are stored even if a `before_flush` listener queries the same rows."""
    app = FastAPI(routes=routes(kind))
    options = session_class(kind, Auditing)
    install_database(app, engine=engine, shutdown=engine.dispose, session_options=options)
    with TestClient(app) as client, isolated(app) as session:
        session.add(item := Item(name="mine"))
        session.commit()
        item.name = "flushed"
        assert names(session) == ["flushed"]
        item.name = "committed"
        session.commit()
        item.name = "changed"
        assert client.post("/names").json() == ["changed"]
    assert rows.names == []


@asynchronous
@pytest.mark.anyio
async def test_the_tests_own_asynchronous_session(app: FastAPI, rows: Rows) -> None:
    """On the event loop, objects loaded by the test's own session need no reload."""
    async with async_client(app) as client, isolated(app) as session:
        item = Item(name="mine")
        session.add(item)
        await session.commit()
        await session.refresh(item)
        assert (await client.post("/rename")).status_code == 201
        assert item.name == "mine"
        assert await session.get(Item, item.id) is item
        assert item.name == "mine-renamed"
        assert (await client.post("/rename")).status_code == 201
        assert list(await session.scalars(select(Item))) == [item]
        assert item.name == "mine-renamed-renamed"
        assert (await client.post("/explicit")).status_code == 201
        found = await session.scalars(select(Item.name).order_by(Item.name))
        assert list(found) == ["kept", "mine-renamed-renamed", "nested"]
    assert rows.names == []


@asynchronous
@pytest.mark.anyio
async def test_whoever_looks_at_the_bind_sends_nothing(app: FastAPI) -> None:
    """Session.bind and get_bind() have the dialect and send nothing.

    This holds for the test's session and for a request's.
    """

    def dialects(session: Any) -> list[str]:
        return [session.bind.dialect.name, session.get_bind().dialect.name]

    @app.get("/dialects")
    async def look(session: Annotated[Any, Depends(get_db())]) -> list[str]:
        return dialects(session)

    async with async_client(app) as client, isolated(app) as session:
        with capture_statements(app) as statements:
            assert dialects(session) == ["postgresql"] * 2
            assert (await client.get("/dialects")).json() == ["postgresql"] * 2
        assert statements == []


@asynchronous
def test_the_synchronous_session_is_refused_on_the_applications_loop(app: FastAPI) -> None:
    """The test's synchronous session raises IsolationError on the application's event loop.

    In an override of get_db() or in portal.call(), it would wait for itself.
    """
    with TestClient(app) as client, isolated(app) as session:

        async def on_the_loop() -> list[str]:
            return names(session)

        app.get("/overridden")(using_session)
        app.dependency_overrides[get_db()] = lambda: session
        with pytest.raises(IsolationError, match="would wait for itself"):
            client.get("/overridden")
        assert client.portal is not None
        with pytest.raises(IsolationError, match="would wait for itself"):
            client.portal.call(on_the_loop)
        assert names(session) == []
        session.add(item := Item(name="mine"))
        session.commit()
        app.get("/item")(show_item)
        app.dependency_overrides[current_item] = lambda: item
        with pytest.raises(IsolationError, match="objects from the request's session"):
            client.get("/item")


def current_item() -> Item:
    raise NotImplementedError


async def show_item(item: Annotated[Any, Depends(current_item)]) -> str:
    name: str = item.name
    return name


async def using_session(session: Annotated[Any, Depends(get_db())]) -> list[str]:
    return names(session)


@pytest.mark.anyio
async def test_the_session_works_without_a_running_application(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """The session works without a running application, and the block closes its connection.

    There is no shutdown to close it.
    """
    app = FastAPI()
    engine = make_engine(connect_args=named(kind.driver, "isolated"))
    install_database(app, engine=engine, shutdown=engine.dispose)
    if kind.asynchronous:
        async with isolated(app) as session:
            session.add(Item(name="mine"))
            assert await session.run_sync(names) == ["mine"]
    else:
        with isolated(app) as own:
            own.add(Item(name="mine"))
            assert names(own) == ["mine"]
    wait_until(lambda: rows.backends(application="isolated") == 0)
    assert rows.names == []


@pytest.mark.anyio
async def test_the_wrong_word_is_refused(app: FastAPI, kind: Kind) -> None:
    """The wrong one of `with` and `async with` raises an error that names the other.

    `async with` returns an AsyncSession, and `with` cannot await the end of one.
    """
    if kind.asynchronous:
        with pytest.raises(RuntimeError, match="async with"):
            isolated(app).__enter__()
    else:
        with pytest.raises(TypeError, match="`with isolated"):
            await isolated(app).__aenter__()
        async with async_client(app) as client:
            with isolated(app) as session:
                session.add(Item(name="mine"))
                assert (await client.post("/names")).json() == ["mine"]


def test_blocks_within_blocks(app: FastAPI, rows: Rows) -> None:
    """An inner block undoes its own work and keeps the outer block's."""
    with TestClient(app) as client, isolated(app) as outer:
        outer.add(Item(name="module"))
        for _ in range(2):
            with isolated(app) as inner:
                inner.add(Item(name="test"))
                assert client.post("/add").status_code == 201
                assert client.post("/names").json() == ["added", "module", "test"]
            assert client.post("/names").json() == ["module"]
    assert rows.names == []


@pytest.mark.anyio
async def test_the_tests_own_commit_checks_deferred_constraints(
    app: FastAPI, kind: Kind, rows: Rows
) -> None:
    """The test's commit checks deferred constraints, as the application's commit does.

    The release of a savepoint does not, and a failed check keeps what was stored before.
    """

    def twice(session: Session) -> None:
        with session.begin_nested():
            add("second", position=1)(session)
        assert names(session) == ["first", "second"]
        with pytest.raises(IntegrityError, match="position"):
            session.commit()
        session.rollback()
        add("third", position=2)(session)
        session.commit()

    async with async_client(app) as client, in_block(app, kind) as session:
        session.add(Item(name="first", position=1))
        if kind.asynchronous:
            await session.commit()
            await session.run_sync(twice)
        else:
            session.commit()
            twice(session)
        assert (await client.post("/names")).json() == ["first", "third"]
    assert rows.names == []


@pytest.mark.parametrize("used_before", [False, True], ids=["first-use", "used-before"])
def test_a_block_within_a_block_that_has_sent_nothing(
    app: FastAPI, rows: Rows, used_before: bool, subtests: pytest.Subtests
) -> None:
    """A row belongs to the innermost block, whichever session writes it first and in what way."""

    def check(client: TestClient, how: str) -> None:
        with isolated(app) as outer:
            if used_before:
                outer.add(Item(name="module"))
                outer.commit()
            with isolated(app), isolated(app) as inner:
                writing = outer if how == "outer" else inner
                writing.add(Item(name="test"))
                if how in ("commit", "flush"):
                    getattr(writing, how)()
                assert client.post("/names").json() == ["module"] * used_before + ["test"]
            assert client.post("/names").json() == ["module"] * used_before
        assert rows.names == []

    with TestClient(app) as client:
        for how in "commit", "flush", "add", "outer":
            with subtests.test(how):
                check(client, how)


@pytest.mark.parametrize("ends", ["request", "commit", "rollback", "close", "block", "begun"])
def test_an_outer_session_that_ends_around_an_inner_one(
    app: FastAPI, ends: str, rows: Rows
) -> None:
    """An outer session may end in any way while an inner session has work open inside it."""
    with TestClient(app) as client:
        with isolated(app) as outer, isolated(app) as inner:
            with outer.begin() if ends == "begun" else nullcontext():
                add("outer")(outer)
                outer.flush()
                add("inner")(inner)
                inner.flush()
            if ends in ("commit", "rollback", "close"):
                getattr(outer, ends)()
            if ends != "block":
                kept = [] if ends in ("rollback", "close") else ["inner", "outer"]
                assert client.post("/names").json() == names(outer) == names(inner) == kept
        assert client.post("/names").json() == []
    assert rows.names == []


@asynchronous
@pytest.mark.anyio
async def test_asynchronous_blocks_within_blocks(app: FastAPI, rows: Rows) -> None:
    """What an outer session has pending belongs to the outer block, but not what it adds inside."""
    async with async_client(app) as client, isolated(app) as outer:
        outer.add(Item(name="module"))
        for _ in range(2):
            async with isolated(app), isolated(app) as inner:
                outer.add(Item(name="outer"))
                inner.add(Item(name="inner"))
                await inner.flush()
                assert (await client.post("/names")).json() == ["inner", "module", "outer"]
            assert (await client.post("/names")).json() == ["module"]
    assert rows.names == []


@pytest.mark.parametrize("failing", ["flush", "execute"])
def test_an_error_of_the_tests_own(app: FastAPI, kind: Kind, failing: str, rows: Rows) -> None:
    """Requests work while the test's session has an error that it has not rolled back."""
    with TestClient(app) as client, isolated(app) as session:
        session.bulk_save_objects([Item(name="mine")])
        session.commit()
        fail: Callable[[], Any] = session.flush
        if failing == "execute":
            fail = functools.partial(session.execute, items.insert().values(name="mine"))
        else:
            session.add(Item(name="mine"))
        with pytest.raises(IntegrityError):
            fail()
        assert client.post("/names").json() == ["mine"]
        assert client.post("/add").status_code == 201
        session.rollback()
        assert names(session) == ["added", "mine"]


def test_the_session_and_a_request_in_another_thread(app: FastAPI, rows: Rows) -> None:
    """A request from another thread sees what the test's session has added."""
    with TestClient(app) as client, isolated(app) as session, ThreadPoolExecutor() as threads:
        session.add(Item(name="mine"))
        assert threads.submit(client.post, "/names").result().json() == ["mine"]


def test_a_block_that_ends_before_one_inside_it(app: FastAPI, rows: Rows) -> None:
    """Leaving an outer block before an inner one raises IsolationError and undoes both.

    Later blocks are not affected.
    """
    with TestClient(app) as client:
        outer, inner = isolated(app), isolated(app)
        for block, name in (outer, "outer"), (inner, "inner"):
            block.__enter__().add(Item(name=name))
            assert name in client.post("/names").json()
        with pytest.raises(IsolationError, match="leave that one first"):
            outer.__exit__()
        inner.__exit__()
        with isolated(app) as own:
            own.add(Item(name="later"))
            assert client.post("/names").json() == ["later"]
    assert rows.names == []


def test_a_block_that_another_context_has_entered(app: FastAPI, rows: Rows) -> None:
    """A block inside one from another context, as with anyio's fixtures, shares its connection."""
    with TestClient(app) as client:
        block = isolated(app)
        copy_context().run(block.__enter__)
        with isolated(app) as session:
            session.add(Item(name="mine"))
            session.commit()
            assert client.post("/names").json() == ["mine"]
        assert client.post("/names").json() == []
        block.__exit__()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_savepoint_of_an_outer_session_after_an_inner_one_began(app: FastAPI, end: str) -> None:
    """A savepoint of the outer session ends as usual, and the inner session's work remains."""
    with TestClient(app), isolated(app) as outer, isolated(app) as inner:
        for session, name in ((outer, "outer"), (inner, "inner")):
            add(name)(session)
            session.flush()
        savepoint = outer.begin_nested()
        add("nested")(outer)
        outer.flush()
        getattr(savepoint, end)()
        assert names(outer) == ["inner", *(["nested"] if end == "commit" else []), "outer"]


def test_a_session_that_cannot_be_made_leaves_no_block_behind(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """If the session class cannot be constructed, its error is raised and later work is stored."""

    class Failing(Session):
        fails = True

        def __init__(self, *arguments: Any, **options: Any) -> None:
            if Failing.fails:
                raise ValueError("not now")
            super().__init__(*arguments, **options)

    app, engine = FastAPI(routes=routes(kind)), make_engine()
    options = {"sync_session_class" if kind.asynchronous else "class_": Failing}
    install_database(app, engine=engine, shutdown=engine.dispose, session_options=options)
    with TestClient(app) as client:
        with pytest.raises(ValueError, match="not now"), isolated(app):
            pass
        Failing.fails = False
        assert client.post("/add").status_code == 201
        assert rows.names == ["added"]


def test_a_transaction_that_cannot_begin_leaves_no_connection(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """The error of a begin listener is raised, no connection is left over, and a retry works."""
    app, engine = FastAPI(routes=routes(kind)), make_engine()
    install_database(app, engine=engine, shutdown=engine.dispose)
    inner = engine.sync_engine if isinstance(engine, AsyncEngine) else engine

    def fail(_: Connection) -> None:
        event.remove(inner, "begin", fail)
        raise ValueError("not now")

    with TestClient(app) as client:
        with isolated(app):
            event.listen(inner, "begin", fail)
            with pytest.raises(ValueError, match="not now"):
                client.post("/add")
            assert inner.pool.checkedout() == 0  # type: ignore[attr-defined] # a QueuePool
            assert client.post("/add").status_code == 201
        assert rows.names == []


def test_the_tests_own_session_after_its_block(app: FastAPI, rows: Rows) -> None:
    """The test's session raises IsolationError after its block, even inside an outer block.

    There it would disturb the next test.
    """
    with TestClient(app) as client:
        with isolated(app) as outer:
            with isolated(app) as inner:
                assert names(inner) == []
            with pytest.raises(IsolationError, match="has ended"):
                names(inner)
            assert names(outer) == []
        with pytest.raises(IsolationError, match="has ended"):
            names(outer)
        assert client.post("/names").json() == rows.names == []


@asynchronous
def test_a_block_that_is_refused_is_not_left_behind(app: FastAPI, rows: Rows) -> None:
    """A synchronous block that fails inside an asynchronous one lets that one end as usual."""
    block = isolated(app)

    async def enter() -> None:
        session = await block.__aenter__()
        session.add(Item(name="mine"))
        await session.commit()

    with asyncio.Runner() as runner:
        runner.run(enter())
        with pytest.raises(IsolationError, match="not running"), isolated(app):
            pass
        runner.run(block.__aexit__())
    assert rows.names == []


@asynchronous
def test_a_block_that_could_send_nothing_is_not_left_behind(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """An inner block that could send nothing lets the outer block end as usual.

    Here the engine is known only once the application runs.
    """
    app = make_app(kind, make_engine)
    block = isolated(app)

    async def enter() -> None:
        await block.__aenter__()
        async with async_client(app) as client:
            assert (await client.post("/add")).status_code == 201

    with asyncio.Runner() as runner:
        runner.run(enter())
        refused = pytest.raises(IsolationError, match="the application's event loop")
        with isolated(app), TestClient(app) as client, refused:
            client.post("/names")
        runner.run(block.__aexit__())
    assert rows.names == []
    wait_until(lambda: rows.backends("idle in transaction%") == 0)


def test_what_the_test_holds_follows(app: FastAPI, rows: Rows) -> None:
    """The test's objects expire at commit, as in every Session, and are reloaded when accessed."""
    with TestClient(app) as client, isolated(app) as session:
        session.add(item := Item(name="mine"))
        session.commit()
        assert client.post("/rename").status_code == 201
        assert item.name == "mine-renamed"


def test_a_request_inside_of_a_transaction_of_the_tests(
    app: FastAPI, kind: Kind, rows: Rows
) -> None:
    """A request inside the test's transaction sees its changes, and one inside a handle's fails."""
    with TestClient(app) as client, isolated(app) as session:

        def around_with_handle() -> None:
            database: Any = installed_databases(app)["default"]
            with database.transaction() as own:
                names(own)
                client.post("/add")

        with session.begin():
            session.add(Item(name="mine"))
            assert client.post("/rename").status_code == 201
            assert names(session) == ["mine-renamed"]
        with session.begin_nested() as undone:
            assert client.post("/add").status_code == 201
            undone.rollback()
        assert names(session) == ["mine-renamed"]
        if not kind.asynchronous:
            with pytest.raises(IsolationError, match="beside an open one"):
                around_with_handle()
        assert client.post("/names").json() == ["mine-renamed"]


@pytest.mark.anyio
async def test_the_tests_session_inside_of_a_request(app: FastAPI, kind: Kind, rows: Rows) -> None:
    """An override may use the test's session, whose work ends with the request's transaction."""
    async with in_block(app, kind) as session, async_client(app) as client:
        own: Session = getattr(session, "sync_session", session)

        def inside(requests: Session) -> list[str]:
            add("added")(requests)
            requests.flush()
            own.add(Item(name="mine"))
            return names(own)

        def fail_inside(requests: Session) -> None:
            assert names(requests) == names(own) == ["added", "mine"]
            raise HTTPException(409)

        route(app, kind, "/inside", transactional(), inside)
        route(app, kind, "/fail-inside", transactional(), fail_inside)
        assert (await client.post("/inside")).json() == ["added", "mine"]
        for _ in range(2):
            assert (await client.post("/fail-inside")).status_code == 409
            await session.run_sync(Session.commit) if kind.asynchronous else session.commit()
            assert (await client.post("/names")).json() == ["added", "mine"]


@pytest.mark.anyio
async def test_the_tests_own_changes_that_cannot_be_stored(
    app: FastAPI, kind: Kind, rows: Rows
) -> None:
    """A request that cannot store the test's changes fails, but its own work is stored.

    The next request succeeds.
    """
    async with in_block(app, kind) as session, async_client(app) as client:
        own: Session = getattr(session, "sync_session", session)

        def add_inside(requests: Session) -> None:
            add("added")(requests)
            requests.flush()
            own.add(Item())  # lacks the required name

        def fail_inside(requests: Session) -> None:
            add_inside(requests)
            raise HTTPException(409)

        route(app, kind, "/inside", transactional(), add_inside)
        route(app, kind, "/fail-inside", transactional(), fail_inside)
        for path in "/fail-inside", "/inside", "/names":
            own.add(Item() if path == "/names" else Item(name=path))
            with pytest.raises(IsolationError, match=r"cannot be stored.*name"):
                await client.post(path)
        assert (await client.post("/names")).json() == ["/fail-inside", "/inside", "added"]
    assert rows.names == []


@pytest.mark.anyio
async def test_changes_that_a_handles_block_cannot_store(
    app: FastAPI, kind: Kind, rows: Rows
) -> None:
    """Outside a request, a handle's block that cannot store the test's own changes fails."""
    async with async_client(app), in_block(app, kind) as session:
        own: Session = getattr(session, "sync_session", session)

        def add_inside(handles: Session) -> None:
            add("added")(handles)
            handles.flush()
            own.add(Item())  # lacks the required name

        with pytest.raises(IsolationError, match="cannot be stored"):
            await in_handle(kind, add_inside)(installed_databases(app)["default"])
    assert rows.names == []


def test_a_refusal_that_is_swallowed_fails_the_request(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """An IsolationError that the application swallows is raised by the test's client."""
    app = make_app(kind, make_engine())

    def swallow_text(session: Session) -> None:
        with contextlib.suppress(IsolationError):
            session.execute(text("COMMIT"))

    route(app, kind, "/text", get_db(), swallow_text)
    with TestClient(app) as client:
        with isolated(app), pytest.raises(IsolationError, match="COMMIT"):
            client.post("/text")
        with isolated(app):
            client.post("/names")


# --- taking turns ---


def last_for(seconds: float) -> Callable[[Session], Any]:
    return lambda session: session.execute(text(f"SELECT pg_sleep({seconds})"))


Handle = Annotated[Any, Depends(get_database_handle())]


def in_handle(kind: Kind, body: Callable[[Session], Any]) -> Callable[[Any], Any]:
    async def asynchronous(database: Any) -> Any:
        async with database.transaction() as session:
            return await session.run_sync(body)

    def synchronous(database: Any) -> Any:
        with database.transaction() as session:
            return body(session)

    return asynchronous if kind.asynchronous else synchronous


def test_requests_take_turns(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """Concurrent requests run one after the other, each as a whole."""
    app = make_app(kind, make_engine(pool_size=5, max_overflow=0))

    def numbered(session: Session) -> int:
        before = len(names(session))
        session.execute(text("SELECT pg_sleep(0.001)"))
        add(f"row-{before:03}")(session)
        return before

    route(app, kind, "/numbered", transactional(), numbered)
    with TestClient(app) as client, isolated(app), ThreadPoolExecutor(10) as threads:
        answers = threads.map(lambda _: client.post("/numbered").json(), range(20))
        assert sorted(answers) == list(range(20))


def on_two_databases(make_engine: MakeEngine) -> FastAPI:
    """Make an application with the databases `a` and `b`."""
    app = FastAPI()
    for name in "a", "b":
        engine = make_engine(second=name == "b")
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    return app


def test_requests_on_two_databases_take_turns(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """Requests that begin with different databases do not wait for each other's second one."""
    app = on_two_databases(make_engine)
    for first, second in (("a", "b"), ("b", "a")):
        one, other = Depends(transactional(first)), Depends(transactional(second))

        async def asynchronous(x: Any = one, y: Any = other) -> None:
            await x.run_sync(names)
            await y.run_sync(names)

        def synchronous(x: Any = one, y: Any = other) -> None:
            names(x)
            names(y)

        app.post(f"/{first}")(asynchronous if kind.asynchronous else synchronous)
    with TestClient(app) as client, isolated(app), ThreadPoolExecutor(8) as threads:
        paths = ["/a", "/b"] * 10
        assert {each.status_code for each in threads.map(client.post, paths)} == {200}


def test_a_second_session_beside_the_first(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """`reader` works beside an open transaction, and a handle's transaction fails there."""
    app = make_app(kind, engine)
    session, read, handle = map(Depends, (transactional(), reader(), get_database_handle()))
    use = in_handle(kind, add("beside"))

    async def reads_async(one: Any = session, other: Any = read) -> Any:
        await one.run_sync(add("one"))
        await one.flush()
        return await other.run_sync(names)

    def reads_sync(one: Any = session, other: Any = read) -> Any:
        add("one")(one)
        one.flush()
        return names(other)

    async def beside_async(one: Any = session, other: Any = handle) -> None:
        await one.run_sync(names)
        await asyncio.create_task(use(other))

    def beside_sync(one: Any = session, other: Any = handle) -> None:
        names(one)
        use(other)

    app.post("/reads")(reads_async if kind.asynchronous else reads_sync)
    app.post("/beside")(beside_async if kind.asynchronous else beside_sync)
    with TestClient(app) as client, isolated(app):
        assert client.post("/reads").json() == ["one"]
        with pytest.raises(IsolationError, match="beside an open one"):
            client.post("/beside")
        assert client.post("/names").json() == ["one"]


@pytest.mark.driver_decides
@pytest.mark.parametrize("dependency", [get_db(), transactional(), reader()])
def test_a_socket_that_the_client_closes(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows, dependency: Any
) -> None:
    """A websocket that `TestClient` cancels while its session ends loses nothing."""
    app = make_app(kind, engine)

    @app.websocket("/socket")
    async def socket(socket: WebSocket, session: Annotated[Any, Depends(dependency)]) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            await socket.send_json(
                await (
                    session.run_sync(names)
                    if kind.asynchronous
                    else run_in_threadpool(names, session)
                )
            )

    with TestClient(app) as client, isolated(app) as own:
        own.add(Item(name="own"))
        with client.websocket_connect("/socket") as connected:
            connected.send_text("?")
            assert connected.receive_json() == ["own"]
        assert client.post("/add").status_code == 201
        assert names(own) == ["added", "own"]


@pytest.mark.parametrize("dependency", [get_db(), transactional()])
def test_server_sent_events_beside_a_dependency(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows, dependency: Any
) -> None:
    """A generator of server-sent events waits for the end of the dependencies.

    FastAPI starts the generator before it ends them.
    """
    sse = pytest.importorskip("fastapi.sse", reason="this FastAPI has no server-sent events")
    app = make_app(kind, engine)
    current_names = using(kind, Depends(dependency), names)
    read = in_handle(kind, names)

    async def events(_: Annotated[Any, Depends(current_names)], database: Handle) -> Any:
        yield await read(database)

    def sync_events(_: Annotated[Any, Depends(current_names)], database: Handle) -> Any:
        yield read(database)

    path = app.get("/events", response_class=sse.EventSourceResponse)
    path(events if kind.asynchronous else sync_events)
    with TestClient(app) as client, isolated(app) as own:
        own.add(Item(name="own"))
        assert 'data: ["own"]' in client.get("/events").text
        assert client.post("/add").status_code == 201


def test_a_stream_that_the_test_leaves(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """A stream that the test leaves ends its session, as under a server, and blocks no request."""
    app = make_app(kind, engine)

    async def lines(database: Any) -> AsyncGenerator[str]:
        async with database.session() as session:
            for name in (await session.scalars(select(Item.name))).all() * 3:
                yield name

    def sync_lines(database: Any) -> Iterator[str]:
        with database.session() as session:
            yield from names(session) * 3

    @app.get("/stream")
    async def stream(database: Handle) -> StreamingResponse:
        return StreamingResponse(lines(database) if kind.asynchronous else sync_lines(database))

    with TestClient(app) as client, isolated(app) as own:
        own.add(Item(name="own"))
        with client.stream("GET", "/stream") as answer:
            assert next(answer.iter_text()).startswith("own")
        assert client.post("/add").status_code == 201


def test_a_session_beside_its_requests_comes_next(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """Work that a request starts runs when the request's session ends, however many others wait."""
    app = make_app(kind, make_engine(pool_size=20))
    current, read = Depends(using(kind, Depends(get_db()), last_for(0.15))), in_handle(kind, names)
    started = list[Any]()

    async def asynchronous(database: Handle, _: Annotated[Any, current]) -> Any:
        started.append(asyncio.create_task(read(database)))
        await asyncio.sleep(0)

    def synchronous(database: Handle, _: Annotated[Any, current]) -> Any:
        started.append(threads.submit(copy_context().run, read, database))

    app.post("/started")(asynchronous if kind.asynchronous else synchronous)
    with ThreadPoolExecutor(30) as threads, TestClient(app) as client, isolated(app):
        answers = list(threads.map(client.post, ["/started"] * 10))
        assert {each.status_code for each in answers} == {200}
        wait_until(lambda: all(each.done() for each in started))
        assert [each.result() for each in started] == [[]] * 10


def test_work_after_the_request(kind: Kind, engine: Engine | AsyncEngine, rows: Rows) -> None:
    """A handle in a background task is isolated, even if it was fetched before the block."""
    app = make_app(kind, engine)
    before: list[Any] = []

    @app.post("/background")
    async def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(in_handle(kind, add("background")), before[0])

    with TestClient(app) as client:
        before.append(installed_databases(app)["default"])
        with isolated(app):
            client.post("/background")
            assert client.post("/names").json() == ["background"]
    assert rows.names == []


def test_a_worker_beside_the_tests_session(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """A worker that polls all the time does not disturb the test's session and is not blocked."""
    app = make_app(kind, make_engine(pool_size=5))
    ended, polled, failed = threading.Event(), threading.Event(), list[Exception]()
    poll = in_handle(kind, names)

    async def poll_once() -> None:
        await poll(installed_databases(app)["default"])

    def work(client: TestClient) -> None:
        while not ended.is_set():
            try:
                if kind.asynchronous:
                    assert client.portal is not None
                    client.portal.call(poll_once)
                else:
                    poll(installed_databases(app)["default"])
            except Exception as error:  # noqa: BLE001 - asserted below
                failed.append(error)
            polled.set()

    with TestClient(app) as client, isolated(app) as session, ThreadPoolExecutor(1) as threads:
        threads.submit(work, client)
        polled.wait()
        for number in range(10):
            session.add(item := Item(name=f"mine-{number}"))
            session.commit()
            session.refresh(item)
            if number % 5 == 0:
                assert client.post("/rename").status_code == 201
        polled.clear()
        polled.wait()
        ended.set()
    assert failed == []
    assert rows.names == []


@asynchronous
@pytest.mark.anyio
async def test_a_worker_that_the_test_has_started(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """A task of the lifespan runs in the test's context, but does not commit the test's changes."""
    asked, done = asyncio.Event(), asyncio.Event()

    async def work(database: Any) -> None:
        await asked.wait()
        await in_handle(kind, names)(database)
        done.set()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(work(installed_databases(app)["default"]))
            yield

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=make_engine())
    async with isolated(app) as session:
        await session.run_sync(names)
        async with async_client(app):
            session.add(Item(name="mine"))
            await session.flush()
            asked.set()
            await done.wait()
            await session.rollback()
            assert await session.run_sync(names) == []
    assert rows.names == []


def test_what_a_worker_still_holds_is_undone_with_the_block(
    kind: Kind, make_engine: MakeEngine, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker still holds is undone with the block, so it cannot go on or keep its lock."""
    monkeypatch.setattr(_turns, "_PATIENCE", 0.1)
    app = make_app(kind, make_engine(pool_size=5))
    holding, ended = threading.Event(), threading.Event()

    def hold(session: Session) -> None:
        add("added")(session)
        session.flush()
        holding.set()
        await_only(asyncio.to_thread(ended.wait)) if kind.asynchronous else ended.wait()

    def work(client: TestClient, *arguments: Any) -> None:
        portal: Any = client.portal
        held = in_handle(kind, hold)
        portal.call(held, *arguments) if kind.asynchronous else held(*arguments)

    with TestClient(app) as client, ThreadPoolExecutor(1) as threads, ExitStack() as last:
        last.callback(ended.set)
        with isolated(app):
            worker = threads.submit(work, client, installed_databases(app)["default"])
            holding.wait()
        with isolated(app):
            assert client.post("/add").status_code == 201
        ended.set()
        assert isinstance(worker.exception(), SQLAlchemyError)
    assert rows.names == []


def test_a_block_for_one_database(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """A block for one database leaves what a request stores in another database."""
    app = on_two_databases(make_engine)
    for name in "a", "b":
        route(app, kind, f"/{name}", transactional(name), add("added"))
    with isolated(app, "a"), TestClient(app) as client:
        assert client.post("/a").status_code == client.post("/b").status_code == 201
    assert (rows.names, second_rows.names) == ([], ["added"])


def test_an_application_that_ends_in_a_block_shuts_down(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """An application that is started twice in a block calls `shutdown` each time."""
    app, engine, ended = FastAPI(), make_engine(), list[str]()

    def shutdown() -> Any:
        ended.append("ended")
        return engine.dispose()

    install_database(app, engine=engine, shutdown=shutdown)
    route(app, kind, "/names", get_db(), names)
    with isolated(app):
        for run in 1, 2:
            with TestClient(app) as client:
                assert client.post("/names").json() == []
            assert ended == ["ended"] * run


def test_the_block_waits_for_a_transaction_that_a_worker_has_open(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """The block waits until a worker's transaction has ended, in all databases, then undoes it."""
    app, holding = make_app(kind, make_engine()), threading.Event()
    engine = make_engine(second=True)
    install_database(app, name="second", engine=engine, shutdown=engine.dispose)

    def hold(session: Session) -> None:
        add("added")(session)
        session.flush()
        holding.set()
        last_for(0.3)(session)
        assert names(session) == ["added"]
        beside = in_handle(kind, add("beside"))(installed_databases(app)["second"])
        if kind.asynchronous:
            await_only(beside)

    with TestClient(app) as client, ThreadPoolExecutor(1) as threads:
        call: Any = (
            client.portal.call if kind.asynchronous and client.portal else lambda f, *a: f(*a)
        )
        with isolated(app):
            database = installed_databases(app)["default"]
            worker = threads.submit(call, in_handle(kind, hold), database)
            holding.wait()
        worker.result()
    assert rows.names == second_rows.names == []


def test_a_turn_that_comes_after_the_block_is_refused(
    app: FastAPI, kind: Kind, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that has waited until the block ended raises IsolationError.

    It opens no connection, which would stay open.
    """
    take, block = _turns.Turn.take, isolated(app)

    def take_late(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        await_only(asyncio.to_thread(block.__exit__)) if kind.asynchronous else block.__exit__()
        take(*arguments, **options)

    with TestClient(app) as client:
        block.__enter__()
        monkeypatch.setattr(_turns.Turn, "take", take_late)
        with pytest.raises(IsolationError, match="has ended"):
            client.post("/add")
        assert client.post("/add").status_code == 201
    assert rows.names == ["added"]


def test_a_turn_is_taken_while_sessions_of_the_test_end() -> None:
    """A turn can be taken while another thread begins one for a session of the test."""
    turn, threads = _turns.Turn(), ThreadPoolExecutor(1)
    allowing = turn.during("the test's")

    class Holder:
        def __bool__(self) -> bool:
            wait([threads.submit(allowing.__enter__)], timeout=0.1)
            return True

    first = Holder()
    _turns.joins_flow(first)
    turn.take(first, first, transaction=True)
    turn.take("second", None, transaction=False)
    threads.shutdown()
    assert turn.holds("second")


def test_who_looks_at_the_bind_keeps_nobody_waiting(app: FastAPI, kind: Kind, rows: Rows) -> None:
    """An open session that has only called get_bind() keeps no other request waiting."""

    @app.websocket("/dialect")
    async def socket(socket: WebSocket, session: Annotated[Any, Depends(get_db())]) -> None:
        await socket.accept()
        await socket.send_text(session.get_bind().dialect.name)
        await socket.receive_text()

    with TestClient(app) as client, isolated(app):
        with client.websocket_connect("/dialect") as connected:
            assert connected.receive_text() == "postgresql"
            assert client.post("/add").status_code == 201
            connected.send_text("end")
        assert client.post("/names").json() == ["added"]


@asynchronous
def test_a_client_on_a_loop_of_its_own_is_refused(app: FastAPI, kind: Kind, rows: Rows) -> None:
    """A request on another event loop raises IsolationError at once.

    A second TestClient that is not entered runs its requests on another loop.
    """
    refused = pytest.raises(IsolationError, match="the application's event loop")
    with TestClient(app), isolated(app), refused:
        TestClient(app).post("/names")


# --- work that does not use the handle ---


def test_a_session_on_another_engine_is_left_alone(block: tuple[TestClient, Session]) -> None:
    """A session on an engine that is not the application's works as it does outside the block."""
    engine = sqlite()
    with Session(engine) as session:
        assert session.scalar(text("SELECT 1")) == 1
        assert session.bind is engine


def test_a_factorys_session_joins(make_engine: MakeEngine, rows: Rows) -> None:
    """A scoped_session on the application's engine joins the block, and leaves it at the end."""
    kind = Kind("psycopg-sync", "psycopg", False)
    engine: Any = create_engine(make_engine_url(rows), pool_size=2)
    app = make_app(kind, engine)
    factory = scoped_session(sessionmaker(engine))
    with TestClient(app) as client, isolated(app):
        item = Item(name="made")
        factory.add(item)
        factory.commit()
        assert item.name == "made"  # begins another transaction
        assert client.post("/names").json() == ["made"]
        assert client.post("/rename").status_code == 201
        factory.expire_all()
        assert item.name == "made-renamed"
    assert isinstance(factory().bind, Engine)
    assert names(factory()) == rows.names == []
    factory.remove()
    engine.dispose()


def read_and_write(session: Session) -> list[str]:
    found = names(session)
    session.execute(items.insert().values(name="core"))
    assert session.get(Item, 99) is None
    session.commit()
    return found


@pytest.mark.anyio
async def test_a_session_from_the_engine_joins_whatever_it_does_first(
    app: FastAPI, kind: Kind, rows: Rows
) -> None:
    """A session from the engine joins the block, even if it reads first, and its work is undone."""
    async with async_client(app) as client, in_block(app, kind):
        engine: Any = installed_databases(app)["default"].engine
        if kind.asynchronous:
            async with AsyncSession(engine) as session:
                session.add(Item(name="added"))
                await session.commit()
            async with AsyncSession(engine) as session:
                assert await session.run_sync(read_and_write) == ["added"]
        else:
            with Session(engine) as session:
                session.add(Item(name="added"))
                session.commit()
            with Session(engine) as session:
                assert read_and_write(session) == ["added"]
        assert (await client.post("/names")).json() == ["added", "core"]
    assert rows.names == []


@contextlib.asynccontextmanager
async def in_block(app: FastAPI, kind: Kind) -> AsyncGenerator[Any]:
    if kind.asynchronous:
        async with isolated(app) as session:
            yield session
    else:
        with isolated(app) as session:
            yield session


def make_engine_url(rows: Rows) -> Any:
    info = rows.connection.info
    return f"postgresql+psycopg://{info.user}@{info.host}:{info.port}/{info.dbname}"


def test_core_on_the_engine_is_refused(
    kind: Kind, engine: Engine | AsyncEngine, make_engine: MakeEngine, rows: Rows
) -> None:
    """In a block, a permanent write on the engine and a COMMIT as text raise IsolationError."""
    engine = make_engine()
    app = make_app(kind, engine)

    async def asynchronous() -> None:
        assert isinstance(engine, AsyncEngine)
        async with engine.begin() as connection:
            await connection.execute(items.insert().values(name="core"))

    def synchronous() -> None:
        assert isinstance(engine, Engine)
        with engine.begin() as connection:
            connection.execute(items.insert().values(name="core"))

    app.post("/core")(asynchronous if kind.asynchronous else synchronous)
    route(app, kind, "/text", get_db(), lambda session: session.execute(text("COMMIT")))
    with TestClient(app) as client:
        with isolated(app) as session:
            session.add(Item(name="mine"))
            for path in "/core", "/text":
                with pytest.raises(IsolationError):
                    client.post(path)
            assert client.post("/add").status_code == 201
        assert rows.names == []
        assert client.post("/core").status_code == 200
    assert rows.names == ["core"]


ENDS = [
    "BEGIN; INSERT INTO item (name) VALUES ('seed'); COMMIT;",
    "INSERT INTO item (name) VALUES ('a;b') ; end",
    "/* seed */ COMMIT",
    "-- seed\nROLLBACK WORK",
    "SELECT 'to'; ROLLBACK",
    r"SELECT E'it\'s'; COMMIT",
    "commit\nand chain",
]


def test_an_end_as_text_is_refused_wherever_it_stands(
    app: FastAPI, kind: Kind, rows: Rows, subtests: pytest.Subtests
) -> None:
    """COMMIT or ROLLBACK as text raises IsolationError, even after a comment or within a script."""
    sent: list[str] = []
    route(app, kind, "/text", get_db(), lambda session: session.execute(text(sent[-1])))
    with TestClient(app) as client:
        for sql in ENDS:
            sent.append(sql)
            with subtests.test(sql):
                with isolated(app) as session:
                    session.add(Item(name="mine"))
                    with pytest.raises(IsolationError, match="as text"):
                        client.post("/text")
                    assert client.post("/names").json() == ["mine"]
                assert rows.names == []


NO_ENDS = [
    'SELECT \'x; COMMIT\', "name; commit" FROM (SELECT 1 AS "name; commit") AS found',
    "SELECT 1 /* ; COMMIT */ -- ; ROLLBACK",
    r"SELECT E'it\'s; COMMIT'",
    "DO $$ BEGIN PERFORM 1; END $$",
    "DO $body$ BEGIN PERFORM 1; IF false THEN COMMIT; END IF; END; $body$;",
    "CREATE FUNCTION pg_temp.one() RETURNS int BEGIN ATOMIC SELECT 1; END",
    "SELECT CASE WHEN true THEN 1 END",
    "/* again */ ROLLBACK TO SAVEPOINT mine",
    "ROLLBACK WORK TO mine",
]


def test_text_that_only_looks_like_an_end_is_not_refused(
    app: FastAPI, kind: Kind, rows: Rows, subtests: pytest.Subtests
) -> None:
    """COMMIT or ROLLBACK in a comment, literal or function body does not raise."""
    sent: list[str] = []

    def send(session: Session) -> None:
        session.execute(text("SAVEPOINT mine"))
        session.execute(text(sent[-1]))

    route(app, kind, "/text", get_db(), send)
    with TestClient(app) as client:
        for sql in NO_ENDS:
            sent.append(sql)
            with subtests.test(sql), isolated(app):
                client.post("/text")
                assert client.post("/names").json() == []


def test_a_commented_read_on_the_engine_is_not_refused(make_engine: MakeEngine, rows: Rows) -> None:
    """A read on the engine is allowed, and a write is not, whatever comment precedes them."""
    engine = create_engine(make_engine_url(rows))
    app = make_app(Kind("psycopg-sync", "psycopg", False), engine)
    with TestClient(app), isolated(app), engine.connect() as connection:
        assert connection.scalar(text("/* report */ SELECT 1")) == 1
        with pytest.raises(IsolationError, match="on the engine itself"):
            connection.execute(text("/* report */ INSERT INTO item (name) VALUES ('core')"))
    engine.dispose()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_the_end_of_the_connection_itself_is_refused(
    app: FastAPI, kind: Kind, rows: Rows, end: str
) -> None:
    """Ending session.connection() itself raises IsolationError, as does later work in the block.

    Its commit() would store the work permanently.
    """

    def connection_end(session: Session) -> None:
        connection = session.connection()
        connection.execute(items.insert().values(name="core"))
        getattr(connection, end)()

    route(app, kind, "/end", get_db(), connection_end)
    with TestClient(app) as client:
        with isolated(app):
            with isolated(app):
                client.post("/add")
                with pytest.raises(IsolationError, match="of the connection itself"):
                    client.post("/end")
                with pytest.raises(IsolationError, match="lost or ended"):
                    client.post("/names")
            with pytest.raises(IsolationError, match="lost or ended"):
                client.post("/names")
        assert rows.names == []
        with isolated(app):
            assert client.post("/names").json() == []
            assert client.post("/add").status_code == 201
    assert rows.names == []
    wait_until(lambda: rows.backends("idle in transaction%") == 0)


def test_two_applications_on_one_database(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """Two applications on one database share the connection.

    If asynchronous ones run on two event loops, the second raises IsolationError at once.
    """
    apps = [make_app(kind, make_engine()) for _ in range(2)]
    with ExitStack() as stack:
        first, second = (stack.enter_context(TestClient(app)) for app in apps)
        for app in apps:
            stack.enter_context(isolated(app))
        assert first.post("/add").status_code == 201
        if kind.asynchronous:
            with pytest.raises(IsolationError, match="the application's event loop"):
                second.post("/names")
        else:
            assert second.post("/names").json() == ["added"]
    assert rows.names == []


@asynchronous
@pytest.mark.anyio
async def test_two_applications_on_one_event_loop(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """Two applications on one event loop see each other's stored work."""
    one, other = (make_app(kind, make_engine()) for _ in range(2))
    async with (
        async_client(one) as first,
        async_client(other) as second,
        isolated(one),
        isolated(other),
    ):
        assert (await first.post("/add")).status_code == 201
        assert (await second.post("/names")).json() == ["added"]
        answers = await asyncio.gather(
            *(each.post("/explicit") for each in (first, second)), return_exceptions=True
        )
        assert sum(isinstance(each, IntegrityError) for each in answers) == 1
    assert rows.names == []


@pytest.mark.parametrize(
    "fail",
    [
        functools.partial(fail_next_statement, failure="connection_lost"),
        functools.partial(fail_next_commit, failure="connection_lost_before"),
        fail_next_checkout,
    ],
    ids=["statement", "commit", "checkout"],
)
def test_a_failure_of_a_name_that_shares_the_connection(
    kind: Kind, make_engine: MakeEngine, rows: Rows, fail: Any
) -> None:
    """A simulated failure affects sessions of its name, not of another name on the connection."""
    app = FastAPI()
    for name in ("default", "other"):
        engine = make_engine()
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
        route(app, kind, f"/{name}", transactional(name), add(name))
    with TestClient(app, raise_server_exceptions=False) as client, isolated(app):
        with fail(app, name="other"):
            assert client.post("/default").status_code == 201
            assert client.post("/other").status_code == 500
        assert client.post("/other").status_code == 201
    assert rows.names == []


def test_a_commit_that_is_refused_is_not_lost(app: FastAPI, rows: Rows) -> None:
    """A connection loss planned after a COMMIT that fails does not affect the next request."""
    with TestClient(app) as client, isolated(app):
        assert client.post("/late").status_code == 201
        with pytest.raises(IntegrityError), fail_next_commit(app, "connection_lost_after"):
            client.post("/again")
        assert client.post("/explicit").status_code == 201


def test_an_engine_and_an_async_engine_for_one_database_are_refused(rows: Rows) -> None:
    """An Engine and an AsyncEngine for one database raise an IsolationError that names both.

    They cannot share a connection.
    """
    app = FastAPI()
    url = make_engine_url(rows)
    install_database(app, name="sync", engine=create_engine(url))
    install_database(app, name="async", engine=create_async_engine(url))
    with pytest.raises(IsolationError, match="'sync' and 'async' are the same"):
        isolated(app).__enter__()


def test_an_engine_in_autocommit_is_refused(kind: Kind, make_engine: MakeEngine) -> None:
    """An engine in AUTOCOMMIT raises IsolationError, because there is nothing to roll back."""
    app = make_app(kind, make_engine(isolation_level="AUTOCOMMIT"))
    refused = pytest.raises(IsolationError, match="AUTOCOMMIT")
    with TestClient(app) as client, isolated(app), refused:
        client.post("/db-names")


def test_a_connection_that_is_lost_says_so(kind: Kind, engine: Engine | AsyncEngine) -> None:
    """After a lost connection, the next request raises IsolationError and does not start over.

    What the test has stored is lost with the connection.
    """
    app = make_app(kind, engine)
    end = "SELECT pg_terminate_backend(pg_backend_pid())"
    route(app, kind, "/lose", get_db(), lambda session: session.execute(text(end)).all())
    with TestClient(app, raise_server_exceptions=False) as client, isolated(app):
        client.post("/add")
        assert client.post("/lose").status_code == 500
        raised = TestClient(app)
        raised.portal = client.portal
        with pytest.raises(IsolationError, match="was lost"):
            raised.post("/names")


# --- SQLite ---


def on_sqlite(kind: Kind, path: str) -> tuple[FastAPI, Any]:
    """Return an application that has a route that creates its tables, and its engine."""
    shared: Any = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    options = {} if path or kind.asynchronous else shared
    make: Any = create_async_engine if kind.asynchronous else create_engine
    engine = make(f"sqlite+{kind.driver}://{path}", **options)
    app = make_app(kind, engine)
    create = using(
        kind, Depends(transactional()), lambda s: Base.metadata.create_all(s.connection())
    )
    app.post("/create")(create)
    return app, engine


@pytest.mark.parametrize("recipe", [False, True], ids=["", "with-recipe"])
@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
def test_sqlite(kind: Kind, where: str, recipe: bool, tmp_path: Any) -> None:
    """SQLite is isolated whether its driver or a listener begins transactions."""
    app, engine = on_sqlite(kind, "" if where == "memory" else f"/{tmp_path}/file.db")
    if recipe:
        inner: Engine = engine.sync_engine if kind.asynchronous else engine
        event.listen(inner, "connect", lambda connection, _: _by_hand(connection))
        event.listen(inner, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    with TestClient(app, raise_server_exceptions=False) as client:
        client.post("/create")
        for _ in range(2):
            with isolated(app) as session:
                session.add(Item(name="mine"))
                assert client.post("/explicit").status_code == 201
                assert client.post("/fail").status_code == 409
                assert client.post("/read-only").status_code == 500
                assert client.post("/names").json() == ["kept", "mine", "nested"]
            assert client.post("/names").json() == []
        assert client.post("/add").status_code == 201
        assert client.post("/names").json() == ["added"]


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
def test_sqlite_tells_what_a_commit_would_store(kind: Kind, tmp_path: Any) -> None:
    """In a block on SQLite, an update needs a commit only if it changes a row, as in production."""
    app, _ = on_sqlite(kind, f"/{tmp_path}/file.db")
    update = text("UPDATE item SET position = 1")
    route(app, kind, "/update", get_db(), lambda session: session.execute(update).close())
    with TestClient(app) as client:
        client.post("/create")
        with isolated(app):
            assert client.post("/update").status_code == 201
            assert client.post("/add").status_code == 201
            with pytest.raises(UncommittedChangesError):
                client.post("/update")


def test_a_refused_end_in_memory_leaves_nothing() -> None:
    """A refused commit of the connection itself leaves no row in a database in memory.

    The database itself remains, because it lives in its only connection.
    """
    shared: Any = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    engine = create_engine("sqlite://", **shared)
    Base.metadata.create_all(engine)
    kind = Kind("", "", False)
    app = make_app(kind, engine)

    def end(session: Session) -> None:
        session.connection().execute(items.insert().values(name="core"))
        session.connection().commit()

    route(app, kind, "/end", get_db(), end)
    with TestClient(app) as client:
        with isolated(app), pytest.raises(IsolationError, match="of the connection itself"):
            client.post("/end")
        assert client.post("/names").json() == []


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
def test_a_database_in_memory_ends_with_its_application(kind: Kind) -> None:
    """An in-memory database is empty after a restart of its application, even inside a block."""
    app, _ = on_sqlite(kind, "")
    with isolated(app):
        for _ in range(2):
            with TestClient(app) as client:
                client.post("/create")
                assert client.post("/names").json() == []
                assert client.post("/add").status_code == 201


def _by_hand(connection: Any) -> None:
    connection.isolation_level = None
