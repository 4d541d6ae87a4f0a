"""The recognition of database failures, and their mapping to HTTP errors."""

import asyncio
import contextlib
import errno
import logging
import socket
import sqlite3
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import asyncpg
import psycopg
import pymysql
import pytest
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
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
from fastapi_sqlnative._drivers.failures import ended_before_commit, reported_by_server
from fastapi_sqlnative.exceptions import (
    AfterCommitError,
    CommitOutcomeUnknownError,
    PartialCommitError,
    SessionFinishedError,
    TransactionAbortedError,
    UncommittedChangesError,
)
from tests.failing import of_driver

Kind = DatabaseErrorKind


def raised(from_: BaseException | None, error: Exception) -> Exception:
    """Raise and catch an error, so that its cause and traceback are real."""
    try:
        raise error from from_
    except type(error) as caught:
        return caught


def wrapped(error: Exception, statement: str | None = None) -> exc.DBAPIError:
    """Wrap a driver's error as SQLAlchemy does, on purpose in a class that is not specific."""
    return exc.DBAPIError(statement, None, error)


class Stating(psycopg.Error):
    """A driver's error with a code and a text that contradict each other."""

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
    Kind.AFTER_COMMIT: AfterCommitError(),
}


# --- recognition --------------------------------------------------------------------------------


class CodedError(Exception):
    """An error of no driver that has the attributes of drivers' errors."""

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
    """An error that is no database failure is not described, even if it resembles one."""
    assert describe_database_error(error) is None


@pytest.mark.parametrize(("kind", "error"), OWN.items(), ids=OWN)
def test_failures_without_a_code_are_described_by_their_class(kind: Kind, error: Exception) -> None:
    """SQLAlchemy's own errors and ours are described by their class, whatever caused them."""
    found = describe_database_error(raised(wrapped(UNIQUE), error))
    assert found is not None
    assert (found.kind, found.code, found.retryable) == (kind, None, False)


def test_the_nearest_failure_of_the_chain_counts() -> None:
    """An application's error is described by the nearest database failure among its causes."""
    near = raised(raised(OWN[Kind.STALE], wrapped(UNIQUE)), LookupError())
    found = describe_database_error(near)
    assert found is not None
    assert found.kind is Kind.UNIQUE


def test_a_context_is_no_cause() -> None:
    """An error that was only raised during the handling of a failure is not described."""
    error = KeyError()
    error.__context__ = wrapped(UNIQUE)
    assert describe_database_error(error) is None


def test_a_cycle_of_causes_ends() -> None:
    """Errors that are each other's cause are examined only once."""
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert describe_database_error(first) is None


def test_the_code_decides_and_not_the_text_or_class() -> None:
    """The code decides the kind, whatever the text or SQLAlchemy's class indicates."""
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
        ("22004", Kind.BAD_VALUE),
        ("22023", Kind.OTHER),
        ("22030", Kind.BAD_VALUE),
        ("2200H", Kind.OTHER),
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
    """An exact code takes precedence over its class.

    A code that no test can provoke has the kind of its class, unless the table lists it.
    """
    found = describe_database_error(wrapped(Stating(code, "")))
    assert found is not None
    assert (found.kind, found.code) == (kind, code)


def test_an_error_of_a_driver_is_described_without_sqlalchemy(postgres: WorkerPostgres) -> None:
    """An error of a driver that is called directly is described too, without its SQL."""
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
    # A part of a value is not taken for a name.
    assert found[2] is not None
    assert found[2].constraint == "uq"


def connecting(error: Exception) -> exc.DBAPIError:
    """Wrap a driver's error that was raised before there was a connection."""
    return exc.OperationalError(None, None, error)


def failure_to_connect(driver: str) -> exc.DBAPIError:
    """Connect to a port without a listener, and return the error.

    An error that the driver raises by itself is wrapped here.
    """
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    url = f"postgresql+{driver}://canary@127.0.0.1:{port}/canary"

    async def connect() -> None:
        async with create_async_engine(url).connect():
            pass

    try:
        if driver == "asyncpg":
            asyncio.run(connect())
        create_engine(url).connect()
    except exc.DBAPIError as error:
        return error
    except OSError as error:
        return connecting(error)
    raise AssertionError("somebody listens")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg"])
