"""What a database failure is, read from the codes that drivers and servers state.

Text that a server wrote decides nothing here, where there is a code: it is translated on some
servers, and holds what users have stored.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from traceback import walk_tb
from typing import Final, NamedTuple

from sqlalchemy import Column, MetaData, PrimaryKeyConstraint, Table, UniqueConstraint, exc
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.schema import ColumnCollectionConstraint

from .exceptions import (
    CommitOutcomeUnknownError,
    PartialCommitError,
    TransactionAbortedError,
    UncommittedChangesError,
)


class DatabaseErrorKind(StrEnum):
    """Name what went wrong, whatever the database and its driver.

    The values are the keywords of `http_errors` and `map_database_error`.
    """

    UNIQUE = "unique"
    EXCLUSION = "exclusion"
    FOREIGN_KEY = "foreign_key"  # which of the next two, the database does not tell
    MISSING_PARENT = "missing_parent"
    STILL_REFERENCED = "still_referenced"
    NOT_NULL = "not_null"
    CHECK = "check"
    BAD_VALUE = "bad_value"
    STALE = "stale"
    SERIALIZATION = "serialization"
    DEADLOCK = "deadlock"
    LOCK_NOT_AVAILABLE = "lock_not_available"
    STATEMENT_TIMEOUT = "statement_timeout"  # or cancelled: the servers have one code for both
    POOL_TIMEOUT = "pool_timeout"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    UNAVAILABLE = "unavailable"
    READ_ONLY = "read_only"
    PERMISSION_DENIED = "permission_denied"
    ABORTED_TRANSACTION = "aborted_transaction"
    UNCOMMITTED_CHANGES = "uncommitted_changes"
    PARTIAL_COMMIT = "partial_commit"
    OUTCOME_UNKNOWN = "outcome_unknown"
    OTHER = "other"


Kind = DatabaseErrorKind

# PostgreSQL's SQLSTATEs, of which two digits are a whole class; MySQL's and MariaDB's numbers;
# SQLite's names, of which two words stand for all that begin with them. An exact one goes first.
_CODES: Final[Mapping[Kind, str]] = {
    Kind.UNIQUE: """23505  1022 1062 1169 1586
        SQLITE_CONSTRAINT_UNIQUE SQLITE_CONSTRAINT_PRIMARYKEY SQLITE_CONSTRAINT_ROWID""",
    Kind.EXCLUSION: "23P01",
    Kind.FOREIGN_KEY: "23503  SQLITE_CONSTRAINT_FOREIGNKEY",
    Kind.MISSING_PARENT: "1216 1452",
    Kind.STILL_REFERENCED: "23001  1217 1451",
    Kind.NOT_NULL: "23502  1048 1364  SQLITE_CONSTRAINT_NOTNULL",
    Kind.CHECK: "23514  3819 4025  SQLITE_CONSTRAINT_CHECK",
    # 22000 is asyncpg's own, for what it cannot encode. A division by zero is a bug: not here.
    Kind.BAD_VALUE: """22000 22001 22003 22007 22008 22009 22021 22026 22032 22P02 22P03 22P05
        1264 1265 1292 1366 1367 1406 1411 3140
        SQLITE_MISMATCH SQLITE_TOOBIG SQLITE_CONSTRAINT_DATATYPE""",
    Kind.SERIALIZATION: "40001  1020 3101  SQLITE_BUSY_SNAPSHOT",
    Kind.DEADLOCK: "40P01  1213",
    Kind.LOCK_NOT_AVAILABLE: "55P03  1205 3572  SQLITE_BUSY SQLITE_LOCKED",
    Kind.STATEMENT_TIMEOUT: "57014 25P04  1317 1969 3024  SQLITE_INTERRUPT",
    Kind.TOO_MANY_CONNECTIONS: "53300  1040 1203 1226",
    Kind.UNAVAILABLE: """08 53 57 25P03
        1053 1152 1158 1159 1160 1161 1927 2002 2003 2005 2006 2013 2055 4031  SQLITE_CANTOPEN""",
    Kind.READ_ONLY: "25006  1290 1792 1836  SQLITE_READONLY",
    Kind.PERMISSION_DENIED: "28 42501  1044 1045 1142 1143 1227 1370  SQLITE_AUTH SQLITE_PERM",
    Kind.ABORTED_TRANSACTION: "25P02",
    Kind.OUTCOME_UNKNOWN: "08007 40003",
}
_KINDS: Final = {code: kind for kind, codes in _CODES.items() for code in codes.split()}

# libpq hands on no code of a server that refused a connection, only its words. In another
# language than English they are not understood, and the server is taken to be away.
_REFUSALS: Final = {
    Kind.TOO_MANY_CONNECTIONS: re.compile(
        r"FATAL:  (sorry, too many clients|remaining connection slots|too many connections for) "
    ),
    Kind.PERMISSION_DENIED: re.compile(
        r"FATAL:  (.* authentication failed for user |no pg_hba\.conf entry for |"
        r"pg_hba\.conf rejects connection for |permission denied "
        r'|role ".*" (does not exist|is not permitted to log in))|no password supplied'
    ),
    Kind.OTHER: re.compile(r'FATAL:  database ".*" does not exist'),
}

# Classes of SQLAlchemy's and of ours, each of which means one thing.
_CLASSES: Final[Mapping[Kind, type[Exception]]] = {
    Kind.STALE: StaleDataError,
    Kind.POOL_TIMEOUT: exc.TimeoutError,
    Kind.ABORTED_TRANSACTION: TransactionAbortedError,
    Kind.UNCOMMITTED_CHANGES: UncommittedChangesError,
    Kind.PARTIAL_COMMIT: PartialCommitError,
    Kind.OUTCOME_UNKNOWN: CommitOutcomeUnknownError,
}

_TRANSIENT: Final = frozenset(
    {
        Kind.SERIALIZATION,
        Kind.DEADLOCK,
        Kind.LOCK_NOT_AVAILABLE,
        Kind.POOL_TIMEOUT,
        Kind.TOO_MANY_CONNECTIONS,
        Kind.UNAVAILABLE,
    }
)

# By module, the classes that all of a driver's errors have for a base.
_DRIVER_ERRORS: Final = {
    "MySQLdb": ("MySQLError",),
    "asyncmy.errors": ("MySQLError",),
    "asyncpg": ("PostgresError", "InterfaceError"),
    "psycopg": ("Error",),
    "psycopg2": ("Error",),
    "pymysql": ("MySQLError",),
    "sqlite3": ("Error",),
}


@dataclass(frozen=True, slots=True)
class DatabaseErrorDescription:
    """Describe a database failure, with what its driver states and nothing guessed.

    Attributes:
        kind: what went wrong.
        code: the SQLSTATE, MySQL error number or SQLite error name that says so; `None` where
            the failure came with none, such as a connection refused.
        constraint: the violated constraint's name.
        table: the table it is on.
        columns: the columns concerned, in the constraint's order.
        retryable: running the whole transaction again may succeed, and cannot do it twice.
        transient: the database is busy or away, for a while.
    """

    kind: DatabaseErrorKind
    code: str | None = None
    constraint: str | None = None
    table: str | None = None
    columns: tuple[str, ...] = ()
    retryable: bool = False
    transient: bool = False


def describe_database_error(
    error: BaseException, *, metadata: MetaData | None = None
) -> DatabaseErrorDescription | None:
    """Describe a database failure; `None` for an error that is none.

    The nearest failure counts, of the error and its `__cause__` chain: an `IntegrityError` that
    was raised `from` another failure is described, not that other one.

    Args:
        error: from SQLAlchemy, from this package or from a driver itself.
        metadata: names a constraint's columns where the driver names only the constraint, and
            the other way round. What it does not name exactly once stays out.

    Example:
        failure = describe_database_error(error)
        if failure is not None and failure.constraint == "uq_users_email": ...
    """
    for each in _chain(error):
        description = _describe(each)
        if description is not None:
            return description if metadata is None else _complete(description, metadata)
    return None


def loaded_driver_errors() -> tuple[type[Exception], ...]:
    """Return the base classes of drivers' errors, of those drivers that are imported.

    SQLAlchemy lets some through unwrapped: asyncpg's, while a stream is read.
    """
    return tuple(
        getattr(sys.modules[module], name)
        for module, names in _DRIVER_ERRORS.items()
        if module in sys.modules
        for name in names
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__


def _describe(error: BaseException) -> DatabaseErrorDescription | None:
    for kind, class_ in _CLASSES.items():
        if isinstance(error, class_):
            return _description(kind)
    if isinstance(error, exc.PendingRollbackError):
        return _description(Kind.ABORTED_TRANSACTION)
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        return _describe_drivers(error.orig, error.statement, error.connection_invalidated)
    if isinstance(error, loaded_driver_errors()):
        return _describe_drivers(error)
    return _describe_raw_asyncpg(error) if isinstance(error, OSError) else None


def _describe_drivers(
    error: BaseException, statement: str | None = None, disconnected: bool = False
) -> DatabaseErrorDescription:
    code = _code(error)
    kind = _kind(error, code, disconnected)
    constraint, table, columns = _stated(error)
    if kind is Kind.FOREIGN_KEY:
        kind = _direction(statement or "", table)
    # Lost with a statement on its way, it was not lost in COMMIT: nothing can have been stored.
    lost_early = kind is Kind.UNAVAILABLE and disconnected and statement is not None
    retryable = lost_early or kind in (Kind.SERIALIZATION, Kind.DEADLOCK)
    return replace(
        _description(kind),
        code=code,
        constraint=constraint,
        table=table,
        columns=columns,
        retryable=retryable,
    )


def _description(kind: Kind) -> DatabaseErrorDescription:
    return DatabaseErrorDescription(kind, transient=kind in _TRANSIENT)


def _code(error: BaseException) -> str | None:
    name: str | None = getattr(error, "sqlite_errorname", None)
    if name is not None:
        # Python 3.11 has no name for what a STRICT table refuses.
        strict = getattr(error, "sqlite_errorcode", None) == 3091
        return "SQLITE_CONSTRAINT_DATATYPE" if strict else name
    # MySQL's drivers state a number, beside an SQLSTATE too coarse to tell anything by.
    if error.args and isinstance(error.args[0], int):
        return str(error.args[0])
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def _kind(error: BaseException, code: str | None, disconnected: bool) -> Kind:
    kind = None if code is None else _KINDS.get(code) or _KINDS.get(_code_class(code))
    if kind is not None:
        return kind
    if disconnected:
        return Kind.UNAVAILABLE
    if code is None and type(error).__module__.startswith("psycopg"):
        # No server has said anything: it could not be reached, or was never asked.
        names = {class_.__name__ for class_ in type(error).__mro__}
        if "OperationalError" in names:
            return _refusal(str(error))
        if "DataError" in names:
            return Kind.BAD_VALUE
    return Kind.OTHER


def _refusal(text: str) -> Kind:
    said = (kind for kind, words in _REFUSALS.items() if words.search(text))
    return next(said, Kind.UNAVAILABLE)


def _code_class(code: str) -> str:
    return "_".join(code.split("_")[:2]) if code.startswith("SQLITE_") else code[:2]


def _describe_raw_asyncpg(error: OSError) -> DatabaseErrorDescription | None:
    """Recognise what asyncpg lets through unwrapped, by where it was raised."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    places = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames]
    if not any(module.partition(".")[0] == "asyncpg" for module, _ in places):
        return None
    connecting = ("asyncpg.connection", "connect") in places
    timed_out = isinstance(error, TimeoutError) and not connecting
    return _description(Kind.STATEMENT_TIMEOUT if timed_out else Kind.UNAVAILABLE)


