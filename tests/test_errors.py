"""What is a database failure and what is not, and what the mapping makes of it."""

import asyncio
import contextlib
import errno
import logging
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import asyncpg
import psycopg
import pymysql
import pytest
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from sqlalchemy import (
    CheckConstraint,
    Column,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    exc,
    func,
    text,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm.exc import StaleDataError
from starlette.exceptions import HTTPException as StarletteHTTPException

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    DatabaseErrorKind,
    ErrorRule,
    describe_database_error,
    error_responses,
    http_errors,
    map_database_error,
)
from fastapi_sqlnative.exceptions import (
    CommitOutcomeUnknownError,
    PartialCommitError,
    SessionFinishedError,
    TransactionAbortedError,
    UncommittedChangesError,
)

Kind = DatabaseErrorKind


def raised(from_: BaseException | None, error: Exception) -> Exception:
    """Raise and catch, so that cause and traceback are real."""
    try:
        raise error from from_
    except type(error) as caught:
        return caught


def wrapped(error: Exception, statement: str | None = None) -> exc.DBAPIError:
    """Wrap a driver's error as SQLAlchemy does; its class says nothing on purpose."""
    return exc.DBAPIError(statement, None, error)


class Stating(psycopg.Error):
    """Be a driver's error with a code and a text that contradict each other."""

    def __init__(self, sqlstate: str, said: str) -> None:
        super().__init__(said)
        self.sqlstate = sqlstate


UNIQUE = Stating("23505", "canary")
OWN: dict[Kind, Exception] = {
    Kind.STALE: StaleDataError(),
    Kind.POOL_TIMEOUT: exc.TimeoutError(),
    Kind.ABORTED_TRANSACTION: TransactionAbortedError(),
    Kind.UNCOMMITTED_CHANGES: UncommittedChangesError(),
    Kind.PARTIAL_COMMIT: PartialCommitError(("a",), "b"),
    Kind.OUTCOME_UNKNOWN: CommitOutcomeUnknownError(),
}


# --- what it is ---------------------------------------------------------------------------------


class CodedError(Exception):
    """Have whatever an error may be mistaken for."""

    code = sqlstate = pgcode = "23505"
    errno = 1062
    sqlite_errorname = "SQLITE_CONSTRAINT_UNIQUE"


@pytest.mark.parametrize(
    "error",
    [
        ValueError(1062, "Duplicate entry"),
        CodedError(1062),
        OSError(errno.ECONNREFUSED, "refused"),
        TimeoutError(),
        HTTPException(409),
        exc.NoResultFound(),
        exc.InvalidRequestError(),
        exc.StatementError("text", None, None, ValueError()),
        SessionFinishedError(),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_database_failure_is_not_described(error: BaseException) -> None:
    """Not the look of an error counts, but whose it is."""
    assert describe_database_error(error) is None


@pytest.mark.parametrize(("kind", "error"), OWN.items(), ids=OWN)
def test_failures_without_a_code_are_described_by_their_class(kind: Kind, error: Exception) -> None:
    """SQLAlchemy's own and ours mean one thing each, whatever caused them."""
    found = describe_database_error(raised(wrapped(UNIQUE), error))
    assert found is not None
    assert (found.kind, found.code, found.retryable) == (kind, None, False)


def test_the_nearest_failure_of_the_chain_counts() -> None:
    """An error of the application's is described by its cause, the nearest of several."""
    near = raised(raised(OWN[Kind.STALE], wrapped(UNIQUE)), LookupError())
    found = describe_database_error(near)
    assert found is not None
    assert found.kind is Kind.UNIQUE


def test_a_context_is_no_cause() -> None:
    """An error that merely happened while a failure was handled is not that failure."""
    error = KeyError()
    error.__context__ = wrapped(UNIQUE)
    assert describe_database_error(error) is None


def test_a_cycle_of_causes_ends() -> None:
    """Errors that are each other's cause are looked at once."""
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert describe_database_error(first) is None


def test_the_code_decides_and_not_the_text_or_class() -> None:
    """A text that names another failure changes nothing, nor does SQLAlchemy's class."""
    said = 'duplicate key value violates unique constraint "uq_canary" (23505)'
    found = describe_database_error(exc.IntegrityError("", None, Stating("40001", said)))
    assert found is not None
    assert (found.kind, found.code, found.retryable) == (Kind.SERIALIZATION, "40001", True)
    unknown = describe_database_error(exc.IntegrityError("", None, Stating("99999", said)))
    assert unknown is not None
    assert (unknown.kind, unknown.code, unknown.constraint) == (Kind.OTHER, "99999", None)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("08006", Kind.UNAVAILABLE),
        ("08P01", Kind.UNAVAILABLE),
        ("08007", Kind.OUTCOME_UNKNOWN),
        ("22012", Kind.OTHER),
        ("22023", Kind.OTHER),
        ("23001", Kind.STILL_REFERENCED),
        ("25P03", Kind.UNAVAILABLE),
        ("25P04", Kind.STATEMENT_TIMEOUT),
        ("28P01", Kind.PERMISSION_DENIED),
        ("40003", Kind.OUTCOME_UNKNOWN),
        ("53200", Kind.UNAVAILABLE),
        ("53300", Kind.TOO_MANY_CONNECTIONS),
        ("57014", Kind.STATEMENT_TIMEOUT),
        ("57P03", Kind.UNAVAILABLE),
        ("P0001", Kind.OTHER),
        ("XX000", Kind.OTHER),
    ],
)
def test_an_exact_code_goes_before_its_class(code: str, kind: Kind) -> None:
    """Codes that no test can provoke are read as the rest of their class, unless they differ."""
    found = describe_database_error(wrapped(Stating(code, "")))
    assert found is not None
    assert (found.kind, found.code) == (kind, code)


