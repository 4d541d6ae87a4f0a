"""The dependencies that routes declare."""

# No `from __future__ import annotations` here: older versions of FastAPI cannot resolve string
# annotations on an object's `__call__`.

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any, Final

from fastapi import Depends
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.requests import HTTPConnection
from fastapi.routing import APIRoute

from ._lifespan.running import running_for, trimmed
from ._sessions.holders import UNIT
from ._sessions.options import AUTOCOMMIT, IsolationLevel, TransactionOptions
from ._sessions.session import AnySession
from ._unit_of_work import UnitOfWork
from .databases import AnyDatabase
from .exceptions import DatabaseDependencyError

# FastAPI's private key for the exit stack that it closes between serialization and the start of
# the response. The public way onto that stack is a generator with scope="function", which costs
# each request a tenth of a read. It is the fallback if FastAPI has no stack under this key.
_FUNCTION_STACK: Final = "fastapi_function_astack"
# Our own key for the stack that the request's unit of work ends with, or has ended with.
_STACK: Final = "fastapi_sqlnative_stack"
# The parameter by which an override of get_db(name) reaches transactional(name) and reader(name).
ONLY_FOR_OVERRIDES: Final = "session"


def unit_of(connection: HTTPConnection, stack: AsyncExitStack | None = None) -> UnitOfWork:
    """Return the request's unit of work, which ends with FastAPI's stack, or else with this one."""
    scope = connection.scope
    unit: UnitOfWork | None = scope.get(UNIT)
    # A copied scope belongs to another request: an endpoint may call the application itself.
    if unit is None or unit.scope is not scope:
        if HAS_FUNCTION_STACK:
            stack = scope.get(_FUNCTION_STACK)
        if stack is None or (unit is None and stack is scope.get(_STACK)):
            raise _called_directly()  # nothing would end the session
        unit = UnitOfWork(connection)
        stack.push_async_exit(unit.finish)
        scope[UNIT], scope[_STACK] = unit, stack
    return unit


async def _end_of_request(connection: HTTPConnection) -> AsyncGenerator[UnitOfWork]:
    """End the unit of work through FastAPI's public API, a generator with function scope."""
    async with AsyncExitStack() as stack:
        yield unit_of(connection, stack)


# A function-scoped generator that depends on this exits before the unit, and so before the COMMIT.
IN_UNIT_OF_WORK: Final[Any] = Depends(_end_of_request, scope="function")


_keyword: Final = functools.partial(Parameter, kind=Parameter.KEYWORD_ONLY)
_CONNECTION: Final = _keyword("connection", annotation=HTTPConnection)


def _look_at_fastapi() -> dict[str, Any]:
    """Serve a request under overrides; return what it gives to a dependency, and the stack.

    The dependency gets one more parameter after the route is made.
    """
    found: dict[str, Any] = {}

    async def look(connection: HTTPConnection, **given: object) -> None:
        found.update(given, stack=connection.scope.get(_FUNCTION_STACK))

    async def nothing() -> None: ...
    async def channel(*_: object) -> Any: ...

    signed: Any = look
    signed.__signature__ = Signature([_CONNECTION])
    overridden = SimpleNamespace(dependency_overrides={channel: nothing})
    route = APIRoute(
        "/", nothing, dependencies=[Depends(look)], dependency_overrides_provider=overridden
    )
    signed.__signature__ = Signature([_CONNECTION, _keyword("later", default=Depends(nothing))])
    request: Any = {"type": "http", "method": "GET", "query_string": b"", "headers": []}
    serving: Any = AsyncExitStackMiddleware(route.app)(request, channel, channel)
    with suppress(Exception):  # another FastAPI may need more; then nothing is found
        serving.send(None)  # runs it to the end, because nothing in it waits
    serving.close()
    return found


_FOUND: Final = _look_at_fastapi()
HAS_FUNCTION_STACK: Final = isinstance(_FOUND.get("stack"), AsyncExitStack)
# Under overrides, FastAPI reads the signatures of all dependencies again for each request. So
# start-up can leave out what only an override needs, which is a fifteenth of a reader's request.
READS_SIGNATURES_AGAIN: Final = "later" in _FOUND


def _called_directly() -> DatabaseDependencyError:
    return DatabaseDependencyError(
        "A dependency of fastapi_sqlnative was called directly, and not by FastAPI for a route. If "
        "a test calls your function, pass it a session from `with isolated(app) as session` or a "
        "handle's `session()`. To test the dependency itself, send a request. In a middleware, an "
        "exception handler, a background task or a generator's exit, open a session with "
        "`installed_databases(request.app)[name].session()`."
    )


# The default for `connection`, if a dependency is called directly, as in a unit test.
_NO_REQUEST: Final[Any] = HTTPConnection({"type": "http"})


