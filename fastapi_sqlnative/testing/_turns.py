"""Whose turn it is on the connections of isolated databases, across threads and event loops."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from sqlalchemy.util import await_only

from ._targets import running_loop

# Seconds for which a session waits for another one's transaction to end.
_PATIENCE: Final = 10.0
# The sessions that were used in this request, task or test, or in the one that it came from.
_FLOW: ContextVar[tuple[weakref.ref[Any], ...]] = ContextVar("fastapi_sqlnative_flow", default=())


def joins_flow(session: object) -> None:
    """Note that a session is used by whoever runs here, and by what that starts."""
    others = tuple(each for each in _FLOW.get() if each() not in (None, session))
    _FLOW.set((*others, weakref.ref(session)))


def in_flow(session: object) -> bool:
    """Tell whether a session belongs to whoever runs here, or to what has started that."""
    return any(each() is session for each in _FLOW.get())


class Turn:
    """The right to use isolated connections, for one request or piece of other work at a time.

    A session has it from the beginning of its transaction to the end. Others wait; one that would
    wait for its own request is refused.

    Attributes:
        refusals: what requests have been refused, and have swallowed.
    """

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self._lock = threading.Lock()
        # Sessions, and the connection that each has for its transaction; `None` for a statement.
        self._holders: dict[object, object] = {}
        self._waiting: list[Future[None]] = []
        self._called: set[Future[None] | None] = set()  # who have waited, and not yet come

    def holds(self, session: object) -> bool:
        """Tell whether a session has it."""
        return session in self._holders

    def take(
        self, session: object, connection: Any, *, beside: bool = False, brief: bool = False
    ) -> None:
        """Wait for the turn: in a greenlet for an asynchronous connection, else in a thread.

        Args:
            session: whose it will be.
            connection: that the session is about to use.
            beside: for one statement, which may stand within a transaction of the same request.
            brief: for one statement, for whose end those may wait that it has started.
        """
        ticket: Future[None] | None = None
        try:
            while (ticket := self._try(session, connection, beside, brief, ticket)) is not None:
                if connection.asynchronous:
                    await_only(asyncio.wait_for(asyncio.wrap_future(ticket), _PATIENCE))
                else:
                    ticket.result(_PATIENCE if running_loop() is None else 0)
        except BaseException as error:
            self._called.discard(ticket)
            self.give_back(None)  # to those who wait for this one
            if not isinstance(error, TimeoutError):
                raise
            raise connection.refused(
                "another session's transaction stays open on its one connection. Close that "
                "session first; await what uses the database before a synchronous session "
                "does so on the event loop; or test with cloned(app)."
            ) from None

    def _try(
        self,
        session: object,
        connection: Any,
        beside: bool,
        brief: bool,
        ticket: Future[None] | None,
    ) -> Future[None] | None:
        with self._lock:
            own = [used for each, used in self._holders.items() if used and in_flow(each)]
            # Those who have waited come first, or one that begins again and again would keep it.
            if not own and session not in self._holders:
                late = self._called and ticket not in self._called
                self._called.discard(ticket)
                if self._holders or late:
                    self._waiting.append(Future())
                    return self._waiting[-1]
            if connection not in own or beside:
                self._holders[session] = None if beside or brief else connection
                return None
        raise connection.refused(
            "a second session was to begin a transaction beside an open one of the same request "
            "or test, on one connection. End that one first, use one session for both, or test "
            "with cloned(app)."
        )

    @contextmanager
    def lent(self, session: object) -> Generator[None]:
        """Let a session of the test's end beside the one that has the turn."""
        self._holders[session] = None
        try:
            yield
        finally:
            del self._holders[session]

    def give_back(self, session: object) -> None:
        """Let others in, if the session has the turn and is the last of its request."""
        with self._lock:
            self._holders.pop(session, None)
            if self._holders:
                return
            waiting, self._waiting = self._waiting, []
            # One that is not called has given up.
            self._called.update(e for e in waiting if e.set_running_or_notify_cancel())
        for each in waiting:
            if not each.cancelled():
                each.set_result(None)
