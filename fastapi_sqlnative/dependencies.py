"""The dependencies of a route, and the request's unit of work behind them."""

# No `from __future__ import annotations` here: older versions of FastAPI cannot resolve the text
# of an annotation on an object's `__call__`.

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends
from fastapi.requests import HTTPConnection
from sqlalchemy.orm import Session

from ._options import AUTOCOMMIT, NO_OPTIONS, IsolationLevel, TransactionOptions
from ._registry import registry_for, trimmed
from ._sessions import guard_of, has_pending_changes
from .databases import (
    AnyDatabase,
    AnySession,
    Call,
    close,
    commit,
    is_busy,
    run_together,
    sync_session,
)
from .exceptions import (
    PartialCommitError,
    ReadOnlySessionError,
    TransactionOptionsError,
    UncommittedChangesError,
)


@dataclass(eq=False, slots=True)
class _Member:
    """Hold a session of the request, and whether it is to be committed."""

    database: AnyDatabase
    session: AnySession
    inner: Session  # the session that does the work
    commit: bool = False


class UnitOfWork:
    """Own every session of one request: open late, commit what was marked, close all.

    Lives from the first dependency that asks for a session until the endpoint has returned and
    its result is serialized. The response starts after that.
    """

    __slots__ = (
        "_endpoint",
        "_gate",
        "_members",
        "_readers",
        "_registry",
        "_router",
        "_sessions",
    )

    def __init__(self, connection: HTTPConnection) -> None:
        self._registry, self._router = registry_for(connection)
        self._sessions: dict[AnyDatabase, _Member] = {}
        self._readers: dict[AnyDatabase, _Member] = {}
        self._members: dict[int, _Member] = {}  # by the identity of the session handed out
        # A websocket would keep its place for as long as the client stays.
        is_request = connection.scope["type"] == "http"
        self._gate = self._registry.gate_for(self._router) if is_request else None
        self._endpoint = connection.scope.get("endpoint")

    async def session(self, name: str) -> AnySession:
        """Return the request's one session for a database."""
        database = self._registry.database(name, self._router)
        member = self._sessions.get(database)
        if member is None:
            member = self._sessions[database] = await self._open(database, NO_OPTIONS)
        return member.session

    async def reader(self, session: AnySession) -> AnySession:
        """Return the AUTOCOMMIT session beside a session of ours, else that session itself."""
        beside = self._members.get(id(session))
        if beside is None:
            return session  # an override's: the application's own
        member = self._readers.get(beside.database)
        if member is None:
            member = await self._open(beside.database, AUTOCOMMIT)
            self._readers[beside.database] = member
        return member.session

    def enlist(self, session: AnySession, options: TransactionOptions) -> None:
        """Mark a session for the commit at the end; an override's session is left alone.

        Raises:
            TransactionOptionsError: the options cannot apply (any more).
        """
        member = self._members.get(id(session))
        if member is None:
            return
        if options != NO_OPTIONS:
            _set_options(member, options)
        member.commit = True

    def check_uncommitted(self) -> None:
        """Refuse a success while something that was written waits for a commit.

        Raises:
            UncommittedChangesError: through `get_db`.
            ReadOnlySessionError: through `reader`.
        """
        for member in self._members.values():
            guard_of(member.inner).check_discarded()
            if not is_busy(member.inner):
                continue
            guard, name = guard_of(member.inner), member.database.name
            pending = has_pending_changes(member.inner)
            if pending and guard.options == AUTOCOMMIT:
                raise ReadOnlySessionError(
                    f"Changes wait in the session from reader({name!r}), which only reads. Depend "
                    f"on transactional({name!r}) to write."
                )
            if not member.commit and (pending or guard.has_written):
                raise UncommittedChangesError(
                    f"The request wrote to database {name!r} through get_db({name!r}) and returned "
                    f"without a commit. Depend on transactional({name!r}), which commits before "
                    "the response, or call commit() or rollback() yourself."
                )

    async def complete(self) -> None:
        """Commit what was marked, close everything: the endpoint has returned."""
        await self._finish(self._commit_all)

    async def abandon(self, *, cancelled: bool) -> None:
        """Roll everything back, close everything: something was raised."""
        await self._finish(self._close_all, cancelled=cancelled)

    async def _open(self, database: AnyDatabase, options: TransactionOptions) -> _Member:
        if self._gate is not None:
            await self._gate.enter(self, self._endpoint, database)
        loop_thread = threading.get_ident() if database.blocking else None
        session = database.open(options, loop_thread=loop_thread)
        member = self._members[id(session)] = _Member(database, session, sync_session(session))
        return member

    def _commit_all(self, call: Call) -> None:
        marked = [member for member in self._members.values() if member.commit]
        if len(marked) > 1:
            installed = self._registry.databases(self._router)
            order = {database: place for place, database in enumerate(installed)}
            marked.sort(key=lambda member: order.get(member.database, -1))
        try:
            # Every flush comes before the first COMMIT, so that only a COMMIT can come too late.
            for member in marked:
                call(member.session, _prepare)
            committed: list[str] = []
            for member in marked:
                may_have_written = guard_of(member.inner).may_have_written
                _commit(call, member, committed)
                if may_have_written:
                    committed.append(member.database.name)
        finally:
            self._close_all(call)

    def _close_all(self, call: Call) -> None:
        # All of them, also when the deadline of a cancellation cuts one short.
        with contextlib.ExitStack() as closing:
            for member in self._members.values():
                closing.callback(call, member.session, close)

    async def _finish(self, work: Callable[[Call], None], *, cancelled: bool = False) -> None:
        members = self._members.values()
        try:
            # Sessions that nobody used are the most common: they take the shortest way.
            if any(member.inner.in_transaction() for member in members):
                await run_together(
                    [member.session for member in members],
                    work,
                    timeout=max(member.database.shutdown_timeout for member in members),
                    cancelled=cancelled,
                )
            else:
                for member in members:
                    close(member.inner)
        finally:
            if self._gate is not None:
                self._gate.leave(self)


