"""Failures that a test injects: the driver's own, raised once, and never missed silently."""

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context
from typing import Any

import pytest
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI, Request
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    exc,
    make_url,
    select,
    text,
)
from sqlalchemy.orm import Mapped, Session, registry
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_sqlnative import (
    Database,
    DatabaseErrorKind,
    describe_database_error,
    get_db,
    install_database,
    installed_databases,
    transactional,
)
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.exceptions import CommitOutcomeUnknownError, TransactionAbortedError
from fastapi_sqlnative.testing import (
    fail_next_checkout,
    fail_next_commit,
    fail_next_statement,
    isolated,
)
from tests.failing import ASYNCPG, DRIVERS, FOLLOWERS, Driver, disposing, engine_for
from tests.in_process import sqlite
from tests.serving import PSYCOPG, Kind, route, using

notes = Table(
    "sqlnative_note",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("name", String(20), unique=True),
)


class Note:
    """A row that a flush stores."""

    id: Mapped[int]
    name: Mapped[str]

    def __init__(self, name: str) -> None:
        self.name = name


registry().map_imperatively(Note, notes)


def _params() -> Iterator[Any]:
    """Yield each driver, and for each database one driver with isolation.

    The driver decides which error is raised. One driver per database shows how the error is
    handled.
    """
    databases: set[str] = set()
    for driver in DRIVERS:
        marks = [pytest.mark.mariadb] * (driver.dialect == "mysql")
        marks += [pytest.mark.other_driver] * (driver in (ASYNCPG, *FOLLOWERS))
        yield pytest.param((driver, False), id=driver.id, marks=marks)
        if driver.dialect not in databases:
            databases.add(driver.dialect)
            yield pytest.param((driver, True), id=f"{driver.id}-isolated", marks=marks)


@pytest.fixture(params=_params())
def setting(request: pytest.FixtureRequest) -> tuple[Driver, bool]:
    found: tuple[Driver, bool] = request.param
    return found


@pytest.fixture
def driver(setting: tuple[Driver, bool]) -> Driver:
    return setting[0]


def _mariadb_database(server: str, worker: str) -> str:
    name = f"sqlnative_testing_{worker}"
    url = make_url(server).set(drivername="mysql")
    admin = create_engine(url.set(drivername="mysql+pymysql"))
    with disposing(admin), admin.begin() as connection:
        connection.execute(text(f"CREATE OR REPLACE DATABASE {name}"))
    return url.set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def outsides(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Engine]]:
    """Yield a function that returns a dialect's engine, whose table is created only once."""
    with contextlib.ExitStack() as closing:

        @functools.cache
        def outside(dialect: str) -> Engine:
            if dialect == "postgresql":
                driver, url = "psycopg", request.getfixturevalue("postgres").dsn
            elif dialect == "mysql":
                worker = getattr(request.config, "workerinput", {}).get("workerid", "main")
                url = _mariadb_database(request.getfixturevalue("mariadb"), worker)
                driver = "pymysql"
            else:
                driver, url = "pysqlite", f"sqlite:///{tmp_path_factory.mktemp('faults')}/file.db"
            engine = engine_for(Driver("", dialect, driver, False), url)
            assert isinstance(engine, Engine)
            closing.enter_context(disposing(engine))
            notes.metadata.drop_all(engine)
            notes.metadata.create_all(engine)
            closing.callback(notes.metadata.drop_all, engine)
            return engine

        yield outside


@pytest.fixture
def url(driver: Driver, outsides: Callable[[str], Engine]) -> Iterator[str]:
    """Yield the URL, without a driver, of a database that contains the empty table."""
    outside = outsides(driver.dialect)
    yield outside.url.set(drivername=driver.dialect).render_as_string(hide_password=False)
    with outside.begin() as connection:
        connection.execute(notes.delete())


