"""Every kind of failure on real servers: its description, its HTTP answer, and no leaks."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import asyncpg
import pytest
from fastapi import HTTPException
from sqlalchemy import Engine, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    DatabaseErrorKind,
    describe_database_error,
    map_database_error,
)
from fastapi_sqlnative._sessions.engines import sync_engine
from tests import failing
from tests.failing import (
    AIOSQLITE,
    ASYNCPG,
    FOLLOWERS,
    LEADERS,
    PSYCOPG,
    PSYCOPG2,
    PYMYSQL,
    SQLITE3,
    Driver,
    Provocation,
    Server,
    engine_for,
)
from tests.in_process import sqlite

Kind = DatabaseErrorKind


class Cell(NamedTuple):
    """The facts that a driver states about a failure."""

    kind: Kind
    code: str | None
    constraint: str | None = None
    table: str | None = None
    columns: tuple[str, ...] = ()
    retryable: bool = False


class Row(NamedTuple):
    """A provocation, with what each dialect, or a driver that differs, states about it."""

    provoke: Provocation
    cells: dict[str, Cell | None]
    limited: bool = False  # with the role that cannot connect
    everywhere: bool = False  # on every driver, because the result depends on it


CHILD = "canary_child"
UNIQUE, FOREIGN_KEY, CHECK = "uq_canary_name", "fk_canary_parent", "ck_canary_amount"
POSTGRES, SQLITE, MYSQL = "postgresql", "sqlite", "mysql"

TABLE = (
    Row(
        failing.unique,
        everywhere=True,
        cells={
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
        everywhere=True,
        cells={
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
        failing.missing_parent_behind_a_comment,
        {
            POSTGRES: Cell(Kind.MISSING_PARENT, "23503", FOREIGN_KEY, CHILD),
            SQLITE: Cell(Kind.MISSING_PARENT, "SQLITE_CONSTRAINT_FOREIGNKEY"),
        },
    ),
    Row(
        failing.missing_parent_behind_a_cte,
        {POSTGRES: Cell(Kind.MISSING_PARENT, "23503", FOREIGN_KEY, CHILD)},
    ),
    Row(
        failing.missing_parent_in_a_function,
        {POSTGRES: Cell(Kind.MISSING_PARENT, "23503", FOREIGN_KEY, CHILD)},
        everywhere=True,
    ),
    Row(
        failing.still_referenced_by_a_merge,
        {POSTGRES: Cell(Kind.STILL_REFERENCED, "23503", FOREIGN_KEY, CHILD)},
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
            POSTGRES: Cell(Kind.MISSING_PARENT, "23503", "fk_canary_late", "canary_late_child"),
            SQLITE: Cell(Kind.FOREIGN_KEY, "SQLITE_CONSTRAINT_FOREIGNKEY"),
        },
    ),
    Row(
        failing.not_null,
        everywhere=True,
        cells={
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
    Row(failing.refused_by_a_view, {POSTGRES: Cell(Kind.CHECK, "44000")}),
    Row(failing.stale, dict.fromkeys((POSTGRES, SQLITE, MYSQL), Cell(Kind.STALE, None))),
    Row(
        failing.too_long,
        {POSTGRES: Cell(Kind.BAD_VALUE, "22001"), MYSQL: Cell(Kind.BAD_VALUE, "1406")},
    ),
    Row(
        failing.out_of_range,
        everywhere=True,
        cells={
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
        failing.bad_pattern,
        {POSTGRES: Cell(Kind.BAD_VALUE, "2201B"), MYSQL: Cell(Kind.BAD_VALUE, "1139")},
    ),
    Row(failing.bad_escape, {POSTGRES: Cell(Kind.BAD_VALUE, "22025")}),
    Row(failing.negative_limit, {POSTGRES: Cell(Kind.BAD_VALUE, "2201W")}),
    Row(failing.no_such_zone, {POSTGRES: Cell(Kind.BAD_VALUE, "22023")}),
    Row(failing.too_long_for_an_index, {POSTGRES: Cell(Kind.BAD_VALUE, "54000")}),
    Row(failing.infinity, {MYSQL: Cell(Kind.BAD_VALUE, None)}, everywhere=True),
    Row(
        failing.nul_character,
        everywhere=True,
        cells={
            POSTGRES: Cell(Kind.BAD_VALUE, None),
            ASYNCPG.id: Cell(Kind.BAD_VALUE, "22021"),
        },
    ),
    Row(
        failing.not_strictly_typed,
        {SQLITE: Cell(Kind.BAD_VALUE, "SQLITE_CONSTRAINT_DATATYPE")},
    ),
    Row(
        failing.serialization,
        everywhere=True,
        cells={
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
        everywhere=True,
        cells={
            POSTGRES: Cell(Kind.LOCK_NOT_AVAILABLE, "55P03"),
            SQLITE: Cell(Kind.LOCK_NOT_AVAILABLE, "SQLITE_BUSY"),
            MYSQL: Cell(Kind.LOCK_NOT_AVAILABLE, "1205"),
        },
    ),
    Row(
        failing.statement_timeout,
        everywhere=True,
        cells={
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
        everywhere=True,
        cells={
            POSTGRES: Cell(Kind.UNAVAILABLE, "57P01", retryable=True),
            PSYCOPG2.id: Cell(Kind.UNAVAILABLE, None, retryable=True),
            ASYNCPG.id: Cell(Kind.UNAVAILABLE, "08003", retryable=True),
            MYSQL: Cell(Kind.UNAVAILABLE, "2013", retryable=True),
        },
    ),
    Row(failing.lost_beyond, {POSTGRES: Cell(Kind.UNAVAILABLE, "08006")}),
    Row(
        failing.pool_timeout,
        dict.fromkeys((POSTGRES, SQLITE, MYSQL), Cell(Kind.POOL_TIMEOUT, None)),
    ),
    Row(
        failing.connect,
        everywhere=True,
        cells={
            # libpq passes on a message, but no code.
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
    Row(failing.row_security, {POSTGRES: Cell(Kind.ROW_SECURITY, "42501")}, everywhere=True),
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
        everywhere=True,
        cells={POSTGRES: Cell(Kind.OTHER, "22012"), MYSQL: Cell(Kind.OTHER, "1365")},
    ),
    Row(failing.malformed_in_the_statement, {POSTGRES: Cell(Kind.OTHER, "22P02")}),
    Row(failing.bad_setting, {POSTGRES: Cell(Kind.OTHER, "22023")}),
    Row(failing.too_many_parameters, {POSTGRES: Cell(Kind.OTHER, None)}),
    Row(failing.wrong_type, {ASYNCPG.id: Cell(Kind.OTHER, "22000")}),
    Row(failing.str_for_int, {ASYNCPG.id: Cell(Kind.OTHER, "22000")}),
    Row(failing.beyond_python, {PSYCOPG.id: Cell(Kind.OTHER, None)}),
)

# The statuses that the issue specifies, repeated here.
STATUS = {
    409: (Kind.UNIQUE, Kind.EXCLUSION, Kind.STILL_REFERENCED, Kind.STALE, Kind.FOREIGN_KEY),
    403: (Kind.ROW_SECURITY,),
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


def cells() -> list[Any]:
    """Return the parameters of the test, one for each row and driver with a cell.

    A driver without a cell has no such failure.
    """
    found = []
    for row in TABLE:
        for driver in (*LEADERS, *(FOLLOWERS if row.everywhere else ())):
            cell = row.cells.get(driver.id, row.cells.get(driver.dialect, "absent"))
            if cell != "absent":
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
    """Return the driver's server, with its rows reset."""
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
    """Yield a runner, which keeps one event loop for the module.

    The threads of aiosqlite still use the event loop after a failed connect.
    """
    with asyncio.Runner() as runner:
        yield runner


