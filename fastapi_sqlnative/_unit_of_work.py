"""One request's sessions: opened late, committed in order, closed before the response."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from typing import Any, Final

import anyio.to_thread
from fastapi.requests import HTTPConnection
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from starlette.types import Scope

from . import exceptions
from ._lifespan.running import Running, running_for
from ._routes import is_frontend
from ._sessions import finishing
from ._sessions.holders import UNIT
from ._sessions.options import AUTOCOMMIT, TransactionOptions
from ._sessions.record import Record
from ._sessions.session import AnySession, NativeSession, may_store, sync_session
from ._sessions.transaction import has_pending_changes
from .databases import AnyDatabase, AsyncDatabase, sessions_of
from .errors._kinds import is_database_error, only_error

# Seconds after which a request without a connection gives up its place in the gate.
_IDLE: Final = 0.1


class UnitOfWork:
    """The owner of all sessions of one request.

    Lives from the first dependency that needs a session until the endpoint has returned and its
    result is serialized. The response starts after that.
    """

    def __init__(self, connection: HTTPConnection) -> None:
        self.running: Running = running_for(connection)
        self.scope: Scope = connection.scope
        self._route: object = self.scope.get("route")
        self._loop = asyncio.get_running_loop()
        # With the synchronous sessions behind them, which have the records.
        self._opened: list[tuple[AnySession, NativeSession]] = []
        # Cancel once: a second cancellation would interrupt the driver's cancel request.
        self.cancelled: bool = False
        self.ends_at: float = math.inf  # the request's deadline, on the time.monotonic() clock
        self._entering = asyncio.Lock()  # held while it waits for its places in the gate

    async def reader(self, session: AnySession) -> AnySession:
        """Return the AUTOCOMMIT session of the same database, or an override's session itself."""
        record = self._record_of(session)
        return session if record is None else await self.session(record.state.name, reads=True)

    def enlist(self, session: AnySession, options: TransactionOptions) -> None:
        """Mark a session for the commit at the end, unless it comes from an override."""
        record = self._record_of(session)
        if record is not None:
            if is_frontend(self.scope):
                name = record.state.name
                raise exceptions.DatabaseDependencyError(
                    f"transactional({name!r}) cannot commit before the response of app.frontend(): "
                    "FastAPI sends the file before it ends the dependencies. Call commit() on "
                    f"get_db({name!r}), or declare transactional on the router or route that needs "
                    "it, not on the application."
                )
            record.will_commit(options)

    def _record_of(self, given: object) -> Record | None:
        """Return the record of a request's session; an override may give any other object.

        The request may have another scope, if a library resolves dependencies with FastAPI's cache.
        """
        if not isinstance(given, Session | AsyncSession):
            return None
        record = getattr(sync_session(given), "sqlnative", None)
        if not isinstance(record, Record) or record.given() is not given:
            return None  # a proxy has the record of the session behind it
        is_here = isinstance(record.unit, UnitOfWork) and record.unit.running is self.running
        return record if is_here else None

    @property
    def _records(self) -> list[Record]:
        return [inner.sqlnative for _, inner in self._opened]

    async def session(self, name: str, *, reads: bool = False) -> AnySession:
        """Return the request's one session for a database, or its one reader."""
        for session, inner in self._opened:
            record = inner.sqlnative
            if record.state.name == name and (record.options is AUTOCOMMIT) is reads:
                return session
        database = self.running.database(name)
        # Not a websocket, which would keep its place for as long as the client stays.
        is_http = self.scope.get("type") == "http"  # scopes of FastStream and the like have no type
        limiters = self.running.limiters(self._route, database) if is_http else []
        if limiters:
            await self._admit(limiters, database)
        factory = sessions_of(database)
        session = factory.open()
        inner = sync_session(session)
        record = inner.sqlnative
        record.request = self.scope
        if reads:
            record.options = AUTOCOMMIT
            inner.twophase = False  # it has no transaction to prepare
        record.loop_thread = None if factory.asynchronous else threading.get_ident()
        self._opened.append((session, inner))
        if limiters and self.running.gate.awaits(self._route):
            record.on_idle = self._released
            # It may wait for something else before its first statement.
            self._loop.call_later(_IDLE, self._leave_if_idle)
        return session

    async def _admit(self, limiters: list[anyio.CapacityLimiter], database: AnyDatabase) -> None:
        """Wait for places in the gate, whose timeout is tagged like an error of a session."""
        try:
            async with self._entering:  # two sessions may come back at a time
                await self.running.gate.enter(self, limiters, database)
        except PoolTimeoutError as error:
            tagged: Any = error
            tagged.database_name, tagged.database_stored = database.name, self.has_stored
            raise

    @property
    def has_stored(self) -> bool:
        """Return whether the endpoint's own COMMIT has stored something or may be about to."""
        return any(record.has_stored for record in self._records)

    @property
    def may_be_cancelled(self) -> bool:
        """Return whether a cancellation loses no stored work and leaves no thread behind."""
        awaits = self.running.gate.awaits(self._route)
        too_late = self.cancelled or self.has_stored or not awaits
        return not too_late and all(isinstance(each, AsyncSession) for each, _ in self._opened)

    async def finish(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Commit the marked sessions and roll back the rest, or all after an error; close all."""
        if error is not None and self.has_stored:
            failure: Any = only_error(error)
            if is_database_error(failure):
                failure.database_stored = True  # a handle's session knows nothing of the request's
        try:
            sessions = [inner for _, inner in self._opened]
            await finishing.finish(sessions, self._commit_all, error)
        finally:
            self.scope.pop(UNIT, None)
            self.running.gate.leave(self)

    def _released(self) -> None:
        """Leave the gate soon if the request holds no connection. Called from any thread."""
        if not any(record.finished for record in self._records):
            # Not at once: a request that runs its next statement right away keeps its place.
            self._loop.call_soon_threadsafe(self._loop.call_later, _IDLE, self._leave_if_idle)

    def _leave_if_idle(self) -> None:
        # While it waits for its second place, the first stays: taken after that, it could deadlock.
        if self._entering.locked():
            return
        for record in self._records:
            record.on_wanted = self._return
        # Asked after that: a session in another thread has seen it, or is seen to have asked.
        if not any(record.asked for record in self._records):
            self.running.gate.leave(self)

    def _return(self, record: Record) -> None:
        """Wait for a place again, in the greenlet or thread that wants a connection."""
        record.on_wanted = None
        database = self.running.database(record.state.name)
        if isinstance(database, AsyncDatabase):
            await_only(self._enter_again(database, threads=0))
        else:  # in any thread, for example asyncio.to_thread()'s
            entering = self._enter_again(database, threads=1)
            asyncio.run_coroutine_threadsafe(entering, self._loop).result()

    async def _enter_again(self, database: AnyDatabase, threads: int) -> None:
        limiter = anyio.to_thread.current_default_thread_limiter()
        # One more while a thread waits: those in the gate need threads to leave.
        limiter.total_tokens += threads
        try:
            await self._admit(self.running.limiters(self._route, database), database)
        finally:
            limiter.total_tokens -= threads
            if any(record.finished for record in self._records):
                self.running.gate.leave(self)  # cancelled meanwhile: nobody else will leave

    # From here on: plain code that runs in a greenlet or a thread.

    def _commit_all(self) -> None:
        sessions = [inner for _, inner in self._opened]
        for session in sessions:
            _check_nothing_forgotten(session)
        marked = [each for each in sessions if each.sqlnative.commits]
        if len(marked) > 1:
            self._prepare(marked)
        for session in marked:
            _commit(session, self._others(session))

    def _prepare(self, marked: list[NativeSession]) -> None:
        """Flush all before the first COMMIT, so that after it only a COMMIT can fail."""
        order = {sessions_of(each).state: at for at, each in enumerate(self.running.databases())}
        marked.sort(key=lambda each: order.get(each.sqlnative.state, -1))
        for session in marked:
            try:
                finishing.perform(session, _flush_and_prepare)
            except Exception as error:
                _check_partial(error, self._others(session), [session.sqlnative])
                raise

    def _others(self, session: NativeSession) -> list[Record]:
        return [record for record in self._records if record is not session.sqlnative]


# -- one session; plain code in a greenlet or a thread ------------------------------------------


def _check_nothing_forgotten(session: NativeSession) -> None:
    """Refuse to report success if a session leaves changes uncommitted."""
    record = session.sqlnative
    record.check_discarded()
    if record.commits or not session.in_transaction():
        return
    name, pending = record.state.name, has_pending_changes(session)
    if record.options is AUTOCOMMIT:
        if pending:
            raise record.state.error(exceptions.ReadOnlySessionError)
    elif pending or (record.may_have_written and finishing.perform(session, _leaves_unstored)):
        raise exceptions.UncommittedChangesError(
            f"The request wrote to database {name!r} through get_db({name!r}) and returned "
            f"without a commit. Depend on transactional({name!r}), which commits before the "
            "response, or call commit() or rollback() yourself."
        )


def _leaves_unstored(session: NativeSession) -> bool:
    record = session.sqlnative
    record.end_results()  # SQLite counts the changes of a statement at its end
    return record.count_unstored() > 0


def _flush_and_prepare(session: NativeSession) -> None:
    """Flush, and refuse what cannot be committed, before the first COMMIT."""
    if session.in_transaction():
        session.flush()
        if not session.is_active:
            session.commit()  # raises: an earlier flush has failed
        session.sqlnative.prepare()


def _commit(session: NativeSession, others: Sequence[Record]) -> None:
    """Commit one of the request's sessions.

    A session with nothing to store is committed as well, in case we have missed a write, but
    losing its connection doesn't fail the request.
    """
    record = session.sqlnative
    # Not idle if there are listeners, which may still write.
    marked = [each for each in others if each.commits]
    idle = bool(marked) and not (may_store(session) or finishing.commit_is_observed(session))
    try:
        finishing.perform(session, finishing.commit)
    except Exception as error:
        lost_connection = getattr(error, "connection_invalidated", isinstance(error, OSError))
        if idle and lost_connection:
            return
        kept, lost = others, [] if idle and not record.stored else [record]
        if isinstance(error, exceptions.AfterCommitError):
            # This database did commit; the ones after it won't.
            kept, lost = [*others, record], [each for each in marked if each.may_have_written]
        _check_partial(error, kept, lost)
        raise


def _check_partial(error: Exception, kept: Sequence[Record], lost: Sequence[Record]) -> None:
    """Refuse to report a failure as if nothing was stored, when another database has stored."""
    names = tuple(each.state.name for each in kept if each.stored)
    if names and lost:
        raise exceptions.PartialCommitError(names, lost[0].state.name) from error