@pytest.fixture
def app(driver: Driver, url: str) -> FastAPI:
    """Return an application that adds notes, with and without retries."""
    engine = engine_for(driver, url, pool_size=1, max_overflow=0, pool_timeout=1)
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    kind = Kind(driver.id, driver.name, driver.asynchronous)

    def add(session: Session) -> None:
        session.execute(notes.insert().values(name="note"))

    def flush(session: Session) -> None:
        session.add(Note(name="note"))
        session.flush()

    def names(session: Session) -> list[str]:
        return list(session.scalars(select(notes.c.name)))

    def swallow(session: Session) -> None:
        session.execute(notes.insert().values(name="before"))
        with contextlib.suppress(exc.DBAPIError):
            session.execute(text("INSERT INTO sqlnative_note (name) VALUES ('swallowed')"))

    def roll_back(session: Session) -> None:
        session.add(Note(name="note"))
        try:
            session.commit()
        except Exception:
            session.rollback()
            raise

    def release(session: Session) -> None:
        try:
            with session.begin_nested():
                add(session)
        except exc.DBAPIError as error:
            raise AssertionError("The savepoint failed.") from error

    async def retried_async() -> None:
        async def work(session: Any) -> None:
            await session.run_sync(add)

        await installed_databases(app)["default"].run_in_transaction(work, backoff=0)

    def retried_sync() -> None:
        database: Any = installed_databases(app)["default"]
        database.run_in_transaction(add, backoff=0)

    route(app, kind, "/add", transactional(), add)
    route(app, kind, "/flush", transactional(), flush)
    route(app, kind, "/roll-back", get_db(), roll_back)
    route(app, kind, "/swallow", transactional(), swallow)
    route(app, kind, "/release", transactional(), release)
    route(app, kind, "/nothing", get_db(), lambda session: session.commit())
    route(app, kind, "/names", transactional(), names)
    route(
        app,
        kind,
        "/clear",
        transactional(),
        lambda session: session.execute(notes.delete()).close(),
    )
    app.state.retried = retried_async if driver.asynchronous else retried_sync
    app.post("/retried")(app.state.retried)
    return app


@pytest.fixture
def client(
    app: FastAPI, setting: tuple[Driver, bool], outsides: Callable[[str], Engine]
) -> Iterator[TestClient]:
    driver, is_isolated = setting
    around: AbstractContextManager[object] = isolated(app) if is_isolated else nullcontext()
    with TestClient(app) as client, around:
        yield client
    if is_isolated:
        with outsides(driver.dialect).connect() as outside:
            assert outside.execute(select(notes)).all() == []


Fail = Callable[..., AbstractContextManager[None]]


def without_deadlock(driver: Driver, failure: str) -> bool:
    return driver.dialect == "sqlite" and failure == "deadlock"


LOST = ["connection_lost_before", "connection_lost_after"]
FAILS: list[Fail] = [fail_next_statement, fail_next_commit]


@pytest.mark.driver_decides
def test_a_failure_that_passes(
    app: FastAPI, client: TestClient, driver: Driver, subtests: pytest.Subtests
) -> None:
    """An injected serialization failure or deadlock stores nothing, and a retry succeeds.

    It is the error that the driver reports.
    """
    for fail, failure in itertools.product(FAILS, ["serialization", "deadlock"]):
        with subtests.test(f"{fail.__name__}, {failure}"):
            check_a_failure_that_passes(app, client, driver, fail, failure)
        client.post("/clear")


def check_a_failure_that_passes(
    app: FastAPI, client: TestClient, driver: Driver, fail: Fail, failure: str
) -> None:
    if without_deadlock(driver, failure):
        with pytest.raises(ValueError, match="has no 'deadlock'"), fail(app, failure):
            pass
        return
    with pytest.raises(exc.DBAPIError) as raised, fail(app, failure):
        client.post("/add")
    description = describe_database_error(raised.value)
    assert description is not None
    assert (description.kind, description.retryable) == (DatabaseErrorKind(failure), True)
    assert client.post("/names").json() == []
    with fail(app, failure):
        assert client.post("/retried").status_code == 200
    assert client.post("/names").json() == ["note"]


@pytest.mark.driver_decides
def test_a_connection_lost_in_a_statement(
    app: FastAPI, client: TestClient, setting: tuple[Driver, bool], subtests: pytest.Subtests
) -> None:
    """A connection lost in a statement ends the transaction and, unless isolated, is replaced."""
    discarded: list[object] = []
    engine = sync_engine(installed_databases(app)["default"].engine)
    event.listen(engine, "invalidate", lambda *args: discarded.append(args))
    for path in "/add", "/flush":
        with subtests.test(path):
            check_a_connection_lost_in_a_statement(app, client, path)
        client.post("/clear")
    assert bool(discarded) is not setting[1]


