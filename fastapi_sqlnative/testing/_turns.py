"""Requests, and whose turn it is on isolated connections, across threads and event loops."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from sqlalchemy.util import await_only
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from ._targets import IsolationError, running_loop

T = TypeVar("T")
# The request that is being served, and under which its scope keeps what it was refused.
SERVED: Final = ContextVar[Scope | None]("fastapi_sqlnative_served", default=None)
REFUSED: Final = "fastapi_sqlnative_refused"
# Seconds for which a session waits for another one's transaction to end.
_PATIENCE: Final = 10.0
# The sessions that were used in this request, task or test, or in the one that it came from.
_FLOW: ContextVar[tuple[weakref.ref[Any], ...]] = ContextVar("fastapi_sqlnative_flow", default=())


def joins_flow(session: object) -> None:
    """Note that a session is used by whoever runs here, and by what that starts."""
    others = tuple(each for each in _FLOW.get() if each() not in (None, session))
    _FLOW.set((*others, weakref.ref(session)))


def in_flow(session: object) -> bool:
    """Return whether a session belongs to whoever runs here, or to what has started that."""
    return any(each() is session for each in _FLOW.get())


@contextmanager
def marking_requests(app: Starlette) -> Generator[None]:
    """Let `SERVED` tell for which request something is done; fail one that swallows a refusal."""
    inner = app.router.middleware_stack

    async def mark(scope: Scope, receive: Receive, send: Send) -> None:
        before = SERVED.get()
        SERVED.set(scope)
        if scope["type"] == "lifespan":
            _FLOW.set(())  # what the application starts is no part of the test
        try:
            await inner(scope, receive, send)
        finally:
            SERVED.set(before)  # the test itself may have called, in its own task
        if REFUSED in scope:
            raise IsolationError(scope[REFUSED])

    app.router.middleware_stack = mark
    try:
        yield
    finally:
        app.router.middleware_stack = inner


class Turn:
    """The right to use isolated connections, for one request or piece of other work at a time.

    A session of the application's has it from the beginning of its transaction to the end, one of
    the test's for each call. Others wait, first come first served; one that would wait for its
    own request is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Sessions, and the connection that each has for a transaction; `None` for one call.
        self._holders: dict[object, object] = {}
        self._waiting: deque[tuple[object, object, Future[None]]] = deque()

    def holds(self, session: object) -> bool:
        """Return whether a session has it."""
        return session in self._holders

    def take(self, session: object, connection: Any, *, transaction: bool) -> None:
        """Wait for the turn: in a greenlet for an asynchronous connection, else in a thread.

        Without `transaction` it is for one call, which may stand within a transaction of the same
        request.
        """
        ticket, use = Future[None](), connection if transaction else None
        with self._lock:
            own = [used for each, used in self._holders.items() if used and in_flow(each)]
            if use in own:
                raise connection.refused(
                    "a second transaction was to begin beside an open one of the same request or "
                    "test. End that one first, use its session, or test with cloned(app)."
                )
            if own or not self._holders:
                self._holders[session] = use
                return
            self._waiting.append((session, use, ticket))
        try:
            if connection.asynchronous:
                await_only(asyncio.wait_for(asyncio.wrap_future(ticket), _PATIENCE))
            else:
                ticket.result(_PATIENCE if running_loop() is None else 0)
        except BaseException as error:
            if not ticket.cancel():  # it has come at the last moment
                self.release(session)
            if not isinstance(error, TimeoutError):
                raise
            raise connection.refused(
                "another session's transaction stays open on its one connection. End that one "
                "first (await it, on the event loop), or test with cloned(app)."
            ) from None

    def release(self, session: object) -> None:
        """Let the next one in, if the session has the turn and is the last of its request."""
        with self._lock:
            self._holders.pop(session, None)
            while self._waiting and not self._holders:
                following, use, ticket = self._waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    self._holders[following] = use
                    ticket.set_result(None)

    def during(self, who: object, connection: Any, work: Callable[[], T]) -> T:
        """Do something when nobody else uses the connection."""
        if self.holds(who):
            return work()
        self.take(who, connection, transaction=False)
        try:
            return work()
        finally:
            self.release(who)

    @contextmanager
    def lent(self, session: object) -> Generator[None]:
        """Let a session of the test's end beside the one that has the turn."""
        self._holders[session] = None
        try:
            yield
        finally:
            del self._holders[session]
