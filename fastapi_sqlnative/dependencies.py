"""The dependencies of a route."""

# No `from __future__ import annotations` here: older versions of FastAPI cannot resolve the text
# of an annotation on an object's `__call__`.

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, nullcontext, suppress
from inspect import Parameter, Signature
from typing import Any, Final, Literal

from fastapi import Depends
from fastapi.requests import HTTPConnection
from fastapi.routing import request_response
from starlette.requests import Request
from starlette.responses import Response

from ._lifespan.running import running_for, trimmed
from ._sessions.options import AUTOCOMMIT, IsolationLevel, TransactionOptions
from ._sessions.session import AnySession
from ._unit_of_work import UNIT, UnitOfWork
from .databases import AnyDatabase
from .exceptions import DatabaseDependencyError

# FastAPI's own name for the stack that it leaves after serialization and before the response
# starts. A generator with scope="function" is the public way onto it, and costs every request a
# tenth of a read. Where FastAPI keeps no such stack, the dependencies take the public way.
_FUNCTION_STACK: Final = "fastapi_function_astack"


def unit_of(connection: HTTPConnection) -> UnitOfWork:
    """Return the request's unit of work, which ends before the response starts."""
    unit: UnitOfWork | None = connection.scope.get(UNIT)
    # A copy of the scope is another request: an endpoint may call the application itself.
    if unit is None or unit.scope is not connection.scope:
        unit = connection.scope[UNIT] = UnitOfWork(connection)
        if HAS_FUNCTION_STACK:
            stack: AsyncExitStack = connection.scope[_FUNCTION_STACK]
            stack.push_async_exit(unit)
    return unit


async def _end_of_request(connection: HTTPConnection) -> AsyncGenerator[UnitOfWork]:
    """End the unit of work by FastAPI's public means: a generator with function scope."""
    unit = unit_of(connection)
    async with nullcontext() if HAS_FUNCTION_STACK else unit:
        yield unit


# What depends on it with function scope is left before the unit ends, and so before the COMMIT.
IN_UNIT_OF_WORK: Final[Any] = Depends(_end_of_request, scope="function")


def _has_function_stack() -> bool:
    """Serve a request by hand, and look."""
    found: list[object] = []

    async def look(request: Request) -> Response:
        found.append(request.scope.get(_FUNCTION_STACK))
        return Response()

    async def nothing(*_: object) -> Any: ...

    serving: Any = request_response(look)({"type": "http", "headers": []}, nothing, nothing)
    with suppress(StopIteration):
        serving.send(None)  # it is a coroutine, and waits for nothing
    return isinstance(found[0], AsyncExitStack)


HAS_FUNCTION_STACK: Final = _has_function_stack()


class _NoRequest:
    """The connection of a dependency that is called by hand, in a unit test say."""

    @property
    def scope(self) -> dict[str, Any]:
        raise DatabaseDependencyError(
            "A dependency of fastapi_sqlnative was called without a request. A test that calls "
            "your function itself passes it a session, from `with isolated(app) as session` or a "
            "handle's `session()`; one that needs the dependency sends a request."
        )


_NO_REQUEST: Final[Any] = _NoRequest()


class DatabaseDependency:
    """A callable for `Depends`, named for its database: what `get_db` and its like return.

    There is one object for one name and options, so that FastAPI's cache and
    `dependency_overrides` recognise it, however the name was spelt.
    """

    # What a request opens with it, or may open.
    opens: Literal["session", "reader", "handle"] | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