# -- constraint, table, columns --------------------------------------------------------------

_TARGET: Final = re.compile(r"\s*(INSERT|UPDATE|DELETE)\b(?:\s+ONLY\b)?\s+(\S+)", re.IGNORECASE)

# SQLite and MySQL state names in their text alone, in places that no row's value reaches. A
# message that is translated, or a name that is none, matches nothing.
_NAMES: Final = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"UNIQUE constraint failed: index '(?P<constraint>\w+)'",
        r"(?:UNIQUE|NOT NULL) constraint failed: (?P<paths>\w+\.\w+(?:, \w+\.\w+)*)",
        r"CHECK constraint failed: (?P<constraint>\w+)",
        r"Duplicate entry '.*' for key '(?:(?P<table>\w+)\.)?(?P<constraint>\w+)'",
        r"Column '(?P<column>\w+)' cannot be null",
        r"Field '(?P<column>\w+)' doesn't have a default value",
        r"CONSTRAINT `(?P<constraint>\w+)` failed for `\w+`\.`(?P<table>\w+)`",
        r"Check constraint '(?P<constraint>\w+)' is violated\.",
        r"Cannot [a-z ]+: a foreign key constraint fails "
        r"\(`\w+`\.`(?P<table>\w+)`, CONSTRAINT `(?P<constraint>\w+)` FOREIGN KEY .*",
    )
)