def test_a_server_that_nobody_reaches_is_away(driver: str) -> None:
    """A driver's error without a code means an outage if there was no connection yet."""
    found = describe_database_error(failure_to_connect(driver))
    assert found is not None
    assert (found.kind, found.code, found.transient, found.retryable) == (
        Kind.UNAVAILABLE,
        None,
        True,
        False,
    )


CLOSED = asyncpg.InterfaceError("connection is closed")


def of_pgbouncer(said: str) -> Exception:
    """Return the error that asyncpg raises for a refusal by PgBouncer."""
    error: Exception = asyncpg.PostgresError.new({"C": "08P01", "M": said})
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (connecting(ConnectionResetError()), Kind.UNAVAILABLE),
        (connecting(TimeoutError()), Kind.UNAVAILABLE),
        (connecting(asyncpg.ConnectionDoesNotExistError()), Kind.UNAVAILABLE),
        (connecting(asyncpg.exceptions.TargetServerAttributeNotMatched()), Kind.UNAVAILABLE),
        (connecting(asyncpg.TooManyConnectionsError()), Kind.TOO_MANY_CONNECTIONS),
        (connecting(of_pgbouncer("query_wait_timeout")), Kind.UNAVAILABLE),
        (connecting(of_pgbouncer("no more connections allowed (...)")), Kind.TOO_MANY_CONNECTIONS),
        (connecting(of_pgbouncer("client connections exceeded (.)")), Kind.TOO_MANY_CONNECTIONS),
        (connecting(asyncpg.InvalidPasswordError()), Kind.PERMISSION_DENIED),
        (connecting(asyncpg.InvalidParameterValueError()), Kind.OTHER),
        (connecting(asyncpg.ClientConfigurationError("no such file")), Kind.OTHER),
        (connecting(psycopg.errors.ConnectionTimeout()), Kind.UNAVAILABLE),
        (exc.InterfaceError(None, None, CLOSED), Kind.UNAVAILABLE),
        (exc.InterfaceError("SELECT 1", None, CLOSED), Kind.UNAVAILABLE),
        (exc.InterfaceError("SELECT 1", None, asyncpg.InterfaceError("busy")), Kind.OTHER),
        (exc.OperationalError("SELECT 1", None, psycopg.OperationalError("busy")), Kind.OTHER),
        (exc.OperationalError("SELECT 1", None, TimeoutError()), Kind.STATEMENT_TIMEOUT),
        (exc.OperationalError("SELECT 1", None, ConnectionResetError()), Kind.UNAVAILABLE),
    ],
    ids=repr,
)
def test_an_error_without_a_statement_is_of_connecting(error: Exception, kind: Kind) -> None:
    """The kind of an error without a code depends on whether it was raised while connecting."""
    found = describe_database_error(error)
    assert found is not None
    assert found.kind is kind


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("FATAL:  sorry, too many clients already", Kind.TOO_MANY_CONNECTIONS),
        ("FATAL:  client connections exceeded (max_...)", Kind.TOO_MANY_CONNECTIONS),
        ("FATAL:  no more connections allowed (max_...)", Kind.TOO_MANY_CONNECTIONS),
        ('- host a: FATAL:  role "canary" does not exist', Kind.PERMISSION_DENIED),
        ('FATAL:  password authentication failed for user "x"', Kind.PERMISSION_DENIED),
        ("fe_sendauth: no password supplied", Kind.PERMISSION_DENIED),
        ('FATAL:  database "canary" does not exist', Kind.OTHER),
        ("FATAL:  die Datenbank startet gerade", Kind.UNAVAILABLE),
    ],
)
def test_a_refusal_that_libpq_only_words_is_read(said: str, kind: Kind) -> None:
    """libpq's English texts distinguish a refused role or database from an unavailable server."""
    found = describe_database_error(connecting(psycopg.OperationalError(f"failed\n{said}\n")))
    assert found is not None
    assert found.kind is kind


class UnknownDriverError(Exception):
    """An error of an unknown driver, raised with the number and text of a MySQL error."""

    sqlstate = "23505"


