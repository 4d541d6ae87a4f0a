"""Which databases a test means, and where it can reach them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

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
from .._sessions.engines import AnyEngine, sync_engine
from ..databases import AnyDatabase, database_class

T = TypeVar("T")
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


def finish(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop | None) -> T:
    """Run a coroutine to its end from plain code: on an event loop, or here if it never awaits.

    Raises:
        RuntimeError: it awaits something, and this is the event loop's own thread.
    """
    if loop is not None and loop is not running_loop():
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return] # the coroutine's own
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
