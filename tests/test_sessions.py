"""Rules 2, 3 and 10: a request has one session per database, and holds only what it uses."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, Security
from fastapi.responses import Response, StreamingResponse
from fastapi.security import SecurityScopes
from sqlalchemy import Engine, insert, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, NotSupportedError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_sqlnative import (
    get_database_handle,
    get_db,
    install_database,
    reader,
    transactional,
)
from fastapi_sqlnative.exceptions import SessionFinishedError
from fastapi_sqlnative.testing import isolated
from tests.conftest import MakeEngine
from tests.in_process import Hearing, asking, running, session_class
from tests.serving import (
    KINDS,
    PSYCOPG,
    PSYCOPG_ASYNC,
    Item,
    Kind,
    Rows,
    add,
    items,
    make_app,
    named,
    pid_of,
    route,
    serve,
    until,
    using,
    wait_until,
)

# -- one session -----------------------------------------------------------------------------


def test_whoever_asks_gets_the_same_session(kind: Kind, engine: Engine, rows: Rows) -> None:
    """Sub-dependencies, repositories and security dependencies share one session.

    It makes no difference how they are declared.
    """
    seen: list[Session] = []
    app = make_app(engine)

    class Repository:
        def __init__(self, session: Annotated[Any, Depends(get_db())]) -> None:
            seen.append(session.sync_session if kind.asynchronous else session)

    async def user(
        scopes: SecurityScopes, session: Annotated[Any, Security(get_db(), scopes=["mine"])]
    ) -> None:
        assert scopes.scopes
        seen.append(session.sync_session if kind.asynchronous else session)

    asking: list[Any] = [
        Depends(Repository),
        Security(user, scopes=["a"]),
        Security(user, scopes=["b", "c"]),
        Depends(using(kind, Depends(get_db(), use_cache=False), seen.append)),
        Depends(using(kind, Depends(get_db(" "), scope="function"), seen.append)),
        Depends(using(kind, Depends(get_db(" default\n")), seen.append)),
        Depends(using(kind, Depends(transactional(), use_cache=False), seen.append)),
    ]
    route(app, kind, "/", get_db(), seen.append, dependencies=asking)
    with serve(app) as served:
        assert served.post("/").status_code == 201
        assert len(seen) == len(asking) + 1
        assert len(set(map(id, seen))) == 1
        assert served.post("/").status_code == 201
        assert len(set(map(id, seen))) == 2


@pytest.mark.parametrize("dependency", [get_db, transactional, reader, get_database_handle])
def test_a_name_has_one_spelling(dependency: Callable[..., Any]) -> None:
    """Names are trimmed and a blank name is `default`, so all spellings return one dependency."""
    assert dependency() is dependency("") is dependency(" \t") is dependency(" default ")
    assert dependency("sales ") is dependency("sales")
    assert dependency("sales") is not dependency("Sales")
    with pytest.raises(TypeError, match="must be a string, not int"):
        dependency(1)


def test_options_make_another_dependency() -> None:
    """Equal options return the same dependency, and different options return another.

    An override therefore names exactly what it replaces.
    """
    assert transactional("a", read_only=True) is transactional(" a", read_only=True)
    assert transactional("a", read_only=False) is transactional("a")
    assert transactional("a", read_only=True) is not transactional("a")
    assert transactional("a", isolation_level="SERIALIZABLE") is not transactional("a")


def test_a_session_that_was_read_with_becomes_transactional(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A transactional endpoint also commits what a dependency with get_db has read and changed."""
    rows.add("user")
    app = make_app(engine)
    users: list[str] = []

    def read_user(session: Session) -> None:
        user = session.scalars(select(Item)).one()
        users.append(user.name)
        user.position = 7

    current_user = Depends(using(kind, Depends(get_db()), read_user))
    route(app, kind, "/", transactional(), add("new"), dependencies=[current_user])
    route(app, kind, "/taken", transactional(), add("user"), dependencies=[current_user])
    with serve(app) as served:
        assert served.post("/taken").json() == {"error": "IntegrityError"}
        assert rows.positions == {"user": None}
        assert served.post("/").status_code == 201
    assert users == ["user", "user"]
    assert rows.positions == {"user": 7, "new": None}


