"""The request that is served here, for what is to happen, or has happened, in one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send


@dataclass(eq=False, slots=True)
class Served:
    """A request, and what has been refused in it."""

    scope: Scope
    refusals: list[str] = field(default_factory=list[str])


SERVED: Final = ContextVar[Served | None]("fastapi_sqlnative_served", default=None)


@contextmanager
def marking_requests(app: Starlette, refusals: list[str]) -> Generator[None]:
    """Let `SERVED` tell requests apart; note what was refused in one that ends without an error."""
    inner = app.router.middleware_stack

    async def mark(scope: Scope, receive: Receive, send: Send) -> None:
        request = SERVED.get()
        if request is None or request.scope is not scope:
            request = Served(scope)
            SERVED.set(request)
        try:
            await inner(scope, receive, send)
            refusals.extend(request.refusals)
            request.refusals.clear()
        finally:
            SERVED.set(None)  # the test itself may have called, in its own task

    app.router.middleware_stack = mark
    try:
        yield
    finally:
        app.router.middleware_stack = inner
