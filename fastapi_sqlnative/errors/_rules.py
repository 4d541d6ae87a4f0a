"""The answers to each kind of database failure, and how an application changes them."""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypedDict, TypeVar, cast
from weakref import WeakKeyDictionary

from fastapi import HTTPException
from sqlalchemy import MetaData
from starlette.exceptions import HTTPException as AnyHTTPException

from ..exceptions import DeadlineExceededError
from ._kinds import (
    DatabaseErrorDescription,
    Kind,
    describe_database_error,
    is_database_error,
    only_error,
)

ErrorT = TypeVar("ErrorT", bound=Exception)
logger = logging.getLogger("fastapi_sqlnative")


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """The answer to a kind of failure or to a violated constraint.

    Without a `status`, the rule changes only the message; with one, it replaces status, message
    and Retry-After. A wrong argument is a `TypeError` or `ValueError` at once.

    Attributes:
        detail: the message for the client; `None` for the default.
        status: 400 to 599.
        retry_after: seconds, for the Retry-After header; only with a `status`.
        pointer: the field at fault, as a JSON pointer such as `#/email`; for problem details.
    """

    detail: str | None = None
    status: int | None = None
    retry_after: int | None = None
    pointer: str | None = None

    def __post_init__(self) -> None:
        for name, type_ in ("detail", str), ("status", int), ("retry_after", int), ("pointer", str):
            value: object = getattr(self, name)
            if not isinstance(value, type_ | None) or isinstance(value, bool):
                raise TypeError(f"{name} of an ErrorRule must be {type_.__name__}, not {value!r}.")
        if self.status is not None and not 400 <= self.status <= 599:
            raise ValueError(f"status={self.status} is not an error: use 400 to 599.")
        if self.retry_after is not None and (self.status is None or self.retry_after < 0):
            raise ValueError("retry_after must be 0 seconds or more, and needs a status.")
        if self.pointer is not None and not self.pointer.startswith(("/", "#/")):
            raise ValueError(f"pointer={self.pointer!r} is not a JSON pointer such as '#/email'.")


class ErrorRules(TypedDict, total=False):
    """Messages or `ErrorRule`s by kind. `foreign_key` covers both of its directions."""

    unique: str | ErrorRule
    exclusion: str | ErrorRule
    foreign_key: str | ErrorRule
    missing_parent: str | ErrorRule
    still_referenced: str | ErrorRule
    not_null: str | ErrorRule
    check: str | ErrorRule
    bad_value: str | ErrorRule
    row_security: str | ErrorRule
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
    after_commit: str | ErrorRule
    other: str | ErrorRule


class MappingOptions(ErrorRules, total=False):
    """Rules for kinds and for constraints, which take precedence, and `metadata` for lookups."""

    constraints: Mapping[str, str | ErrorRule] | None
    metadata: MetaData | None


_BUSY: Final = "The service is busy. Try again."

_ANSWERS: Final[Mapping[ErrorRule, str]] = {
    ErrorRule("This conflicts with something that exists.", 409): "unique exclusion",
    ErrorRule("What this refers to is missing, or this is still in use.", 409): "foreign_key",
    ErrorRule("This is still in use.", 409): "still_referenced",
    ErrorRule("This has been changed in the meantime.", 409): "stale",
    ErrorRule("What this refers to does not exist.", 422): "missing_parent",
    ErrorRule("A required value is missing.", 422): "not_null",
    ErrorRule("A value is not allowed.", 422): "check",
    ErrorRule("A value is malformed or out of range.", 422): "bad_value",
    ErrorRule("This is not allowed.", 403): "row_security",
    ErrorRule(_BUSY, 503, retry_after=1): "serialization deadlock lock_not_available",
    ErrorRule(_BUSY, 503, retry_after=5): "pool_timeout too_many_connections",
    ErrorRule("The service is not available. Try again later.", 503, retry_after=5): "unavailable",
    ErrorRule("The service took too long to answer.", 504): "statement_timeout",
    ErrorRule("The server failed to answer this request.", 500): """read_only permission_denied
        aborted_transaction uncommitted_changes other""",
    # The client must not simply repeat these.
    ErrorRule("This may or may not have been stored. Check first.", 500): "outcome_unknown",
    ErrorRule("Only a part of this has been stored. Do not repeat it.", 500): "partial_commit",
    ErrorRule("This has been stored, and then something failed.", 500): "after_commit",
}
_RULES: Final = {Kind(name): rule for rule, names in _ANSWERS.items() for name in names.split()}
_NEVER_REPEATED: Final = (Kind.OUTCOME_UNKNOWN, Kind.PARTIAL_COMMIT, Kind.AFTER_COMMIT)
_FAULTS: Final = {kind for kind, rule in _RULES.items() if rule.status == 500} - {Kind.READ_ONLY}


class DatabaseHTTPException(HTTPException):
    """An `HTTPException` to which a database failure was mapped."""

    def __init__(self, rule: ErrorRule) -> None:
        headers = None if rule.retry_after is None else {"Retry-After": str(rule.retry_after)}
        super().__init__(rule.status or 500, rule.detail, headers)
        self.pointer = rule.pointer


