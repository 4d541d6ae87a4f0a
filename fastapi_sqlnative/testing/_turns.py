"""Whose turn it is on the connections of isolated databases, across threads and event loops."""

from __future__ import annotations

import asyncio
import threading
import weakref
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Final

from sqlalchemy.util import await_only

from ._targets import IsolationError, running_loop

# Seconds for which a session waits for another one's transaction to end.
_PATIENCE: Final = 10.0
# The sessions that were opened in this request, task or test, or in the one that it came from.
_FLOW: ContextVar[tuple[weakref.ref[Any], ...]] = ContextVar("fastapi_sqlnative_flow", default=())


def joins_flow(session: object) -> None:
    """Note that a session is used by whoever runs here, and by what that starts."""
    alive = tuple(each for each in _FLOW.get() if each() is not None)
    _FLOW.set((*alive, weakref.ref(session)))


class Turn:
    """The right to use isolated connections, for one request or piece of other work at a time.

    A session has it from the beginning of its transaction to the end. Others wait; one that would
    wait for its own request is refused.

    Attributes:
        giving_way: the connection on which the test's sessions end, though it is not their turn.
    """

    def __init__(self) -> None:
        self.giving_way: object = None
        self._lock = threading.Lock()
        self._holders: dict[object, object] = {}  # sessions, and the connection that each uses
        self._waiting: list[Future[None]] = []

    def holds(self, session: object) -> bool:
        """Tell whether a session has it."""
        return session in self._holders

    def take(self, session: object, connection: Any, *, beside: bool = False) -> None:
        """Wait for the turn: in a greenlet for an asynchronous connection, else in a thread.

        Args:
            session: whose it will be.
            connection: that the session is about to use.
            beside: for one statement, which may stand within a transaction of the same request.
        """
        while (others := self._try(session, connection, beside)) is not None:
            try:
                if connection.asynchronous:
                    await_only(asyncio.wait_for(asyncio.wrap_future(others), _PATIENCE))
                else:
                    others.result(_PATIENCE if running_loop() is None else 0)
            except TimeoutError:
                raise IsolationError(
                    f"Database {connection.name!r} is isolated: another session's transaction "
                    "stays open on its one connection. Close that session first; await what uses "
                    "the database before a synchronous session does so on the event loop; or test "
                    "with cloned(app)."
                ) from None

    def _try(self, session: object, connection: Any, beside: bool) -> Future[None] | None:
        flow = [each() for each in _FLOW.get()]
        with self._lock:
            own = [each for each in self._holders if each in flow]
            if session in self._holders or not self._holders:
                self._holders[session] = connection
            elif not own:
                self._waiting.append(Future())
                return self._waiting[-1]
            elif all(self._holders[each] is not connection for each in own):
                self._holders[session] = connection
            elif not beside:
                raise IsolationError(
                    f"Database {connection.name!r} is isolated: a second session was to begin a "
                    "transaction beside an open one of the same request, on one connection. End "
                    "that one first, use one session for both, or test with cloned(app)."
                )
        return None

    def give_back(self, session: object) -> None:
        """Let others in, if the session has the turn and is the last of its request."""
        with self._lock:
            self._holders.pop(session, None)
            if self._holders:
                return
            waiting, self._waiting = self._waiting, []
        for each in waiting:
            if each.set_running_or_notify_cancel():  # it may have given up
                each.set_result(None)
