"""Another engine for a database of an application, for as long as a block lasts."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from starlette.applications import Starlette

from .._lifespan.running import EngineFactory
from .._lifespan.startup import call_factory, start_installation
from .._sessions.engines import AnyEngine, dispose
from ..databases import database_class
from ._isolation import is_isolated
from ._targets import Block, Place, is_one_database, places, ready_engine


def override_database(app: Starlette, name: str, engine: AnyEngine | EngineFactory) -> Block:
    """Make an application use another engine for one of its databases within a block.

    It is swapped where names are looked up, so that routes, handles, background work, websockets,
    mounted applications and health follow. A handle that was fetched before does not. The
    session options and times are those of the installation.

    Enter it before the application starts, which then does not call a factory of its own, or
    while it runs: as `with`, or on the application's event loop as `async with`.

    Args:
        app: the application, or the outermost of those mounted in each other.
        name: of the database.
        engine: of the kind that is installed: a ready one, which the test closes, or a factory,
            whose engine is disposed of at the end.

    Raises:
        DatabaseNotInstalledError: an unknown name.
        TypeError: the engine is of the other kind.
        ValueError: it leads to the database that is installed, and no `isolated` block takes
            back what the tests write.
        RuntimeError: `with` on the application's event loop.

    Example:
        with override_database(app, "default", build_test_engine), TestClient(app) as client: ...
    """
    (place,) = places(app, [name])
    return Block(partial(_swap, place, engine), place[0])


async def _swap(place: Place, engine: Any, undo: AsyncExitStack) -> None:
    installed, installation = place
    own, isolated = ready_engine(installation), is_isolated(installation)
    was = installation.engine, installation.database
    builds = database_class(engine) is None

    async def build() -> Any:
        built = await call_factory(engine)
        try:
            _check(installation.name, own, built, isolated)
        except (TypeError, ValueError):
            await dispose(built)
            raise
        return built

    async def restore() -> None:
        built = installation.database if builds else None
        installation.engine, installation.database = was
        if not installed.runs:
            installation.database = None  # the end of the lifespan has closed it
        elif installation.database is None:
            await start_installation(installation, waits=False)
        if installed.runs and built is not None:
            await dispose(built.engine)

    if not builds:
        _check(installation.name, own, engine, isolated)
    undo.push_async_callback(restore)
    installation.engine, installation.database = (build if builds else engine), None
    if installed.runs:
        await start_installation(installation, waits=False)
        # Those who count, hear or isolate what is sent follow too.
        for observer in [*installed.observers]:
            observer(installation.database)  # type: ignore[arg-type] # it has just been made


def _check(name: str, own: AnyEngine | None, engine: AnyEngine, isolated: bool) -> None:
    if own is None or database_class(engine) is None:
        return  # start-up says what is no engine
    if database_class(own) is not database_class(engine):
        raise TypeError(
            f"Database {name!r} is installed with an {type(own).__name__}, which an "
            f"{type(engine).__name__} cannot stand in for: the routes expect other sessions."
        )
    if is_one_database(own, engine) and not isolated:
        raise ValueError(
            f"The engine given for database {name!r} leads to the very database that is "
            "installed: the tests would write to it. Give one for a database of their own, or "
            "enter isolated(app) first, which takes everything back."
        )
