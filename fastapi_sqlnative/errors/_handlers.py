"""App-wide: what answers a failure that no route has answered."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Mapping
from typing import Any, Unpack

from fastapi import FastAPI
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from .._routes import applications_in, route_of
from ..exceptions import ApplicationAlreadyStartedError
from ._formats import answer_invalid, answer_problem, document_failures
from ._kinds import OUR_ERRORS
from ._log import FailureLog
from ._rules import DatabaseHTTPException, ErrorMapping, MappingOptions


def install_error_handlers(
    app: FastAPI,
    *,
    problem_details: bool = False,
    every_error: bool = False,
    **options: Unpack[MappingOptions],
) -> None:
    """Answer the database failures of an application, and of those that are mounted in it by now.

    Everything is answered that no route has answered, failures of COMMIT included. The
    application's handlers for more particular errors go first; so does one for the same class,
    whenever it was registered. Websockets are left alone. A mounted application keeps handlers of
    this kind that it has; one that is mounted later needs a call of its own.

    In the OpenAPI document a route that uses a database shows how a conflict and an outage are
    answered, unless it describes that status itself. What passes is logged once, and more of the
    same within five seconds as a number.

    Args:
        app: one that has not started; otherwise an `ApplicationAlreadyStartedError`.
        problem_details: answer with RFC 9457 `application/problem+json`, also what `http_errors`
            and `map_database_error` have mapped. Only a rule's `pointer` names a field.
        every_error: with `problem_details`, have the application's other `HTTPException` and
            invalid requests answered so, too, unless it has handlers of its own for them.
        **options: as for `map_database_error`. `read_only=ErrorRule(status=503, retry_after=5)`
            is for writes that a standby refuses.
    """
    if every_error and not problem_details:
        raise ValueError("every_error=True asks for problem details: add problem_details=True.")
    if _has_handlers(app):
        raise RuntimeError(
            "The application has these handlers: install them once, with all options."
        )
    mapping = ErrorMapping(options, FailureLog(window=5))
    answered = [each for each in applications_in(app) if not _has_handlers(each)]
    if any(each.middleware_stack is not None for each in answered):
        raise ApplicationAlreadyStartedError(
            "Error handlers cannot be installed: the application, or one mounted in it, has "
            "started. Call install_error_handlers where the application is made."
        )
    for each in answered:
        _install(each, _Answer(mapping), problem_details, every_error)
        if isinstance(each, FastAPI):
            document_failures(each, mapping, problem_details, every_error)


def _has_handlers(app: Starlette) -> bool:
    return isinstance(app.exception_handlers.get(SQLAlchemyError), _Answer)


def _install(app: Starlette, answer: _Answer, problem_details: bool, every_error: bool) -> None:
    handlers: dict[Any, Any] = app.exception_handlers
    # A group is answered if its one error is a failure; any other is raised again.
    for failure in (SQLAlchemyError, ExceptionGroup, *OUR_ERRORS):
        handlers.setdefault(failure, answer)
    if problem_details:
        handlers[DatabaseHTTPException] = answer_problem
    if every_error and handlers.get(HTTPException) is http_exception_handler:
        handlers[HTTPException] = answer_problem
    invalid = handlers.get(RequestValidationError)
    if every_error and invalid is request_validation_exception_handler:
        handlers[RequestValidationError] = answer_invalid


class _Answer:
    """What answers whatever was raised: an exception handler for Starlette."""

    def __init__(self, mapping: ErrorMapping) -> None:
        self._mapping = mapping

    async def __call__(self, request: Request, error: Exception) -> Response:
        """Answer a database failure as an `HTTPException`; raise anything else again."""
        # A websocket has no response to be answered with.
        is_http = request.scope["type"] == "http"
        mapped = self._mapping.map_own(error, route_of(request)) if is_http else error
        if not isinstance(mapped, DatabaseHTTPException):
            raise error
        handlers: Mapping[Any, Any] = request.app.exception_handlers
        by_class = (handlers[class_] for class_ in type(mapped).__mro__ if class_ in handlers)
        handler = handlers.get(mapped.status_code) or next(by_class, http_exception_handler)
        response: Response | Awaitable[Response] = handler(request, mapped)
        return await response if inspect.isawaitable(response) else response
