"""Finishing sessions: commit, roll back and close, even if the caller is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import logging
import math
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
from .session import AnySession, NativeSession, record_of, sync_session
from .work import has_pending_changes

logger = logging.getLogger("fastapi_sqlnative")

Operation: TypeAlias = Callable[[AnySession], None]
# Runs an operation in the session's greenlet or thread.
Call: TypeAlias = Callable[[AnySession, Operation], None]


# -- operations on one session; plain code in a greenlet or a thread ------------------------------


def commit(session: AnySession) -> None:
    """Commit, if there is something to commit or to refuse, or a listener to call."""
    inner = sync_session(session)
    record = inner.sqlnative
    record.check_discarded()
    # Not after a failed flush: SQLAlchemy rightly refuses to commit then.
    if record.lost_without_writes and inner.is_active and not has_pending_changes(inner):
        inner.rollback()  # SQLAlchemy would refuse to commit on an invalidated connection
    if not (inner.in_transaction() or commit_is_observed(inner)):
        return  # SQLAlchemy's own commit would do nothing
    record.committed = False
    record.shielded = True  # by whoever finishes it
    try:
        _run(session, "commit")
    except AfterCommitError:
        raise
    except Exception as error:
        if record.committed:  # an override of commit() failed after its super().commit()
            raise record.state.error(AfterCommitError) from error
        raise


def commit_is_observed(session: NativeSession) -> bool:
    """Return whether code of the application would notice a commit without SQL."""
    record = session.sqlnative
    if record.closed or not (session.in_transaction() or session.autobegin):
        return False
    listened = session.dispatch.before_commit or len(session.dispatch.after_commit) > 1
    return bool(listened or "commit" in record.state.overridden)


def roll_back_and_close(session: AnySession) -> None:
    """Roll back and close; call `rollback()` only if the application observes it.

    It expires every object, and an exception handler may still read what was loaded.
    """
    inner = sync_session(session)
    listened = inner.dispatch.after_rollback or len(inner.dispatch.after_soft_rollback) > 1
    observed = listened or "rollback" in inner.sqlnative.state.overridden
    # A failed flush has already rolled back. SQLAlchemy would warn about changes made since.
    _end(session, *(("rollback", "close") if observed and inner.is_active else ("close",)))


def close(session: AnySession) -> None:
    """Roll back, return the connection to the pool and refuse further use."""
    _end(session, "close")


def _end(session: AnySession, *methods: str) -> None:
    """Call the methods that end a session.

    A failure here only means that the connection is lost. It is logged, so that it doesn't hide
    the response or the error that the session's work ended with.
    """
    inner = sync_session(session)
    record = inner.sqlnative
    record.finished = True
    overridden = record.state.overridden
    if not (inner.in_transaction() or inner.identity_map or overridden.intersection(methods)):
        return None  # never used: nothing to roll back, release or detach
    record.ending = bool(overridden) or "rollback" in methods
    try:
        if record.state.stopping == "stopped":
            return inner.invalidate()  # the pool is disposed of and would not close the connection
        for method in methods:
            _run(session, method)
    except BaseException as error:
        record.discard_connections()
        record.forget()
        if not isinstance(error, Exception):
            raise  # a cancellation's deadline has passed
        logger.warning(
            "A session of database %r could not return its connection, which is discarded: "
            "it was lost, or a task that outlived the request is still using it.",
            record.state.name,
            exc_info=True,
        )
    finally:
        record.ending = False


def _run(session: AnySession, method: str) -> None:
    """Call a method of the session, or the application's override of it."""
    own = getattr(type(session), method)
    if isinstance(session, AsyncSession) and own is not getattr(AsyncSession, method):
        await_only(own(session))
    else:
        getattr(sync_session(session), method)()


def close_all(call: Call, sessions: Sequence[AnySession], end: Operation = close) -> None:
    """End all sessions, even if a cancellation's deadline interrupts one of them."""
    if len(sessions) == 1:
        call(sessions[0], end)
        return
    with ExitStack() as closing:
        for session in sessions:
            closing.callback(call, session, end)


# -- running them in tasks and threads ------------------------------------------------------------


def has_only_read(session: AnySession) -> bool:
    """Return whether cancelling the end of the session can cost no more than its connection.

    Then it needs no task of its own: nothing was written, and returning the connection is a single
    step. In AUTOCOMMIT there is no ROLLBACK to wait for, so nothing can be cancelled.
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
            or (record.options is NO_OPTIONS and state.returns_by_rollback_only)
        )
        and not has_pending_changes(inner)
        and not (record.commits and inner.dispatch.before_commit)  # a listener may write
    )


async def run_together(
    sessions: Sequence[AnySession],
    work: Callable[[Call], None],
    *,
    timeout: float,
    cancelled: bool = False,
) -> None:
    """Run the code that finishes these sessions to its end, even if the caller is cancelled.

    `work` is plain code that touches sessions only through `call`. It runs in a greenlet if all
    sessions are asynchronous, else in one worker thread, which hands the operations of async
    sessions back to the event loop.

    Args:
        sessions: all sessions that `work` touches.
        work: commits, rolls back and closes them.
        timeout: seconds from the cancellation after which async connections are discarded.
            Synchronous ones are waited for: their driver's timeouts bound that.
        cancelled: the caller is already being cancelled.
    """
    asynchronous = [session for session in sessions if isinstance(session, AsyncSession)]
    bridge = _Bridge()
    if len(asynchronous) == len(sessions):
        running = asynchronous[0].run_sync(lambda _: work(directly))
    else:
        call = bridge.call if asynchronous else directly
        # A limiter of its own: threads that wait for a connection may have used up the default
        # one, and this work is about to release connections.
        running = anyio.to_thread.run_sync(work, call, limiter=anyio.CapacityLimiter(1))

    def abandon(task: asyncio.Task[None]) -> None:
        bridge.cancel() if len(asynchronous) < len(sessions) else task.cancel()

    await to_completion(
        running,
        databases=[record_of(session).state.name for session in sessions],
        timeout=timeout if asynchronous else math.inf,
        cancelled=cancelled,
        abandon=abandon,
    )


def directly(session: AnySession, operation: Operation) -> None:
    """Run an operation right here."""
    operation(session)


class _Bridge:
    """A bridge from a worker thread to the sessions of both kinds."""

    def __init__(self) -> None:
        self._crossing: asyncio.Task[Any] | None = None

    def call(self, session: AnySession, operation: Operation) -> None:
        if isinstance(session, AsyncSession):
            anyio.from_thread.run(self._cross, session, operation)
        else:
            operation(session)

    def cancel(self) -> None:
        """Cancel the current operation on the event loop; the thread goes on with the rest."""
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
    """Finish an async session at the end of a block: by `success`, or by rolling back."""

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
    """Commit, then close even if that failed."""
    try:
        commit(session)
    finally:
        close(session)