def test_an_error_of_a_driver_is_described_without_sqlalchemy(postgres: WorkerPostgres) -> None:
    """Who calls a driver directly has its errors described too, without their SQL."""
    with psycopg.connect(postgres.dsn) as connection, pytest.raises(psycopg.Error) as of_psycopg:
        connection.execute("SELECT 'canary'::int")
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.execute("CREATE TABLE t (n INT UNIQUE)")
        with pytest.raises(sqlite3.Error) as of_sqlite:
            memory.execute("INSERT INTO t VALUES (1), (1)")
    of_mysql = pymysql.err.IntegrityError(1062, "Duplicate entry 'x' for key 'y' for key 'uq'")
    found = [
        describe_database_error(each) for each in (of_psycopg.value, of_sqlite.value, of_mysql)
    ]
    assert [each and each.code for each in found] == ["22P02", "SQLITE_CONSTRAINT_UNIQUE", "1062"]
    # What a value says is not taken for a name.
    assert found[2] is not None
    assert found[2].constraint == "uq"


def asyncpg_failure(url: str, statement: str = "SELECT 1", **connect_args: Any) -> Exception:
    async def main() -> None:
        engine = create_async_engine(url, connect_args=connect_args)
        try:
            async with engine.connect() as connection:
                await connection.execute(text(statement))
        finally:
            await engine.dispose()

    with pytest.raises((OSError, asyncpg.PostgresError)) as caught:
        asyncio.run(main())
    assert isinstance(caught.value, Exception)
    return caught.value


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "nowhere.invalid:1"], ids=["refused", "unknown-host"]
)
def test_asyncpg_that_cannot_connect_is_described(host: str) -> None:
    """Its bare OSErrors are told from the application's by where they come from."""
    error = asyncpg_failure(f"postgresql+asyncpg://canary@{host}/canary")
    assert not isinstance(error, exc.SQLAlchemyError)
    found = describe_database_error(error)
    assert found is not None
    assert (found.kind, found.code, found.transient, found.retryable) == (
        Kind.UNAVAILABLE,
        None,
        True,
        False,
    )