def _set_options(member: _Member, options: TransactionOptions) -> None:
    guard, name = guard_of(member.inner), member.database.name
    if guard.options not in (NO_OPTIONS, options):
        raise TransactionOptionsError(
            f"transactional({name!r}) was asked for twice in one request, with {guard.options} and "
            f"with {options}. A request has one transaction for a database: declare it once, with "
            "the options that it needs."
        )
    if guard.transactions and guard.options != options:
        raise TransactionOptionsError(
            f"The transaction on database {name!r} has begun: an earlier dependency has used the "
            f"session, and {options} can no longer apply. Declare the transaction first, in the "
            f"route's or router's dependencies=[Depends(transactional({name!r}, ...))]."
        )
    member.database.support(options)
    guard.options = options


def _prepare(session: Session) -> None:
    if is_busy(session):
        session.flush()
        guard_of(session).check_committable()


def _commit(call: Call, member: _Member, committed: list[str]) -> None:
    try:
        call(member.session, commit)
    except Exception as error:
        if committed:
            raise PartialCommitError(tuple(committed), member.database.name) from error
        raise


async def unit_of_work(connection: HTTPConnection) -> AsyncGenerator[UnitOfWork]:
    """Keep the request's sessions: committed, rolled back and closed before the response.

    FastAPI runs a function-scoped exit after serialization and before `http.response.start`, so
    a failure here still reaches the application's exception handlers.
    """
    unit = UnitOfWork(connection)
    try:
        yield unit
        unit.check_uncommitted()
    except BaseException as error:
        await unit.abandon(cancelled=isinstance(error, asyncio.CancelledError))
        raise
    await unit.complete()


_Unit = Annotated[UnitOfWork, Depends(unit_of_work, scope="function")]


class DatabaseDependency:
    """Be what `get_db` and its like return: a callable for `Depends`, named for its database.

    There is one object for one name and options, so that FastAPI's cache and
    `dependency_overrides` recognise it, however the name was spelt.
    """

    gives_handle = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


class SessionDependency(DatabaseDependency):
    """Hand out the request's session."""

    async def __call__(self, unit: _Unit) -> AnySession:
        """Open the session at the first call of a request."""
        return await unit.session(self.name)


