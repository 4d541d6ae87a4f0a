"""Where sessions end: committed, rolled back, closed, whoever cancels the caller meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeAlias

import anyio
import anyio.from_thread
import anyio.to_thread
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only

from ..exceptions import AfterCommitError
from .completion import to_completion
from .options import AUTOCOMMIT, NO_OPTIONS
from .pending import has_pending_changes
from .session import AnySession, NativeSession, record_of, sync_session

logger = logging.getLogger("fastapi_sqlnative")

Operation: TypeAlias = Callable[[AnySession], None]
# Runs an operation where the session may wait for the database.
Call: TypeAlias = Callable[[AnySession, Operation], None]


# -- what is done to one session, in a greenlet of its own kind or in a thread --------------------


def commit(session: AnySession) -> None:
    """Commit, where there is something to commit, to refuse, or to tell a listener of."""
    inner = sync_session(session)
    record = inner.sqlnative
    record.check_discarded()
    # After a failed flush, too, SQLAlchemy refuses, and it is right.
    if record.has_lost_nothing and inner.is_active and not has_pending_changes(inner):
        inner.rollback()  # SQLAlchemy would refuse to commit on an invalidated connection
    if not (inner.in_transaction() or tells_of_commit(inner)):
        return  # SQLAlchemy's own commit would do nothing
    record.committed = False
    try:
        _run(session, "commit")
    except AfterCommitError:
        raise
    except Exception as error:
        if record.committed:  # an override of the application's went on after it
            raise record.state.error(AfterCommitError) from error
        raise


def tells_of_commit(session: NativeSession) -> bool:
    """Tell whether a commit without SQL would be heard by code of the application."""
    record = session.sqlnative
    if record.closed or not (session.in_transaction() or session.autobegin):
        return False
    listened = session.dispatch.before_commit or len(session.dispatch.after_commit) > 1
    return bool(listened or "commit" in record.state.overridden)


def roll_back_and_close(session: AnySession) -> None:
    """Roll back, so that the application's listeners hear of it, and close."""
    # After a failed flush that has been done, and SQLAlchemy warns of what was changed since.
    undone = not sync_session(session).is_active
    _end(session, *(("close",) if undone else ("rollback", "close")))


def close(session: AnySession) -> None:
    """Give the connection back, with what is not committed rolled back; refuse further use."""
    _end(session, "close")


def _end(session: AnySession, *methods: str) -> None:
    """Call what ends a session.

    A failure here only means that the connection is gone: it is logged, because it must not
    hide the answer, or the error, that the session's work ended with.
    """
    inner = sync_session(session)
    record = inner.sqlnative
    record.finished = True
    overridden = record.state.overridden
    if not (inner.in_transaction() or inner.identity_map or overridden.intersection(methods)):
        return None  # never used: there is nothing to roll back, to give back or to detach
    record.ending = bool(overridden)
    try:
        if record.state.stopping == "stopped":
            return inner.invalidate()  # no pool waits for the connection any more, to close it
        for method in methods:
            _run(session, method)
    except BaseException as error:
        record.discard_connections()
        record.forget()
        if not isinstance(error, Exception):
            raise  # the deadline of a cancellation
        logger.warning(
            "A session of database %r could not give its connection back, which is discarded: "
            "it was lost, or a task that the request left behind is still using it.",
            record.state.name,
            exc_info=True,
        )
    finally:
        record.ending = False


def _run(session: AnySession, method: str) -> None:
    """Call a method of the session, as the application's class has it."""
    own = getattr(type(session), method)
    if isinstance(session, AsyncSession) and own is not getattr(AsyncSession, method):
        await_only(own(session))
    else:
        getattr(sync_session(session), method)()


def close_all(call: Call, sessions: Sequence[AnySession], end: Operation = close) -> None:
    """End all of them, also when the deadline of a cancellation cuts one short."""
    if len(sessions) == 1:
        call(sessions[0], end)
        return
    with ExitStack() as closing:
        for session in sessions:
            closing.callback(call, session, end)


# -- where it is done -----------------------------------------------------------------------------