def test_asyncpg_that_waits_in_vain_to_connect_is_described() -> None:
    """A server that accepts and says nothing is away, too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        error = asyncpg_failure(f"postgresql+asyncpg://canary@127.0.0.1:{port}/canary", timeout=0.2)
    assert type(error) is TimeoutError
    found = describe_database_error(error)
    assert found is not None
    assert found.kind is Kind.UNAVAILABLE


def test_asyncpg_that_waits_in_vain_for_an_answer_is_described(postgres: WorkerPostgres) -> None:
    """Its own timeout for a statement is one, like the server's."""
    url = postgres.url("asyncpg")
    error = asyncpg_failure(url, "SELECT pg_sleep(5)", command_timeout=0.1)
    assert type(error) is TimeoutError
    found = describe_database_error(error)
    assert found is not None
    assert (found.kind, found.transient) == (Kind.STATEMENT_TIMEOUT, False)


def test_a_connection_that_may_have_been_lost_in_commit_is_not_retryable() -> None:
    """Without a statement on its way it may have been a COMMIT: nobody is told to repeat it."""
    lost = Stating("57P01", "")
    in_statement = exc.OperationalError("UPDATE t", None, lost, connection_invalidated=True)
    in_commit = exc.OperationalError(None, None, lost, connection_invalidated=True)
    found = [describe_database_error(each) for each in (in_statement, in_commit, lost)]
    assert [each and each.retryable for each in found] == [True, False, False]


def test_a_description_cannot_be_changed() -> None:
    """It is a value: frozen, and equal to another of the same failure."""
    found = describe_database_error(wrapped(UNIQUE))
    assert found == describe_database_error(wrapped(UNIQUE))
    with pytest.raises(FrozenInstanceError):
        found.kind = Kind.OTHER  # type: ignore[misc, union-attr] # what is tested


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("INSERT INTO child VALUES (1)", Kind.MISSING_PARENT),
        ('  insert into "child" VALUES (1)', Kind.MISSING_PARENT),
        ("DELETE FROM parent", Kind.STILL_REFERENCED),
        ("UPDATE child SET x = 1", Kind.MISSING_PARENT),
        ('UPDATE public."child" SET x = 1', Kind.MISSING_PARENT),
        ("UPDATE ONLY child SET x = 1", Kind.MISSING_PARENT),
        ("UPDATE parent SET x = 1", Kind.STILL_REFERENCED),
        ("WITH x AS (SELECT 1) INSERT INTO child SELECT 1", Kind.FOREIGN_KEY),
        ("CALL anything()", Kind.FOREIGN_KEY),
        (None, Kind.FOREIGN_KEY),
    ],
)
def test_which_way_a_foreign_key_failed_is_told_by_the_statement(
    statement: str | None, kind: Kind
) -> None:
    """PostgreSQL has one code for both; where the statement does not tell, nobody guesses."""

    class OnChild(asyncpg.ForeignKeyViolationError):  # type: ignore[misc] # asyncpg has no types
        table_name = "child"
        constraint_name = "fk"

    found = describe_database_error(wrapped(OnChild(), statement))
    assert found is not None
    assert (found.kind, found.table, found.constraint) == (kind, "child", "fk")


# --- metadata -----------------------------------------------------------------------------------

METADATA = MetaData(naming_convention={"uq": "uq_%(table_name)s_%(column_0_N_name)s"})
Table(
    "account",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("bank", String),
    Column("number", String),
    Column("email", String),
    UniqueConstraint("bank", "number"),
    UniqueConstraint("email", name="uq_same"),
    CheckConstraint("id > 0", name="ck_id"),
)
account = METADATA.tables["account"]
Index("ix_email", account.c.email, account.c.bank, unique=True)
Index("ix_lower_email", func.lower(account.c.email), unique=True)
Table("other", METADATA, Column("email", String), UniqueConstraint("email", name="uq_same"))


class Named(asyncpg.UniqueViolationError):  # type: ignore[misc] # asyncpg has no types
    def __init__(self, constraint: str, table: str | None = None) -> None:
        super().__init__("canary")
        self.constraint_name = constraint
        self.table_name = table


