"""Every kind of failure, provoked on every driver's real server: described, answered, no leak."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import asyncpg
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    DatabaseErrorKind,
    describe_database_error,
    http_errors,
    install_database,
    install_error_handlers,
    transactional,
)
from tests import failing
from tests.failing import ASYNCPG, DRIVERS, PSYCOPG2, Driver, Provocation, Server, engine_for
from tests.serving import Kind as Colour
from tests.serving import route

Kind = DatabaseErrorKind


class Cell(NamedTuple):
    """Say what a driver states about a failure."""

    kind: Kind
    code: str | None
    constraint: str | None = None
    table: str | None = None
    columns: tuple[str, ...] = ()
    retryable: bool = False


class Row(NamedTuple):
    """Say what each dialect, or a driver that differs, states about a provocation."""

    provoke: Provocation
    cells: dict[str, Cell | None]
    limited: bool = False  # with the role that cannot connect


CHILD = "canary_child"
UNIQUE, FOREIGN_KEY, CHECK = "uq_canary_name", "fk_canary_parent", "ck_canary_amount"
POSTGRES, SQLITE, MYSQL = "postgresql", "sqlite", "mysql"

TABLE = (
    Row(
        failing.unique,
        {
            POSTGRES: Cell(Kind.UNIQUE, "23505", UNIQUE, CHILD),
            SQLITE: Cell(
                Kind.UNIQUE, "SQLITE_CONSTRAINT_UNIQUE", None, CHILD, ("parent_id", "name")
            ),
            MYSQL: Cell(Kind.UNIQUE, "1062", UNIQUE),
        },
    ),
    Row(
        failing.primary_key,
        {
            POSTGRES: Cell(Kind.UNIQUE, "23505", "canary_child_pkey", CHILD),
            SQLITE: Cell(Kind.UNIQUE, "SQLITE_CONSTRAINT_PRIMARYKEY", None, CHILD, ("id",)),
            MYSQL: Cell(Kind.UNIQUE, "1062", "PRIMARY"),
        },
    ),
    Row(
        failing.exclusion,
        {POSTGRES: Cell(Kind.EXCLUSION, "23P01", "ex_canary_span", "canary_booking")},
    ),
    Row(
        failing.missing_parent,
        {
            POSTGRES: Cell(Kind.MISSING_PARENT, "23503", FOREIGN_KEY, CHILD),
            SQLITE: Cell(Kind.MISSING_PARENT, "SQLITE_CONSTRAINT_FOREIGNKEY"),
            MYSQL: Cell(Kind.MISSING_PARENT, "1452", FOREIGN_KEY, CHILD),
        },
    ),
    Row(
        failing.missing_parent_by_update,
        {
            POSTGRES: Cell(Kind.MISSING_PARENT, "23503", FOREIGN_KEY, CHILD),
            SQLITE: Cell(Kind.FOREIGN_KEY, "SQLITE_CONSTRAINT_FOREIGNKEY"),
            MYSQL: Cell(Kind.MISSING_PARENT, "1452", FOREIGN_KEY, CHILD),
        },
    ),
    Row(
        failing.still_referenced,
        {
            POSTGRES: Cell(Kind.STILL_REFERENCED, "23503", FOREIGN_KEY, CHILD),
            SQLITE: Cell(Kind.STILL_REFERENCED, "SQLITE_CONSTRAINT_FOREIGNKEY"),
            MYSQL: Cell(Kind.STILL_REFERENCED, "1451", FOREIGN_KEY, CHILD),
        },
    ),
    Row(
        failing.still_referenced_by_update,
        {
            POSTGRES: Cell(Kind.STILL_REFERENCED, "23503", FOREIGN_KEY, CHILD),
            SQLITE: Cell(Kind.FOREIGN_KEY, "SQLITE_CONSTRAINT_FOREIGNKEY"),
            MYSQL: Cell(Kind.STILL_REFERENCED, "1451", FOREIGN_KEY, CHILD),
        },
    ),
    Row(
        failing.late_foreign_key,
        {
            POSTGRES: Cell(Kind.FOREIGN_KEY, "23503", "fk_canary_late", "canary_late_child"),
            SQLITE: Cell(Kind.FOREIGN_KEY, "SQLITE_CONSTRAINT_FOREIGNKEY"),
        },
    ),
    Row(
        failing.not_null,
        {
            POSTGRES: Cell(Kind.NOT_NULL, "23502", None, CHILD, ("name",)),
            SQLITE: Cell(Kind.NOT_NULL, "SQLITE_CONSTRAINT_NOTNULL", None, CHILD, ("name",)),
            MYSQL: Cell(Kind.NOT_NULL, "1048", columns=("name",)),
        },
    ),
    Row(failing.no_default, {MYSQL: Cell(Kind.NOT_NULL, "1364", columns=("name",))}),
    Row(
        failing.check,
        {
            POSTGRES: Cell(Kind.CHECK, "23514", CHECK, CHILD),
            SQLITE: Cell(Kind.CHECK, "SQLITE_CONSTRAINT_CHECK", CHECK),
            MYSQL: Cell(Kind.CHECK, "4025", CHECK, CHILD),
        },
    ),
    Row(failing.stale, dict.fromkeys((POSTGRES, SQLITE, MYSQL), Cell(Kind.STALE, None))),
    Row(
        failing.too_long,
        {POSTGRES: Cell(Kind.BAD_VALUE, "22001"), MYSQL: Cell(Kind.BAD_VALUE, "1406")},
    ),
    Row(
        failing.out_of_range,
        {
            POSTGRES: Cell(Kind.BAD_VALUE, "22003"),
            ASYNCPG.id: Cell(Kind.BAD_VALUE, "22000"),
            MYSQL: Cell(Kind.BAD_VALUE, "1264"),
        },
    ),
    Row(
        failing.malformed,
        {
            POSTGRES: Cell(Kind.BAD_VALUE, "22P02"),
            SQLITE: Cell(Kind.BAD_VALUE, "SQLITE_MISMATCH"),
            MYSQL: Cell(Kind.BAD_VALUE, "1366"),
        },
    ),
    Row(failing.no_such_date, {POSTGRES: Cell(Kind.BAD_VALUE, "22008")}),
    Row(
        failing.nul_character,
        {
            POSTGRES: Cell(Kind.BAD_VALUE, None),
            ASYNCPG.id: Cell(Kind.BAD_VALUE, "22021"),
            PSYCOPG2.id: None,  # its own ValueError, which SQLAlchemy does not wrap
        },
    ),
    Row(
        failing.not_strictly_typed,
        {SQLITE: Cell(Kind.BAD_VALUE, "SQLITE_CONSTRAINT_DATATYPE")},
    ),
    Row(
        failing.serialization,
        {
            POSTGRES: Cell(Kind.SERIALIZATION, "40001", retryable=True),
            SQLITE: Cell(Kind.SERIALIZATION, "SQLITE_BUSY_SNAPSHOT", retryable=True),
            MYSQL: Cell(Kind.SERIALIZATION, "1020", retryable=True),
        },
    ),
    Row(
        failing.deadlock,
        {
            POSTGRES: Cell(Kind.DEADLOCK, "40P01", retryable=True),
            MYSQL: Cell(Kind.DEADLOCK, "1213", retryable=True),
        },
    ),
    Row(
        failing.lock_not_available,
        {
            POSTGRES: Cell(Kind.LOCK_NOT_AVAILABLE, "55P03"),
            SQLITE: Cell(Kind.LOCK_NOT_AVAILABLE, "SQLITE_BUSY"),
            MYSQL: Cell(Kind.LOCK_NOT_AVAILABLE, "1205"),
        },
    ),
    Row(
        failing.statement_timeout,
        {
            POSTGRES: Cell(Kind.STATEMENT_TIMEOUT, "57014"),
            SQLITE: Cell(Kind.STATEMENT_TIMEOUT, "SQLITE_INTERRUPT"),
            MYSQL: Cell(Kind.STATEMENT_TIMEOUT, "1969"),
        },
    ),
    Row(
        failing.cancelled,
        {
            POSTGRES: Cell(Kind.STATEMENT_TIMEOUT, "57014"),
            MYSQL: Cell(Kind.STATEMENT_TIMEOUT, "1317"),
        },
    ),
    Row(
        failing.lost,
        {
            POSTGRES: Cell(Kind.UNAVAILABLE, "57P01", retryable=True),
            PSYCOPG2.id: Cell(Kind.UNAVAILABLE, None, retryable=True),
            ASYNCPG.id: Cell(Kind.UNAVAILABLE, "08003", retryable=True),
            MYSQL: Cell(Kind.UNAVAILABLE, "2013", retryable=True),
        },
    ),
    Row(
        failing.pool_timeout,
        dict.fromkeys((POSTGRES, SQLITE, MYSQL), Cell(Kind.POOL_TIMEOUT, None)),
    ),
    Row(
        failing.connect,
        {
            # libpq hands on words, and no code.
            POSTGRES: Cell(Kind.TOO_MANY_CONNECTIONS, None),
            ASYNCPG.id: Cell(Kind.TOO_MANY_CONNECTIONS, "53300"),
            SQLITE: Cell(Kind.UNAVAILABLE, "SQLITE_CANTOPEN"),
            MYSQL: Cell(Kind.TOO_MANY_CONNECTIONS, "1226"),
        },
        limited=True,
    ),
    Row(
        failing.read_only,
        {
            POSTGRES: Cell(Kind.READ_ONLY, "25006"),
            SQLITE: Cell(Kind.READ_ONLY, "SQLITE_READONLY"),
            MYSQL: Cell(Kind.READ_ONLY, "1792"),
        },
    ),
    Row(
        failing.permission_denied,
        {
            POSTGRES: Cell(Kind.PERMISSION_DENIED, "42501"),
            SQLITE: Cell(Kind.PERMISSION_DENIED, "SQLITE_AUTH"),
            MYSQL: Cell(Kind.PERMISSION_DENIED, "1142"),
        },
    ),
    Row(failing.aborted_on_the_server, {POSTGRES: Cell(Kind.ABORTED_TRANSACTION, "25P02")}),
    Row(
        failing.aborted_in_the_session,
        dict.fromkeys((POSTGRES, SQLITE, MYSQL), Cell(Kind.ABORTED_TRANSACTION, None)),
    ),
    Row(
        failing.no_such_table,
        {
            POSTGRES: Cell(Kind.OTHER, "42P01"),
            SQLITE: Cell(Kind.OTHER, "SQLITE_ERROR"),
            MYSQL: Cell(Kind.OTHER, "1146"),
        },
    ),
    Row(
        failing.division_by_zero,
        {POSTGRES: Cell(Kind.OTHER, "22012"), MYSQL: Cell(Kind.OTHER, "1365")},
    ),
)

# What the issue promises, written down once more.
STATUS = {
    409: (Kind.UNIQUE, Kind.EXCLUSION, Kind.STILL_REFERENCED, Kind.STALE, Kind.FOREIGN_KEY),
    422: (Kind.MISSING_PARENT, Kind.NOT_NULL, Kind.CHECK, Kind.BAD_VALUE),
    503: (
        Kind.SERIALIZATION,
        Kind.DEADLOCK,
        Kind.LOCK_NOT_AVAILABLE,
        Kind.POOL_TIMEOUT,
        Kind.TOO_MANY_CONNECTIONS,
        Kind.UNAVAILABLE,
    ),
    504: (Kind.STATEMENT_TIMEOUT,),
    500: (Kind.READ_ONLY, Kind.PERMISSION_DENIED, Kind.ABORTED_TRANSACTION, Kind.OTHER),
}
STATUS_OF = {kind: status for status, kinds in STATUS.items() for kind in kinds}
PROBLEM = {"type", "title", "status", "detail"}
LEVEL_OF = {409: "INFO", 422: "INFO", 500: "ERROR", 503: "WARNING", 504: "WARNING"}


def cells(*, failures_only: bool) -> list[Any]:
    """List what is provoked: a driver without a cell has no such failure."""
    found = []
    for row in TABLE:
        for driver in DRIVERS:
            cell = row.cells.get(driver.id, row.cells.get(driver.dialect, "absent"))
            if cell == "absent" or (cell is None and failures_only):
                continue
            marks = [pytest.mark.mariadb] if driver.dialect == MYSQL else []
            name = f"{row.provoke.__name__}-{driver.id}"
            found.append(pytest.param(row, driver, cell, id=name, marks=marks))
    return found


# --- servers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(pytestconfig: pytest.Config) -> str:
    name: str = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    return name


@pytest.fixture(scope="module")
def on_postgres(postgres: WorkerPostgres) -> Iterator[Server]:
    with failing.canary_on_postgres(postgres.dsn) as server:
        yield server


@pytest.fixture(scope="module")
def on_mariadb(mariadb: str, worker: str) -> Iterator[Server]:
    with failing.canary_on_mariadb(mariadb, f"canary_{worker}") as server:
        yield server


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with failing.canary_on_sqlite(str(tmp_path_factory.mktemp("canary") / "file")) as server:
        yield server


@pytest.fixture
def server(driver: Driver, request: pytest.FixtureRequest) -> Server:
    """Give the driver's server, its rows reset."""
    fixture = {POSTGRES: "on_postgres", SQLITE: "on_sqlite", MYSQL: "on_mariadb"}[driver.dialect]
    found: Server = request.getfixturevalue(fixture)
    found.reset()
    return found


