"""Which databases a test means, and where it can reach them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

from sqlalchemy import URL
from starlette.applications import Starlette

from .._lifespan.running import (
    Installation,
    Installations,
    installations_of,
    not_installed,
    running_of,
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


def running_database(target: Target, name: str) -> AnyDatabase:
    """Return the handle of one of an application's databases, or the one that is given."""
    if not isinstance(target, Starlette):
        return target
    ((_, installation),) = places(target, [name])
    return installation.database or running_of(target).database(installation.name)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread, if one runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Block:
    """What `with` and `async with` enter alike: both do the same, where it can be awaited.

    Args:
        begin: does it, and puts what undoes it on the stack.
        loop: finds the event loop that all of it needs, if there is one.
    """

    def __init__(
        self,
        begin: Callable[[AsyncExitStack], Coroutine[Any, Any, None]],
        loop: Callable[[], asyncio.AbstractEventLoop | None],
    ) -> None:
        self._begin = begin
        self._loop = loop
        self._undo = AsyncExitStack()

    def __enter__(self) -> None:
        self._finish(self._enter())

    def __exit__(self, *_: object) -> None:
        self._finish(self._undo.aclose())

    async def __aenter__(self) -> None:
        await self._there(self._enter())

    async def __aexit__(self, *_: object) -> None:
        await self._there(self._undo.aclose())

    async def _enter(self) -> None:
        async with AsyncExitStack() as undo:
            await self._begin(undo)
            self._undo = undo.pop_all()

    async def _there(self, coroutine: Coroutine[Any, Any, None]) -> None:
        loop = self._loop()
        if loop in (None, running_loop()):
            await coroutine
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))

    def _finish(self, coroutine: Coroutine[Any, Any, None]) -> None:
        loop = self._loop()
        if loop is None:
            in_thread(lambda: asyncio.run(coroutine)).result()
        elif loop is not running_loop():
            asyncio.run_coroutine_threadsafe(coroutine, loop).result()
        else:
            try:
                coroutine.send(None)
            except StopIteration:
                return
            coroutine.close()
            raise RuntimeError("This block has to await something here: write `async with`.")


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