def test_a_driver_that_is_not_known_is_not_read_as_another() -> None:
    """An unknown driver's codes are ignored, but SQLAlchemy's mark of a lost connection counts."""
    error = UnknownDriverError(1062, "Duplicate entry 'a' for key 'b'")
    found = describe_database_error(exc.IntegrityError("INSERT", None, error))
    assert (found and found.kind, found and found.code) == (Kind.OTHER, None)
    lost = exc.OperationalError("INSERT", None, error, connection_invalidated=True)
    found = describe_database_error(lost)
    assert (found and found.kind, found and found.retryable) == (Kind.UNAVAILABLE, True)
    assert describe_database_error(error) is None


TAKEN = "Duplicate entry 'x' for key 'y' for key 'uq'"
FIELDS = {"S": "ERROR", "C": "23505", "M": "taken", "D": "Key (b)=(x)", "t": "t", "n": "uq"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (of_driver("pg8000.exceptions", FIELDS), "23505"),
        (of_driver("mysql.connector.errors", 1062, f"1062: {TAKEN}", "", msg=TAKEN), "1062"),
        (of_driver("mariadb", TAKEN, errno=1062, msg=TAKEN), "1062"),
    ],
    ids=["pg8000", "mysql.connector", "mariadb"],
)
def test_a_driver_that_keeps_its_code_elsewhere_is_read(error: Exception, code: str) -> None:
    """A code is read wherever a driver's error keeps it, and has the same kind everywhere."""
    found = describe_database_error(wrapped(error))
    assert found is not None
    assert (found.kind, found.code, found.constraint) == (Kind.UNIQUE, code, "uq")


def test_a_number_without_a_text_is_enough() -> None:
    """A connector's error is described by its number alone, as a pool or a test may raise it."""
    found = describe_database_error(wrapped(of_driver("mariadb", errno=1062)))
    assert found is not None
    assert (found.kind, found.constraint) == (Kind.UNIQUE, None)


def test_a_commit_that_pg8000_finds_rolled_back_is_not_unknown() -> None:
    """pg8000's own error about a failed transaction block counts as reported by the server.

    The server has reported the rollback, although not as an error. pg8000's other texts do not come
    from the server.
    """
    engine = create_engine("sqlite://")
    engine.dialect.driver = "pg8000"
    said = FIELDS, "in failed transaction block", "network error"
    with engine.connect() as connection:
        found = [reported_by_server(of_driver("pg8000", each), connection) for each in said]
    assert found == [True, True, False]


def test_a_commit_that_mysql_connector_has_not_sent_is_not_unknown() -> None:
    """mysql.connector's error about a closed socket means that no COMMIT was sent.

    Its other errors may concern a COMMIT that was sent.
    """
    said = "MySQL Connection not available.", "Lost connection to MySQL server during query"
    module = "mysql.connector.errors"
    found = [ended_before_commit(of_driver(module, each, name="OperationalError")) for each in said]
    assert found == [True, False]


def test_a_lost_connection_that_only_pg8000_words_is_read() -> None:
    """pg8000's "network error" is an outage, as the other drivers' classes and codes for it are."""
    error = of_driver("pg8000.exceptions", "network error", name="InterfaceError")
    found = describe_database_error(wrapped(error))
    assert found is not None
    assert found.kind is Kind.UNAVAILABLE


def test_a_code_of_another_database_is_none() -> None:
    """A PostgreSQL driver's SQLSTATE is not looked up among MySQL's numbers."""
    found = describe_database_error(wrapped(Stating("1062", "")))
    assert found is not None
    assert found.kind is Kind.OTHER


@pytest.mark.parametrize("own", sorted(OWN.keys() - {Kind.ABORTED_TRANSACTION}))
@pytest.mark.parametrize("inside", ["57P01", "40001"])
def test_the_cause_of_an_error_of_ours_decides_nothing(own: Kind, inside: str) -> None:
    """SQLAlchemy's own errors and ours keep their kind and are not retryable, whatever caused them.

    Something may have been stored.
    """
    lost = exc.OperationalError("UPDATE t", None, Stating(inside, ""), connection_invalidated=True)
    found = describe_database_error(raised(lost, OWN[own]))
    assert found is not None
    assert (found.kind, found.retryable, found.transient) == (own, False, own is Kind.POOL_TIMEOUT)


