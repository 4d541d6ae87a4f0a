"""Which databases a test means, and where what it does to them is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from sqlalchemy import URL
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from .._lifespan.running import (
    Installation,
    Installations,
    installations_of,
    not_installed,
    trimmed,
)
from .._routes import applications_in
from .._sessions.completion import in_thread
from .._sessions.engines import AnyEngine, sync_engine
from ..databases import AnyDatabase, database_class

Target: TypeAlias = Starlette | AnyDatabase
Place: TypeAlias = tuple[Installations, Installation]


class IsolationError(RuntimeError):
    """A test has asked a database for what the block that it is in cannot do."""


def all_installations(app: Starlette) -> list[Installations]:
    """List what is installed on an application and on those mounted in it, at any depth."""
    return [installations_of(each) for each in applications_in(app)]


def places(app: Starlette, names: Sequence[str]) -> list[Place]:
    """Find where names are installed, on the application or on a mounted one; all without a name.

    Raises:
        DatabaseNotInstalledError: a name is unknown, or there is no database at all.
    """
    every = [(each, one) for each in all_installations(app) for one in each.by_name.values()]
    known = [installation.name for _, installation in every]
    for name in map(trimmed, names or ["default"] * (not every)):
        if name not in known:
            raise not_installed(name, known)
    return [every[known.index(trimmed(name))] for name in names] or every


def ready_engine(installation: Installation) -> AnyEngine | None:
    """Return the engine; `None` where a factory has not made it yet."""
    engine: Any = installation.engine
    if installation.database is not None:
        return installation.database.engine
    return None if database_class(engine) is None else engine


def is_one_database(one: AnyEngine, other: AnyEngine) -> bool:
    """Tell whether two engines mean the same database, whoever logs in with whatever driver."""
    first, second = sync_engine(one), sync_engine(other)
    address = _address(first.url)  # an engine made from another, with options, has its dialect
    return first.dialect is second.dialect or bool(address and address == _address(second.url))


def _address(url: URL) -> tuple[object, ...] | None:
    backend, port = url.get_backend_name(), url.port or url.query.get("port")
    if backend == "sqlite":
        return (backend, url.database) if (url.database or ":memory:") != ":memory:" else None
    host = url.host or url.query.get("host")
    port = str(port or {"postgresql": 5432}.get(backend, 3306))
    # Nothing at all: the address is in a `creator`, or in the environment.
    return (backend, host, port, url.database) if host or url.database else None


# -- requests ------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Served:
    """A request that is being served, and what has been refused in it."""

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


# -- blocks --------------------------------------------------------------------------------------


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread, if one runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Block:
    """What `with` and `async with` enter alike, on the application's event loop while it runs."""

    def __init__(
        self, begin: Callable[[AsyncExitStack], Coroutine[Any, Any, None]], installed: Installations
    ) -> None:
        self._begin = begin
        self._installed = installed
        self._undo = AsyncExitStack()

    def __enter__(self) -> None:
        if self._installed.runs and self._installed.loop is running_loop():
            raise RuntimeError("This block is awaited on the event loop: write `async with`.")
        self._submit(self._enter()).result()

    def __exit__(self, *_: object) -> None:
        self._submit(self._undo.aclose()).result()

    async def __aenter__(self) -> None:
        await asyncio.wrap_future(self._submit(self._enter()))

    async def __aexit__(self, *_: object) -> None:
        await asyncio.wrap_future(self._submit(self._undo.aclose()))

    async def _enter(self) -> None:
        async with AsyncExitStack() as undo:
            await self._begin(undo)
            self._undo = undo.pop_all()

    def _submit(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        if self._installed.runs and self._installed.loop is not None:
            return asyncio.run_coroutine_threadsafe(coroutine, self._installed.loop)
        return in_thread(lambda: asyncio.run(coroutine))