class TransactionDependency(DatabaseDependency):
    """Hand out the request's session and have it committed."""

    def __init__(self, name: str, options: TransactionOptions) -> None:
        super().__init__(name)
        self.options = options
        self.__signature__ = _after_get_db(name)

    async def __call__(self, session: AnySession, unit: UnitOfWork) -> AnySession:
        """Enlist what `get_db` has given."""
        unit.enlist(session, self.options)
        return session


class ReaderDependency(DatabaseDependency):
    """Hand out the request's AUTOCOMMIT session."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__signature__ = _after_get_db(name)

    async def __call__(self, session: AnySession, unit: UnitOfWork) -> AnySession:
        """Open a session beside the one that `get_db` has given."""
        return await unit.reader(session)


class HandleDependency(DatabaseDependency):
    """Hand out the database's handle."""

    gives_handle = True

    async def __call__(self, connection: HTTPConnection) -> AnyDatabase:
        """Look the handle up."""
        registry, router = registry_for(connection)
        return registry.database(self.name, router)


class InstalledDependency(DatabaseDependency):
    """Want a database to be installed, which the start looks at, and hand out nothing."""

    gives_handle = True

    async def __call__(self) -> None:
        """Need nothing of the request."""


def get_db(name: str = "default") -> Callable[..., Awaitable[Any]]:
    """Depend on the request's one session for a database.

    The session is opened without a connection, shared by everything in the request that asks
    for the same name, and rolled back and closed before the response starts: streams and
    background tasks need `get_database_handle`. Nothing is committed unless you call `commit()`
    or something in the request depends on `transactional(name)`.

    Raises:
        UncommittedChangesError: in the request, when something was written and not committed.

    Example:
        Db = Annotated[AsyncSession, Depends(get_db("analytics"))]
    """
    return _session_dependency(trimmed(name))


def transactional(
    name: str = "default",
    *,
    isolation_level: IsolationLevel | None = None,
    read_only: bool = False,
) -> Callable[..., Awaitable[Any]]:
    """Depend on the request's session for a database, and have it committed.

    It is the session of `get_db(name)`. It is committed after the result is serialized and
    before the response starts, so a failed COMMIT is never answered with a success; any
    exception, `HTTPException` included, rolls it back. A returned response commits, whatever
    its status.

    Args:
        name: the name given to `install_database`.
        isolation_level: for this transaction only; the pooled connection gets its own back.
        read_only: have the server refuse writes.

    Raises:
        ValueError: at once, for an isolation level that is none.
        TransactionOptionsError: in the request, when an earlier dependency has used the session
            and the options can no longer apply. Declare the transaction first, in the route's
            or router's `dependencies=[...]`.
        TransactionAbortedError: in the request, when an error inside was swallowed.
        CommitOutcomeUnknownError: in the request, when the connection was lost during COMMIT.
        PartialCommitError: in the request, when another database had committed before this one
            failed.
    """
    options = TransactionOptions.checked(isolation_level, read_only)
    return _transaction_dependency(trimmed(name), options)


def reader(name: str = "default") -> Callable[..., Awaitable[Any]]:
    """Depend on a session for reads that need no transaction.

    A session of its own, in AUTOCOMMIT: one round trip a query, each seeing what is committed
    by then. It does not see what the request's own transaction has written.

    Raises:
        ReadOnlySessionError: in the request, for a flush, an ORM write or a Core insert, update
            or delete. Textual SQL is not recognised, and is committed at once.
    """
    return _reader_dependency(trimmed(name))


def get_database_handle(name: str = "default") -> Callable[..., Awaitable[Any]]:
    """Depend on the handle of a database, for work that outlives the request's session.

    The handle is a `Database` or an `AsyncDatabase` and lives as long as the application runs.

    Example:
        async def rows(database: Annotated[AsyncDatabase, Depends(get_database_handle())]):
            async with database.session() as session: ...
    """
    return _handle_dependency(trimmed(name))


def _after_get_db(name: str) -> inspect.Signature:
    # Through get_db, so that an override of get_db(name) is seen here too.
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter("session", keyword, default=Depends(get_db(name))),
            inspect.Parameter("unit", keyword, annotation=_Unit),
        ]
    )


_session_dependency = functools.cache(SessionDependency)
_transaction_dependency = functools.cache(TransactionDependency)
_reader_dependency = functools.cache(ReaderDependency)
_handle_dependency = functools.cache(HandleDependency)
