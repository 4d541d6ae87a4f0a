"""Classifying database failures, by the driver's error and the application's metadata."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Final, TypeAlias, cast

from sqlalchemy import Column, Index, MetaData, Table, exc, make_url, schema
from sqlalchemy.orm.exc import StaleDataError

from .. import exceptions as own
from .._drivers.errors import StatedError, read_error, server_of
from .._drivers.failures import ended_before_commit


class DatabaseErrorKind(StrEnum):
    """The kind of a database failure. The values are the keywords of `map_database_error`."""

    UNIQUE = auto()
    EXCLUSION = auto()
    FOREIGN_KEY = auto()  # one of the next two; the database doesn't say which
    MISSING_PARENT = auto()
    STILL_REFERENCED = auto()
    NOT_NULL = auto()
    CHECK = auto()
    BAD_VALUE = auto()
    ROW_SECURITY = auto()
    STALE = auto()
    SERIALIZATION = auto()
    DEADLOCK = auto()
    LOCK_NOT_AVAILABLE = auto()
    STATEMENT_TIMEOUT = auto()  # or a cancellation, which has the same code; or our deadline
    POOL_TIMEOUT = auto()
    TOO_MANY_CONNECTIONS = auto()
    UNAVAILABLE = auto()
    READ_ONLY = auto()
    PERMISSION_DENIED = auto()
    ABORTED_TRANSACTION = auto()
    UNCOMMITTED_CHANGES = auto()
    PARTIAL_COMMIT = auto()
    OUTCOME_UNKNOWN = auto()
    AFTER_COMMIT = auto()
    OTHER = auto()


Kind = DatabaseErrorKind

# Exception classes of SQLAlchemy and of ours that determine the kind, whatever the cause.
_CLASSES: Final[Mapping[type[Exception], DatabaseErrorKind]] = {
    StaleDataError: Kind.STALE,
    exc.TimeoutError: Kind.POOL_TIMEOUT,
    exc.PendingRollbackError: Kind.ABORTED_TRANSACTION,
    own.TransactionAbortedError: Kind.ABORTED_TRANSACTION,
    own.UncommittedChangesError: Kind.UNCOMMITTED_CHANGES,
    own.PartialCommitError: Kind.PARTIAL_COMMIT,
    own.CommitOutcomeUnknownError: Kind.OUTCOME_UNKNOWN,
    own.AfterCommitError: Kind.AFTER_COMMIT,
    own.DeadlineExceededError: Kind.STATEMENT_TIMEOUT,
}
OUR_ERRORS: Final = tuple(each for each in _CLASSES if not issubclass(each, exc.SQLAlchemyError))

_REPEATABLE: Final = ("serialization", "deadlock")
_PASSING: Final = ("lock_not_available", "pool_timeout", "too_many_connections", "unavailable")
_TRANSIENT: Final = _REPEATABLE + _PASSING


@dataclass(frozen=True, slots=True)
class DatabaseErrorDescription:
    """The description of a database failure: the facts that its driver states, without guesses.

    Attributes:
        kind: what went wrong.
        code: the SQLSTATE, MySQL error number or SQLite error name, if there is one.
        constraint: the name of the violated constraint.
        table: the constraint's table.
        columns: the columns concerned, in the constraint's order.
        retryable: repeating the whole transaction may succeed, and cannot store its work twice.
        transient: the database is temporarily busy or unavailable.
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
    """Describe a database failure; return `None` for any other error. Never raises.

    The nearest failure in the error's `__cause__` chain counts: for an `IntegrityError` raised
    `from` another failure, the `IntegrityError` is described. A group with one error counts as
    that error.

    Args:
        error: an error of SQLAlchemy, of this package or of a driver.
        metadata: used to look up a constraint's columns if the driver names only the constraint,
            and the other way round. A lookup without exactly one match is left out.

    Example:
        failure = describe_database_error(error)
        if failure is not None and failure.constraint == "uq_users_email": ...
    """
    for each in _chain(error):
        kind = next((kind for class_, kind in _CLASSES.items() if isinstance(each, class_)), None)
        if kind is Kind.ABORTED_TRANSACTION and _lost_before(each):
            return DatabaseErrorDescription(Kind.UNAVAILABLE, retryable=True, transient=True)
        if kind is not None:
            return DatabaseErrorDescription(kind, transient=kind in _TRANSIENT)
        if server_of(each) is not None:
            each = exc.DBAPIError(None, None, each)
        if isinstance(each, exc.DBAPIError) and isinstance(each.orig, BaseException):
            return _describe(each, metadata)
    return None