def test_what_a_repository_writes_belongs_to_the_service(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A repository's write through get_db fails alone, but commits in a transactional service."""
    app = make_app(engine)
    repository = Depends(using(kind, Depends(get_db()), add("a")))
    route(app, kind, "/alone", get_db(), lambda _: None, dependencies=[repository])
    route(app, kind, "/service", transactional(), lambda _: None, dependencies=[repository])
    with serve(app) as served:
        assert served.post("/alone").json() == {"error": "UncommittedChangesError"}
        assert rows.names == []
        assert served.post("/service").status_code == 201
    assert rows.names == ["a"]


def test_requests_at_the_same_time_have_sessions_of_their_own(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """Overlapping requests share neither session nor connection, and each commits its own work."""
    engine = make_engine(pool_size=5, max_overflow=0)
    app = make_app(engine)
    seen: list[tuple[Session, int]] = []

    def body(session: Session) -> None:
        pid = pid_of(session)
        seen.append((session, pid))
        session.add(Item(name=str(pid)))
        session.flush()
        session.execute(text("SELECT pg_advisory_xact_lock_shared(1)"))

    route(app, kind, "/", transactional(), body)
    with serve(app) as served, ThreadPoolExecutor(5) as clients:
        with rows.locked(1):
            answers = [clients.submit(served.client.post, "/") for _ in range(5)]
            wait_until(lambda: rows.backends("active") == 5)
        assert [answer.result().status_code for answer in answers] == [201] * 5
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # it is a QueuePool
    assert len({id(session) for session, _ in seen}) == 5
    assert rows.names == sorted(str(pid) for _, pid in seen)


# -- only what is used is held ---------------------------------------------------------------


def begin(session: Session) -> None:
    session.begin()


def select_one(session: Session) -> None:
    session.execute(text("SELECT 1"))


@pytest.mark.parametrize("dependency", [get_db(), transactional(), reader()])
def test_an_untouched_session_connects_to_nothing(
    kind: Kind, make_engine: MakeEngine, dependency: Callable[..., Any]
) -> None:
    """A session that is only declared or begun opens no connection."""
    engine: Any = make_engine()
    app = make_app(engine)
    route(app, kind, "/", dependency, lambda _: None)
    route(app, kind, "/begin", dependency, begin)
    with serve(app) as served:
        for path in "/", "/begin":
            assert served.post(path).status_code == 201
            assert (engine.pool.checkedin(), engine.pool.checkedout()) == (0, 0)


@pytest.mark.anyio
@pytest.mark.parametrize("begun", [False, True], ids=["declared", "begun"])
async def test_an_untouched_session_costs_neither_task_nor_thread(
    kind: Kind, make_engine: MakeEngine, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that does not use its sessions starts no task and no thread."""
    app = make_app(make_engine())

    @app.get("/")
    async def endpoint(
        db: Annotated[Any, Depends(get_db())],
        _transaction: Annotated[Any, Depends(transactional())],
        _reader: Annotated[Any, Depends(reader())],
    ) -> None:
        if begun:
            getattr(db, "sync_session", db).begin()

    loop = asyncio.get_running_loop()
    tasks: list[object] = []

    class Noted(asyncio.Task[Any]):
        def __init__(self, work: Any, **options: Any) -> None:
            tasks.append(work)
            super().__init__(work, **options)

    async with running(app) as client:
        threads = set(threading.enumerate())
        monkeypatch.setattr(asyncio, "Task", Noted)  # for tasks that the factory does not make
        loop.set_task_factory(lambda loop, work, **options: Noted(work, loop=loop, **options))
        try:
            assert (await client.get("/")).status_code == 200
        finally:
            loop.set_task_factory(None)
        assert tasks == []
        assert set(threading.enumerate()) <= threads


def test_a_connection_is_taken_at_the_first_statement(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A request holds no connection before its first statement, even with pending changes."""
    app = make_app(engine)
    held: list[int] = []
    pool: Any = engine.pool

    def body(session: Session) -> None:
        session.add(Item(name="a"))
        held.append(pool.checkedout())
        session.flush()
        held.append(pool.checkedout())
        session.commit()
        held.append(pool.checkedout())

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert held == [0, 1, 0]


class Shop:
    """A dependency with an attribute that the package's dependencies have too."""

    opens = "09:00"

    def __init__(self, session: Annotated[Any, Depends(get_db())]) -> None: ...


@pytest.mark.parametrize(
    ("beside", "opened"), [([], 1), ([Depends(get_db())], 2), ([Depends(Shop)], 2)]
)
def test_a_route_that_only_reads_opens_one_session(
    kind: Kind, make_engine: MakeEngine, beside: list[Any], opened: int
) -> None:
    """A route with reader() opens one session, and a second one only if it also uses get_db()."""
    sessions: list[object] = []
    base: Any = AsyncSession if kind.asynchronous else Session

    class Counted(base):  # type: ignore[misc] # the base depends on the kind
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            sessions.append(self)

    app = make_app(make_engine(), session_options={"class_": Counted})
    route(app, kind, "/", reader(), select_one, dependencies=beside)
    with serve(app) as served:
        sessions.clear()
        assert served.post("/").status_code == 201
    assert len(sessions) == opened


def test_an_inclusion_may_add_a_transaction(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """A route that only reads commits the writes of a dependency that a later inclusion adds."""
    app, router = make_app(make_engine()), APIRouter()
    endpoint = using(kind, Depends(reader()), select_one)
    router.post("/read", response_model=None)(endpoint)
    app.include_router(router)
    writing = [Depends(using(kind, Depends(transactional()), add("a")))]
    with serve(app) as served:
        assert served.post("/read").status_code == 200
        app.include_router(router, prefix="/again", dependencies=writing)
        assert served.post("/again/read").status_code == 200
    assert rows.names == ["a"]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [PSYCOPG_ASYNC, PSYCOPG], indirect=True)
async def test_a_reader_recovers_from_a_migration(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A reader's query that the driver has prepared fails at most once after a migration.

    It must not fail until the connection is closed. Other failures leave the connection as it is.
    """
    servers: list[int] = []

    def body(session: Session) -> None:
        servers.append(pid_of(session))
        session.execute(text("SELECT * FROM migrated")).all()

    def fail(session: Session) -> None:
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1 / 0"))

    def find_it_migrated(session: Session) -> None:
        with pytest.raises(NotSupportedError):
            body(session)
        assert pid_of(session) == servers[-1]  # this request goes on

    rows.connection.execute("CREATE TABLE migrated (id int)")
    try:
        async with asking(engine, kind, reader()) as request:
            for _ in range(6):  # psycopg prepares it then
                assert await request(body) == 201
            assert await request(fail) == 201
            rows.connection.execute("ALTER TABLE migrated ADD note text")
            assert await request(find_it_migrated) == 201
            assert await request(body) == 201
    finally:
        rows.connection.execute("DROP TABLE migrated")
    assert len(set(servers[:-1])) == 1
    assert servers[-1] != servers[0]


@pytest.mark.driver_decides
@pytest.mark.parametrize(
    ("dependency", "expected"),
    [
        (get_db(), ["BEGIN", "SELECT", "ROLLBACK"]),
        (transactional(), ["BEGIN", "SELECT", "COMMIT"]),
        (reader(), ["SELECT"]),
    ],
    ids=["get_db", "transactional", "reader"],
)
def test_a_read_costs_what_it_must(
    kind: Kind,
    make_engine: MakeEngine,
    server_log: Callable[[], str] | None,
    dependency: Callable[..., Any],
    expected: list[str],
) -> None:
    """The server receives the query and the transaction around it, and nothing else."""
    if server_log is None:
        pytest.skip("TEST_DATABASE_URL has no log to read")
    name = f"costs {kind.id} {'-'.join(expected)}"
    connect_args = named(kind.driver, name)
    if kind.driver == "asyncpg":
        connect_args["server_settings"]["log_statement"] = "all"
    else:
        connect_args["options"] = "-c log_statement=all"
    engine = make_engine(pool_size=1, max_overflow=0, connect_args=connect_args)
    app = make_app(engine)
    route(app, kind, "/", dependency, select_one)

    def statements() -> list[str]:
        lines = [line for line in server_log().splitlines() if f" {name} LOG: " in line]
        sent = [line.rpartition(": ")[2].strip(" ;") for line in lines]
        return [statement.split()[0].upper() for statement in sent if statement]

    with serve(app) as served:
        assert served.post("/").status_code == 201
        wait_until(lambda: statements()[-len(expected) :] == expected)
        before = len(statements())
        assert served.post("/").status_code == 201
        wait_until(lambda: len(statements()) >= before + len(expected))
        assert statements()[before:] == expected


def test_nothing_is_held_while_the_body_streams(kind: Kind, engine: Engine, rows: Rows) -> None:
    """The response streams and background tasks run after COMMIT, without holding a connection."""
    app = make_app(engine)
    held: list[tuple[int, int, list[str]]] = []
    pool: Any = engine.pool

    def look() -> None:
        held.append((pool.checkedout(), rows.backends("idle in transaction%"), rows.names))

    def body(session: Session) -> Response:
        session.add(Item(name="a"))

        def stream() -> Any:
            look()
            yield b"done"

        tasks = BackgroundTasks()
        tasks.add_task(look)
        return StreamingResponse(stream(), background=tasks)

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").text == "done"
    assert held == [(0, 0, ["a"])] * 2


# -- work that the request leaves behind -----------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> Future[Any]:
    """Start work in a thread without waiting for it, and return its future."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - the test examines it
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def leave_behind(
    app: FastAPI, kind: Kind, statement: Any, sent: Callable[[Any], bool], left: list[Any]
) -> None:
    """Add `GET /`, which fails while a statement that it does not wait for is pending."""
    marker = Depends(get_db())

    async def asynchronous(session: Annotated[AsyncSession, marker]) -> None:
        left.append(asyncio.create_task(session.execute(statement)))
        await until(lambda: sent(session))
        raise ZeroDivisionError

    def synchronous(session: Annotated[Session, marker]) -> None:
        left.append(in_a_thread(lambda: session.execute(statement)))
        wait_until(lambda: sent(session))
        raise ZeroDivisionError

    app.get("/")(asynchronous if kind.asynchronous else synchronous)


@pytest.mark.driver_decides
def test_a_statement_left_behind_in_the_queue_of_the_pool(
    kind: Kind, make_engine: MakeEngine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """If a request ends while its session waits for the pool, a late connection is returned."""
    engine: Any = make_engine(pool_size=1, max_overflow=0, pool_timeout=20)
    app = make_app(engine)
    left: list[Any] = []
    hold = insert(items).values(name="never")
    leave_behind(app, kind, hold, lambda session: session.in_transaction(), left)

    def holder(session: Session) -> None:
        session.execute(text("SELECT pg_advisory_xact_lock(2)"))

    route(app, kind, "/hold", get_db(), holder)
    with serve(app) as served, ThreadPoolExecutor(1) as client:
        with rows.locked(2):
            holding = client.submit(served.client.post, "/hold")
            wait_until(rows.waits)
            assert served.client.get("/").status_code == 500
        assert holding.result().status_code == 201
        wait_until(left[0].done)
        assert isinstance(left[0].exception(), SessionFinishedError)
        wait_until(lambda: engine.pool.checkedout() == 0)
    assert rows.names == []
    assert "a task that outlived the request" in caplog.text


@pytest.mark.driver_decides
def test_a_statement_left_behind_on_the_server(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """A request that ends during a statement of its session stores nothing and holds nothing."""
    engine: Any = make_engine(pool_size=1, max_overflow=0)
    app = make_app(engine)
    left: list[Any] = []
    # The statement is short, because psycopg and the request wait for it before they roll back.
    statement = text("WITH new AS (INSERT INTO item (name) VALUES ('never')) SELECT pg_sleep(0.5)")
    leave_behind(app, kind, statement, lambda _: rows.backends("active") == 1, left)
    route(app, kind, "/next", transactional(), add("next"))
    with serve(app) as served:
        assert served.client.get("/").status_code == 500
        wait_until(left[0].done)
        left[0].exception()
        wait_until(lambda: engine.pool.checkedout() == 0)
        assert served.post("/next").status_code == 201
    assert rows.names == ["next"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.asynchronous], ids=lambda k: k.id)
def test_two_databases_at_once(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """If `gather` queries two databases and one query fails, the other's connection is not lost."""
    engines: list[Any] = [make_engine(pool_size=1), make_engine(second=True, pool_size=1)]
    app = make_app(engines[0])
    install_database(app, name="second", engine=engines[1], shutdown=engines[1].dispose)

    @app.get("/")
    async def endpoint(
        first: Annotated[AsyncSession, Depends(transactional())],
        second: Annotated[AsyncSession, Depends(transactional("second"))],
    ) -> None:
        await second.execute(insert(items).values(name="never"))
        await asyncio.gather(  # the second statement is short, as above
            first.execute(text("SELECT 1 / 0")), second.execute(text("SELECT pg_sleep(0.3)"))
        )

    with serve(app) as served:
        assert served.client.get("/").status_code == 500
        wait_until(lambda: [engine.pool.checkedout() for engine in engines] == [0, 0])
        wait_until(lambda: second_rows.backends("active") == 0)
        wait_until(lambda: second_rows.backends("idle in transaction%") == 0)
    assert second_rows.names == []


# -- middleware ------------------------------------------------------------------------------


class Passing:
    """A pure ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marking(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"passed", b"yes")]
            await send(message)

        await self.app(dict(scope), receive, marking)


class Awaiting(BaseHTTPMiddleware):
    """A middleware that runs the application in its own task, as Starlette's base class does."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


@pytest.mark.parametrize("middleware", [Passing, Awaiting])
def test_middleware_changes_nothing(
    kind: Kind, engine: Engine, rows: Rows, middleware: Any
) -> None:
    """A request commits or fails as usual behind pure ASGI middleware and BaseHTTPMiddleware."""
    rows.add("taken", position=1)
    app = make_app(engine)
    app.add_middleware(middleware)
    route(app, kind, "/", transactional(), add("a"))
    route(app, kind, "/taken", transactional(), lambda s: s.add(Item(name="b", position=1)))
    route(app, kind, "/forgotten", get_db(), add("c"))
    with serve(app) as served:
        assert served.post("/").status_code == 201
        assert served.post("/taken").json() == {"error": "IntegrityError"}
        assert served.post("/forgotten").json() == {"error": "UncommittedChangesError"}
        assert rows.backends("idle in transaction%") == 0
    assert rows.names == ["a", "taken"]


# -- the raw session -------------------------------------------------------------------------


def test_the_connection_is_the_transactions(kind: Kind, engine: Engine, rows: Rows) -> None:
    """`connection()` returns the transaction's connection, whose writes commit with the rest."""
    app = make_app(engine)

    def body(session: Session) -> None:
        session.add(Item(name="orm"))
        session.flush()
        connection = session.connection()
        assert connection is session.connection()
        names = connection.execute(select(items.c.name)).scalars().all()
        connection.execute(insert(items).values(name=f"beside {names}"))

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["beside ['orm']", "orm"]


@pytest.mark.parametrize("dependency", [get_db(), transactional()])
def test_a_block_of_the_applications_own_commits(
    kind: Kind, engine: Engine, rows: Rows, dependency: Callable[..., Any]
) -> None:
    """`with session.begin()` in a handler commits at its end, and rolls back when it fails."""
    app = make_app(engine)

    def body(session: Session) -> None:
        with session.begin():
            session.add(Item(name="kept"))
        with contextlib.suppress(ZeroDivisionError), session.begin():
            session.add(Item(name="lost"))
            session.flush()
            raise ZeroDivisionError

    route(app, kind, "/", dependency, body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["kept"]


@pytest.mark.parametrize("class_", [Session, Hearing])
@pytest.mark.parametrize("dependency", [get_db(), transactional()])
def test_without_autobegin_the_application_begins(
    kind: Kind, engine: Engine, rows: Rows, dependency: Callable[..., Any], class_: type[Session]
) -> None:
    """With autobegin=False, nothing begins by itself, and an untouched session ends normally."""
    options = session_class(kind, class_) | {"autobegin": False}
    app = make_app(engine, session_options=options)

    def write(session: Session) -> None:
        with pytest.raises(InvalidRequestError, match=r"call session\.begin\(\)"):
            session.execute(text("SELECT 1"))
        with session.begin():
            session.add(Item(name="block"))

    def begin_and_add(session: Session) -> None:
        session.begin()
        session.add(Item(name="begun"))

    route(app, kind, "/untouched", dependency, lambda _: None)
    route(app, kind, "/block", dependency, write)
    route(app, kind, "/begun", dependency, begin_and_add)
    with serve(app) as served:
        assert served.post("/untouched").status_code == 201
        assert served.post("/block").status_code == 201
        assert served.post("/begun").status_code == (201 if dependency is transactional() else 409)
    assert rows.names == (["begun", "block"] if dependency is transactional() else ["block"])


@pytest.mark.parametrize("class_", [Session, Hearing])
@pytest.mark.parametrize("dependency", [get_db(), transactional()])
def test_a_session_closed_by_the_application_is_no_failure(
    kind: Kind, engine: Engine, rows: Rows, dependency: Callable[..., Any], class_: type[Session]
) -> None:
    """A handler that commits and then closes its session, as `with session` does, succeeds."""
    app = make_app(engine, session_options=session_class(kind, class_))

    def body(session: Session) -> None:
        with session:
            session.add(Item(name="kept"))
            session.commit()

    route(app, kind, "/", dependency, body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["kept"]


@pytest.mark.parametrize("alone", [True, False], ids=["production", "isolated"])
def test_a_savepoint_that_cannot_be_released_costs_no_connection(
    kind: Kind, engine: Engine, rows: Rows, alone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An error swallowed in a savepoint fails its request, but not the next request."""
    app = make_app(engine)

    def body(session: Session) -> None:
        session.begin_nested()
        session.begin_nested()
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1 / 0"))

    route(app, kind, "/", transactional(), body)
    route(app, kind, "/next", transactional(), add("next"))
    with TestClient(app) as client, contextlib.nullcontext() if alone else isolated(app):
        with pytest.raises(DBAPIError, match="RELEASE SAVEPOINT"):
            client.post("/")
        assert client.post("/next").status_code == 201
    assert rows.names == (["next"] if alone else [])
    assert "could not return its connection" not in caplog.text


@pytest.mark.parametrize("dependency", [get_db(), transactional()], ids=["get_db", "transactional"])
def test_a_session_closed_by_the_application_can_be_used_again(
    kind: Kind, engine: Engine, rows: Rows, dependency: Callable[..., Any]
) -> None:
    """A session that the application closed can be used again, as with SQLAlchemy alone.

    Here, two `with session` blocks close it in turn.
    """
    app = make_app(engine)
    used: list[Session] = []

    def body(session: Session) -> None:
        used.append(session)
        for name in ("first", "second"):
            with session:
                session.add(Item(name=name))
                session.commit()
        session.add(Item(name="third"))

    route(app, kind, "/", dependency, body)
    with serve(app) as served:
        assert served.post("/").status_code == (201 if dependency is transactional() else 409)
    kept = ["first", "second", "third"] if dependency is transactional() else ["first", "second"]
    assert rows.names == kept
    with pytest.raises(SessionFinishedError):
        used[0].execute(text("SELECT 1"))
    assert rows.backends("idle in transaction%") == 0


def close_over_pending(session: Session) -> None:
    with session:
        session.add(Item(name="lost"))


def close_over_flushed(session: Session) -> None:
    session.add(Item(name="lost"))
    session.flush()
    session.close()


def reset_over_flushed(session: Session) -> None:
    session.add(Item(name="lost"))
    session.flush()
    session.reset()


def reset_again(session: Session) -> None:
    reset_over_flushed(session)
    session.execute(text("SELECT 1"))
    session.reset()


@pytest.mark.parametrize("dependency", [get_db(), transactional()], ids=["get_db", "transactional"])
@pytest.mark.parametrize(
    "body", [close_over_pending, close_over_flushed, reset_over_flushed, reset_again]
)
def test_a_session_closed_over_changes_is_no_success(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    dependency: Callable[..., Any],
    body: Callable[[Session], None],
) -> None:
    """`with session`, close() and reset() fail the request if they discard changes."""
    app = make_app(engine)
    route(app, kind, "/", dependency, body)
    with serve(app) as served:
        assert served.post("/").status_code == 409
    assert rows.names == []
    assert rows.backends("idle in transaction%") == 0
