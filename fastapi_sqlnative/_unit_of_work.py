"""One request's sessions: opened late, committed in order, closed before the response."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import anyio.to_thread
from fastapi.requests import HTTPConnection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only
from starlette.types import Scope

from . import exceptions
from ._lifespan.functions import is_awaitable
from ._lifespan.running import running_for
from ._routes import is_frontend
from ._sessions import finishing
from ._sessions.holders import UNIT
from ._sessions.options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions
from ._sessions.session import AnySession, may_store, record_of, sync_session
from ._sessions.work import has_pending_changes
from .databases import AnyDatabase, AsyncDatabase, sessions_of

# Seconds after which a request without a connection gives up its place in the gate.
_IDLE: Final = 0.1


class UnitOfWork:
    """The owner of all sessions of one request.

    Lives from the first dependency that needs a session until the endpoint has returned and its
    result is serialized. The response starts after that.
    """

    def __init__(self, connection: HTTPConnection) -> None:
        self._running = running_for(connection)
        self.scope: Scope = connection.scope
        self._members: list[Member] = []
        # Cancel once: a second cancellation would interrupt the driver's cancel request.
        self.cancelled: bool = False
        self.ends_at: float = math.inf  # the request's deadline, on the time.monotonic() clock

    async def reader(self, session: AnySession) -> AnySession:
        """Return the AUTOCOMMIT session of the same database, or an override's session itself."""
        beside = self._member_of(session)
        if beside is None or beside.record.options is AUTOCOMMIT:
            return session  # an override's session, the application's own, or already the reader
        name = beside.state.name
        shared = beside.asked_again or self._found(name, reads=True)
        if shared or not self._running.only_reads(self.scope, name):
            return await self.session(name, reads=True)
        beside.record.options = AUTOCOMMIT  # nobody else has it: FastAPI got it for the reader
        return session

    def enlist(self, session: AnySession, options: TransactionOptions) -> None:
        """Mark a session for the commit at the end, unless it comes from an override."""
        member = self._member_of(session)
        if member is not None:
            if is_frontend(self.scope):
                raise exceptions.DatabaseDependencyError(
                    f"transactional({member.state.name!r}) cannot commit before the response of "
                    "app.frontend(): FastAPI sends the file before it ends the dependencies. Call "
                    f"commit() on get_db({member.state.name!r}), or declare transactional on the "
                    "router or route that needs it, not on the application."
                )
            member.record.will_commit(options)

    def _member_of(self, session: AnySession) -> Member | None:
        return next((each for each in self._members if each.session is session), None)

    def _found(self, name: str, *, reads: bool) -> Member | None:
        for each in self._members:
            if each.state.name == name and (each.record.options is AUTOCOMMIT) is reads:
                return each
        return None

    async def session(self, name: str, *, reads: bool = False) -> AnySession:
        """Return the request's one session for a database, or its one reader."""
        found = self._found(name, reads=reads)
        if found is not None:
            found.asked_again = True
            return found.session
        database = self._running.database(name)
        may_leave = False
        # Not for a websocket, which would keep its place for as long as the client stays.
        if self.scope.get("type") == "http":  # scopes of FastStream and the like have no type
            may_leave = await self._running.admit(self, self.scope.get("route"), database)
        factory = sessions_of(database)
        loop_thread = None if factory.asynchronous else threading.get_ident()
        options = AUTOCOMMIT if reads else NO_OPTIONS
        member = Member(factory.open(options, loop_thread=loop_thread))
        member.record.request = self.scope
        self._members.append(member)
        if may_leave:
            loop = asyncio.get_running_loop()
            member.record.on_idle = functools.partial(self._released, loop)
            # It may wait for something else before its first statement.
            loop.call_later(_IDLE, self._leave_if_idle, loop)
        self.limit(self.ends_at)
        return member.session

    def limit(self, ends_at: float) -> None:
        """Have the server end synchronous sessions' statements: they can't be cancelled here."""
        self.ends_at = min(self.ends_at, ends_at)
        for member in self._members:
            if not isinstance(member.session, AsyncSession):
                member.record.ends_at = self.ends_at

    @property
    def has_stored(self) -> bool:
        """Return whether the endpoint's own COMMIT has stored something or may be about to."""
        return any(each.record.has_stored for each in self._members)

    @property
    def may_be_cancelled(self) -> bool:
        """Return whether a cancellation loses no stored work and leaves no thread behind."""
        awaits = is_awaitable(getattr(self.scope.get("route"), "endpoint", None))
        too_late = self.cancelled or self.has_stored or not awaits
        return not too_late and all(
            isinstance(each.session, AsyncSession) for each in self._members
        )

    async def finish(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Commit the marked sessions and roll back the rest, or all after an error; close all."""
        try:
            sessions = [each.session for each in self._members]
            await finishing.finish(sessions, self._commit_all, error)
        finally:
            self.scope.pop(UNIT, None)
            self._running.gate.leave(self)

    def _released(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave the gate soon if the request holds no connection. Called from any thread."""
        if not any(each.record.finished for each in self._members):
            # Not at once: a request that runs its next statement right away keeps its place.
            loop.call_soon_threadsafe(loop.call_later, _IDLE, self._leave_if_idle, loop)

    def _leave_if_idle(self, loop: asyncio.AbstractEventLoop) -> None:
        if not any(each.record.asked for each in self._members):
            self._running.gate.leave(self)
            for each in self._members:
                each.record.on_wanted = functools.partial(self._return, each, loop)

    def _return(self, member: Member, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for a place again, in the greenlet or thread that wants a connection."""
        member.record.on_wanted = None
        database = self._running.database(member.state.name)
        entering = self._enter_again(database)
        if isinstance(database, AsyncDatabase):
            await_only(entering)
        else:  # in any thread, for example asyncio.to_thread()'s
            asyncio.run_coroutine_threadsafe(_without_thread(entering), loop).result()

    async def _enter_again(self, database: AnyDatabase) -> None:
        await self._running.admit(self, self.scope.get("route"), database)
        if any(each.record.finished for each in self._members):
            self._running.gate.leave(self)  # cancelled meanwhile: nobody else will leave

    # From here on: plain code that runs in a greenlet or a thread.

    def _commit_all(self) -> None:
        for member in self._members:
            member.check_nothing_forgotten()
        marked = [each for each in self._members if each.record.commits]
        if len(marked) > 1:
            self._prepare(marked)
        for member in marked:
            member.commit(self._others(member))

    def _prepare(self, marked: list[Member]) -> None:
        """Flush all before the first COMMIT, so that after it only a COMMIT can fail."""
        order = [sessions_of(each).state for each in self._running.databases()]
        marked.sort(key=lambda each: order.index(each.state) if each.state in order else -1)
        for member in marked:
            try:
                finishing.perform(member.session, _flush_and_prepare)
            except Exception as error:
                _check_partial(error, self._others(member), [member])
                raise

    def _others(self, member: Member) -> list[Member]:
        return [each for each in self._members if each is not member]


async def _without_thread(entering: Coroutine[Any, Any, None]) -> None:
    """Let others use one more thread while one waits: those in the gate need threads to leave."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    limiter.total_tokens += 1
    try:
        await entering
    finally:
        limiter.total_tokens -= 1


# -- one of the sessions, and how it is committed --------------------------------------------------


class Member:
    """A session of the request, with its synchronous session, its record and its database."""

    __slots__ = ("asked_again", "inner", "record", "session", "state")

    def __init__(self, session: AnySession) -> None:
        self.session = session
        self.inner = sync_session(session)
        self.record = self.inner.sqlnative
        self.state = self.record.state
        self.asked_again = False  # so that others than the first have it

    def check_nothing_forgotten(self) -> None:
        """Refuse to report success if the session leaves changes uncommitted."""
        record, name = self.record, self.state.name
        record.check_discarded()
        if record.commits or not self.inner.in_transaction():
            return
        pending = has_pending_changes(self.inner)
        if record.options is AUTOCOMMIT:
            if pending:
                raise self.state.error(exceptions.ReadOnlySessionError)
        elif pending or (
            record.may_have_written and finishing.perform(self.session, _leaves_unstored)
        ):
            raise exceptions.UncommittedChangesError(
                f"The request wrote to database {name!r} through get_db({name!r}) and returned "
                f"without a commit. Depend on transactional({name!r}), which commits before "
                "the response, or call commit() or rollback() yourself."
            )

    def commit(self, others: Sequence[Member]) -> None:
        """Commit, as one of the request's databases.

        A session with nothing to store is committed as well, in case we have missed a write, but
        losing its connection doesn't fail the request.
        """
        # Not idle if there are listeners, which may still write.
        marked = [each for each in others if each.record.commits]
        idle = bool(marked) and not (
            may_store(self.inner) or finishing.commit_is_observed(self.inner)
        )
        try:
            finishing.perform(self.session, finishing.commit)
        except Exception as error:
            if idle and (
                getattr(error, "connection_invalidated", False) or isinstance(error, OSError)
            ):
                return
            kept, lost = others, [] if idle and not self.record.stored else [self]
            if isinstance(error, exceptions.AfterCommitError):
                # This database did commit; the ones after it won't.
                kept, lost = [*others, self], [e for e in marked if e.record.may_have_written]
            _check_partial(error, kept, lost)
            raise


def _check_partial(error: Exception, kept: Sequence[Member], lost: Sequence[Member]) -> None:
    """Refuse to report a failure as if nothing was stored, when another database has stored."""
    names = tuple(each.state.name for each in kept if each.record.stored)
    if names and lost:
        raise exceptions.PartialCommitError(names, lost[0].state.name) from error


def _flush_and_prepare(session: AnySession) -> None:
    """Flush, and refuse what cannot be committed, before the first COMMIT."""
    inner = sync_session(session)
    if inner.in_transaction():
        inner.flush()
        if not inner.is_active:
            inner.commit()  # raises: an earlier flush has failed
        inner.sqlnative.prepare()


def _leaves_unstored(session: AnySession) -> bool:
    record = record_of(session)
    record.end_results()  # SQLite counts the changes of a statement at its end
    return record.count_unstored() > 0