_Stated = tuple[str | None, str | None, tuple[str, ...]]


def _direction(statement: str, child: str | None) -> Kind:
    """Tell by the statement which way a foreign key failed, where the code does not.

    Args:
        statement: what was sent, empty for a COMMIT.
        child: the table that has the foreign key, if the server stated it.
    """
    sent = _TARGET.match(statement)
    verb = sent[1].upper() if sent else ""
    if verb == "UPDATE" and sent and child is not None:
        target = sent[2].rpartition(".")[2].strip('"')
        return Kind.MISSING_PARENT if target == child else Kind.STILL_REFERENCED
    known = {"INSERT": Kind.MISSING_PARENT, "DELETE": Kind.STILL_REFERENCED}
    return known.get(verb, Kind.FOREIGN_KEY)


def _stated(error: BaseException) -> _Stated:
    # psycopg and psycopg2; asyncpg, which SQLAlchemy wraps twice.
    for teller in (getattr(error, "diag", None), error, error.__cause__):
        if hasattr(teller, "constraint_name"):
            column: str | None = getattr(teller, "column_name", None)
            table: str | None = getattr(teller, "table_name", None)
            return getattr(teller, "constraint_name", None), table, (column,) if column else ()
    text = error.args[-1] if error.args else None
    return _stated_in_text(text) if isinstance(text, str) else (None, None, ())