@pytest.fixture
def engine(driver: Driver, server: Server, row: Row) -> Engine | AsyncEngine:
    """Build an engine with one connection, in the application's or the limited role."""
    url = server.limited if row.limited else server.url
    return engine_for(driver, url, pool_size=1, max_overflow=0, pool_timeout=0.1)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """Keep one event loop: aiosqlite's threads have something to say after a failed connect."""
    with asyncio.Runner() as runner:
        yield runner


def failure_of(
    engine: Engine | AsyncEngine, server: Server, provoke: Provocation, runner: asyncio.Runner
) -> Exception:
    """Provoke it in a transaction of a handle's."""

    async def provoke_and_dispose(engine: AsyncEngine) -> None:
        try:
            async with AsyncDatabase(engine).transaction() as session:
                await session.run_sync(provoke, server)
        finally:
            await engine.dispose()

    try:
        if isinstance(engine, AsyncEngine):
            runner.run(provoke_and_dispose(engine))
        else:
            with failing.disposing(engine), Database(engine).transaction() as session:
                provoke(session, server)
    except (SQLAlchemyError, asyncpg.PostgresError, OSError, ValueError) as error:
        return error
    raise AssertionError("nothing went wrong")


# --- description --------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "driver", "cell"), cells(failures_only=False))
def test_a_failure_is_described_by_its_code(
    row: Row,
    driver: Driver,
    cell: Cell | None,
    engine: Engine,
    server: Server,
    runner: asyncio.Runner,
) -> None:
    """Kind, code and names are what the driver states, and nothing else is there."""
    found = describe_database_error(failure_of(engine, server, row.provoke, runner))
    if cell is None:
        assert found is None
        return
    assert found is not None
    stated = found.kind, found.code, found.constraint, found.table, found.columns, found.retryable
    assert stated == cell
    assert found.transient == (STATUS_OF[cell.kind] == 503)