class DatabaseDependency:
    """A callable for `Depends`, for one database, as returned by `get_db` and the others.

    The same name and options always give the same object, however the name is spelt, so that
    FastAPI's cache and `dependency_overrides` recognise it.

    One that opens nothing only makes start-up check that the database is installed.
    """

    opens: str | None = None  # what a request may open through it: a session, reader or handle

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    async def __call__(self) -> Any:
        """Do nothing in a request."""


class SessionDependency(DatabaseDependency):
    """The dependency on a session: plain, transactional, or a reader.

    `options` are those of the transaction to commit. `AUTOCOMMIT` means the reader, `None` the
    plain session.
    """

    def __init__(self, name: str, options: TransactionOptions | None = None) -> None:
        super().__init__(name)
        self.opens: str | None = "reader" if options is AUTOCOMMIT else "session"
        self.options = options
        given = [_CONNECTION]
        if options is not None:
            given.append(_keyword(ONLY_FOR_OVERRIDES, default=Depends(get_db(name))))
        if not HAS_FUNCTION_STACK:
            given.append(_keyword("unit", default=IN_UNIT_OF_WORK))
        # FastAPI reads the signature of a callable object like that of a function.
        self.__signature__: Signature = Signature(given)

    async def __call__(
        self,
        connection: HTTPConnection = _NO_REQUEST,
        session: AnySession = _NO_REQUEST,
        unit: object = None,
    ) -> AnySession:
        """Return the request's session, opening it at the first call."""
        work, reads = unit_of(connection), self.options is AUTOCOMMIT
        if session is _NO_REQUEST:
            session = await work.session(self.name, reads=reads)
        elif reads:
            return await work.reader(session)
        if not (reads or self.options is None):
            work.enlist(session, self.options)
        return session


class HandleDependency(DatabaseDependency):
    """The dependency on a database's handle."""

    opens: str | None = "handle"

    async def __call__(self, connection: HTTPConnection = _NO_REQUEST) -> AnyDatabase:
        """Return the handle."""
        if connection is _NO_REQUEST:
            raise _called_directly()
        return running_for(connection).database(self.name)


_session_dependency = functools.cache(SessionDependency)
_handle_dependency = functools.cache(HandleDependency)


def get_db(name: str = "default") -> Callable[..., Awaitable[AnySession]]:
    """Depend on the request's one session for a database.

    The session has no connection until the first statement. Everything in the request that asks
    for the same name shares it. It is rolled back and closed before the response starts; streams
    and background tasks need `get_database_handle`. Nothing is committed unless you call
    `commit()` or something in the request depends on `transactional(name)`.

    Args:
        name: the name given to `install_database`.

    Raises:
        UncommittedChangesError: in the request, if it leaves changes uncommitted.

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
    """Depend on the session of `get_db(name)` and commit it.

    The COMMIT runs after the result is serialized and before the response starts, so a failed
    COMMIT never gets a success response. Any exception, including `HTTPException`, rolls back; a
    returned response commits, whatever its status.

    Args:
        name: the name given to `install_database`.
        isolation_level: for this transaction only; it is reset when the connection is returned.
        read_only: make the server refuse writes.

    Raises:
        ValueError: at once, for an unknown isolation level.
        TransactionOptionsError: in the request, if the session was used before: declare the
            transaction first, in the route's or router's `dependencies=[...]`.
        TransactionAbortedError: in the request, if an error inside was swallowed.
        CommitOutcomeUnknownError: in the request, if the connection was lost during COMMIT.
        PartialCommitError: in the request, if another database had already committed.
    """
    options = TransactionOptions.checked(isolation_level, read_only)
    return _session_dependency(trimmed(name), options)


def reader(name: str = "default") -> Callable[..., Awaitable[AnySession]]:
    """Depend on a session for reads of the database `name` that need no transaction.

    It is a session of its own, in AUTOCOMMIT. Each query is one round trip and sees the data that
    is committed at that moment, but not the uncommitted changes of the request's own transaction.

    Raises:
        ReadOnlySessionError: in the request, for statements that write, textual SQL included. A
            call of a function that writes is not recognised, and commits at once.

    Example:
        Reader = Annotated[AsyncSession, Depends(reader())]
    """
    return _session_dependency(trimmed(name), AUTOCOMMIT)


def get_database_handle(name: str = "default") -> Callable[..., Awaitable[AnyDatabase]]:
    """Depend on the handle of the database `name`, for work that outlives the request's session.

    The handle is a `Database` or an `AsyncDatabase` and lives as long as the application runs.

    Example:
        async def rows(database: Annotated[AsyncDatabase, Depends(get_database_handle())]):
            async with database.session() as session: ...
    """
    return _handle_dependency(trimmed(name))
