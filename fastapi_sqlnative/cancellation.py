"""Dependencies that end a request that is too slow, or that nobody waits for, up to its COMMIT."""

# No `from __future__ import annotations` here: FastAPI could not resolve names of a function.

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Final, TypeAlias

from fastapi import Depends
from fastapi.requests import HTTPConnection
from starlette.requests import ClientDisconnect, Request

from ._routes import name_of_route
from ._seconds import check_seconds
from ._unit_of_work import UnitOfWork
from .dependencies import UNIT_OF_WORK
from .errors import DatabaseErrorKind, describe_database_error
from .exceptions import ClientDisconnectedError, DeadlineExceededError

__all__ = ["cancel_on_disconnect", "deadline"]

logger = logging.getLogger("fastapi_sqlnative")

# Seconds that a cancelled request has to end, in which its driver tells the server to stop. Then
# it is cancelled once more, which costs its connection: a network may swallow that message too.
_GRACE: Final = 1.0

_Guard: TypeAlias = Callable[[Request, UnitOfWork], AbstractAsyncContextManager[None]]
_Dependency: TypeAlias = Callable[..., Awaitable[None]]


def deadline(seconds: float) -> _Dependency:
    """Depend on the request's being done in time: everything from here up to its COMMIT.

    Past the deadline nothing is committed and the client reads 504, whatever the endpoint makes of
    the cancellation. With asynchronous engines whatever waits is cancelled: the query ends on the
    server too. Of a synchronous engine each statement ends, by the server's own timeout. A COMMIT
    that has begun is never interrupted, nor is what comes after one that has stored something. Of
    several deadlines the earliest counts. Websockets have none.

    Args:
        seconds: from the moment that FastAPI comes to this dependency, when it has read the body.

    Raises:
        TypeError: at once, for what is no number.
        ValueError: at once, for a time that is not above zero.
        DeadlineExceededError: in the request.

    Example:
        @app.get("/report", dependencies=[Depends(deadline(2))])
    """
    check_seconds("deadline", seconds)
    return _deadline(float(seconds))


def cancel_on_disconnect(*, methods: Iterable[str] = ("GET", "HEAD")) -> _Dependency:
    """Depend on the client's waiting: when it goes away the request is cancelled, up to its COMMIT.

    As by `deadline`, the query of an asynchronous engine ends on the server and nothing is
    committed; a request with a synchronous session goes on to its end. A body that the endpoint
    reads by itself would be taken from it: then the client is not watched.

    Args:
        methods: of the requests that are cancelled. What writes may better be finished.

    Raises:
        ClientDisconnectedError: in the request.

    Example:
        @app.get("/report", dependencies=[Depends(cancel_on_disconnect())])
    """
    return _cancel_on_disconnect(frozenset(method.upper() for method in methods))


@functools.cache
def _deadline(seconds: float) -> _Dependency:
    return _around_request(functools.partial(_until, seconds))


@functools.cache
def _cancel_on_disconnect(methods: frozenset[str]) -> _Dependency:
    return _around_request(functools.partial(_while_connected, methods))


def _around_request(guard: _Guard) -> _Dependency:
    """Make a dependency of a context manager, which is left before the COMMIT in any scope."""

    async def around(
        connection: HTTPConnection, unit: Annotated[UnitOfWork, UNIT_OF_WORK]
    ) -> AsyncGenerator[None]:
        if not isinstance(connection, Request):
            yield  # a websocket lives for as long as its client likes
            return
        async with guard(connection, unit):
            yield

    # A generator's scope is for whoever writes Depends() to choose; that of its own dependency not.
    async def dependency(around: Annotated[None, Depends(around, scope="function")]) -> None: ...

    return dependency


class _Cancellation:
    """The cancellation of a request, which its context manager turns into a `TimeoutError`."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit
        self._first, self._second = asyncio.timeout(None), asyncio.timeout(None)

    def send(self) -> None:
        """Cancel the request, unless that would cost what is stored or leave a thread behind."""
        if self._unit.may_be_cancelled:
            self._unit.cancelled = True
            now = asyncio.get_running_loop().time()
            self._first.reschedule(now)
            self._second.reschedule(now + _GRACE)

    @asynccontextmanager
    async def raises(self, error: Callable[[], Exception]) -> AsyncGenerator[None]:
        """Raise an error in place of the cancellation, and of an answer in spite of it."""
        own: Exception | None = None
        try:
            async with self._second, self._first:
                try:
                    yield
                except Exception as raised:
                    own = raised
                    raise
        except TimeoutError as cancelled:
            if cancelled is own:
                raise  # by a timeout of the application's
            raise error() from cancelled
        if self._first.expired() and not self._unit.has_stored:
            raise error()


@asynccontextmanager
async def _until(seconds: float, request: Request, unit: UnitOfWork) -> AsyncGenerator[None]:
    ends_at = time.monotonic() + seconds

    def is_over() -> bool:
        return time.monotonic() >= ends_at and not unit.has_stored

    def error() -> DeadlineExceededError:
        return DeadlineExceededError(
            504,
            "The service took too long to answer.",
            f"{name_of_route(request.scope) or 'The request'} was not done after {seconds:g} s, "
            "its deadline, and is rolled back. The cause says what it waited for: make that "
            "faster, or give deadline() more seconds.",
        )

    unit.limit(ends_at)
    cancellation = _Cancellation(unit)
    timer = asyncio.get_running_loop().call_later(seconds, cancellation.send)
    try:
        async with cancellation.raises(error):
            yield
    except Exception as failure:
        found = describe_database_error(failure)
        timed_out = found is not None and found.kind is DatabaseErrorKind.STATEMENT_TIMEOUT
        if timed_out and is_over() and not isinstance(failure, DeadlineExceededError):
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
    if request.method not in methods or not await _has_no_body_left(request):
        yield
        return
    cancellation = _Cancellation(unit)

    def error() -> ClientDisconnectedError:
        route = name_of_route(request.scope) or "a request"
        message = f"The client of {route} has gone away: the request is rolled back."
        logger.debug("%s", message)
        return ClientDisconnectedError(499, "The client has gone away.", message)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancellation.send()

    watching = asyncio.create_task(watch())
    try:
        async with cancellation.raises(error):
            yield
    finally:
        watching.cancel()


async def _has_no_body_left(request: Request) -> bool:
    """Read the empty body of a request without one; tell whether the watch would take none away."""
    if getattr(request.scope.get("route"), "body_field", None) is not None:
        return True  # FastAPI has read it
    headers = request.headers
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        return False
    with contextlib.suppress(ClientDisconnect):  # the watch hears of it as well
        # The endpoint may ask for it, and would wait for ever: the request keeps it.
        await request.body()
    return True