@pytest.mark.parametrize(
    ("constraint", "table", "columns"),
    [
        ("uq_account_bank_number", None, ("bank", "number")),
        ("uq_account_bank_number", "account", ("bank", "number")),
        ("uq_account_bank_number", "other", ()),
        ("uq_same", None, ()),
        ("uq_same", "other", ("email",)),
        ("ix_email", None, ("email", "bank")),
        ("ix_lower_email", None, ()),
        ("ck_id", None, ()),
        ("unheard_of", None, ()),
    ],
)
def test_metadata_names_a_constraints_columns_exactly_or_not_at_all(
    constraint: str, table: str | None, columns: tuple[str, ...]
) -> None:
    """A constraint that the metadata has once gets its columns, in order; any other gets none."""
    error = wrapped(Named(constraint, table))
    found = describe_database_error(error, metadata=METADATA)
    assert found is not None
    assert (found.constraint, found.columns) == (constraint, columns)
    without = describe_database_error(error)
    assert without is not None
    assert without.columns == ()


@pytest.mark.parametrize(
    ("paths", "constraint"),
    [
        ("account.number, account.bank", "uq_account_bank_number"),
        ("account.email", "uq_same"),
        ("account.bank", None),
        ("unheard_of.email", None),
    ],
)
def test_metadata_names_the_constraint_of_what_sqlite_states(
    paths: str, constraint: str | None
) -> None:
    """SQLite states columns: a key that is on exactly these is the one that was violated."""
    table = paths.partition(".")[0]
    names = [path.partition(".")[2] for path in paths.split(", ")]
    columns, row = ", ".join(names), ", ".join("1" for _ in names)
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.execute(f"CREATE TABLE {table} ({columns}, UNIQUE ({columns}))")
        with pytest.raises(sqlite3.Error) as caught:
            memory.execute(f"INSERT INTO {table} VALUES ({row}), ({row})")
    found = describe_database_error(caught.value, metadata=METADATA)
    assert found is not None
    assert (found.constraint, found.table, found.columns) == (constraint, table, tuple(names))


# --- mapping ------------------------------------------------------------------------------------


def mapped(error: Exception, **options: Any) -> HTTPException:
    found = map_database_error(error, **options)
    assert isinstance(found, HTTPException)
    return found


def test_a_mapped_failure_keeps_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    """What is raised in its place names the failure as its cause, and the log has it once."""
    error = raised(wrapped(UNIQUE), LookupError("canary"))
    with caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        found = mapped(error)
    assert (found.status_code, found.__cause__) == (409, error)
    (record,) = caplog.records
    assert (record.levelname, record.exc_info and record.exc_info[1]) == ("INFO", error)


HTTP_ERRORS = [HTTPException(418), StarletteHTTPException(418)]