@pytest.mark.parametrize(
    ("lost", "kind"), [(True, Kind.UNAVAILABLE), (False, Kind.ABORTED_TRANSACTION)]
)
def test_a_commit_refused_for_a_lost_connection_is_a_lost_connection(
    lost: bool, kind: Kind
) -> None:
    """A commit that fails because of an earlier lost connection is an outage and retryable.

    Nothing can be stored then. A commit that fails for another reason is not retryable.
    """
    cause = exc.OperationalError("UPDATE t", None, Stating("x", ""), connection_invalidated=lost)
    found = describe_database_error(raised(cause, TransactionAbortedError()))
    assert found is not None
    assert (found.kind, found.retryable, found.transient) == (kind, lost, lost)


def test_a_group_of_one_failure_is_that_failure() -> None:
    """An exception group is described by its failure if it contains exactly one."""
    one = ExceptionGroup("tasks", [ExceptionGroup("tasks", [wrapped(UNIQUE)])])
    found = describe_database_error(one)
    assert found is not None
    assert found.kind is Kind.UNIQUE
    two = ExceptionGroup("tasks", [wrapped(UNIQUE), wrapped(UNIQUE)])
    assert describe_database_error(two) is None


def test_a_connection_that_may_have_been_lost_in_commit_is_not_retryable() -> None:
    """A connection lost outside a statement is not retryable, as it may have been in COMMIT."""
    lost = Stating("57P01", "")
    in_statement = exc.OperationalError("UPDATE t", None, lost, connection_invalidated=True)
    in_commit = exc.OperationalError(None, None, lost, connection_invalidated=True)
    found = [describe_database_error(each) for each in (in_statement, in_commit, lost)]
    assert [each and each.retryable for each in found] == [True, False, False]


def test_a_description_cannot_be_changed() -> None:
    """A description is frozen, and equal to another description of the same failure."""
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
        ("/* UPDATE */ -- DELETE\n INSERT INTO child VALUES (1)", Kind.MISSING_PARENT),
        ("WITH x AS (SELECT 'DELETE') INSERT INTO child SELECT 1", Kind.MISSING_PARENT),
        ("UPDATE child SET x = 1", Kind.FOREIGN_KEY),
        ("INSERT OR REPLACE INTO child VALUES (1)", Kind.FOREIGN_KEY),
        ("REPLACE INTO child VALUES (1)", Kind.FOREIGN_KEY),
        (None, Kind.FOREIGN_KEY),
    ],
)
def test_which_way_a_foreign_key_failed_is_told_by_the_statement(
    statement: str | None, kind: Kind
) -> None:
    """On SQLite, the statement decides in which direction a foreign key failed.

    SQLite reports only that one failed. If the statement does not decide it, the kind is
    `foreign_key`.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.executescript(
            "PRAGMA foreign_keys = ON; CREATE TABLE parent (id INTEGER PRIMARY KEY);"
            "CREATE TABLE child (id INT REFERENCES parent)"
        )
        with pytest.raises(sqlite3.Error) as caught:
            memory.execute("INSERT INTO child VALUES (1)")
    found = describe_database_error(wrapped(caught.value, statement))
    assert found is not None
    assert found.kind is kind


class ForeignKey(asyncpg.ForeignKeyViolationError):  # type: ignore[misc] # asyncpg has no types
    table_name = "child"
    constraint_name = "fk"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('insert or update on table "child" violates constraint "fk"', Kind.MISSING_PARENT),
        ("Einfügen in Tabelle »child« verletzt Constraint »fk«", Kind.MISSING_PARENT),
        ("« child » « fk »", Kind.MISSING_PARENT),
        ('update or delete on "parent" violates "fk" on "child"', Kind.STILL_REFERENCED),
        ("Löschen in »parent« verletzt »fk« von »child«", Kind.STILL_REFERENCED),
        ("", Kind.FOREIGN_KEY),
    ],
)
def test_postgresql_tells_the_way_by_the_number_of_names(said: str, kind: Kind) -> None:
    """On PostgreSQL, the number of tables in the message decides the direction of a foreign key.

    The message names one table or two in any language, whatever statement was executed.
    """
    error: Any = ForeignKey(said)
    error.message = said
    found = describe_database_error(wrapped(error, "SELECT a_function()"))
    assert found is not None
    assert (found.kind, found.table, found.constraint) == (kind, "child", "fk")


@pytest.mark.parametrize(
    ("code", "said", "statement", "constraint", "table"),
    [
        (1062, "Duplicate entry 'a' for key 'uq-email'", "INSERT", "uq-email", None),
        (1062, "Duplicate entry 'a' for key 'uq.email'", "INSERT INTO t", "uq.email", None),
        (1062, "Duplicate entry 'a' for key 't.uq.email'", "INSERT INTO `t`", "uq.email", "t"),
        (1062, "Duplicate entry 'x' for key 'y' for key 'uq'", "INSERT", "uq", None),
        (
            1452,
            "Cannot add or update a child row: a foreign key constraint fails (`my-db`.`t-1`, "
            "CONSTRAINT `fk.a``b` FOREIGN KEY (`x`) REFERENCES `p` (`id`))",
            "INSERT",
            "fk.a`b",
            "t-1",
        ),
        (4025, "CONSTRAINT `ck.a` failed for `my-db`.`t-1`", "INSERT", "ck.a", "t-1"),
    ],
)
def test_names_of_mysql_may_hold_anything(
    code: int, said: str, statement: str, constraint: str, table: str | None
) -> None:
    """MySQL's names may contain dashes, dots and backticks, and values are not taken for names."""
    found = describe_database_error(wrapped(pymysql.err.IntegrityError(code, said), statement))
    assert found is not None
    assert (found.constraint, found.table) == (constraint, table)


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
    ForeignKeyConstraint(["email"], ["other.email"], name="fk_email"),
    CheckConstraint("id > 0", name="ck_id"),
)
account = METADATA.tables["account"]
Index("ix_bank_number", account.c.bank, account.c.number)
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
    """A constraint gets its columns, in order, only if the metadata identifies them exactly."""
    error = wrapped(Named(constraint, table))
    found = describe_database_error(error, metadata=METADATA)
    assert found is not None
    assert (found.constraint, found.columns) == (constraint, columns)
    without = describe_database_error(error)
    assert without is not None
    assert without.columns == ()


