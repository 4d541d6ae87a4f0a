"""Answering a failure: in a block of a route, and app-wide."""

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, Unpack, cast, overload

import starlette
from fastapi import FastAPI, HTTPException
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import Request
from starlette.responses import Response

from .._routes import applications_in, name_of_route
from ..exceptions import ApplicationAlreadyStartedError
from ._formats import answer_invalid, answer_problem, document_failures
from ._kinds import OUR_ERRORS
from ._rules import DatabaseHTTPException, ErrorMapping, ErrorT, MappingOptions

# The second None tells type checkers that a block swallows no error, so it may end with `return`.
_Block = contextlib.AbstractContextManager[None, None]
_AsyncBlock = contextlib.AbstractAsyncContextManager[None, None]
# A group is answered if its only error is a failure, else re-raised. Starlette before 0.46 raises a
# group for any error in a stream, and a handler must not interfere there.
_GROUPS = () if starlette.__version__ < "0.46" else (ExceptionGroup,)


def map_database_error(error: ErrorT, **options: Unpack[MappingOptions]) -> ErrorT | HTTPException:
    """Return the `HTTPException` that answers a database failure, or the same error unchanged.

    Raise the result. The given error becomes its `__cause__` and is logged here, once. An
    `HTTPException` is returned unchanged; for any other error, the nearest database failure in
    its chain of causes counts.

    Args:
        error: any exception.
        **options: kinds, and `constraints` by name, each with a message or an `ErrorRule`; and the
            `metadata` for `describe_database_error`.

    Raises:
        TypeError: at once, for an unknown option or a rule of the wrong type.
        ValueError: at once, for a rule that invites clients to repeat work that may be stored.

    Example:
        except IntegrityError as error:
            raise map_database_error(error, unique="E-mail already registered.")
    """
    return ErrorMapping(options).map(error)


@overload
def http_errors(session: Session | None = None, /, **options: Unpack[MappingOptions]) -> _Block: ...
@overload
def http_errors(session: AsyncSession, /, **options: Unpack[MappingOptions]) -> _AsyncBlock: ...
def http_errors(
    session: Session | AsyncSession | None = None, /, **options: Unpack[MappingOptions]
) -> _Block | _AsyncBlock:
    """Map the database failures of a block, like `map_database_error`.

    An exception of the application that was raised `from` a failure is left alone. With a session,
    the block is a savepoint that is flushed at its end: an `add()` fails there and not at COMMIT,
    and the transaction can continue without the work of the block. A deferred constraint still
    fails at COMMIT. Use `with` for a `Session` and `async with` for an `AsyncSession`; without a
    session, always use `with`, even in `async` code.

    Args:
        session: the session used in the block; without it there is no savepoint.
        **options: as for `map_database_error`.

    Raises:
        TypeError: at once, for a session of another kind, and as `map_database_error`.
        ValueError: as `map_database_error`.

    Example:
        async with http_errors(session, unique="E-mail already registered."):
            session.add(User(email=email))
    """
    mapping = ErrorMapping(options)
    if session is None:
        return mapping
    if isinstance(session, AsyncSession):
        return cast("_AsyncBlock", _async_savepoint(session, mapping))
    if isinstance(cast("object", session), Session):
        return cast("_Block", _savepoint(session, mapping))
    found = type(session).__name__
    raise TypeError(f"http_errors takes a Session or an AsyncSession, not {found}.")


@contextlib.contextmanager
def _savepoint(session: Session, mapping: ErrorMapping) -> Generator[None]:
    with ErrorMapping({}):
        session.flush()  # pending changes from before are not this block's failures
    with mapping, session.begin_nested():
        yield


@contextlib.asynccontextmanager
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
    every_error: bool = False,
    **options: Unpack[MappingOptions],
) -> None:
    """Answer the database failures of an application, and of those already mounted in it.

    This covers all failures that a route doesn't handle, including those of COMMIT. The
    application's handlers for the same class or a more specific one take precedence, whenever they
    were added. Websockets are left alone. An application that is mounted later needs its own call,
    and one that had its own call keeps its handlers. A transient failure is logged once, and
    repetitions within five seconds are counted. The OpenAPI document describes the answers to a
    conflict and an outage for routes that use a database, unless they describe that status.

    Args:
        app: the application, which must not have started.
        problem_details: answer with RFC 9457 `application/problem+json`, including errors mapped
            by `http_errors` and `map_database_error`. Only a rule's `pointer` names a field.
        every_error: also answer other `HTTPException`s and invalid requests in this format, unless
            the application has handlers of its own for them.
        **options: as for `map_database_error`. Pass `read_only=ErrorRule(status=503,
            retry_after=5)` if writes may reach a standby.

    Raises:
        ValueError: `every_error` without `problem_details`.
        RuntimeError: the application already has these handlers.
        ApplicationAlreadyStartedError: the application has started.

    Example:
        install_error_handlers(app, constraints={"uq_users_email": "E-mail already registered."})
    """
    if every_error and not problem_details:
        raise ValueError("every_error=True needs problem details: add problem_details=True.")
    if _has_handlers(app):
        raise RuntimeError(
            "This application already has these handlers: call install_error_handlers once, with "
            "all options."
        )
    mapping = ErrorMapping(options, window=5)
    answered = [each for each in applications_in(app) if not _has_handlers(each)]
    if any(each.middleware_stack is not None for each in answered):
        raise ApplicationAlreadyStartedError(
            "The application, or one mounted in it, has started without error handlers: call "
            "install_error_handlers where it is created."
        )
    for each in answered:
        handlers: dict[Any, Any] = each.exception_handlers
        for failure in (SQLAlchemyError, *_GROUPS, *OUR_ERRORS):
            handlers.setdefault(failure, functools.partial(_answer, mapping))
        if problem_details:
            handlers[DatabaseHTTPException] = answer_problem
        if every_error:
            for class_, default, answer in (
                (AnyHTTPException, http_exception_handler, answer_problem),
                (RequestValidationError, request_validation_exception_handler, answer_invalid),
            ):
                if handlers.get(class_) is default:
                    handlers[class_] = answer
        if isinstance(each, FastAPI):
            document_failures(each, mapping, problem_details, every_error)


def _has_handlers(app: Starlette) -> bool:
    handler = app.exception_handlers.get(SQLAlchemyError)
    return isinstance(handler, functools.partial) and handler.func is _answer


async def _answer(mapping: ErrorMapping, request: Request, error: Exception) -> Response:
    """Answer a database failure as an `HTTPException`; re-raise anything else."""
    # A websocket has no response.
    is_http = request.scope["type"] == "http"
    mapped = mapping.map_own(error, name_of_route(request.scope)) if is_http else error
    if not isinstance(mapped, DatabaseHTTPException):
        raise error
    handlers: Mapping[Any, Any] = request.app.exception_handlers
    by_class = (handlers[class_] for class_ in type(mapped).__mro__ if class_ in handlers)
    handler = handlers.get(mapped.status_code) or next(by_class, http_exception_handler)
    if inspect.iscoroutinefunction(handler):
        response = handler(request, mapped)
    else:  # in a thread, as in Starlette, because it may block
        response = await run_in_threadpool(handler, request, mapped)
    answer: Response = await response if inspect.isawaitable(response) else response
    return answer
