"""The routes of an application, as FastAPI and Starlette keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import routing
from fastapi.dependencies.models import Dependant
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Mount, Router


def mounted_applications(app: Starlette) -> list[Starlette]:
    """List the applications mounted directly in this one, behind whatever middleware."""
    behind = map(_mounted, routes_of(app.routes))
    return list(dict.fromkeys(each for each in behind if isinstance(each, Starlette)))


def routes_of(routes: Sequence[BaseRoute]) -> Iterator[Any]:
    """Yield every route, with what include_router made of it, and those of mounted routers."""
    # Older versions of FastAPI flatten an included router where newer ones keep it.
    contexts = getattr(routing, "iter_route_contexts", iter)
    for route in contexts(routes):
        yield route
        behind = _mounted(route)
        if isinstance(behind, Router):
            yield from routes_of(behind.routes)


def applications_in(app: Starlette) -> list[Starlette]:
    """List an application and all that are mounted in it at any depth, each once."""
    found = [app]
    for above in found:
        found += [each for each in mounted_applications(above) if each not in found]
    return found


def routes_with_a_database(app: Starlette) -> list[Any]:
    """List the routes that depend on a session or a handle of ours."""
    return [route for route in routes_of(app.routes) if _uses(getattr(route, "dependant", None))]


def _uses(dependant: Dependant | None) -> bool:
    below = [] if dependant is None else dependant.dependencies
    return any(getattr(each.call, "opens", None) or _uses(each) for each in below)


def name_of_route(scope: Mapping[str, Any]) -> str | None:
    """Name a request's route in full, `GET /api/orders/{id}`, or `None` where it has none."""
    route = scope.get("route")
    # An included router's route knows no prefix; FastAPI keeps what it made of it nowhere else.
    context = scope.get("fastapi", {}).get("effective_route_context")
    found = context if getattr(context, "original_route", None) is route else route
    pattern = getattr(found, "path", None)
    if pattern is None:
        return None
    # What is before the application's own path is the server's, or that of a proxy.
    mount = scope.get("root_path", "")
    mount = mount.removeprefix(scope.get("app_root_path", mount)).rstrip("/")
    return f"{scope.get('method', 'WS')} {mount}{pattern}"


def _mounted(route: Any) -> Starlette | Router | None:
    if not isinstance(getattr(route, "original_route", route), Mount | Host):
        return None
    app = route.app
    while app is not None and not isinstance(app, Starlette | Router):
        app = getattr(app, "app", None)  # the way middleware keeps what it wraps
    return app