def only_error(error: BaseException) -> BaseException:
    """Unwrap groups, however nested, that contain a single error; return any other error as is."""
    while isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        if len(group.exceptions) != 1:
            return group
        error = group.exceptions[0]
    return error


def is_database_error(error: BaseException) -> bool:
    """Return whether an error is SQLAlchemy's, a driver's or one of ours."""
    return isinstance(error, (exc.SQLAlchemyError, *OUR_ERRORS)) or server_of(error) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: object = error
    while isinstance(following, BaseException) and id(following) not in seen:
        seen.add(id(following))
        nearest = only_error(following)
        yield nearest
        following = nearest.__cause__


def _lost_before(error: BaseException) -> bool:
    """Return whether a transaction cannot go on because its connection was lost, then swallowed."""
    # 8s2b is SQLAlchemy's code for that, and our error has either as its cause.
    lost = getattr(error.__cause__, "connection_invalidated", False)
    return bool(lost) or any(getattr(e, "code", None) == "8s2b" for e in (error, error.__cause__))


def _describe(error: exc.DBAPIError, metadata: MetaData | None) -> DatabaseErrorDescription:
    stated = read_error(error)
    kind = Kind(stated.kind)
    # Lost during a statement or before COMMIT was sent: nothing can have been stored.
    lost = kind is Kind.UNAVAILABLE and error.connection_invalidated
    lost_early = lost and (error.statement or ended_before_commit(error))
    part, table = _find(stated, metadata, str(error.statement)) if metadata else (None, None)
    return DatabaseErrorDescription(
        kind,
        stated.code,
        stated.constraint if part is None else str(part.name),
        table or stated.table,
        stated.columns or (() if part is None else _columns(part)),
        retryable=bool(lost_early) or kind in _REPEATABLE,
        transient=kind in _TRANSIENT,
    )


# -- lookups in the metadata -----------------------------------------------------------------

_Part: TypeAlias = schema.ColumnCollectionConstraint | Index


def _find(
    stated: StatedError, metadata: MetaData, statement: str
) -> tuple[_Part, str] | tuple[None, None]:
    """Find the only constraint or index in the metadata that matches, and its table's name."""
    parts = {part: table.name for table in metadata.tables.values() for part in _parts(table)}
    here = [part for part, table in parts.items() if stated.table in (None, table)]
    if stated.constraint is not None:
        found = [part for part in here if part.name == stated.constraint]
        found = found or [part for part in here if _is_shortened(part, stated)]
        if not found and stated.kind == Kind.UNIQUE and not stated.nested:
            # A partition's key has a generated name; the statement names the partitioned table.
            written = set(re.findall(r"\w+", statement))
            if stated.table not in {*written, *parts.values()}:
                above = (part for part, table in parts.items() if table in written)
                found = [part for part in above if _is_key(part, stated.key)]
    else:
        is_key = stated.kind == Kind.UNIQUE
        found = [part for part in here if is_key and _is_key(part, stated.columns)]
    return (found[0], parts[found[0]]) if len(found) == 1 else (None, None)


def _parts(table: Table) -> Iterator[_Part]:
    """Yield the named constraints and unique indexes."""
    for part in (*table.constraints, *(index for index in table.indexes if index.unique)):
        if isinstance(part, _Part) and isinstance(part.name, str):
            yield part


def _is_key(part: _Part, columns: tuple[str, ...]) -> bool:
    """Return whether this is a key on exactly these columns."""
    keys = schema.PrimaryKeyConstraint | schema.UniqueConstraint | Index
    return bool(columns) and isinstance(part, keys) and set(_columns(part)) == set(columns)


def _columns(part: _Part) -> tuple[str, ...]:
    if isinstance(part, Index) and not all(isinstance(each, Column) for each in part.expressions):
        return ()  # an index on an expression has no definite columns
    return tuple(column.name for column in part.columns)


def _is_shortened(part: _Part, stated: StatedError) -> bool:
    """Return whether the stated name is this one, shortened because it is too long."""
    name, stored = str(part.name), stated.constraint or ""
    if not 50 < len(stored) < len(name):
        return False
    preparer = make_url(f"{stated.server}://").get_dialect()().identifier_preparer
    try:
        return preparer.format_constraint(part) == preparer.quote(stored)
    except exc.IdentifierError:  # not created by SQLAlchemy: the server has truncated it
        return name.startswith(stored)
