"""Dependencies that end a request that is too slow, or that nobody waits for, up to its COMMIT."""

# No `from __future__ import annotations` here: FastAPI could not resolve names of a function.

import asyncio
import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, Final, TypeAlias

from fastapi import Depends
from fastapi.requests import HTTPConnection
from sqlalchemy.exc import DBAPIError
from starlette.requests import ClientDisconnect, Request

from ._routes import name_of_route
from ._seconds import check_seconds
from ._unit_of_work import UnitOfWork
from .dependencies import IN_UNIT_OF_WORK
from .errors import DatabaseErrorKind, describe_database_error
from .exceptions import ClientDisconnectedError, DeadlineExceededError

__all__ = ["cancel_on_disconnect", "deadline"]

logger: logging.Logger = logging.getLogger("fastapi_sqlnative")

# Seconds in which a cancelled driver tells the server to stop. Then it is cancelled once more,
# which costs the connection: a network that swallows packets may have swallowed that as well.
_GRACE: Final = 1.0

_Dependency: TypeAlias = Callable[..., Awaitable[None]]


def deadline(seconds: float) -> _Dependency:
    """End a request that is not done in time, from here up to its COMMIT.

    Past the deadline nothing is committed and the client reads 504, also where the endpoint answers
    in spite of it. With asynchronous engines whatever waits is cancelled, and the query ends on the
    server. With a synchronous one the server ends each statement, and nothing else ends early; a
    `def` endpoint is waited for, and so is what its dependencies do. No
    COMMIT is interrupted, and a request that has committed something itself is left alone. Of
    several deadlines the earliest counts. Websockets have none.

    Args:
        seconds: from the moment when FastAPI comes to this dependency; by then it has the body.

    Raises:
        TypeError: at once, for what is no number.
        ValueError: at once, for a time that is not above zero.
        DeadlineExceededError: in the request; an `HTTPException`.

    Example:
        @app.get("/report", dependencies=[Depends(deadline(2))])
    """
    check_seconds("deadline", seconds)
    return _around_request(_until, float(seconds))


def cancel_on_disconnect(*, methods: Iterable[str] = ("GET", "HEAD")) -> _Dependency:
    """Cancel a request whose client has gone away, up to its COMMIT.

    What `deadline` says of a cancellation holds here. A request with a synchronous session goes on
    to its end, and so does one with a body that FastAPI has left for the endpoint to read.

    Args:
        methods: of the requests to cancel. One that writes is better finished, as a rule.

    Raises:
        ClientDisconnectedError: in the request; an `HTTPException`, whose answer nobody reads.

    Example:
        @app.get("/report", dependencies=[Depends(cancel_on_disconnect())])
    """
    if isinstance(methods, str):
        raise TypeError(f"methods are several: write methods=({methods!r},).")
    return _around_request(_while_connected, frozenset(each.upper() for each in methods))


# One dependency for one limit, so that FastAPI's cache and `dependency_overrides` recognise it.
@functools.cache
def _around_request(guard: Any, limit: object) -> _Dependency:
    """Make a dependency that is left before the COMMIT, with whatever scope it is declared."""

    async def around(
        connection: HTTPConnection, unit: Annotated[UnitOfWork, IN_UNIT_OF_WORK]
    ) -> AsyncGenerator[None]:
        if isinstance(connection, Request):
            async with guard(limit, connection, unit):
                yield
        else:
            yield  # a websocket lives for as long as its client likes

    async def dependency(around: Annotated[None, Depends(around, scope="function")]) -> None: ...

    return dependency


@asynccontextmanager
async def _cancellable(
    unit: UnitOfWork, error: Callable[[], Exception]
) -> AsyncGenerator[Callable[[], None]]:
    """Yield what cancels the request; raise the error in place of what comes of that."""
    first, second = asyncio.timeout(None), asyncio.timeout(None)

    def cancel() -> None:
        if unit.may_be_cancelled:
            unit.cancelled = True
            now = asyncio.get_running_loop().time()
            first.reschedule(now)
            second.reschedule(now + _GRACE)

    own: Exception | None = None
    try:
        async with second, first:
            try:
                yield cancel
            except Exception as raised:
                own = raised
                raise
    except TimeoutError as cancelled:
        if cancelled is own:
            raise  # by a timeout of the application's
        raise error() from cancelled
    if first.expired() and not unit.has_stored:
        raise error()  # the endpoint has swallowed the cancellation


@asynccontextmanager
async def _until(seconds: float, request: Request, unit: UnitOfWork) -> AsyncGenerator[None]:
    ends_at = time.monotonic() + seconds
    unit.limit(ends_at)

    def is_over() -> bool:
        return time.monotonic() >= ends_at and not unit.has_stored

    def error() -> DeadlineExceededError:
        return DeadlineExceededError(name_of_route(request.scope), seconds)

    async with _cancellable(unit, error) as cancel:
        timer = asyncio.get_running_loop().call_later(seconds, cancel)
        try:
            yield
        except DBAPIError as failure:
            described = describe_database_error(failure)
            timed_out = described and described.kind is DatabaseErrorKind.STATEMENT_TIMEOUT
            if timed_out and is_over():
                raise error() from failure
            raise
        finally:
            timer.cancel()
    if is_over():
        raise error()


@asynccontextmanager
async def _while_connected(
    methods: frozenset[str], request: Request, unit: UnitOfWork
) -> AsyncGenerator[None]:
    if request.method not in methods or not await _is_read(request):
        yield
        return

    def error() -> ClientDisconnectedError:
        gone = ClientDisconnectedError(name_of_route(request.scope))
        logger.debug("%s", gone)
        return gone

    async def watch(cancel: Callable[[], None]) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass  # the end of a body
        cancel()

    async with _cancellable(unit, error) as cancel:
        watching = asyncio.create_task(watch(cancel))
        try:
            yield
        finally:
            watching.cancel()


async def _is_read(request: Request) -> bool:
    """Return whether nothing is left of the body, which the watch would take from the endpoint."""
    if getattr(request.scope.get("route"), "body_field", None) is not None:
        return True  # FastAPI has read it
    headers = request.headers
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        return False
    with suppress(ClientDisconnect):  # the watch hears of it, too
        await request.body()  # an endpoint that asks for it as well gets what the request keeps
    return True