class ErrorMapping:
    """The default answers with an application's changes; a context manager without state.

    Repetitions of a WARNING within `window` seconds, if given, are counted and logged at its end.
    """

    def __init__(self, options: Mapping[str, Any], window: float | None = None) -> None:
        given = dict(options)
        self._metadata: MetaData | None = given.pop("metadata", None)
        constraints: Mapping[Any, object] = given.pop("constraints", None) or {}
        if not isinstance(cast("object", constraints), Mapping):
            raise TypeError(f"constraints must map names to messages; {constraints!r} does not.")
        self._constraints = {name: _rule(name, each) for name, each in constraints.items()}
        own = {kind_named(name): _rule(name, each) for name, each in given.items()}
        if Kind.FOREIGN_KEY in own:
            halves = (Kind.MISSING_PARENT, Kind.STILL_REFERENCED)
            own = dict.fromkeys(halves, own[Kind.FOREIGN_KEY]) | own
        for kind, rule in own.items():
            if kind in _NEVER_REPEATED and (rule.retry_after is not None or rule.status == 503):
                raise ValueError(
                    f"{kind.value} takes no 503 or retry_after: a client must not repeat it."
                )
        self.rules = _RULES | {kind: _merged(_RULES[kind], rule) for kind, rule in own.items()}
        self._window = window
        # By event loop: the timers of a closed loop never fire.
        self._repeats = WeakKeyDictionary[asyncio.AbstractEventLoop, Counter[str]]()

    def map(self, error: ErrorT, route: str | None = None) -> ErrorT | DatabaseHTTPException:
        """Log a failure and return its `HTTPException`; return any other error unchanged."""
        failure = describe_database_error(error, metadata=self._metadata)
        is_answer = isinstance(error, AnyHTTPException)
        if failure is None or (is_answer and not isinstance(error, DeadlineExceededError)):
            return error
        # The metadata's name for a constraint takes precedence over the database's.
        stated = describe_database_error(error) or failure
        names = failure.constraint, stated.constraint, f"{stated.table}.{stated.constraint}"
        own = next((self._constraints[each] for each in names if each in self._constraints), None)
        rule = _merged(self.rules[failure.kind], own or ErrorRule())
        if getattr(only_error(error), "database_stored", False) and (
            rule.retry_after is not None or rule.status in (503, 504)
        ):
            rule = self.rules[Kind.OUTCOME_UNKNOWN]  # repeated, it would be stored twice
        mapped = DatabaseHTTPException(rule)
        mapped.__cause__ = error
        self._log(failure, error, mapped.status_code, route)
        return mapped

    def map_own(self, error: ErrorT, route: str | None = None) -> ErrorT | DatabaseHTTPException:
        """Map a database error, but not an application's exception that was raised from one."""
        return self.map(error, route) if is_database_error(only_error(error)) else error

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Raise the mapped exception in place of the error."""
        if isinstance(error, Exception) and (mapped := self.map_own(error)) is not error:
            raise mapped

    def _log(
        self, failure: DatabaseErrorDescription, error: Exception, status: int, route: str | None
    ) -> None:
        """Log the known facts of a failure, without any user data."""
        database = getattr(only_error(error), "database_name", None)  # set by our session
        where = f" of database {database!r}" if isinstance(database, str) else ""
        code = f", code {failure.code}" if failure.code else ""
        constraint = f", constraint {failure.constraint!r}" if failure.constraint else ""
        what = f"A failure{where} ({failure.kind}{code}{constraint}) is answered with {status}"
        fault = status == 500 or failure.kind in _FAULTS  # even if its status was changed
        level = logging.ERROR if fault else logging.WARNING if status > 500 else logging.INFO
        if level == logging.WARNING and self._window is not None:
            loop = asyncio.get_running_loop()
            repeats = self._repeats.setdefault(loop, Counter())
            if what in repeats:
                repeats[what] += 1
                return
            repeats[what] = 0
            loop.call_later(self._window, self._log_repeats, repeats, what)
        place = f" on {route}" if route else ""
        logger.log(level, "%s%s.", what, place, exc_info=error if fault else None)

    def _log_repeats(self, repeats: Counter[str], what: str) -> None:
        if times := repeats.pop(what):
            logger.warning("%s: %d times more in %gs.", what, times, self._window)


def kind_named(name: str) -> Kind:
    """Return the kind of that name, or raise a `TypeError` that lists all names."""
    if name not in set(Kind):
        known = ", ".join(Kind)
        raise TypeError(f"{name!r} is no kind of database failure. Use one of {known}.")
    return Kind(name)


def _rule(name: object, value: object) -> ErrorRule:
    if not (isinstance(name, str) and isinstance(value, str | ErrorRule)):
        raise TypeError(f"{name!r} takes a message or an ErrorRule, not {value!r}.")
    return ErrorRule(value) if isinstance(value, str) else value


def _merged(row: ErrorRule, own: ErrorRule) -> ErrorRule:
    if own.status is None:
        return replace(row, detail=own.detail or row.detail, pointer=own.pointer or row.pointer)
    return replace(own, detail=own.detail or row.detail)