@pytest.mark.parametrize(
    "error",
    [ValueError(), RequestValidationError([]), *HTTP_ERRORS],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_failure_comes_back_itself(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The very same object, so that raising it hides nothing; an HTTPException with any cause."""
    if error in HTTP_ERRORS:
        error = raised(wrapped(UNIQUE), error)
    assert map_database_error(error) is error
    assert caplog.records == []


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (Kind.STALE, 409),
        (Kind.POOL_TIMEOUT, 503),
        (Kind.ABORTED_TRANSACTION, 500),
        (Kind.UNCOMMITTED_CHANGES, 500),
        (Kind.PARTIAL_COMMIT, 500),
        (Kind.OUTCOME_UNKNOWN, 500),
    ],
)
def test_our_own_errors_are_mapped(kind: Kind, status: int) -> None:
    """What nobody should repeat is no 503 and has no Retry-After, whatever it was caused by."""
    found = mapped(raised(wrapped(Stating("40001", "")), OWN[kind]))
    assert found.status_code == status
    assert bool(found.headers) == (status == 503)


def test_a_message_changes_the_words_and_a_rule_the_row() -> None:
    """A kind is answered with the application's message, status and Retry-After."""
    busy = wrapped(Stating("40P01", ""))
    found = mapped(busy, deadlock="Once more, please.")
    assert (found.status_code, found.detail, found.headers) == (
        503,
        "Once more, please.",
        {"Retry-After": "1"},
    )
    found = mapped(busy, deadlock=ErrorRule("Later.", 429, retry_after=7))
    assert (found.status_code, found.detail, found.headers) == (429, "Later.", {"Retry-After": "7"})
    found = mapped(busy, deadlock=ErrorRule(status=409))
    assert (found.status_code, found.headers) == (409, None)
    assert mapped(wrapped(UNIQUE), deadlock="Later.").detail != "Later."


def test_a_constraint_goes_before_its_kind() -> None:
    """The message for a constraint by name is the one for it, and no other constraint's."""
    options = {"unique": "Taken.", "constraints": {"uq_email": "E-mail already registered."}}
    assert mapped(wrapped(Named("uq_email")), **options).detail == "E-mail already registered."
    assert mapped(wrapped(Named("uq_email")), **options).status_code == 409
    assert mapped(wrapped(Named("uq_other")), **options).detail == "Taken."


def test_a_rule_for_foreign_keys_is_one_for_both_ways() -> None:
    """Who does not care which way it failed writes one; who does is heard."""
    missing, referenced = (
        wrapped(asyncpg.ForeignKeyViolationError(), statement)
        for statement in ("INSERT INTO t VALUES (1)", "DELETE FROM t")
    )
    options = {"foreign_key": "Related.", "still_referenced": "In use."}
    found = mapped(missing, **options)
    assert (found.status_code, found.detail) == (422, "Related.")
    found = mapped(referenced, **options)
    assert (found.status_code, found.detail) == (409, "In use.")


# --- bad input ----------------------------------------------------------------------------------

ENTRANCES: tuple[Callable[..., object], ...] = (
    http_errors,
    error_responses,
    lambda **options: map_database_error(ValueError(), **options),
)


@pytest.mark.parametrize("entrance", ENTRANCES, ids=["http_errors", "error_responses", "map"])
@pytest.mark.parametrize(
    ("options", "named"),
    [({"uniqe": "Taken."}, "uniqe"), ({"unique": 409}, "unique"), ({"unique": None}, "unique")],
)
def test_a_rule_that_is_none_is_refused_where_it_is_written(
    entrance: Callable[..., object], options: dict[str, Any], named: str
) -> None:
    """A kind that does not exist, or a rule that is none, does not wait for the failure."""
    with pytest.raises(TypeError, match=named):
        entrance(**options)


@pytest.mark.parametrize("constraints", [{"uq": 409}, {1: "Taken."}, ["uq"], "uq"], ids=str)
def test_constraints_that_are_none_are_refused(constraints: Any) -> None:
    """A constraint maps to a message or rule."""
    with pytest.raises(TypeError):
        http_errors(constraints=constraints)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"status": 399}, ValueError),
        ({"status": 600}, ValueError),
        ({"status": 200}, ValueError),
        ({"status": "409"}, TypeError),
        ({"status": True}, TypeError),
        ({"detail": 5}, TypeError),
        ({"retry_after": 5}, ValueError),
        ({"status": 503, "retry_after": -1}, ValueError),
        ({"pointer": "email"}, ValueError),
    ],
    ids=str,
)
def test_a_rule_checks_itself(options: dict[str, Any], error: type[Exception]) -> None:
    """No status below 400 or above 599, and no pointer that is none."""
    with pytest.raises(error, match=next(reversed(options))):
        ErrorRule(**options)


@pytest.mark.parametrize("kind", ["outcome_unknown", "partial_commit"])
def test_nobody_is_told_to_repeat_what_is_half_stored(kind: str) -> None:
    """Not even an application can answer an unknown outcome with Retry-After."""
    rules: dict[str, Any] = {kind: ErrorRule("Again.", 503, retry_after=1)}
    with pytest.raises(ValueError, match=kind):
        http_errors(**rules)
    rules = {kind: ErrorRule("Look.", 502)}
    http_errors(**rules)


def test_a_driver_that_is_not_there_is_not_imported() -> None:
    """Describing an error imports no driver."""
    drivers = {"asyncmy", "asyncpg", "psycopg", "psycopg2", "pymysql", "sqlite3"}
    program = (
        "import sys, fastapi_sqlnative as package; package.describe_database_error(ValueError());"
        f"print({drivers} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


def test_an_error_without_a_drivers_error_is_none() -> None:
    """An error that somebody made by hand, with nothing in it, is no failure of a database."""
    made = exc.DBAPIError("", None, None)  # type: ignore[arg-type] # by hand
    assert describe_database_error(made) is None