def _stated_in_text(text: str) -> _Stated:
    found = next((match for each in _NAMES if (match := each.fullmatch(text))), None)
    if found is None:
        return None, None, ()
    names = found.groupdict()
    if "paths" in names:
        paths = [path.split(".") for path in names["paths"].split(", ")]
        return None, paths[0][0], tuple(column for _, column in paths)
    column = names.get("column")
    return names.get("constraint"), names.get("table"), (column,) if column else ()


class _Part(NamedTuple):
    """Name a constraint or index and its columns, as the metadata has it."""

    table: str
    name: str
    columns: tuple[str, ...]
    is_key: bool


def _complete(
    description: DatabaseErrorDescription, metadata: MetaData
) -> DatabaseErrorDescription:
    tables = metadata.tables.values()
    parts = [part for table in tables for part in _parts(table)]
    if description.table is not None:
        parts = [part for part in parts if part.table == description.table]
    if description.constraint is not None:
        parts = [part for part in parts if part.name == description.constraint]
    elif description.kind is Kind.UNIQUE and description.columns:
        columns = set(description.columns)
        parts = [part for part in parts if part.is_key and set(part.columns) == columns]
    else:
        return description
    if len(parts) != 1:
        return description
    table, name, columns_named, _ = parts[0]
    columns_stated = description.columns or columns_named
    return replace(description, constraint=name, table=table, columns=columns_stated)


def _parts(table: Table) -> Iterator[_Part]:
    for constraint in table.constraints:
        if isinstance(constraint, ColumnCollectionConstraint) and isinstance(constraint.name, str):
            is_key = isinstance(constraint, (PrimaryKeyConstraint, UniqueConstraint))
            columns = tuple(column.name for column in constraint.columns)
            yield _Part(table.name, constraint.name, columns, is_key)
    for index in table.indexes:
        columns = tuple(each.name for each in index.expressions if isinstance(each, Column))
        if index.unique and index.name is not None:
            # One on an expression is on no column in particular.
            exact = columns if len(columns) == len(index.expressions) else ()
            yield _Part(table.name, index.name, exact, bool(exact))
