"""Answer a database failure over HTTP, where the application asks for it.

Nothing that a database or driver has said gets into a response: bodies hold the application's
words, or those of the table in `_rules`. What was said is in the `__cause__`, and logged once.
"""

from __future__ import annotations

import http.client
import inspect
from collections.abc import AsyncGenerator, Awaitable, Generator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Final, Unpack, cast, overload

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from sqlalchemy import MetaData
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from ._failures import (
    DatabaseErrorDescription,
    DatabaseErrorKind,
    describe_database_error,
    loaded_driver_errors,
)
from ._rules import (
    DatabaseHTTPException,
    ErrorMapping,
    ErrorRule,
    ErrorRules,
    ErrorT,
    kind_named,
)
from .exceptions import (
    ApplicationAlreadyStartedError,
    CommitOutcomeUnknownError,
    PartialCommitError,
    TransactionAbortedError,
    UncommittedChangesError,
)

__all__ = [
    "DatabaseErrorDescription",
    "DatabaseErrorKind",
    "ErrorRule",
    "describe_database_error",
    "error_responses",
    "http_errors",
    "install_error_handlers",
    "map_database_error",
]

# -- where a failure crosses into the application's meaning ----------------------------------


def map_database_error(
    error: ErrorT,
    *,
    metadata: MetaData | None = None,
    constraints: Mapping[str, str | ErrorRule] | None = None,
    **kinds: Unpack[ErrorRules],
) -> ErrorT | HTTPException:
    """Return the `HTTPException` that answers a database failure, or the very same error.

    What comes back is there to be raised. The error given becomes its `__cause__`, and is logged
    here, once. An `HTTPException` stays as it is, whatever caused it.

    Args:
        error: any exception.
        metadata: where `describe_database_error` looks up names that the driver does not state.
        constraints: by a constraint's name, a message or an `ErrorRule`; it goes before a kind's.
        **kinds: by a kind, a message or an `ErrorRule`.

    Raises:
        TypeError: for an unknown kind, or a rule that is none.

    Example:
        except IntegrityError as error:
            raise map_database_error(error, unique="E-mail already registered.")
    """
    return ErrorMapping(kinds, constraints, metadata).map(error)


@overload
def http_errors(
    *,
    metadata: MetaData | None = ...,
    constraints: Mapping[str, str | ErrorRule] | None = ...,
    **kinds: Unpack[ErrorRules],
) -> AbstractContextManager[None, None]: ...
@overload
def http_errors(
    session: Session,
    /,
    *,
    metadata: MetaData | None = ...,
    constraints: Mapping[str, str | ErrorRule] | None = ...,
    **kinds: Unpack[ErrorRules],
) -> AbstractContextManager[None, None]: ...
@overload
def http_errors(
    session: AsyncSession,
    /,
    *,
    metadata: MetaData | None = ...,
    constraints: Mapping[str, str | ErrorRule] | None = ...,
    **kinds: Unpack[ErrorRules],
) -> AbstractAsyncContextManager[None, None]: ...
def http_errors(
    session: Session | AsyncSession | None = None,
    /,
    *,
    metadata: MetaData | None = None,
    constraints: Mapping[str, str | ErrorRule] | None = None,
    **kinds: Unpack[ErrorRules],
) -> AbstractContextManager[None, None] | AbstractAsyncContextManager[None, None]:
    """Map the database failures of a block, as `map_database_error` does.

    With a session the block is a savepoint, which is flushed at the block's end: an `add()`
    fails there and not at COMMIT, and afterwards the transaction goes on without what the block
    did. A deferred constraint still waits for COMMIT. Write `with` for a `Session` and
    `async with` for an `AsyncSession`; without a session it is `with`, in `async` code too.

    Raises:
        TypeError: at once, for an unknown kind, a rule that is none or another session.

    Example:
        async with http_errors(session, unique="E-mail already registered."):
            session.add(User(email=email))
    """
    mapping = ErrorMapping(kinds, constraints, metadata)
    if session is None:
        return mapping
    # The second None says that no error ends here, so that a block may end with a `return`.
    if isinstance(session, AsyncSession):
        block = _async_savepoint(session, mapping)
        return cast("AbstractAsyncContextManager[None, None]", block)
    if isinstance(cast("object", session), Session):
        return cast("AbstractContextManager[None, None]", _savepoint(session, mapping))
    raise TypeError(f"http_errors takes a Session or an AsyncSession, not {session!r}.")


@contextmanager
def _savepoint(session: Session, mapping: ErrorMapping) -> Generator[None]:
    with ErrorMapping({}):
        session.flush()  # what waits from before is no failure of this block
    with mapping, session.begin_nested():
        yield


@asynccontextmanager
async def _async_savepoint(session: AsyncSession, mapping: ErrorMapping) -> AsyncGenerator[None]:
    with ErrorMapping({}):
        await session.flush()
    with mapping:
        async with session.begin_nested():
            yield


# -- app-wide --------------------------------------------------------------------------------


