"""Finishing sessions: commit, roll back and close, even if the caller is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import anyio.to_thread
from anyio.lowlevel import checkpoint_if_cancelled
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from ..exceptions import AfterCommitError, RequestCancelledError, UncommittedChangesError
from .completion import once, to_completion, without_yielding
from .engines import run_in_greenlet
from .options import AUTOCOMMIT, NO_OPTIONS
from .session import NativeSession, sync_session
from .transaction import has_pending_changes, would_flush

logger = logging.getLogger("fastapi_sqlnative")

T = TypeVar("T")
# Seconds for a request past its deadline to roll back: its client is waiting for the response.
_GRACE: Final = 1.0


# -- operations on one session; plain code in a greenlet or a thread ------------------------------


def commit(session: NativeSession) -> None:
    """Commit a marked session with something to commit or to refuse, or a listener to call."""
    record = session.sqlnative
    if not record.commits:
        return
    record.check_discarded()
    lost = any(each.invalidated for each in record.connections)
    if lost and not (record.may_have_written or has_pending_changes(session)):
        session.rollback()  # SQLAlchemy would refuse to commit on an invalidated connection
    if not (session.in_transaction() or commit_is_observed(session)):
        return  # SQLAlchemy's own commit would do nothing
    overridden = "commit" in record.state.overridden
    work = record.work
    wrote = overridden and (work.wrote or has_pending_changes(session))
    record.committed = False
    record.shielded = True  # by whoever finishes it
    try:
        _run(session, "commit")
    except Exception as error:
        if record.committed and not isinstance(error, AfterCommitError):
            raise record.state.error(AfterCommitError) from error  # by an override of commit()
        raise
    if overridden and ((wrote and not work.committed) or record.count_unstored() > 0):
        raise UncommittedChangesError(
            f"The session class's commit() has not committed the changes on database "
            f"{record.state.name!r}, which are lost. It must call super().commit(), and must not "
            "swallow its errors."
        )


def commit_is_observed(session: NativeSession) -> bool:
    """Return whether code of the application would notice a commit without SQL."""
    record = session.sqlnative
    if not (session.in_transaction() or session.autobegin):
        return False
    listened = session.dispatch.before_commit or len(session.dispatch.after_commit) > 1
    return bool(listened or "commit" in record.state.overridden)


def end(session: NativeSession, error: BaseException | None = None) -> None:
    """Roll back, return the connection to the pool and refuse further use.

    After an error this calls `rollback()`, but only if the application observes it: it expires
    every object, and an exception handler may still read what was loaded.

    A failure here only means that the connection is lost. It is logged, so that it doesn't hide
    the response or the error that the session's work ended with.
    """
    record = session.sqlnative
    record.finished = True
    overridden = record.state.overridden
    observed = error is not None and (
        session.dispatch.after_rollback
        or len(session.dispatch.after_soft_rollback) > 1
        or "rollback" in overridden
    )
    # After a failed flush, which has rolled back, SQLAlchemy would warn about changes made since.
    # After a COMMIT whose listener has failed, it refuses to roll back.
    over = not session.is_active and (record.committed or would_flush(session))
    methods = ("rollback", "close") if observed and not over else ("close",)
    if not (session.in_transaction() or session.identity_map or overridden.intersection(methods)):
        return None  # never used: nothing to roll back, release or detach
    record.ending = bool(overridden) or "rollback" in methods
    try:
        if record.state.stopping == "stopped":
            return session.invalidate()  # the pool is disposed of and would not close it
        for method in methods:
            _run(session, method)
    except BaseException as failure:
        record.discard_connections()
        if not isinstance(failure, Exception):
            raise  # a cancellation's deadline has passed
        logger.warning(
            "A session of database %r could not return its connection, which is discarded: "
            "it was lost, or a task that outlived the request is still using it.",
            record.state.name,
            exc_info=True,
        )
    finally:
        record.ending = False


def _run(session: NativeSession, method: str) -> None:
    """Call a method of the session, or the application's override of it."""
    record = session.sqlnative
    given = record.given()
    if isinstance(given, AsyncSession) and method in record.state.overridden:
        await_only(getattr(given, method)())
    else:
        getattr(session, method)()


