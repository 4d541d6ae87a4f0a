"""The format of answers: RFC 9457 problem details, and the OpenAPI document."""

import http.client
from collections.abc import Iterable, Mapping
from typing import Any, Final, Unpack, cast
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .._routes import routes_with_a_database
from ._kinds import DatabaseErrorKind, Kind
from ._rules import ErrorMapping, ErrorRules, kind_named

_MEDIA_TYPE: Final = "application/problem+json"


async def answer_problem(request: Request, error: Exception) -> Response:
    """Answer an `HTTPException`; a status below 400 keeps FastAPI's answer."""
    assert isinstance(error, HTTPException)
    if error.status_code < 400:
        return await http_exception_handler(request, error)
    detail = cast("object", error.detail)
    name = "detail" if isinstance(detail, str) else "context"  # a member of our own
    problem: dict[str, Any] = {name: jsonable_encoder(detail)}
    pointer = getattr(error, "pointer", None)
    if pointer is not None:
        problem["errors"] = [{"detail": error.detail, "pointer": pointer}]
    return _problem(error.status_code, problem, error.headers)


async def answer_invalid(_request: Request, error: Exception) -> Response:
    """Answer FastAPI's validation errors, each with a JSON pointer or the parameter's name."""
    assert isinstance(error, RequestValidationError)
    errors = [_invalid(each) for each in error.errors()]
    return _problem(422, {"detail": "The request is not valid.", "errors": errors}, None)


def _title(status: int) -> str:
    return http.client.responses.get(status, "Error")


def _problem(status: int, members: dict[str, Any], headers: Any) -> Response:
    problem = {"type": "about:blank", "title": _title(status), "status": status, **members}
    return JSONResponse(problem, status, headers, _MEDIA_TYPE)


def _invalid(found: object) -> dict[str, str]:
    if not isinstance(found, Mapping):  # the application may raise it with any objects
        return {"detail": str(found)}
    error = cast("Mapping[str, Any]", found)
    invalid = {"detail": str(error.get("msg", "It is not valid."))}
    where, *names = error.get("loc") or ("",)
    if where != "body":
        parameter = ".".join(map(str, names or [where]))
        return invalid | {"parameter": parameter} if parameter else invalid
    if error.get("type") == "json_invalid":
        names = []  # `loc` is a position in the text
    escaped = (quote(str(name).replace("~", "~0").replace("/", "~1")) for name in names)
    return invalid | {"pointer": "/".join(["#", *escaped])}


# -- the OpenAPI document --------------------------------------------------------------------


def error_responses(
    *kinds: DatabaseErrorKind | str, problem_details: bool = False, **rules: Unpack[ErrorRules]
) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` of a route that may fail in these ways, or in any if none is given.

    Args:
        *kinds: members of `DatabaseErrorKind` or their names.
        problem_details: as for `install_error_handlers`.
        **rules: further kinds, with rules as for `map_database_error`.

    Raises:
        TypeError: for an unknown kind.

    Example:
        @app.post("/users", responses=error_responses("check", "stale"))
    """
    wanted = [kind_named(name) for name in (*kinds, *rules)] or list(DatabaseErrorKind)
    return _responses(ErrorMapping(rules), wanted, problem_details)


def document_failures(
    app: FastAPI, mapping: ErrorMapping, problem_details: bool, every_error: bool
) -> None:
    """Document the answers to a conflict and an outage, on routes that use a database."""
    generate = app.openapi
    conflict = _responses(mapping, [Kind.UNIQUE], problem_details)
    outage = _responses(mapping, [Kind.UNAVAILABLE], problem_details)
    invalid = {"description": _title(422), "content": {_MEDIA_TYPE: {"schema": _PROBLEM}}}

    def openapi() -> dict[str, Any]:
        document = generate()
        for route in routes_with_a_database(app):
            for method, operation in document["paths"].get(route.path_format, {}).items():
                if method.upper() in (getattr(route, "methods", None) or ()):
                    found = outage if method in ("get", "head") else conflict | outage
                    answers = {str(status): answer for status, answer in found.items()}
                    operation["responses"] = answers | operation.get("responses", {})
        for path in document["paths"].values() if every_error else ():
            for each in path.values():
                described = cast("dict[str, Any]", each if isinstance(each, dict) else {})
                if "422" in described.get("responses", {}):
                    described["responses"]["422"] = invalid
        return document

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's own way to extend it


def _responses(
    mapping: ErrorMapping, kinds: Iterable[DatabaseErrorKind], problem_details: bool
) -> dict[int | str, dict[str, Any]]:
    rules = (mapping.rules[kind] for kind in kinds)
    answers = sorted((rule.status or 0, rule.retry_after or 0) for rule in rules)
    return {status: _response(status, later, problem_details) for status, later in answers}


def _response(status: int, retry_after: int, problem_details: bool) -> dict[str, Any]:
    content = {_MEDIA_TYPE: {"schema": _PROBLEM}} if problem_details else {}
    if status == 422:
        # FastAPI omits its own validation error if a route documents that status.
        detail = [_VALIDATION] if problem_details else [_TEXT, _VALIDATION]
        content["application/json"] = {"schema": _object(detail={"anyOf": detail})}
    elif not problem_details:
        content["application/json"] = {"schema": _object(detail=_TEXT)}
    response: dict[str, Any] = {"description": _title(status), "content": content}
    if retry_after:
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
    errors={
        "type": "array",
        "items": _object("pointer", "parameter", detail=_TEXT, pointer=_TEXT, parameter=_TEXT),
    },
)