def refused_by_sqlite(table: str, rows: str) -> sqlite3.Error:
    """Return SQLite's error for rows that a table's constraints do not allow."""
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.execute(f"CREATE TABLE {table}")
        with pytest.raises(sqlite3.Error) as caught:
            memory.execute(f"INSERT INTO {table.partition(' ')[0]} VALUES {rows}")
    return caught.value


@pytest.mark.parametrize(
    ("paths", "constraint"),
    [
        ("account.number, account.bank", "uq_account_bank_number"),
        ("account.email", "uq_same"),
        ("account.bank", None),
        ("account.id", None),
        ("unheard_of.email", None),
    ],
)
def test_metadata_names_the_constraint_of_what_sqlite_states(
    paths: str, constraint: str | None
) -> None:
    """The key on exactly the columns that SQLite reports is the constraint that was violated."""
    table = paths.partition(".")[0]
    names = [path.partition(".")[2] for path in paths.split(", ")]
    columns, row = ", ".join(names), ", ".join("1" for _ in names)
    error = refused_by_sqlite(f"{table} ({columns}, UNIQUE ({columns}))", f"({row}), ({row})")
    found = describe_database_error(error, metadata=METADATA)
    assert found is not None
    assert (found.constraint, found.table, found.columns) == (constraint, table, tuple(names))


@pytest.mark.parametrize(
    ("table", "rows"), [("account (email NOT NULL)", "(NULL)"), ('"a.b" (c UNIQUE)', "(1), (1)")]
)
def test_metadata_names_no_constraint_of_which_nothing_is_said(table: str, rows: str) -> None:
    """No constraint is named for a NOT NULL failure, or if SQLite's message yields no columns.

    A name with a dot could be read in two ways, so it yields no table either.
    """
    found = describe_database_error(refused_by_sqlite(table, rows), metadata=METADATA)
    assert found is not None
    assert found.constraint is None
    assert found.table in {"account", None}


LONG = "uq_a_table_with_a_name_of_some_length_a_column_with_a_name_of_some_length"
CUT = MetaData(naming_convention={"uq": "uq_%(table_name)s_%(column_0_name)s"})
Table(
    "a_table_with_a_name_of_some_length",
    CUT,
    Column("a_column_with_a_name_of_some_length", String, unique=True),
    Column("a_column_with_a_name_of_some_length_too", String, unique=True),
)
Table("parted", CUT, Column("id", Integer), Column("year", Integer))
parted = CUT.tables["parted"]
Index("uq_year", parted.c.year, unique=True)
elsewhere = Table("elsewhere", CUT, Column("id", Integer), Column("year", Integer))
Index("uq_elsewhere", elsewhere.c.id, elsewhere.c.year, unique=True)
OF_ITS_OWN = f"uq_{'long' * 20}"
Table("wide", CUT, Column("id", Integer), UniqueConstraint("id", name=OF_ITS_OWN))
Index("uq_parted", parted.c.id, parted.c.year, unique=True)