def end_all(sessions: Sequence[NativeSession], error: BaseException | None) -> None:
    """End all sessions, even if a cancellation's deadline interrupts one of them."""
    if len(sessions) == 1:
        return end(sessions[0], error)
    with ExitStack() as ending:
        for session in sessions:
            ending.callback(perform, session, partial(end, error=error))
    return None


# -- where they run -------------------------------------------------------------------------------


def waits(session: NativeSession) -> bool:
    """Return whether finishing it may block, on the database or in application code."""
    record = session.sqlnative
    return bool(
        record.asked
        or would_flush(session)
        or record.state.overridden
        or (record.commits and commit_is_observed(session))
    )


def has_only_read(session: NativeSession) -> bool:
    """Return whether cancelling the end of the session costs no more than its connection."""
    record = session.sqlnative
    state = record.state
    return (
        record.loop_thread is None
        and state.ends_in_one_step
        # A listener may write.
        and not (record.commits and (session.dispatch.before_commit or would_flush(session)))
        and not record.work.may_have_written
        and not (record.streamed or record.joined)
        and not state.overridden
        and record.options in (NO_OPTIONS, AUTOCOMMIT)
    )


def _switches(session: NativeSession) -> bool:
    # If a cancellation came while it leaves AUTOCOMMIT, the pool would never get it back.
    record = session.sqlnative
    return record.options is AUTOCOMMIT and record.state.awaits_autocommit


def perform(session: NativeSession, operation: Callable[[NativeSession], T]) -> T | None:
    """Run an operation here, or in a thread if it could block the event loop."""
    record = session.sqlnative
    if record.loop_thread == threading.get_ident() and waits(session):
        # One context for all its threads: a listener may reset another's context variable.
        record.context = record.context or contextvars.copy_context()
        work = partial(record.context.run, operation, session)
        return await_only(to_completion(partial(_run_for, (), work)))
    return operation(session)


def _run_for(sessions: Sequence[NativeSession], work: Callable[[], T]) -> Coroutine[Any, Any, T]:
    """Run plain code in a greenlet, or in a thread if all sessions are synchronous."""
    for session in sessions:
        if session.sqlnative.loop_thread is None:
            return run_in_greenlet(work, session.sqlnative.given())
    # A limiter of its own: threads that wait for a connection may have used up the default one,
    # and this work is about to release connections.
    return anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))


async def finish(
    sessions: Sequence[NativeSession],
    success: Callable[[], None],
    error: BaseException | None = None,
) -> None:
    """Finish sessions by `success`, or after an error by rolling back, even if cancelled meanwhile.

    `success` is plain code that commits, and uses the sessions only by way of `perform`. If
    nothing can wait, all runs without a task, a greenlet or a thread.
    """

    def work() -> None:
        try:
            if error is None:
                success()
        except BaseException as failure:
            end_all(sessions, failure)
            raise
        end_all(sessions, error)

    cancelled = isinstance(error, (asyncio.CancelledError, RequestCancelledError))
    waiting = [each for each in sessions if waits(each)]
    if not waiting:
        return work()
    if not cancelled and all(map(has_only_read, waiting)):
        running = _run_for(sessions, work)
        return await (without_yielding(running) if any(map(_switches, waiting)) else running)
    if error is None:
        try:
            # A `def` endpoint's thread cannot be cancelled: this is the first chance.
            await checkpoint_if_cancelled()
        except asyncio.CancelledError as cancellation:
            await finish(sessions, success, cancellation)
            raise
    # Synchronous sessions are waited for: their driver's timeouts bound that.
    states = [each.sqlnative.state for each in sessions if each.sqlnative.loop_thread is None]
    limit = _GRACE if states and isinstance(error, RequestCancelledError) else math.inf
    return await to_completion(
        partial(_run_for, sessions, work if states else once(work)),
        joins=not states,
        databases=states,
        limit=limit,
        cancelled=cancelled,
    )


@contextmanager
def finishing(session: Any) -> Generator[Session]:
    """Commit a marked session at the end of a block, or roll back, and close it."""
    try:
        yield session
        commit(session)
    except BaseException as error:
        end(session, error)
        raise
    end(session)


@asynccontextmanager
async def finishing_async(session: Any) -> AsyncGenerator[AsyncSession]:
    """Do the same, even if the caller is cancelled meanwhile."""
    inner = sync_session(session)
    try:
        yield session
    except BaseException as error:
        await finish([inner], partial(commit, inner), error)
        raise
    await finish([inner], partial(commit, inner))