def check_a_connection_lost_in_a_statement(app: FastAPI, client: TestClient, path: str) -> None:
    with pytest.raises(exc.DBAPIError) as raised, fail_next_statement(app, "connection_lost"):
        client.post(path)
    assert raised.value.connection_invalidated
    description = describe_database_error(raised.value)
    assert description is not None
    assert (description.kind, description.retryable) == (DatabaseErrorKind.UNAVAILABLE, True)
    with fail_next_statement(app, "connection_lost", containing="INSERT"):
        assert client.post("/retried").status_code == 200
    assert client.post("/names").json() == ["note"]


@pytest.mark.driver_decides
def test_a_connection_lost_in_commit(
    app: FastAPI, client: TestClient, subtests: pytest.Subtests
) -> None:
    """A connection lost in COMMIT raises CommitOutcomeUnknownError.

    If it is lost before COMMIT, nothing is stored. If it is lost after COMMIT, all is stored.
    """
    failures: Any = {"connection_lost_before": [], "connection_lost_after": ["note"]}
    for failure, stored in failures.items():
        with subtests.test(failure), fail_next_commit(app, failure):
            with pytest.raises(CommitOutcomeUnknownError):
                client.post("/add")
            assert client.post("/names").json() == stored  # this request commits as well


@pytest.mark.parametrize("failure", ["serialization", *LOST])
def test_a_handler_that_rolls_back(app: FastAPI, client: TestClient, failure: Any) -> None:
    """A handler's rollback() after a failed commit() works, and the failure is raised."""
    error = CommitOutcomeUnknownError if failure in LOST else exc.DBAPIError
    with pytest.raises(error), fail_next_commit(app, failure):
        client.post("/roll-back")
    assert client.post("/names").json() == ["note"] * (failure == "connection_lost_after")
    client.post("/clear")
    client.post("/roll-back")
    assert client.post("/names").json() == ["note"]


def test_a_failure_that_is_swallowed(app: FastAPI, client: TestClient, driver: Driver) -> None:
    """After a swallowed failure, the commit fails only if the server has aborted the transaction.

    PostgreSQL aborts it. SQLite and MariaDB do not.
    """
    gives_up = driver.dialect == "postgresql"
    failing: Any = pytest.raises(TransactionAbortedError) if gives_up else nullcontext()
    with fail_next_statement(app, "serialization", containing="swallowed"), failing:
        client.post("/swallow")
    assert client.post("/names").json() == ([] if gives_up else ["before"])


def test_a_lost_connection_that_is_swallowed(app: FastAPI, client: TestClient) -> None:
    """After a swallowed connection loss, the request fails and its earlier writes are lost."""
    lost = fail_next_statement(app, "connection_lost", containing="swallowed")
    with lost, pytest.raises((TransactionAbortedError, exc.PendingRollbackError)):
        client.post("/swallow")
    assert client.post("/names").json() == []


def test_an_exhausted_pool(app: FastAPI, client: TestClient) -> None:
    """fail_next_checkout() raises SQLAlchemy's own pool timeout once."""
    with pytest.raises(exc.TimeoutError) as raised, fail_next_checkout(app):
        client.post("/add")
    description = describe_database_error(raised.value)
    assert description is not None
    assert description.kind is DatabaseErrorKind.POOL_TIMEOUT
    assert client.post("/add").status_code == 201


def test_what_was_never_hit_fails_the_test(app: FastAPI, client: TestClient) -> None:
    """A failure that was never hit raises AssertionError, and is gone after its block."""
    missed = pytest.raises(AssertionError, match="never hit")
    with missed, fail_next_commit(app, "serialization"):
        pass
    with missed, fail_next_statement(app, "serialization", containing="DELETE"):
        client.post("/add")
    with missed, fail_next_checkout(app):
        pass
    with (
        pytest.raises(AssertionError, match="of a request to '/nam': pass the application"),
        fail_next_checkout(app, route="/nam"),
    ):
        client.post("/names")
    assert client.post("/names").json() == ["note"]
    assert client.post("/clear").status_code == 201