def failure_of(
    engine: Engine | AsyncEngine, server: Server, provoke: Provocation, runner: asyncio.Runner
) -> Exception:
    """Return the error that a provocation raises in a transaction of a handle."""

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


# --- description and answer ---------------------------------------------------------------------


@pytest.mark.parametrize(("row", "driver", "cell"), cells())
def test_a_failure_is_described_by_its_code(
    row: Row,
    driver: Driver,
    cell: Cell | None,
    engine: Engine,
    server: Server,
    runner: asyncio.Runner,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A failure has the kind, code and names that the driver states, and the answer has its status.

    The answer contains nothing of the database, and one log line is written.
    """
    error = failure_of(engine, server, row.provoke, runner)
    found = describe_database_error(error)
    if cell is None:
        assert found is None
        return
    assert found is not None
    stated = found.kind, found.code, found.constraint, found.table, found.columns, found.retryable
    assert stated == cell
    assert found.transient == (STATUS_OF[cell.kind] == 503)
    with caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        answer = map_database_error(error)
    assert isinstance(answer, HTTPException)
    assert (answer.status_code, bool(answer.headers)) == (STATUS_OF[cell.kind], found.transient)
    assert "canary" not in f"{answer.detail} {answer.headers}"
    assert_logged(caplog, answer.status_code)


LEVEL_OF = {403: "INFO", 409: "INFO", 422: "INFO", 500: "ERROR", 503: "WARNING", 504: "WARNING"}


def assert_logged(caplog: pytest.LogCaptureFixture, status: int) -> None:
    """Assert that there is one log line, with a traceback only for what a developer must see.

    The line must not contain the stored value.
    """
    (record,) = caplog.records
    assert record.levelname == LEVEL_OF[status]
    assert bool(record.exc_info) == (status == 500)
    assert "canary-value" not in record.getMessage()


# --- errors of drivers that SQLAlchemy does not wrap --------------------------------------------


def wrap_values(context: ExceptionContext) -> BaseException | None:
    """Wrap a ValueError or OverflowError of a driver's cursor, which SQLAlchemy does not wrap."""
    error = context.original_exception
    if context.sqlalchemy_exception is None and isinstance(error, ValueError | OverflowError):
        return DBAPIError(context.statement, context.parameters, error)
    return None


@pytest.mark.parametrize(
    ("provoke", "driver"),
    [
        (failing.lone_surrogate, PSYCOPG),
        (failing.lone_surrogate, PSYCOPG2),
        (failing.lone_surrogate, ASYNCPG),
        (failing.lone_surrogate, AIOSQLITE),
        pytest.param(failing.lone_surrogate, PYMYSQL, marks=pytest.mark.mariadb),
        (failing.nul_character, PSYCOPG2),
        (failing.beyond_64_bits, SQLITE3),
    ],
    ids=lambda each: getattr(each, "id", None) or each.__name__,
)
@pytest.mark.parametrize("row", [TABLE[0]], ids=[""])
def test_a_value_that_the_driver_cannot_send_is_a_bad_value(
    provoke: Provocation,
    driver: Driver,
    row: Row,
    engine: Engine | AsyncEngine,
    server: Server,
    runner: asyncio.Runner,
) -> None:
    """A lone surrogate, a NUL or too big a number is a bad value of the client, on any driver."""
    inner = sync_engine(engine)
    event.listen(inner, "handle_error", wrap_values)
    found = describe_database_error(failure_of(engine, server, provoke, runner))
    assert found is not None
    assert found.kind is Kind.BAD_VALUE


@pytest.mark.parametrize("sent", ["once", "repeatedly", "without parameters"])
def test_a_refused_value_is_an_error_of_the_database(sent: str) -> None:
    """A value that the driver cannot send is SQLAlchemy's error in a session of ours."""
    given: dict[str, tuple[str, Any]] = {
        "once": ("SELECT ?", ("\ud800",)),
        "repeatedly": ("INSERT INTO item VALUES (?)", [("\ud800",), ("\ud800",)]),
        "without parameters": ("SELECT '\ud800'", None),
    }
    engine, options = sqlite(), {"no_parameters": sent == "without parameters"}
    with Database(engine).transaction() as session:
        session.execute(text("CREATE TABLE item (name TEXT)"))
        connection = session.connection()
        with pytest.raises(DBAPIError) as caught:
            connection.exec_driver_sql(*given[sent], execution_options=options)
    found = describe_database_error(caught.value)
    assert found is not None
    assert found.kind is Kind.BAD_VALUE
    assert vars(caught.value)["database_name"] == "default"
    engine.dispose()


@pytest.mark.parametrize("name", ["before_cursor_execute", "do_execute"])
def test_the_value_error_of_a_listener_is_no_error_of_the_database(name: str) -> None:
    """A ValueError that a listener of the application raises reaches the caller as it is."""

    def refuse(*_: object) -> None:
        raise ValueError("no query without a tenant")

    engine = sqlite()
    event.listen(engine, name, refuse)
    with (
        pytest.raises(ValueError, match="without a tenant"),
        Database(engine).transaction() as session,
    ):
        session.execute(text("SELECT 1"))
    engine.dispose()
