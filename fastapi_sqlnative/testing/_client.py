"""HTTP clients for asynchronous tests."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync as run_in_thread
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from ._turns import FLOW

if TYPE_CHECKING:
    import httpx
    from starlette.testclient import TestClient

_BASE_URL = "http://testserver"


@asynccontextmanager
async def async_client(
    app: Starlette, *, raise_app_exceptions: bool = True, **options: Any
) -> AsyncGenerator[httpx.AsyncClient]:
    """Run the application's lifespan and yield an `httpx.AsyncClient` that calls it in process.

    It is the counterpart of `TestClient` for asynchronous tests, on their event loop. The lifespan
    runs in a task of its own, because a fixture may be set up and torn down in different tasks.

    Args:
        app: the application.
        raise_app_exceptions: raise the application's exceptions in the test; if false, answer 500.
        **options: for `httpx.AsyncClient`, of httpx or, if that is not installed, of httpx2.

    Example:
        async with async_client(app) as client, isolated(app):
            await client.post("/books", json={"title": "Emma"})
    """
    started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    end = asyncio.Event()

    async def run() -> None:
        FLOW.set(())  # tasks that the application starts are not part of the test
        async with app.router.lifespan_context(app) as state:
            started.set_result(dict(state or {}))
            await end.wait()

    running = asyncio.create_task(run())
    try:
        await asyncio.wait({running, started}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            transport = _transport(app, started.result(), raise_app_exceptions=raise_app_exceptions)
            given = {"base_url": _BASE_URL, "transport": transport} | options
            async with _httpx().AsyncClient(**given) as client:
                yield client
    finally:
        end.set()
        await running


def client_beside(served: TestClient) -> httpx.AsyncClient:
    """Return an async client for the application that a `TestClient` runs on its own event loop."""
    transport = _transport(served.app, served.app_state)
    portal: Any = served.portal

    class Transport(_httpx().AsyncBaseTransport):  # type: ignore[misc] # either httpx
        async def handle_async_request(self, request: Any) -> Any:
            await request.aread()
            answering = portal.start_task_soon(transport.handle_async_request, request)
            try:
                return await run_in_thread(answering.result, abandon_on_cancel=True)
            finally:
                answering.cancel()  # if the test has given up

    client: httpx.AsyncClient = _httpx().AsyncClient(transport=Transport(), base_url=_BASE_URL)
    return client


def _httpx() -> Any:
    try:
        return importlib.import_module("httpx")
    except ModuleNotFoundError:
        return importlib.import_module("httpx2")


def _transport(app: ASGIApp, state: dict[str, Any], **options: Any) -> Any:
    """Make a transport that passes the lifespan's state to each request, as a server does."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = state.copy()
        await app(scope, receive, send)

    return _httpx().ASGITransport(app=call, **options)