def test_a_commit_is_one_that_stores(app: FastAPI, client: TestClient) -> None:
    """A failure for COMMIT affects neither an empty commit nor the release of a savepoint."""
    with fail_next_commit(app, "serialization"):
        assert client.post("/nothing").status_code == 201
        with pytest.raises(exc.DBAPIError):
            client.post("/release")
    assert client.post("/names").json() == []


def test_a_failure_is_aimed_at_a_route(app: FastAPI, client: TestClient, driver: Driver) -> None:
    """A failure for a route does not affect other routes or background work."""
    assert client.portal is not None
    call: Callable[..., Any] = client.portal.call
    retried = app.state.retried
    background = functools.partial(call, *([] if driver.asynchronous else [run_sync]), retried)
    for fail in fail_next_statement, fail_next_commit:
        aimed: Any = fail
        with aimed(app, "serialization", route="/add"):
            client.post("/names")
            background()
            client.post("/clear")
            with pytest.raises(exc.DBAPIError):
                client.post("/add")
    with fail_next_checkout(app, route="/add"):
        client.post("/names")
        background()
        with pytest.raises(exc.TimeoutError):
            client.post("/add")


def test_a_failure_is_not_met_by_what_a_request_has_started(
    app: FastAPI, client: TestClient, driver: Driver
) -> None:
    """A failure for a route does not affect a task that an earlier request to it has started."""
    assert client.portal is not None
    work, left = app.state.retried, list[Context]()

    @app.post("/leaving")
    async def leave() -> None:
        left.append(copy_context())

    async def in_its_context() -> None:
        if driver.asynchronous:
            await asyncio.create_task(work(), context=left[0])
        else:
            await run_sync(left[0].run, work)

    client.post("/leaving")
    missed = pytest.raises(AssertionError, match="never hit")
    with missed, fail_next_statement(app, "serialization", route="/leaving"):
        client.portal.call(in_its_context)
    assert client.post("/names").json() == ["note"]


def test_a_failure_is_met_by_a_request_that_middleware_repeats() -> None:
    """A failure for a route affects a request whose scope middleware has used before."""
    app, engine = FastAPI(), sqlite()
    install_database(app, engine=engine, shutdown=engine.dispose)
    endpoint = using(PSYCOPG, Depends(get_db()), lambda session: session.scalar(text("SELECT 1")))
    app.get("/names", response_model=None)(endpoint)

    class HeadAsGet:
        """A middleware that answers HEAD like GET if the route doesn't have it."""

        def __init__(self, inner: ASGIApp) -> None:
            self.inner = inner

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def drop(_message: Message) -> None: ...

            if scope["type"] == "http":
                await self.inner(scope, receive, drop)
                scope["method"] = "GET"
            await self.inner(scope, receive, send)

    app.add_middleware(HeadAsGet)
    late = pytest.raises(exc.TimeoutError)
    with TestClient(app) as client, fail_next_checkout(app, route="/names"), late:
        client.head("/names")


def test_a_failure_is_met_after_a_call_within_the_request() -> None:
    """A failure for a route affects a request that has called the application with its scope."""
    app, engine = FastAPI(), sqlite()
    install_database(app, engine=engine, shutdown=engine.dispose)

    @app.get("/inner")
    async def inner() -> None: ...

    @app.get("/outer")
    async def outer(request: Request) -> None:
        async def drop(_message: Message) -> None: ...

        outer_route = {key: request.scope[key] for key in ("path", "route")}
        request.scope["path"] = "/inner"
        await app.router(request.scope, request.receive, drop)
        request.scope.update(outer_route)
        with installed_databases(app, Database)["default"].session() as session:
            session.scalar(text("SELECT 1"))

    late = pytest.raises(exc.TimeoutError)
    with TestClient(app) as client, fail_next_checkout(app, route="/outer"), late:
        client.get("/outer")


def test_the_route_is_the_one_that_was_included(app: FastAPI, client: TestClient) -> None:
    """A failure for the path of an included router does not affect its other inclusions."""
    router = APIRouter(routes=app.routes)
    app.include_router(router, prefix="/{tenant}")
    with fail_next_checkout(app, route="/{tenant}/names"):
        client.post("/names")
        with pytest.raises(exc.TimeoutError):
            client.post("/one/names")
