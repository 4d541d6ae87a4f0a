"""A client for asynchronous tests, with the application's lifespan around it."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    import httpx


@asynccontextmanager
async def async_client(
    app: Starlette, *, raise_app_exceptions: bool = True, **options: Any
) -> AsyncGenerator[httpx.AsyncClient]:
    """Run the application's lifespan, and give an `httpx.AsyncClient` that calls it in process.

    What `TestClient` does for synchronous tests, on the test's own event loop. The lifespan has a
    task of its own, so that the block may begin and end in different ones, as in fixtures.

    Args:
        app: the application.
        raise_app_exceptions: raise in the test what the application has raised, instead of
            answering with 500.
        **options: for `httpx.AsyncClient` (of httpx, or of httpx2 where that alone is installed).

    Example:
        async with async_client(app) as client, isolated(app):
            await client.post("/books", json={"title": "Emma"})
    """
    http = _httpx()
    state: dict[str, Any] = {}
    async with _lifespan(app, state):
        transport = http.ASGITransport(
            app=_with_state(app, state), raise_app_exceptions=raise_app_exceptions
        )
        given = {"base_url": "http://testserver", "transport": transport} | options
        async with http.AsyncClient(**given) as client:
            yield client


def _httpx() -> Any:
    try:
        return importlib.import_module("httpx")
    except ModuleNotFoundError:
        return importlib.import_module("httpx2")


def _with_state(app: ASGIApp, state: dict[str, Any]) -> ASGIApp:
    """Give every request what the lifespan has yielded, as a server does."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = state.copy()
        await app(scope, receive, send)

    return call


@asynccontextmanager
async def _lifespan(app: Starlette, state: dict[str, Any]) -> AsyncGenerator[None]:
    started, end = asyncio.Event(), asyncio.Event()

    async def run() -> None:
        async with app.router.lifespan_context(app) as yielded:
            state.update(yielded or {})
            started.set()
            await end.wait()

    running = asyncio.create_task(run())
    starting = asyncio.create_task(started.wait())
    try:
        await asyncio.wait({running, starting}, return_when=asyncio.FIRST_COMPLETED)
        if started.is_set():
            yield
    finally:
        starting.cancel()
        end.set()
        await running
