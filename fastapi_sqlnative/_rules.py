"""The table of how each kind of database failure is answered, and what may be changed in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, TypedDict, TypeVar, cast

from fastapi import HTTPException
from sqlalchemy import MetaData
from starlette.exceptions import HTTPException as AnyHTTPException

from ._failures import DatabaseErrorDescription, DatabaseErrorKind, describe_database_error

logger = logging.getLogger("fastapi_sqlnative")

Kind = DatabaseErrorKind
ErrorT = TypeVar("ErrorT", bound=Exception)


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """Say how a kind of failure, or a constraint's, is answered.

    Without a `status` the rule changes the words only; with one it replaces the whole row.

    Attributes:
        detail: what the client reads; `None` for the default.
        status: 400 to 599.
        retry_after: seconds, for the Retry-After header; only beside a `status`.
        pointer: the field of the request that is at fault, as a JSON pointer such as `#/email`;
            in problem details only.

    Raises:
        TypeError: at once, for a value of another type.
        ValueError: at once, for a value out of range.
    """

    detail: str | None = None
    status: int | None = None
    retry_after: int | None = None
    pointer: str | None = None

    def __post_init__(self) -> None:
        _check("detail", self.detail, str)
        _check("status", self.status, int)
        _check("retry_after", self.retry_after, int)
        _check("pointer", self.pointer, str)
        if self.status is not None and not 400 <= self.status <= 599:
            raise ValueError(f"status={self.status} is no error: write 400 to 599.")
        if self.retry_after is not None and (self.status is None or self.retry_after < 0):
            raise ValueError("retry_after is a number of seconds from 0, and needs a status.")
        if self.pointer is not None and not self.pointer.startswith(("/", "#/")):
            raise ValueError(f"pointer={self.pointer!r} is no JSON pointer: write '#/email'.")


def _check(name: str, value: object, type_: type) -> None:
    if value is not None and (not isinstance(value, type_) or isinstance(value, bool)):
        raise TypeError(f"{name} of an ErrorRule is {type_.__name__} or None, not {value!r}.")


class ErrorRules(TypedDict, total=False):
    """Name the kinds as keywords: a message, or an `ErrorRule` for more than that.

    `foreign_key` stands for `missing_parent` and `still_referenced` too, unless they are given.
    """

    unique: str | ErrorRule
    exclusion: str | ErrorRule
    foreign_key: str | ErrorRule
    missing_parent: str | ErrorRule
    still_referenced: str | ErrorRule
    not_null: str | ErrorRule
    check: str | ErrorRule
    bad_value: str | ErrorRule
    stale: str | ErrorRule
    serialization: str | ErrorRule
    deadlock: str | ErrorRule
    lock_not_available: str | ErrorRule
    statement_timeout: str | ErrorRule
    pool_timeout: str | ErrorRule
    too_many_connections: str | ErrorRule
    unavailable: str | ErrorRule
    read_only: str | ErrorRule
    permission_denied: str | ErrorRule
    aborted_transaction: str | ErrorRule
    uncommitted_changes: str | ErrorRule
    partial_commit: str | ErrorRule
    outcome_unknown: str | ErrorRule
    other: str | ErrorRule


_FAILED: Final = "The server failed to answer this request."
_BUSY: Final = "The service is busy. Try again."
_AWAY: Final = "The service is not available. Try again later."

# How a kind is answered, unless the application says otherwise.
_RULES: Final[Mapping[Kind, ErrorRule]] = {
    Kind.UNIQUE: ErrorRule("This conflicts with something that exists.", 409),
    Kind.EXCLUSION: ErrorRule("This conflicts with something that exists.", 409),
    Kind.FOREIGN_KEY: ErrorRule("What this refers to is missing, or this is still in use.", 409),
    Kind.STILL_REFERENCED: ErrorRule("This is still in use.", 409),
    Kind.STALE: ErrorRule("This has been changed in the meantime.", 409),
    Kind.MISSING_PARENT: ErrorRule("What this refers to does not exist.", 422),
    Kind.NOT_NULL: ErrorRule("A required value is missing.", 422),
    Kind.CHECK: ErrorRule("A value is not allowed.", 422),
    Kind.BAD_VALUE: ErrorRule("A value is malformed or out of range.", 422),
    Kind.SERIALIZATION: ErrorRule(_BUSY, 503, retry_after=1),
    Kind.DEADLOCK: ErrorRule(_BUSY, 503, retry_after=1),
    Kind.LOCK_NOT_AVAILABLE: ErrorRule(_BUSY, 503, retry_after=1),
    Kind.POOL_TIMEOUT: ErrorRule(_BUSY, 503, retry_after=5),
    Kind.TOO_MANY_CONNECTIONS: ErrorRule(_BUSY, 503, retry_after=5),
    Kind.UNAVAILABLE: ErrorRule(_AWAY, 503, retry_after=5),
    Kind.STATEMENT_TIMEOUT: ErrorRule("The service took too long to answer.", 504),
    Kind.READ_ONLY: ErrorRule(_FAILED, 500),
    Kind.PERMISSION_DENIED: ErrorRule(_FAILED, 500),
    Kind.ABORTED_TRANSACTION: ErrorRule(_FAILED, 500),
    Kind.UNCOMMITTED_CHANGES: ErrorRule(_FAILED, 500),
    Kind.OTHER: ErrorRule(_FAILED, 500),
    # To be looked at, and not to be repeated.
    Kind.OUTCOME_UNKNOWN: ErrorRule("This may or may not have been stored. Look before.", 500),
    Kind.PARTIAL_COMMIT: ErrorRule("Only a part of this has been stored. Do not repeat it.", 500),
}
_NEVER_REPEATED: Final = frozenset({Kind.OUTCOME_UNKNOWN, Kind.PARTIAL_COMMIT})
_HALVES_OF_FOREIGN_KEY: Final = (Kind.MISSING_PARENT, Kind.STILL_REFERENCED)


class DatabaseHTTPException(HTTPException):
    """Be an `HTTPException` that a database failure was mapped to."""

    def __init__(self, rule: ErrorRule) -> None:
        assert rule.status is not None
        headers = None if rule.retry_after is None else {"Retry-After": str(rule.retry_after)}
        super().__init__(rule.status, rule.detail, headers)
        self.pointer = rule.pointer


class ErrorMapping:
    """Map by the table and what an application has put in its place.

    A context manager too, which keeps no state: it maps what is raised inside.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        constraints: Mapping[str, str | ErrorRule] | None = None,
        metadata: MetaData | None = None,
    ) -> None:
        self._rules = _with_given(given)
        self._constraints = _checked_constraints(constraints)
        self._metadata = metadata

    def map(self, error: ErrorT) -> ErrorT | DatabaseHTTPException:
        """Log the failure and return its exception, or what was given."""
        if isinstance(error, AnyHTTPException):
            return error
        failure = describe_database_error(error, metadata=self._metadata)
        if failure is None:
            return error
        mapped = DatabaseHTTPException(self._rule(failure))
        mapped.__cause__ = error
        _log(failure, mapped.status_code, error)
        return mapped

    def rule(self, kind: Kind) -> ErrorRule:
        """Return the row for a kind."""
        return self._rules[kind]

    def _rule(self, failure: DatabaseErrorDescription) -> ErrorRule:
        own = self._constraints.get(failure.constraint or "")
        rule = self._rules[failure.kind]
        return rule if own is None else _merged(rule, own)

    def __enter__(self) -> None:
        """Map nothing yet."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raise what an error maps to in its place."""
        if isinstance(error, Exception) and (mapped := self.map(error)) is not error:
            raise mapped