def has_only_read(session: AnySession) -> bool:
    """Tell whether a cancellation while the session ends can cost no more than its connection.

    Then neither a task nor a thread is needed: nothing was written, and the connection goes back
    in one piece. In AUTOCOMMIT there is no ROLLBACK to wait for, and nothing to cancel.
    """
    inner = sync_session(session)
    record = inner.sqlnative
    state = record.state
    return (
        isinstance(session, AsyncSession)
        and state.may_be_interrupted
        and not record.work.may_have_written
        and not record.discarded
        and not record.streamed
        and not state.overridden
        and (
            record.options is AUTOCOMMIT
            or (record.options is NO_OPTIONS and state.returns_undisturbed)
        )
        and not has_pending_changes(inner)
    )


async def run_together(
    sessions: Sequence[AnySession],
    work: Callable[[Call], None],
    *,
    timeout: float,
    cancelled: bool = False,
) -> None:
    """Run what finishes these sessions to its end, whoever cancels the caller meanwhile.

    `work` is plain code over sessions, and gets `call` to touch one: in the greenlet of an
    `AsyncSession`, in one worker thread, or, where a request has both kinds, in a thread that
    hands the asynchronous part back to the event loop.

    Args:
        sessions: everything that `work` touches.
        work: commits, rolls back, closes.
        timeout: seconds from the cancellation after which an asynchronous connection is
            discarded. A synchronous one is waited for: its driver's timeouts bound it.
        cancelled: the caller is being cancelled already.
    """
    asynchronous = [session for session in sessions if isinstance(session, AsyncSession)]
    bridge = _Bridge()
    if len(asynchronous) == len(sessions):
        running = asynchronous[0].run_sync(lambda _: work(directly))
    else:
        call = bridge.call if asynchronous else directly
        # A limiter of its own: the default one may be full of threads that wait for a
        # connection, which this work is about to give back.
        running = anyio.to_thread.run_sync(work, call, limiter=anyio.CapacityLimiter(1))

    def abandon(task: asyncio.Task[None]) -> None:
        logger.error(
            "Database %s did not finish within %s s of a cancellation: the connection is "
            "discarded%s.",
            ", ".join(repr(record_of(session).state.name) for session in sessions),
            timeout,
            "" if cancelled else ", and whether a COMMIT took effect is unknown",
        )
        # SQLAlchemy invalidates a connection that is cancelled in mid-flight.
        bridge.cancel() if len(asynchronous) < len(sessions) else task.cancel()

    await to_completion(
        running, timeout=timeout, cancelled=cancelled, abandon=abandon if asynchronous else None
    )


def directly(session: AnySession, operation: Operation) -> None:
    """Run an operation here."""
    operation(session)


class _Bridge:
    """The way from a worker thread to the sessions of both kinds."""

    def __init__(self) -> None:
        self._crossing: asyncio.Task[Any] | None = None

    def call(self, session: AnySession, operation: Operation) -> None:
        if isinstance(session, AsyncSession):
            anyio.from_thread.run(self._cross, session, operation)
        else:
            operation(session)

    def cancel(self) -> None:
        """Give up what runs on the event loop now; the thread goes on with the rest."""
        if self._crossing is not None:
            self._crossing.cancel()

    async def _cross(self, session: AsyncSession, operation: Operation) -> None:
        self._crossing = asyncio.current_task()
        try:
            await session.run_sync(lambda _: operation(session))
        finally:
            self._crossing = None


@asynccontextmanager
async def finishing(
    session: AsyncSession, success: Operation, *, timeout: float
) -> AsyncGenerator[AsyncSession]:
    """Finish an asynchronous session at the end of a block."""

    async def finish(operation: Operation, *, cancelled: bool = False) -> None:
        if record_of(session).asked or operation is not close:
            await run_together(
                [session],
                lambda call: call(session, operation),
                timeout=timeout,
                cancelled=cancelled,
            )
        else:
            await session.run_sync(lambda _: operation(session))

    try:
        yield session
    except BaseException as error:
        await finish(roll_back_and_close, cancelled=isinstance(error, asyncio.CancelledError))
        raise
    await finish(success)


def commit_and_close(session: AnySession) -> None:
    """Commit, and close whatever comes of it."""
    try:
        commit(session)
    finally:
        close(session)
