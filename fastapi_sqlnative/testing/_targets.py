"""Which databases a test means."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from sqlalchemy import URL
from starlette.applications import Starlette

from .._lifespan.running import (
    Installation,
    Installations,
    Observer,
    installations_of,
    not_installed,
    trimmed,
)
from .._routes import applications_in
from .._sessions.engines import AnyEngine, sync_engine
from ..databases import AnyDatabase, database_class

Target: TypeAlias = Starlette | AnyDatabase
Place: TypeAlias = tuple[Installations, Installation]


class IsolationError(RuntimeError):
    """A test has asked a database for what the block that it is in cannot do."""


def places(app: Starlette, names: Sequence[str]) -> list[Place]:
    """Find where names are installed, on the application or on a mounted one; all without a name.

    Raises:
        DatabaseNotInstalledError: a name is unknown, or there is no database at all.
    """
    installed = map(installations_of, applications_in(app))
    every = [(each, one) for each in installed for one in each.by_name.values()]
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
    """Return whether two engines mean the same database, whoever logs in with whatever driver."""
    first, second = sync_engine(one), sync_engine(other)
    # An engine made from another, with options, has its dialect.
    return first.dialect is second.dialect or _address(first.url) == _address(second.url)


def _address(url: URL) -> object:
    backend, host = url.get_backend_name(), url.host or url.query.get("host")
    if not (host or url.database) or url.database == ":memory:":
        return object()  # a `creator` knows it, or it is the engine's own
    port = url.port or url.query.get("port") or {"postgresql": 5432}.get(backend, 3306)
    return backend, host, str(port), url.database


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread, if one runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@contextmanager
def observing(app: Starlette, observer: Observer) -> Generator[None]:
    """Show an observer every database that runs, or starts within the block."""
    installed = [installations_of(each) for each in applications_in(app)]
    for each in installed:
        each.observers.append(observer)
        for installation in each.by_name.values():
            if installation.database is not None:
                observer(installation.database)
    try:
        yield
    finally:
        for each in installed:
            each.observers.remove(observer)
