"""What the start-up looks for in the routes: names, scopes and annotations."""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Union, get_args, get_origin

from fastapi.dependencies.models import Dependant
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette

from ._registry import Installation, Registry, not_installed
from ._routes import routes_of
from .databases import AnyDatabase, AsyncDatabase, Database
from .dependencies import (
    DatabaseDependency,
    InstalledDependency,
    ReaderDependency,
    get_database_handle,
    get_db,
    reader,
    transactional,
)
from .exceptions import DatabaseDependencyError, DatabaseNotInstalledError

# What our dependencies give, and so the only classes whose annotation can contradict them.
_GIVEN: Final = (Session, AsyncSession, Database, AsyncDatabase)
# They make dependencies, and are easily taken for ones.
_MAKERS: Final = (get_db, transactional, reader, get_database_handle)


def check_routes(
    app: Starlette, registry: Registry, router: int
) -> dict[object, Counter[AnyDatabase]]:
    """Refuse routes that depend on a database in a way that cannot work.

    An overridden dependency is the application's business, and is not looked into.

    Returns:
        the endpoints that open more than one session, each with the databases they are of.

    Raises:
        DatabaseNotInstalledError: a name that is not installed.
        DatabaseDependencyError: a scope or an annotation that cannot work.
    """
    several: dict[object, Counter[AnyDatabase]] = {}
    for route in routes_of(app.routes):
        dependant = getattr(route, "dependant", None)
        if dependant is not None:
            overrides = getattr(app, "dependency_overrides", {})
            check = _Check(route.path, registry, router, overrides)
            check.visit(dependant)
            if len(check.sessions) > 1:
                # One function may serve several routes: what any of them opens counts.
                opened = Counter(database for database, _ in check.sessions)
                several[dependant.call] = several.get(dependant.call, Counter()) | opened
    return several


class _Check:
    """Walk the dependencies of one route, and note the sessions that a request opens."""

    def __init__(
        self, route: str, registry: Registry, router: int, overrides: Mapping[Any, Any]
    ) -> None:
        self.route = route
        self.sessions: set[tuple[AnyDatabase, bool]] = set()
        self._registry = registry
        self._router = router
        self._overrides = overrides

    def visit(self, dependant: Dependant, outlives: Dependant | None = None) -> None:
        """Look at what a callable depends on; `outlives` is a request-scoped generator above."""
        for child in dependant.dependencies:
            call: object = child.call
            if self._is_overridden(call):
                continue
            if call in _MAKERS:
                raise DatabaseDependencyError(
                    f"Route {self.route!r}: Depends({_name_of(call)}) gives no session. Write "
                    f"Depends({_name_of(call)}(name)): the call makes the dependency."
                )
            if isinstance(call, DatabaseDependency):
                self._visit_ours(dependant, child, call, outlives)
            else:
                self.visit(child, child if _is_request_scoped_generator(child) else outlives)

    def _is_overridden(self, call: object) -> bool:
        if call in self._overrides:
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
        installation = self._registry.find(call.name, self._router)
        if isinstance(call, InstalledDependency) and self._is_mounted(call.name):
            return  # readiness counts the databases of mounted applications too
        if installation is None:
            error = not_installed(call.name, self._registry.names(self._router))
            raise DatabaseNotInstalledError(f"Route {self.route!r}: {error}")
        if not call.gives_handle:
            self._check_scope(child, call, outlives)
        self._check_annotation(parent, child, call, installation)
        if installation.database is not None and not call.gives_handle:
            self.sessions.add((installation.database, isinstance(call, ReaderDependency)))

    def _is_mounted(self, name: str) -> bool:
        databases = self._registry.databases_from_here(self._router)
        return any(database.name == name for database in databases)

    def _check_scope(
        self, child: Dependant, call: DatabaseDependency, outlives: Dependant | None
    ) -> None:
        if child.scope == "request":
            raise DatabaseDependencyError(
                f"Route {self.route!r}: the session of database {call.name!r} is finished before "
                'the response starts, so scope="request" cannot hold. Leave scope out; work that '
                f"outlives the response depends on get_database_handle({call.name!r})."
            )
        if outlives is not None:
            raise DatabaseDependencyError(
                f"Route {self.route!r}: the generator {_name_of(outlives.call)} depends on the "
                f"session of database {call.name!r}, but runs on after the response has left, when "
                "the session is finished. Declare it with Depends("
                f'{_name_of(outlives.call)}, scope="function").'
            )

    def _check_annotation(
        self,
        parent: Dependant,
        child: Dependant,
        call: DatabaseDependency,
        installation: Installation,
    ) -> None:
        database = installation.database
        annotation = _annotation(parent.call, child.name)
        if database is None or annotation is None:
            return
        given = type(database) if call.gives_handle else database.session_type
        named = [each for each in _classes(annotation) if issubclass(each, _GIVEN)]
        if named and not any(issubclass(each, given) for each in named):
            raise DatabaseDependencyError(
                f"Route {self.route!r}: parameter {child.name!r} of {_name_of(parent.call)} is "
                f"annotated with {named[0].__name__}, but database {call.name!r} is installed with "
                f"an {database.engine_type.__name__} and gives {_article(given)}. Mend the "
                "annotation, or install the other kind of engine."
            )


def _article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _name_of(call: object) -> str:
    return getattr(call, "__qualname__", None) or type(call).__qualname__


def _is_request_scoped_generator(dependant: Dependant) -> bool:
    """Tell what FastAPI enters before the endpoint and leaves after the response."""
    if dependant.scope == "function" or dependant.call is None:
        return False
    call: Any = dependant.call
    while isinstance(call, functools.partial):
        call = call.func
    looked_at = [call, inspect.unwrap(call)]
    if not inspect.isclass(looked_at[1]):
        methods = [each.__call__ for each in looked_at]
        looked_at += [*methods, *map(inspect.unwrap, methods)]
    return any(
        inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in looked_at
    )


# -- annotations -----------------------------------------------------------------------------


def _annotation(call: Callable[..., Any] | None, parameter: str | None) -> object:
    if call is None or parameter is None:
        return None
    try:
        parameters = inspect.signature(call, eval_str=True).parameters
    except Exception:  # noqa: BLE001 - often a name that only the type checker knows
        return None  # nothing visible contradicts
    found = parameters.get(parameter)
    return None if found is None else found.annotation


def _classes(annotation: object) -> list[type]:
    """List the classes that an annotation names, through aliases, `Annotated` and unions."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation]
    # PEP 695 aliases, bare and subscribed, are known by this attribute on every Python.
    value = getattr(annotation, "__value__", None)
    if value is not None:
        return _classes(value)
    origin = get_origin(annotation)
    if origin is Annotated:
        return _classes(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [each for part in get_args(annotation) for each in _classes(part)]
    return _classes(origin) if origin is not None else []
