"""The checks of an application's routes at start-up, for mistakes that FastAPI doesn't see."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from .. import _functions as functions
from .. import dependencies
from .._functions import name_of
from .._routes import call_of, routes_of
from .._sessions.options import AUTOCOMMIT
from ..cancellation import cancel_on_disconnect, deadline
from ..databases import AnyDatabase, AsyncDatabase, Database, sessions_of
from ..exceptions import DatabaseDependencyError, DatabaseNotInstalledError, TransactionOptionsError
from .gate import Opened, key_of
from .running import Running

logger = logging.getLogger("fastapi_sqlnative")

# What our dependencies return or are expected to. Only annotations of these can contradict them.
_FACTORIES: Final = (sessionmaker, async_sessionmaker)
_HANDLES: Final = (Database, AsyncDatabase)
_GIVEN: tuple[type, ...] = (Session, AsyncSession, *_HANDLES, *_FACTORIES)
_ALL: Final = object()  # not None: a request for a file of app.frontend() has no route
# Functions that make dependencies and are easily mistaken for dependencies, and how to call them.
_MAKERS: Final[Mapping[Callable[..., Any], str]] = {
    dependencies.get_db: "get_db(name)",
    dependencies.transactional: "transactional(name)",
    dependencies.reader: "reader(name)",
    dependencies.get_database_handle: "get_database_handle(name)",
    deadline: "deadline(seconds)",
    cancel_on_disconnect: "cancel_on_disconnect()",
}


def check_application(running: Running, *, late: bool = False, only: object = _ALL) -> None:
    """Check all routes that have not been checked, and tell the gate what they open.

    `late`: the application's own lifespan has started. A name that is not installed is then only
    logged, and refused at the route's first request, because the rest is already running. That
    request checks `only` its route, which may have been added after start-up.
    """
    for maker, called in _MAKERS.items():
        if maker in running.overrides:
            raise DatabaseDependencyError(
                f"app.dependency_overrides[{name_of(maker)}] can never match: the dependency is "
                f"what the call returns. Use app.dependency_overrides[{called}]."
            )
    known = set(running.gate.opened)
    if only is not _ALL and key_of(only) in known:
        return  # a request under overrides, which should not walk through all routes
    contexts = [*routes_of(running.app.routes)]
    if only is not _ALL:
        # Not among the application's own: a router that chooses another one, by a version.
        contexts = [each for each in contexts if _original(each) is only] or [only]
    for context in contexts:
        route = _original(context)
        if key_of(route) not in known:
            try:
                running.gate.register(route, _examine(running, context))
            except DatabaseNotInstalledError as error:
                if not late:
                    raise
                logger.error("%s", error)


def _original(context: object) -> object:
    return getattr(context, "original_route", context)


def _examine(running: Running, context: Any) -> Opened:
    """Refuse a route whose dependencies on a database cannot work; return what it opens."""
    route = _original(context)
    # Before 0.143, FastAPI does not pass on the dependencies of an included websocket.
    context = getattr(context, "starlette_route", None) or context
    endpoint = getattr(context, "dependant", None)
    if endpoint is None:
        return Counter()
    opened: set[tuple[AnyDatabase, object]] = set()
    try:
        for parent, child, outlives in _walk(endpoint, running.overrides):
            ours: Any = call_of(child)
            if ours.opens is None:
                # Readiness also covers the databases of mounted applications.
                if all(each.name != ours.name for each in running.databases()):
                    running.database(ours.name)
                continue
            database = running.database(ours.name)
            is_bare = child.call is ours  # what a decorator returns may be anything
            if is_bare:
                _check_annotation(parent.call, child, database)
            if isinstance(ours, dependencies.SessionDependency):
                if is_bare:
                    _check_scope(child, ours.name, outlives)
                    _check_function(parent.call, child, database, is_endpoint=parent is endpoint)
                _check_autocommit(ours, database)
                _leave_out_override(child)
            # transactional(name) shares get_db(name)'s session; a handle may open another one.
            opened.add((database, ours.opens))
    except (DatabaseDependencyError, DatabaseNotInstalledError) as error:
        raise type(error)(f"Route {context.path!r}: {error}") from None
    handler = getattr(type(route), "get_route_handler", APIRoute.get_route_handler)
    if opened and handler is not APIRoute.get_route_handler:
        logger.warning(
            "Route %r uses the custom class %s, whose get_route_handler() runs before the commit: "
            "if it turns an exception into a response, what the request has written until then is "
            "committed. Use an exception handler instead, which runs after the rollback.",
            context.path,
            type(route).__qualname__,
        )
    return Counter(database for database, _ in opened)


def _walk(
    parent: Dependant, overrides: dict[Any, Any], outlives: object = None
) -> Iterator[tuple[Dependant, Dependant, object]]:
    """Yield each of our dependencies, its parent, and a generator above that outlives the response.

    Overridden dependencies are the application's responsibility and are skipped.
    """
    for child in parent.dependencies:
        call: Any = child.call
        known: Any = call if isinstance(call, Hashable) else None
        ours = call_of(child)
        is_session = isinstance(ours, dependencies.SessionDependency)
        # An override of get_db(name) also applies to transactional(name) and reader(name).
        plain = dependencies.get_db(ours.name) if is_session else known
        if known in overrides or plain in overrides:
            continue
        if known in _MAKERS:
            raise DatabaseDependencyError(
                f"Depends({name_of(call)}) lacks a call. Use Depends({_MAKERS[known]}): the "
                "dependency is what the call returns."
            )
        if isinstance(ours, dependencies.DatabaseDependency):
            yield parent, child, outlives
        if not isinstance(call, dependencies.DatabaseDependency):  # a decorator may add its own
            above = outlives
            if child.scope != "function" and functions.is_generator(call):
                above = call
            # A function may return something that doesn't hold the session.
            elif above is not None and not functions.may_return_session(
                call, parent.call, child.name
            ):
                above = None
            yield from _walk(child, overrides, above)


def _leave_out_override(child: Dependant) -> None:
    """Spare requests what only an override needs: FastAPI adds it again if there is one."""
    if dependencies.READS_SIGNATURES_AGAIN:
        below = child.dependencies
        below[:] = [each for each in below if each.name != dependencies.ONLY_FOR_OVERRIDES]


def _check_scope(child: Dependant, name: str, outlives: object) -> None:
    if child.scope == "request":
        raise DatabaseDependencyError(
            f"the session of database {name!r} is finished before the response starts, so "
            'scope="request" cannot work. Leave scope out; for work that outlives the response, '
            f"depend on get_database_handle({name!r})."
        )
    if getattr(child, "concurrency", None) is not None:  # newer versions of FastAPI
        raise DatabaseDependencyError(
            f"max_concurrency around the session of database {name!r} cannot work: it would limit "
            "how many are opened at a time, but not how many are in use. Put it on a generator of "
            "your own, `async def turn(): yield`, in the route's dependencies=[Depends(turn, "
            'scope="function", max_concurrency=...)].'
        )
    if outlives is not None:
        above = name_of(outlives)
        raise DatabaseDependencyError(
            f"the generator {above} depends on the session of database {name!r}, but exits after "
            "the response is sent, when the session is finished. Return the session instead of "
            f'yielding it, or declare it with Depends({above}, scope="function"). Override a '
            f"library's generator with a function that returns the session of get_db({name!r}). "
            "If it gets only data, annotate the return type of the function that reads it."
        )


def _check_annotation(function: Any, child: Dependant, database: AnyDatabase) -> None:
    is_session = isinstance(child.call, dependencies.SessionDependency)
    given: type = sessions_of(database).class_ if is_session else type(database)
    annotation = functions.annotation_of(function, child.name)
    named = [each for each in functions.classes_in(annotation) if issubclass(each, _GIVEN)]
    if not named or any(issubclass(given, each) for each in named):
        return
    said, gives, name = named[0].__name__, given.__name__, database.name
    fix = "Install the other kind of engine, or fix the annotation."
    if is_session and issubclass(named[0], given):
        fix = f'Install it with session_options={{"class_": {said}}}, or fix the annotation.'
        # SQLModel's class has the same name.
        said, gives = (f"{each.__module__}.{each.__qualname__}" for each in (named[0], given))
    elif issubclass(named[0], _FACTORIES):
        handle = f"{type(database).__name__}, Depends(get_database_handle({name!r}))"
        fix = f"Use Annotated[{handle}], and call its session()."
    elif is_session is issubclass(named[0], _HANDLES):
        ours = "get_database_handle" if is_session else "get_db"
        fix = f"Depend on {ours}({name!r}), or fix the annotation."
    raise DatabaseDependencyError(
        f"parameter {child.name!r} of {name_of(function)} is annotated with {said}, but database "
        f"{name!r} is installed with an {type(database.engine).__name__} and gives "
        f"{gives}. {fix}"
    )


def _check_function(
    function: Any, child: Dependant, database: AnyDatabase, *, is_endpoint: bool
) -> None:
    """Refuse a function that cannot use the session: it can't await, or runs too late."""
    if child.name is None:
        return  # declared in `dependencies=[...]`: no function gets the session
    if is_endpoint and functions.is_generator(function):
        raise DatabaseDependencyError(
            f"{name_of(function)} yields its response, but runs after the session of database "
            f"{database.name!r} is finished. Depend on get_database_handle({database.name!r}) and "
            "open a session in the generator."
        )
    # A dependency may only pass the session on, for example to a repository, as classes do.
    if isinstance(database, AsyncDatabase) and (
        not functions.is_awaitable(function)
        if is_endpoint
        else functions.drops_a_coroutine(function, child.name)
    ):
        raise DatabaseDependencyError(
            f"{name_of(function)} is not an `async def`, but gets the AsyncSession of database "
            f"{database.name!r}, whose methods must be awaited: no statement would ever run. "
            "Write it with `async def`, or install an Engine."
        )


def _check_autocommit(ours: dependencies.SessionDependency, database: AnyDatabase) -> None:
    options = database.engine.get_execution_options()
    commits = ours.options is not None and ours.options is not AUTOCOMMIT
    if commits and options.get("isolation_level") == "AUTOCOMMIT":
        error = sessions_of(database).state.error(TransactionOptionsError)
        raise DatabaseDependencyError(str(error))
