"""Taking turns on isolated connections, across requests, threads and event loops."""

import asyncio
import gc
import threading
import weakref
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from sqlalchemy.util import await_only
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from ._targets import IsolationError, running_loop

# The scope of the current request, and the scope's keys for its end and for an error that it has
# been given. A task that it has started keeps the scope.
SERVED: Final = ContextVar[Scope | None]("fastapi_sqlnative_served", default=None)
OVER: Final = "fastapi_sqlnative_over"
REFUSED: Final = "fastapi_sqlnative_refused"
# Seconds that a session waits for another session's transaction to end.
_PATIENCE: Final = 10.0
# The same beside its own request's session, which may wait for it, or may be about to end: FastAPI
# starts the generator of server-sent events before it ends the dependencies.
_BRIEFLY: Final = 1.0
_BESIDE: Final = (
    "a second transaction cannot begin beside an open one of the same request or test. End that "
    "one first, use its session, or test with cloned(app)."
)
_OPEN: Final = (
    "another session's transaction, such as a websocket's, is still open on the only connection. "
    "End it first (await it, on the event loop), or test with cloned(app)."
)
ENDED: Final = (
    "the block has ended. Finish work inside it: if the lifespan starts a worker, enter the block "
    "before the client."
)
# The sessions used in this request, task or test, or in the one that started it.
FLOW: ContextVar[tuple[weakref.ref[Any], ...]] = ContextVar("fastapi_sqlnative_flow", default=())


def joins_flow(session: object) -> None:
    """Record that a session is used in this context and in the tasks started from it."""
    others = tuple(each for each in FLOW.get() if each() not in (None, session))
    FLOW.set((*others, weakref.ref(session)))


def in_flow(session: object) -> bool:
    """Return whether a session is used in this context or in the one that started it."""
    return any(each() is session for each in FLOW.get())


@contextmanager
def marking_requests(app: Starlette) -> Generator[None]:
    """Set `SERVED` during each request, and fail a request that swallows an `IsolationError`."""
    inner = app.router.middleware_stack

    async def mark(scope: Scope, receive: Receive, send: Send) -> None:
        before = SERVED.get()
        SERVED.set(scope)
        scope[OVER] = False  # middleware may have called the application with it before
        if scope["type"] == "lifespan":
            FLOW.set(())  # tasks that the application starts are not part of the test
        try:
            await inner(scope, receive, send)
        except asyncio.CancelledError:
            # `TestClient` cancels a stream that the test leaves, and references in a cycle keep
            # its generator, with its session, alive.
            if scope["type"] == "http":
                asyncio.get_running_loop().call_soon(gc.collect)
            raise
        finally:
            SERVED.set(before)  # the request may run in the test's own task
            scope[OVER] = scope is not before  # a call within the request does not end it
        if REFUSED in scope:
            raise IsolationError(scope[REFUSED])

    app.router.middleware_stack = mark
    try:
        yield
    finally:
        app.router.middleware_stack = inner


class Turn:
    """A lock on the isolated connections, for one request or other piece of work at a time.

    A session of the application holds it for a whole transaction, a session of the test for each
    call, also inside a transaction of the same request. Others wait in order. A session beside one
    of its own request comes next, or is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By session, the connection held for a transaction; `None` for a single call.
        self._holders: dict[object, object] = {}
        self._waiting: deque[tuple[object, object, Future[None]]] = deque()

    def holds(self, session: object) -> bool:
        """Return whether it is a session's turn."""
        return session in self._holders

    def take(self, session: object, connection: Any, *, transaction: bool) -> None:
        """Wait for the turn: in a greenlet for an async connection, else in a thread."""
        ticket, use = Future[None](), connection if transaction else None
        with self._lock:
            own = [used for each, used in self._holders.items() if used and in_flow(each)]
            beside = use in own
            if not beside and (own or not self._holders):
                self._holders[session] = use
                return
            place = 0 if beside else len(self._waiting)  # nobody else's turn can come before
            self._waiting.insert(place, (session, use, ticket))
        patience = _BRIEFLY if beside else _PATIENCE
        try:
            if connection.engine.dialect.is_async:
                await_only(asyncio.wait_for(asyncio.wrap_future(ticket), patience))
            else:
                ticket.result(patience if running_loop() is None else 0)
        except BaseException as error:
            if not ticket.cancel():  # the turn came at the last moment
                self.release(session)
            if not isinstance(error, TimeoutError):
                raise
            raise connection.refused(_BESIDE if beside else _OPEN) from None

    def release(self, session: object) -> None:
        """End a session's turn, and give it to the next in line if no other session holds it."""
        with self._lock:
            self._holders.pop(session, None)
            while self._waiting and not self._holders:
                following, use, ticket = self._waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    self._holders[following] = use
                    ticket.set_result(None)

    @contextmanager
    def during(self, session: object, connection: Any = None) -> Generator[None]:
        """Hold the turn for a call; without a connection, don't wait for another session's end."""
        if connection is None:
            with self._lock:
                self._holders[session] = None
        else:
            self.take(session, connection, transaction=False)
        try:
            yield
        finally:
            self.release(session)
