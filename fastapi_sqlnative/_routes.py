"""The routes of an application, as FastAPI and Starlette keep them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastapi import routing
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Mount, Router


def mounted_applications(app: Starlette) -> list[Starlette]:
    """List the applications mounted directly in this one, behind whatever middleware."""
    behind = map(_mounted, routes_of(app.routes))
    return list(dict.fromkeys(each for each in behind if isinstance(each, Starlette)))


def routes_of(routes: Sequence[BaseRoute]) -> Iterator[Any]:
    """Yield every route, with what include_router made of it, and those of mounted routers."""
    for route in _contexts(routes):
        yield route
        behind = _mounted(route)
        if isinstance(behind, Router):
            yield from routes_of(behind.routes)


def _contexts(routes: Sequence[BaseRoute]) -> Iterable[Any]:
    # Older versions of FastAPI flatten an included router where newer ones keep it.
    walk = getattr(routing, "iter_route_contexts", None)
    return routes if walk is None else walk(routes)


def _mounted(route: Any) -> Starlette | Router | None:
    if not isinstance(getattr(route, "original_route", route), Mount | Host):
        return None
    app = route.app
    while app is not None and not isinstance(app, Starlette | Router):
        app = getattr(app, "app", None)  # the way middleware keeps what it wraps
    return app
