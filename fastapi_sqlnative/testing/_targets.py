"""Finding the databases that a test refers to."""

import asyncio
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeAlias

from sqlalchemy import URL, Engine
from starlette.applications import Starlette

from .._lifespan import running
from .._routes import applications_in
from .._sessions.engines import AnyEngine, sync_engine
from ..databases import AnyDatabase, database_class

Target: TypeAlias = Starlette | AnyDatabase
Place: TypeAlias = tuple[running.Installations, running.Installation]
# The execution option of an engine, and the info of a connection, that leads to a clone: its name.
CLONE: Final = "fastapi_sqlnative_clone"


class IsolationError(RuntimeError):
    """A test tried to do something that its block cannot do."""


def places(app: Starlette, names: Sequence[str]) -> list[Place]:
    """Find where names are installed, on the application or a mounted one; by default all."""
    installed = map(running.installations_of, applications_in(app))
    every = [(each, one) for each in installed for one in each.by_name.values()]
    known = [installation.name for _, installation in every]
    for name in map(running.trimmed, names or ["default"] * (not every)):
        if name not in known:
            raise running.not_installed(name, known)
    return [every[known.index(running.trimmed(name))] for name in names] or every


def ready_engine(installation: running.Installation) -> AnyEngine | None:
    """Return the engine; `None` if its factory has not been called yet."""
    engine: Any = installation.database.engine if installation.database else installation.engine
    return None if database_class(engine) is None else engine


def is_one_database(one: AnyEngine, other: AnyEngine) -> bool:
    """Return whether two engines lead to the same database, ignoring user and driver."""
    first, second = sync_engine(one), sync_engine(other)
    # Engines made by `execution_options()` share the dialect.
    return first.dialect is second.dialect or address_of(first.url) == address_of(second.url)


def connect_alike(one: Engine, other: Engine) -> bool:
    """Return whether two engines lead to the same database, or to the same clone of it."""
    clones = {each.get_execution_options().get(CLONE) for each in (one, other)}
    return one.dialect is other.dialect or (len(clones) == 1 and is_one_database(one, other))


def address_of(url: URL) -> object:
    """Return what identifies a database, without user and driver."""
    backend, host = url.get_backend_name(), url.host or url.query.get("host")
    if not (host or url.database) or url.database == ":memory:":
        return object()  # unknown, because of a `creator`, or an in-memory database of its own
    port = url.port or url.query.get("port") or {"postgresql": 5432}.get(backend, 3306)
    return backend, host, str(port), url.database


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop of this thread, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@contextmanager
def observing(app: Starlette, observer: running.Observer) -> Generator[None]:
    """Call an observer with every database that is running or starts within the block."""
    with ExitStack() as undo:
        for installed in map(running.installations_of, applications_in(app)):
            installed.observers.append(observer)
            undo.callback(installed.observers.remove, observer)
            for installation in installed.by_name.values():
                if installation.database is not None:
                    observer(installation.database)
        yield
