"""What start-up sees of an application's routes, where FastAPI sees nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from .._routes import routes_of
from ..databases import AsyncDatabase, Database
from ..dependencies import (
    DatabaseDependency,
    HandleDependency,
    InstalledDependency,
    ReaderDependency,
    TransactionDependency,
    get_database_handle,
    get_db,
    reader,
    transactional,
)
from ..exceptions import DatabaseDependencyError, DatabaseNotInstalledError
from .annotations import annotation_of, classes_in
from .functions import (
    drops_a_coroutine,
    is_awaitable,
    is_generator,
    is_request_scoped_generator,
    name_of,
)
from .gate import Opened
from .running import Installation, Running, not_installed

logger = logging.getLogger("fastapi_sqlnative")

# What our dependencies give, and so the only classes whose annotation can contradict them.
_GIVEN: Final = (Session, AsyncSession, Database, AsyncDatabase)
# They make dependencies, and are easily taken for ones.
_MAKERS: Final = (get_db, transactional, reader, get_database_handle)


def check_application(running: Running) -> None:
    """Refuse overrides that can never match.

    Raises:
        DatabaseDependencyError: `dependency_overrides[get_db]`, say, without the call.
    """
    for maker in _MAKERS:
        if maker in getattr(running.app, "dependency_overrides", {}):
            raise DatabaseDependencyError(
                f"app.dependency_overrides[{maker.__name__}] can never match: the call makes the "
                f"dependency. Write app.dependency_overrides[{maker.__name__}(name)], with the "
                "name of the database; without one it is 'default'."
            )


def examine_all(running: Running, *, late: bool) -> None:
    """Check the routes that nobody has looked at yet, and tell the gate what they open.

    Args:
        running: the application.
        late: its own lifespan has begun. A name that is not installed is then logged, and refused
            at the route's first request: the rest of the application is at work by now.
    """
    for context in routes_of(running.app.routes):
        if running.gate.knows(_original(context)):
            continue
        try:
            running.gate.learn(_original(context), _examine(running, context))
        except DatabaseNotInstalledError as error:
            if not late:
                raise
            logger.error("%s", error)


def examine_late(running: Running, route: object) -> Opened:
    """Check a route that was added after start-up, when its first request is there."""
    opened: Opened = Counter()
    for context in routes_of(running.app.routes):
        if _original(context) is route:
            opened |= _examine(running, context)
    return opened


def _original(context: object) -> object:
    return getattr(context, "original_route", context)


def _examine(running: Running, context: Any) -> Opened:
    """Refuse a route that depends on a database in a way that cannot work.

    An overridden dependency is the application's business, and is not looked into.

    Returns:
        the databases that a request opens sessions of, with how many.

    Raises:
        DatabaseNotInstalledError: a name that is not installed.
        DatabaseDependencyError: a scope, an annotation or a function that cannot work.
    """
    dependant = getattr(context, "dependant", None)
    if dependant is None:
        return Counter()
    check = _Check(context.path, running, dependant)
    check.visit(dependant)
    if check.opened:
        _report_route_class(_original(context))
    return Counter(database for database, _ in check.opened)


def _report_route_class(route: object) -> None:
    if not isinstance(route, APIRoute):
        return
    if type(route).get_route_handler is not APIRoute.get_route_handler:
        logger.warning(
            "Route %r has a class of its own, %s, whose get_route_handler() runs around the "
            "commit: if it turns an exception into a response, the request is rolled back and "
            "answered as that response says.",
            route.path,
            type(route).__qualname__,
        )


class _Check:
    """A walk through the dependencies of one route."""

    def __init__(self, route: str, running: Running, endpoint: Dependant) -> None:
        self.opened: set[tuple[Any, type]] = set()
        self._route = route
        self._running = running
        self._endpoint = endpoint
        self._overrides = getattr(running.app, "dependency_overrides", {})

    def visit(self, dependant: Dependant, outlives: Dependant | None = None) -> None:
        """Look at what a callable depends on; `outlives` is a request-scoped generator above."""
        for child in dependant.dependencies:
            call: object = child.call
            if self._is_overridden(call):
                continue
            if any(call is maker for maker in _MAKERS):
                raise self._mistake(
                    f"Depends({name_of(call)}) gives no session. Write "
                    f"Depends({name_of(call)}(name)): the call makes the dependency."
                )
            if isinstance(call, DatabaseDependency):
                self._visit_ours(dependant, child, call, outlives)
            else:
                self.visit(child, child if is_request_scoped_generator(child) else outlives)

    def _mistake(self, what: str) -> DatabaseDependencyError:
        return DatabaseDependencyError(f"Route {self._route!r}: {what}")

    def _is_overridden(self, call: object) -> bool:
        if getattr(call, "__hash__", None) is not None and call in self._overrides:
            return True
        if not isinstance(call, DatabaseDependency) or call.gives_handle:
            return False
        # transactional(name) and reader(name) hand out what get_db(name) gives them.
        return get_db(call.name) in self._overrides

    def _visit_ours(
        self,
        parent: Dependant,
        child: Dependant,
        call: DatabaseDependency,
        outlives: Dependant | None,
    ) -> None:
        installation = self._running.find(call.name)
        if isinstance(call, InstalledDependency) and self._is_mounted(call.name):
            return  # readiness counts the databases of mounted applications too
        if installation is None:
            error = not_installed(call.name, self._running.names())
            raise DatabaseNotInstalledError(f"Route {self._route!r}: {error}")
        if not call.gives_handle:
            self._check_scope(child, call, outlives)
        self._check_annotation(parent, child, call, installation)
        if not call.gives_handle:
            self._check_function(parent, child, call, installation)
        if isinstance(call, TransactionDependency):
            self._check_autocommit(call, installation)
        if installation.database is not None and not isinstance(call, InstalledDependency):
            # transactional(name) opens what get_db(name) does; a handle may open one beside it.
            kind = type(call) if isinstance(call, ReaderDependency | HandleDependency) else object
            self.opened.add((installation.database, kind))

    def _is_mounted(self, name: str) -> bool:
        return any(each.name == name for each in self._running.databases_from_here())

    def _check_scope(
        self, child: Dependant, call: DatabaseDependency, outlives: Dependant | None
    ) -> None:
        if child.scope == "request":
            raise self._mistake(
                f"the session of database {call.name!r} is finished before "
                'the response starts, so scope="request" cannot hold. Leave scope out; work that '
                f"outlives the response depends on get_database_handle({call.name!r})."
            )
        if outlives is not None:
            name = name_of(outlives.call)
            raise self._mistake(
                f"the generator {name} depends on the session of database {call.name!r}, but runs "
                "on after the response has left, when the session is finished. Let it return the "
                f'session instead of yielding it, or declare it with Depends({name}, scope="'
                "function\"). Where it is a library's and you can do neither, give it a "
                f"dependency of your own that returns what get_db({call.name!r}) gives."
            )

    def _check_function(
        self, parent: Dependant, child: Dependant, call: DatabaseDependency, found: Installation
    ) -> None:
        """Refuse a function that cannot use the session: it cannot await, or runs too late."""
        is_endpoint = parent is self._endpoint
        if child.name is None or found.database is None:
            return  # nobody looks at what it gets
        name = name_of(parent.call)
        if is_endpoint and is_generator(parent.call):
            raise self._mistake(
                f"{name} yields its response, and runs when the session of database "
                f"{call.name!r} is finished. Depend on get_database_handle({call.name!r}) and "
                "open a session in the generator."
            )
        # A dependency may pass the session on, to a repository say, and classes do nothing else.
        if isinstance(found.database.engine, AsyncEngine) and (
            not is_awaitable(parent.call)
            if is_endpoint
            else drops_a_coroutine(parent.call, child.name)
        ):
            raise self._mistake(
                f"{name} is not an `async def`, and gets the AsyncSession of database "
                f"{call.name!r}, which has to be awaited: nothing that it asks for would be done. "
                "Write it with `async def`, or install an Engine."
            )

    def _check_autocommit(self, call: DatabaseDependency, installation: Installation) -> None:
        database = installation.database
        options: Mapping[str, Any] = (
            {} if database is None else database.engine.get_execution_options()
        )
        if options.get("isolation_level") == "AUTOCOMMIT":
            raise self._mistake(
                f"transactional({call.name!r}) needs transactions, and the engine of database "
                f"{call.name!r} is in AUTOCOMMIT. Make the engine without it, or depend on "
                f"get_db({call.name!r})."
            )

    def _check_annotation(
        self, parent: Dependant, child: Dependant, call: DatabaseDependency, found: Installation
    ) -> None:
        annotation = annotation_of(parent.call, child.name)
        if found.database is None or annotation is None:
            return
        asynchronous = isinstance(found.database.engine, AsyncEngine)
        plain: type = AsyncSession if asynchronous else Session
        session: type = found.session_options.get("class_", plain)
        given = type(found.database) if call.gives_handle else session
        named = [each for each in classes_in(annotation) if issubclass(each, _GIVEN)]
        if not named or any(issubclass(given, each) for each in named):
            return
        said = f"parameter {child.name!r} of {name_of(parent.call)} is annotated with"
        if issubclass(named[0], given):
            raise self._mistake(
                f"{said} {_path(named[0])}, but database {call.name!r} gives "
                f"{_path(given)}. Install it with session_options="
                f'{{"class_": {named[0].__name__}}}, or fix the annotation.'
            )
        raise self._mistake(
            f"{said} {named[0].__name__}, but database {call.name!r} is installed with an "
            f"{type(found.database.engine).__name__} and gives {_article(given)}. Fix the "
            "annotation, or install the other kind of engine."
        )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