def postgres_failure(postgres: WorkerPostgres, *statements: str) -> exc.DBAPIError:
    """Create the table with long names, run statements, and return the error of the last one."""
    engine = create_engine(postgres.url("psycopg"))
    *before, last = statements
    with engine.connect() as connection:
        CUT.tables["a_table_with_a_name_of_some_length"].create(connection)
        for statement in before:
            connection.execute(text(statement))
        with pytest.raises(exc.DBAPIError) as caught:
            connection.execute(text(last))
    engine.dispose()
    return caught.value


def test_metadata_knows_a_name_that_was_too_long(postgres: WorkerPostgres) -> None:
    """A constraint name that SQLAlchemy shortened is described by its full name in the metadata.

    A rule applies under either name.
    """
    insert = "INSERT INTO a_table_with_a_name_of_some_length VALUES ('a', '{}')"
    error = postgres_failure(postgres, insert.format(1), insert.format(2))
    stated = describe_database_error(error)
    found = describe_database_error(error, metadata=CUT)
    assert stated is not None
    assert found is not None
    assert stated.constraint != LONG
    assert (found.constraint, found.columns) == (LONG, ("a_column_with_a_name_of_some_length",))
    for name in LONG, stated.constraint:
        rules: Any = {"constraints": {name: "Taken."}, "metadata": CUT}
        assert mapped(error, **rules).detail == "Taken."


@pytest.mark.parametrize(("kept", "known"), [(63, True), (10, False)])
def test_metadata_knows_a_name_that_the_server_has_cut(kept: int, known: bool) -> None:
    """A name that SQLAlchemy does not shorten is found by the part that PostgreSQL keeps.

    A shorter part is not enough.
    """
    stated = OF_ITS_OWN[:kept]
    found = describe_database_error(wrapped(Named(stated)), metadata=CUT)
    assert found is not None
    assert found.constraint == (OF_ITS_OWN if known else stated)


PARTITIONS = (
    "CREATE TABLE parted (id int, year int, UNIQUE (id, year)) PARTITION BY RANGE (year)",
    "CREATE TABLE parted_2024 PARTITION OF parted FOR VALUES FROM (2024) TO (2025)",
    "CREATE TABLE log (id int, year int, UNIQUE (id, year)); INSERT INTO log VALUES (1, 2024)",
    "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
    " 'BEGIN INSERT INTO log VALUES (NEW.id, NEW.year); RETURN NEW; END'",
)


@pytest.mark.parametrize(
    ("statements", "constraint"),
    [
        (["INSERT INTO parted VALUES (1, 2024), (1, 2024)"], "uq_parted"),
        (["WITH a AS (SELECT 1) INSERT INTO parted VALUES (1, 2024), (1, 2024)"], "uq_parted"),
        (["INSERT INTO parted_2024 VALUES (1, 2024), (1, 2024)"], "parted_2024_id_year_key"),
        (["INSERT INTO log SELECT 1, 2024 FROM parted RIGHT JOIN log ON true"], "log_id_year_key"),
        (
            [
                "CREATE TRIGGER note BEFORE INSERT ON parted FOR EACH ROW EXECUTE FUNCTION note()",
                "INSERT INTO parted VALUES (1, 2024)",
            ],
            "log_id_year_key",
        ),
        (
            [
                "ALTER TABLE parted_2024"
                " ADD CONSTRAINT fk FOREIGN KEY (id, year) REFERENCES log (id, year)",
                "INSERT INTO parted VALUES (2, 2024)",
            ],
            "fk",
        ),
    ],
    ids=["table", "cte", "partition", "another-table", "trigger", "another-constraint"],
)
def test_metadata_knows_the_key_of_a_partitioned_table(
    postgres: WorkerPostgres, statements: list[str], constraint: str
) -> None:
    """A partition's key is described as that of the partitioned table that the statement names.

    The keys of other tables and other constraints keep their names.
    """
    found = describe_database_error(
        postgres_failure(postgres, *PARTITIONS, *statements), metadata=CUT
    )
    assert found is not None
    assert found.constraint == constraint
    assert (found.table == "parted") is (constraint == "uq_parted")


