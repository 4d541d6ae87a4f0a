"""Dependencies that cancel a request, up to its COMMIT, on a deadline or a disconnect."""

# No `from __future__ import annotations` here: FastAPI can't resolve names local to a function.

import asyncio
import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from traceback import clear_frames
from typing import Annotated, Any, Final, TypeAlias, cast

from fastapi import Depends
from fastapi.requests import HTTPConnection
from sqlalchemy.exc import DBAPIError
from starlette.requests import ClientDisconnect, Request

from ._functions import check_seconds
from ._routes import name_of_route
from ._unit_of_work import UnitOfWork
from .dependencies import IN_UNIT_OF_WORK
from .errors import DatabaseErrorKind, describe_database_error
from .exceptions import ClientDisconnectedError, CommitOutcomeUnknownError, DeadlineExceededError

__all__ = ["cancel_on_disconnect", "deadline"]

logger: logging.Logger = logging.getLogger("fastapi_sqlnative")

# Grace period, in seconds, for a cancelled driver to send its cancel request. If the network drops
# that too, a second cancellation discards the connection.
_GRACE: Final = 1.0

_Dependency: TypeAlias = Callable[..., Awaitable[None]]


def deadline(seconds: float) -> _Dependency:
    """End a request that takes longer than `seconds`, up to its COMMIT.

    Past the deadline nothing is committed and the client gets a 504, even if the endpoint still
    returns a response. With asynchronous engines the request is cancelled, and its query ends on
    the server. With a synchronous session the server ends each statement, and nothing else ends
    early; a `def` endpoint and its dependencies run to their end. No COMMIT is interrupted, and a
    request that has committed something itself is left alone. Of several deadlines the earliest
    applies. Websockets have none.

    Args:
        seconds: counted from when FastAPI runs this dependency, after it has read the body.

    Raises:
        TypeError: at once, if `seconds` is not a number.
        ValueError: at once, if it is not above zero.
        DeadlineExceededError: in the request; an `HTTPException`.

    Example:
        @app.get("/report", dependencies=[Depends(deadline(2))])
    """
    check_seconds("deadline", seconds)
    return _around_request(_until, float(seconds))


def cancel_on_disconnect(*, methods: Iterable[str] = ("GET", "HEAD")) -> _Dependency:
    """Cancel a request whose client has disconnected, up to its COMMIT.

    The request is cancelled as by `deadline`. A request with a synchronous session runs to its
    end, and so does one with a body that FastAPI leaves for the endpoint to read.

    Args:
        methods: the HTTP methods to cancel. Requests that write are usually better finished.

    Raises:
        ClientDisconnectedError: in the request; an `HTTPException`, though no client is left.

    Example:
        @app.get("/report", dependencies=[Depends(cancel_on_disconnect())])
    """
    if isinstance(methods, str):
        raise TypeError(f"methods must be a collection of strings: pass methods=({methods!r},).")
    return _around_request(_while_connected, frozenset(each.upper() for each in methods))


# Cached, so that FastAPI's cache and `dependency_overrides` recognise equal dependencies.
@functools.cache
def _around_request(guard: Any, limit: object) -> _Dependency:
    """Make a dependency that exits before the COMMIT, whatever scope it is declared with."""

    async def around(
        connection: HTTPConnection, unit: Annotated[UnitOfWork, IN_UNIT_OF_WORK]
    ) -> AsyncGenerator[None]:
        if isinstance(connection, Request):
            async with guard(limit, connection, unit):
                yield
        else:
            yield  # a websocket may stay open for as long as its client likes

    async def dependency(around: Annotated[None, Depends(around, scope="function")]) -> None: ...

    return dependency


@asynccontextmanager
async def _cancelled_by(
    start: Callable[[Callable[[], None]], Any], unit: UnitOfWork, error: Callable[[], Exception]
) -> AsyncGenerator[None]:
    """Give a timer or task a function that cancels the request; raise `error` if it was called."""
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    before = task.cancelling()
    ours: list[asyncio.TimerHandle | None] = []

    # Not by asyncio.timeout(), which cancels in the event loop's next iteration: by then the task
    # may have sent its COMMIT.
    def cancel() -> None:
        if unit.may_be_cancelled or (ours and not unit.has_stored):
            unit.cancelled = True
            task.cancel()
            again = None if ours else asyncio.get_running_loop().call_later(_GRACE, cancel)
            ours.append(again)

    waiting = start(cancel)
    try:
        yield
    except asyncio.CancelledError as cancelled:
        if not ours or task.cancelling() - len(ours) > before:
            raise  # somebody else has cancelled the request
        clear_frames(cancelled.__traceback__)  # else a half-open connection lives until the next GC
        if unit.has_stored:
            raise CommitOutcomeUnknownError(
                f"{name_of_route(unit.scope) or 'A request'} was cancelled after a commit() of its "
                "own, whose work is stored, or may be. Check the database before you repeat it."
            ) from cancelled
        raise error() from cancelled
    finally:
        waiting.cancel()
        for again in ours:
            task.uncancel()
            if again is not None:
                again.cancel()
    if ours and not unit.has_stored:
        raise error()  # the endpoint swallowed the cancellation


@asynccontextmanager
async def _until(seconds: float, request: Request, unit: UnitOfWork) -> AsyncGenerator[None]:
    ends_at = time.monotonic() + seconds
    # For synchronous sessions, which can't be cancelled: the server ends their statements.
    unit.ends_at = min(unit.ends_at, ends_at)

    def is_over() -> bool:
        return time.monotonic() >= ends_at and not unit.has_stored

    error = functools.partial(DeadlineExceededError, name_of_route(request.scope), seconds)
    timer = functools.partial(asyncio.get_running_loop().call_later, seconds)
    async with _cancelled_by(timer, unit, error):
        try:
            yield
        except DBAPIError as failure:
            described = describe_database_error(failure)
            timed_out = described and described.kind is DatabaseErrorKind.STATEMENT_TIMEOUT
            if timed_out and is_over():
                raise error() from failure
            raise
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
            pass  # skip the end of the body
        cancel()

    async with _cancelled_by(lambda cancel: asyncio.create_task(watch(cancel)), unit, error):
        yield


async def _is_read(request: Request) -> bool:
    """Return whether the body has been read; else the watch would take it from the endpoint."""
    if getattr(request.scope.get("route"), "body_field", None) is not None:
        return True  # FastAPI reads it
    headers = request.headers
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        return False
    with suppress(ClientDisconnect):  # the watch sees it, too
        await request.body()  # cached, so that the endpoint can ask for it as well
    return True