# --- over HTTP ----------------------------------------------------------------------------------


def make_app(driver: Driver, engine: Engine, body: Callable[[Session], None]) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    colour = Colour(driver.id, driver.name, driver.asynchronous)
    route(app, colour, "/", transactional(), body)
    return app


def assert_nothing_leaks(response: Any, server: Server) -> None:
    """Look for what only the database, its driver or its URL can have said."""
    said = f"{response.headers} {response.text}".lower()
    url = make_url(server.url)
    secrets = "canary", "insert", "select", "constraint", "detail:", str(url.host), str(url.port)
    for secret in secrets:
        assert secret not in said, said


@pytest.mark.parametrize("problem_details", [False, True], ids=["json", "problem"])
@pytest.mark.parametrize(("row", "driver", "cell"), cells(failures_only=True))
def test_a_failure_is_answered(
    row: Row,
    driver: Driver,
    cell: Cell,
    engine: Engine,
    server: Server,
    problem_details: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client reads a fitting status and words of ours; the log has the cause, once."""
    app = make_app(driver, engine, lambda session: row.provoke(session, server))
    install_error_handlers(app, problem_details=problem_details, metadata=failing.Base.metadata)
    with TestClient(app) as client, caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        response = client.post("/")
    status = STATUS_OF[cell.kind]
    assert response.status_code == status
    assert ("retry-after" in response.headers) == (status == 503)
    assert set(response.json()) == (PROBLEM if problem_details else {"detail"})
    assert_nothing_leaks(response, server)
    (record,) = [each for each in caplog.records if each.name == "fastapi_sqlnative"]
    assert record.levelname == LEVEL_OF[status]
    assert record.exc_info is not None
    assert record.exc_info[1] is not None


@pytest.mark.parametrize(("row", "driver", "cell"), cells(failures_only=True))
def test_a_failure_is_mapped_at_the_route(
    row: Row, driver: Driver, cell: Cell, engine: Engine, server: Server
) -> None:
    """Where a block says so, a failure inside is answered with the block's own words."""
    words: Any = {cell.kind.value: "Own words."}

    def body(session: Session) -> None:
        with http_errors(**words):
            row.provoke(session, server)

    with TestClient(make_app(driver, engine, body)) as client:
        response = client.post("/")
    assert (response.status_code, response.json()) == (
        STATUS_OF[cell.kind],
        {"detail": "Own words."},
    )