# --- any object ---------------------------------------------------------------------------------


class Hostile:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


# Hypothesis knows these characters without encoding each of them, which takes a second.
CHARACTERS = st.characters(exclude_categories=["Cs"])
VALUES = st.one_of(
    st.none(),
    st.integers(),
    st.text(CHARACTERS, max_size=20),
    st.binary(max_size=5),
    st.lists(st.text(CHARACTERS, max_size=5), max_size=2),
    st.builds(Hostile),
    st.sampled_from(["23505", "22023", "42501", 1062, 1452, "SQLITE_CONSTRAINT_UNIQUE"]),
    st.builds(OSError),
)
NAMES = "sqlstate pgcode diag constraint_name table_name detail context sqlite_errorname message"


@st.composite
def errors(draw: st.DrawFn) -> object:
    """Draw a driver's error with odd attributes, plain, wrapped, in a group or as a cause."""
    known = [psycopg.OperationalError, sqlite3.Error, pymysql.err.MySQLError, ValueError, OSError]
    error = draw(st.sampled_from([*known, asyncpg.PostgresError]))(*draw(st.lists(VALUES)))
    for name, value in draw(st.dictionaries(st.sampled_from(NAMES.split()), VALUES)).items():
        with contextlib.suppress(AttributeError, TypeError):  # the class does not let it be set
            setattr(error, name, value)
    odd: Any = draw(VALUES)
    wrappers: list[Callable[[], object]] = [
        lambda: error,
        lambda: odd,
        lambda: exc.DBAPIError(odd, odd, error),
        lambda: exc.DBAPIError("INSERT INTO t", None, odd),
        lambda: ExceptionGroup("", [error]),
        lambda: raised(error, RuntimeError()),
    ]
    return draw(st.sampled_from(wrappers))()


