"""Lookups in the routes of an application."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import routing
from fastapi.dependencies.models import Dependant
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Mount, Router


def mounted_applications(app: Starlette) -> list[Starlette]:
    """List the applications mounted directly in this one, unwrapping their middleware."""
    behind = map(_mounted, routes_of(app.routes))
    return list(dict.fromkeys(each for each in behind if isinstance(each, Starlette)))


def routes_of(routes: Sequence[BaseRoute]) -> Iterator[Any]:
    """Yield every route as `include_router` has combined it, mounted routers' included."""
    # Older versions of FastAPI flatten included routers; newer ones keep them.
    contexts = getattr(routing, "iter_route_contexts", iter)
    for route in contexts(routes):
        yield route
        behind = _mounted(route)
        if isinstance(behind, Router):
            yield from routes_of(behind.routes)


def applications_in(app: Starlette) -> list[Starlette]:
    """List an application and all applications mounted in it at any depth, each once."""
    found = [app]
    for above in found:
        found += [each for each in mounted_applications(above) if each not in found]
    return found


def routes_with_a_database(app: Starlette) -> list[Any]:
    """List the routes that depend on one of our sessions or handles."""
    return [route for route in routes_of(app.routes) if _opens(getattr(route, "dependant", None))]


def _opens(dependant: Dependant | None) -> bool:
    below = [] if dependant is None else dependant.dependencies
    return any(getattr(call_of(each), "opens", None) is not None or _opens(each) for each in below)


def call_of(dependency: Dependant) -> Any:
    """Return what a dependency calls, behind partials and decorators, as FastAPI reads it."""
    call: Any = dependency.call
    while isinstance(call, functools.partial):
        call = call.func
    return inspect.unwrap(call)


def is_frontend(scope: Mapping[str, Any]) -> bool:
    """Return whether a request is for a file of `app.frontend()`, which is no route."""
    # FastAPI's private key: nothing public tells. Without it, `transactional` is not refused there.
    return "frontend_path" in scope.get("fastapi", {})


def name_of_route(scope: Mapping[str, Any]) -> str | None:
    """Return a request's method and full route, `GET /api/orders/{id}`; `None` without a route."""
    route = scope.get("route")
    # The route of an included router lacks the prefixes of the inclusion; only this context has it.
    context = scope.get("fastapi", {}).get("effective_route_context")
    route = context if getattr(context, "original_route", None) is route else route
    pattern = getattr(route, "path", None)
    if pattern is None:
        return None
    # The part of root_path before the mount belongs to the server or a proxy.
    mount = scope.get("root_path", "")
    mount = mount.removeprefix(scope.get("app_root_path", mount)).rstrip("/")
    return f"{scope.get('method', 'WS')} {mount}{pattern}"


def _mounted(route: Any) -> Starlette | Router | None:
    original = getattr(route, "original_route", route)
    if not isinstance(original, Mount | Host):
        return None
    app: Any = original.app
    for _ in range(100):  # a mock has an attribute of every name, without end
        if isinstance(app, Starlette | Router):
            return app
        app = getattr(app, "app", None)  # where middleware keeps the app it wraps
    return None