def install_error_handlers(
    app: FastAPI,
    *,
    problem_details: bool = False,
    metadata: MetaData | None = None,
    constraints: Mapping[str, str | ErrorRule] | None = None,
    **kinds: Unpack[ErrorRules],
) -> None:
    """Answer every database failure of the application that nobody else has answered.

    Those of COMMIT too. A failure is answered as an `HTTPException` is, by the application's own
    handler for these if it has one. Handlers that the application has registered for more
    particular errors go first; so does one for the same class, whenever it was registered.
    Websockets are left alone.

    Errors that a driver raises by itself are answered if it is imported by now, as it is once an
    engine has been created.

    Args:
        app: one that has not started.
        problem_details: answer with an RFC 9457 `application/problem+json` body. That includes
            what `http_errors` and `map_database_error` have mapped.
        metadata: as for `map_database_error`.
        constraints: as for `map_database_error`. Only these have a field named, by `pointer`.
        **kinds: as for `map_database_error`.

    Raises:
        TypeError: for an unknown kind, or a rule that is none.
        ApplicationAlreadyStartedError: handlers would have no effect any more.
        RuntimeError: for a second call.
    """
    answer = _Answer(app, ErrorMapping(kinds, constraints, metadata))
    if app.middleware_stack is not None:
        raise ApplicationAlreadyStartedError(
            "Error handlers cannot be installed: the application has started. Call "
            "install_error_handlers where the application is made, before it is served."
        )

    if isinstance(app.exception_handlers.get(SQLAlchemyError), _Answer):
        raise RuntimeError(
            "The application has these error handlers: call install_error_handlers once, with "
            "all that it is to know."
        )
    if problem_details:
        app.add_exception_handler(DatabaseHTTPException, _answer_with_problem_details)
    for failure in (*_HANDLED, *loaded_driver_errors()):
        app.exception_handlers.setdefault(failure, answer)


_PROBLEM_JSON: Final = "application/problem+json"

# asyncpg's connection failures are bare OSErrors; any other OSError is raised again.
_HANDLED: Final[tuple[type[Exception], ...]] = (
    SQLAlchemyError,
    OSError,
    CommitOutcomeUnknownError,
    PartialCommitError,
    TransactionAbortedError,
    UncommittedChangesError,
)


class _Answer:
    """Handle whatever was raised: an exception handler for Starlette."""

    def __init__(self, app: FastAPI, mapping: ErrorMapping) -> None:
        self._app = app
        self._mapping = mapping

    async def __call__(self, request: Request, error: Exception) -> Response:
        """Answer a database failure as an `HTTPException`; raise anything else again."""
        # A websocket has no response to be answered with.
        mapped = self._mapping.map(error) if request.scope["type"] == "http" else error
        if not isinstance(mapped, DatabaseHTTPException):
            raise error
        handlers = self._app.exception_handlers
        by_class = (handlers[class_] for class_ in type(mapped).__mro__ if class_ in handlers)
        handler: Any = handlers.get(mapped.status_code) or next(by_class)
        response: Response | Awaitable[Response] = handler(request, mapped)
        return await response if inspect.isawaitable(response) else response


async def _answer_with_problem_details(_request: Request, error: Exception) -> Response:
    assert isinstance(error, DatabaseHTTPException)
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": _title(error.status_code),
        "status": error.status_code,
        "detail": error.detail,
    }
    if error.pointer is not None:
        problem["errors"] = [{"detail": error.detail, "pointer": error.pointer}]
    return JSONResponse(problem, error.status_code, error.headers, _PROBLEM_JSON)


def _title(status: int) -> str:
    return http.client.responses.get(status, "Error")


# -- the OpenAPI document --------------------------------------------------------------------


def error_responses(
    *kinds: DatabaseErrorKind | str, problem_details: bool = False, **rules: Unpack[ErrorRules]
) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` of a route that may fail in these ways; in all, if none is given.

    Args:
        *kinds: as members of `DatabaseErrorKind` or by name.
        problem_details: as for `install_error_handlers`.
        **rules: as for `map_database_error`, for the statuses and for further kinds.

    Raises:
        TypeError: for an unknown kind, or a rule that is none.

    Example:
        @app.post("/users", responses=error_responses("unique", "unavailable"))
    """
    mapping = ErrorMapping(rules)
    wanted = [kind_named(name) for name in (*kinds, *rules)] or list(DatabaseErrorKind)
    documented = [mapping.rule(kind) for kind in wanted]
    return {
        rule.status: _response(rule.status, rule.retry_after, problem_details)
        for rule in sorted(documented, key=lambda rule: (rule.status, rule.retry_after or 0))
        if rule.status is not None
    }


def _response(status: int, retry_after: int | None, problem_details: bool) -> dict[str, Any]:
    content = {_PROBLEM_JSON: {"schema": _PROBLEM}} if problem_details else {}
    if status == 422:
        # FastAPI documents its own validation errors only where nothing else has their status.
        detail = [_VALIDATION] if problem_details else [_TEXT, _VALIDATION]
        content["application/json"] = {"schema": _object(detail={"anyOf": detail})}
    elif not problem_details:
        content["application/json"] = {"schema": _object(detail=_TEXT)}
    response: dict[str, Any] = {"description": _title(status), "content": content}
    if retry_after is not None:
        header = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
        response["headers"] = {"Retry-After": header}
    return response


def _object(*optional: str, **properties: Mapping[str, Any]) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


_TEXT: Final = {"type": "string"}
_VALIDATION: Final = {"type": "array", "items": {"type": "object"}}
_PROBLEM: Final = _object(
    "errors",
    type={"type": "string", "format": "uri-reference"},
    title=_TEXT,
    status={"type": "integer"},
    detail=_TEXT,
    errors={"type": "array", "items": _object(detail=_TEXT, pointer=_TEXT)},
)