def _with_given(given: Mapping[str, Any]) -> dict[Kind, ErrorRule]:
    rules = dict(_RULES)
    own = {kind_named(name): _checked_rule(name, value) for name, value in given.items()}
    if Kind.FOREIGN_KEY in own:
        own = dict.fromkeys(_HALVES_OF_FOREIGN_KEY, own[Kind.FOREIGN_KEY]) | own
    for kind, rule in own.items():
        rules[kind] = _merged(rules[kind], rule)
        if kind in _NEVER_REPEATED and rule.retry_after is not None:
            raise ValueError(f"{kind.value} takes no retry_after: nobody should repeat it.")
    return rules


def kind_named(name: str) -> Kind:
    try:
        return Kind(name)
    except ValueError:
        known = ", ".join(Kind)
        raise TypeError(f"{name!r} is no kind of database failure. Write one of {known}.") from None


def _checked_constraints(constraints: object) -> dict[str, ErrorRule]:
    if constraints is None:
        return {}
    if not isinstance(constraints, Mapping):
        raise TypeError(f"constraints maps names to messages; {constraints!r} does not.")
    given = cast("Mapping[object, object]", constraints)
    return {str(name): _checked_rule(name, rule) for name, rule in given.items()}


def _checked_rule(name: object, value: object) -> ErrorRule:
    if isinstance(name, str) and isinstance(value, (str, ErrorRule)):
        return ErrorRule(value) if isinstance(value, str) else value
    raise TypeError(f"{name!r} takes a message or an ErrorRule, not {value!r}.")


def _merged(row: ErrorRule, own: ErrorRule) -> ErrorRule:
    if own.status is None:
        return replace(row, detail=own.detail or row.detail, pointer=own.pointer or row.pointer)
    return replace(own, detail=own.detail or row.detail)


def _log(failure: DatabaseErrorDescription, status: int, error: Exception) -> None:
    # A conflict is the client's, overload passes by, the rest is for somebody to mend.
    level = logging.INFO if status < 500 else logging.WARNING if status > 500 else logging.ERROR
    logger.log(
        level,
        "A database failure (%s, code %s) is answered with %d.",
        failure.kind.value,
        failure.code,
        status,
        exc_info=error,
    )