def test_describing_never_fails(thorough: bool) -> None:
    """describe_database_error() raises for no object, because exception handlers call it."""

    @given(errors())
    @settings(max_examples=100 if thorough else 30, deadline=None)
    def describe(error: Any) -> None:
        describe_database_error(error)
        describe_database_error(error, metadata=METADATA)

    describe()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "said",
    ["FATAL:  ", 'FATAL:  role "', "UNIQUE constraint failed: a.b, ", "CONSTRAINT ``", "(a)=",
     "Duplicate entry '' for key '", "/*", "'", "Cannot a: a foreign key constraint fails (`a`.`"],
)  # fmt: skip
def test_describing_takes_time_in_proportion_to_the_message(said: str) -> None:
    """The time to describe a failure is proportional to the length of its message.

    A message of half a megabyte does not block the process, because its parts are examined once.
    """
    long = said * (500_000 // len(said))
    describe_database_error(connecting(psycopg.OperationalError(long)))
    describe_database_error(connecting(sqlite3.IntegrityError(long)))
    error = sqlite3.IntegrityError()
    error.sqlite_errorname = "SQLITE_CONSTRAINT_FOREIGNKEY"
    describe_database_error(wrapped(error, long))


# --- mapping ------------------------------------------------------------------------------------


def mapped(error: Exception, **options: Any) -> HTTPException:
    found = map_database_error(error, **options)
    assert isinstance(found, HTTPException)
    return found


def test_a_block_answers_a_drivers_own_error() -> None:
    """http_errors() also maps an error that a driver raises outside of SQLAlchemy."""
    with pytest.raises(HTTPException) as caught, http_errors(unique="Taken."):
        raise UNIQUE
    assert (caught.value.status_code, caught.value.detail) == (409, "Taken.")


def test_a_mapped_failure_keeps_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    """The mapped HTTPException has the failure as its cause, and the failure is logged once."""
    error = raised(wrapped(UNIQUE), LookupError("canary"))
    with caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        found = mapped(error)
    assert (found.status_code, found.__cause__) == (409, error)
    (record,) = caplog.records
    assert (record.levelname, record.exc_info) == ("INFO", None)
    assert "23505" in record.getMessage()


HTTP_ERRORS = [HTTPException(418), StarletteHTTPException(418)]


@pytest.mark.parametrize(
    "error",
    [ValueError(), RequestValidationError([]), *HTTP_ERRORS],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_failure_comes_back_itself(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that is no failure is returned as the same object, so that raising it hides nothing.

    The same applies to an HTTPException with any cause.
    """
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
        (Kind.AFTER_COMMIT, 500),
    ],
)
def test_our_own_errors_are_mapped(kind: Kind, status: int) -> None:
    """A failure that must not be repeated gets neither 503 nor Retry-After, whatever caused it."""
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
    assert found.detail == mapped(busy).detail
    assert mapped(wrapped(UNIQUE), deadlock="Later.").detail != "Later."


def test_a_constraint_goes_before_its_kind() -> None:
    """The message for a constraint takes precedence over its kind's, for this constraint only."""
    options: dict[str, Any] = {
        "unique": "Taken.",
        "constraints": {"uq_email": "E-mail already registered."},
    }
    assert mapped(wrapped(Named("uq_email")), **options).detail == "E-mail already registered."
    assert mapped(wrapped(Named("uq_email")), **options).status_code == 409
    assert mapped(wrapped(Named("uq_other")), **options).detail == "Taken."
    options["unique"] = ErrorRule(pointer="#/email")
    found: Any = mapped(wrapped(Named("uq_email")), **options)
    assert (found.detail, found.pointer) == ("E-mail already registered.", "#/email")


def test_a_rule_for_foreign_keys_is_one_for_both_ways() -> None:
    """The rule `foreign_key` applies to both directions, but a rule for one takes precedence."""
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
    """An unknown kind or an invalid rule raises TypeError immediately, before any failure."""
    with pytest.raises(TypeError, match=named):
        entrance(**options)


@pytest.mark.parametrize("constraints", [{"uq": 409}, {1: "Taken."}, ["uq"], "uq"], ids=str)
def test_constraints_that_are_none_are_refused(constraints: Any) -> None:
    """`constraints` that do not map names to messages or rules raise TypeError."""
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
    """ErrorRule raises an error that names the invalid argument.

    A status below 400 or above 599 is invalid, and so is a `pointer` that is no JSON pointer.
    """
    with pytest.raises(error, match=next(reversed(options))):
        ErrorRule(**options)


def test_a_rule_may_be_at_its_limits() -> None:
    """An ErrorRule may have the status 400 or 599 and a Retry-After of 0."""
    for status in 400, 599:
        assert mapped(wrapped(UNIQUE), unique=ErrorRule(status=status)).status_code == status
    found = mapped(wrapped(UNIQUE), unique=ErrorRule(status=503, retry_after=0))
    assert found.headers == {"Retry-After": "0"}


@pytest.mark.parametrize(
    "rule", [ErrorRule(status=503), ErrorRule(status=504), ErrorRule(status=429, retry_after=1)]
)
def test_no_rule_tells_to_repeat_what_is_stored(rule: ErrorRule) -> None:
    """If something was stored, a failure gets 500 without Retry-After, whatever its rule says.

    Its outcome is unknown.
    """
    error: Any = wrapped(UNIQUE)
    assert mapped(error, unique=rule).status_code == rule.status
    error.database_stored = True  # as our session records it
    found = mapped(error, unique=rule)
    assert (found.status_code, found.headers) == (500, None)


@pytest.mark.parametrize("kind", ["outcome_unknown", "partial_commit", "after_commit"])
def test_nobody_is_told_to_repeat_what_is_half_stored(kind: str) -> None:
    """A rule that answers an unknown outcome with 503 or Retry-After raises ValueError."""
    for status, later in (503, None), (503, 1), (500, 1):
        rules: dict[str, Any] = {kind: ErrorRule("Again.", status, retry_after=later)}
        with pytest.raises(ValueError, match=kind):
            http_errors(**rules)
    rules = {kind: ErrorRule("Look.", 502)}
    http_errors(**rules)


def test_an_error_without_a_drivers_error_is_none() -> None:
    """A DBAPIError that was made by hand, without a driver's error, is no database failure."""
    made = exc.DBAPIError("", None, None)  # type: ignore[arg-type] # by hand
    assert describe_database_error(made) is None