class SessionDependency(DatabaseDependency):
    """The way to the request's session, or to the reader beside it.

    The options are those of the transaction that is to be committed; `AUTOCOMMIT` means the reader,
    and `None` the session as it is.
    """

    def __init__(self, name: str, options: TransactionOptions | None = None) -> None:
        super().__init__(name)
        self.opens = "reader" if options is AUTOCOMMIT else "session"
        self.options = options
        keyword = functools.partial(Parameter, kind=Parameter.KEYWORD_ONLY)
        given = [keyword("connection", annotation=HTTPConnection)]
        if options is not None:
            # An override of get_db(name) reaches what hands out its session, too.
            given.append(keyword("session", default=Depends(get_db(name))))
        if not HAS_FUNCTION_STACK:
            given.append(keyword("unit", default=IN_UNIT_OF_WORK))
        # FastAPI asks a callable object for its signature, as it asks a function.
        self.__signature__ = Signature(given)

    async def __call__(
        self,
        connection: HTTPConnection = _NO_REQUEST,
        session: AnySession = _NO_REQUEST,
        unit: object = None,
    ) -> AnySession:
        """Open the session at the first call of a request, or go on with what `get_db` gave."""
        work = unit_of(connection)
        if self.options is None:
            return await work.session(self.name)
        if self.options is AUTOCOMMIT:
            return await work.reader(session)
        work.enlist(session, self.options)
        return session


class HandleDependency(DatabaseDependency):
    """The way to the database's handle."""

    opens = "handle"

    async def __call__(self, connection: HTTPConnection = _NO_REQUEST) -> AnyDatabase:
        """Look the handle up."""
        return running_for(connection).database(self.name)


class InstalledDependency(DatabaseDependency):
    """The wish that a database is installed, which start-up looks at; hands out nothing."""

    async def __call__(self) -> None:
        """Need nothing of the request."""


_session_dependency = functools.cache(SessionDependency)
_handle_dependency = functools.cache(HandleDependency)


def get_db(name: str = "default") -> Callable[..., Awaitable[AnySession]]:
    """Depend on the request's one session for a database.

    The session is opened without a connection, shared by everything in the request that asks
    for the same name, and rolled back and closed before the response starts: streams and
    background tasks need `get_database_handle`. Nothing is committed unless you call `commit()`
    or something in the request depends on `transactional(name)`.

    Args:
        name: the name given to `install_database`.

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
) -> Callable[..., Awaitable[AnySession]]:
    """Depend on the session of `get_db(name)`, and have it committed.

    The COMMIT comes after the result is serialized and before the response starts, so a failed one
    is never answered with a success. Any exception, `HTTPException` included, rolls back; a
    returned response commits, whatever its status.

    Args:
        name: the name given to `install_database`.
        isolation_level: for this transaction only; the pooled connection gets its own back.
        read_only: have the server refuse writes.

    Raises:
        ValueError: at once, for an isolation level that is none.
        TransactionOptionsError: in the request, when the session was used before: declare the
            transaction first, in the route's or router's `dependencies=[...]`.
        TransactionAbortedError: in the request, when an error inside was swallowed.
        CommitOutcomeUnknownError: in the request, when the connection was lost during COMMIT.
        PartialCommitError: in the request, when another database had committed before.
    """
    options = TransactionOptions.checked(isolation_level, read_only)
    return _session_dependency(trimmed(name), options)


def reader(name: str = "default") -> Callable[..., Awaitable[AnySession]]:
    """Depend on a session for reads that need no transaction.

    It is a second session, in AUTOCOMMIT: one round trip for each query, which sees what is
    committed at that moment. It does not see what the request's own transaction has written.

    Args:
        name: the name given to `install_database`.

    Raises:
        ReadOnlySessionError: in the request, for whatever writes, textual SQL included. A function
            that writes is not recognised, and is committed at once.

    Example:
        Reader = Annotated[AsyncSession, Depends(reader())]
    """
    return _session_dependency(trimmed(name), AUTOCOMMIT)


def get_database_handle(name: str = "default") -> Callable[..., Awaitable[AnyDatabase]]:
    """Depend on the handle of a database, for work that outlives the request's session.

    The handle is a `Database` or an `AsyncDatabase` and lives as long as the application runs.

    Args:
        name: the name given to `install_database`.

    Example:
        async def rows(database: Annotated[AsyncDatabase, Depends(get_database_handle())]):
            async with database.session() as session: ...
    """
    return _handle_dependency(trimmed(name))
