"""Another engine for a database of an application, for as long as a block lasts."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Self

from starlette.applications import Starlette

from .._lifespan.running import EngineFactory
from .._lifespan.startup import call_factory, start_installation, start_with_engine
from .._sessions.engines import AnyEngine, dispose
from ..databases import database_class
from ._isolation import is_isolated
from ._targets import Place, finish, is_one_database, places, ready_engine


def override_database(app: Starlette, name: str, engine: AnyEngine | EngineFactory) -> Override:
    """Have an application use another engine for one of its databases within a block.

    It is swapped where names are looked up, so that routes, handles, background work, websockets,
    mounted applications and health follow. A handle that was fetched before does not. The
    session options and times are those of the installation.

    Enter it before the application starts, which then does not call a factory of its own, or
    while it runs: as `with`, or on the application's event loop as `async with`.

    Args:
        app: the application, or the outermost of those mounted in each other.
        name: of the database.
        engine: of the kind that is installed: a ready one, which the test closes, or a factory,
            whose engine is disposed of at the end. The application's own `shutdown` is still
            called when it ends.

    Raises:
        DatabaseNotInstalledError: an unknown name.
        TypeError: the engine is of the other kind.
        ValueError: it leads to the database that is installed, and no `isolated` block takes
            back what the tests write.

    Example:
        with override_database(app, "default", build_test_engine), TestClient(app) as client: ...
    """
    (place,) = places(app, [name])
    return Override(place, engine)


class Override:
    """The block of `override_database`."""

    def __init__(self, place: Place, engine: AnyEngine | EngineFactory) -> None:
        self._installed, self._installation = place
        self._engine: Any = engine
        self._is_factory = database_class(engine) is None
        self._undo = AsyncExitStack()

    def __enter__(self) -> Self:
        """Swap the engine.

        Raises:
            RuntimeError: on the application's event loop, where a factory had to be awaited.
        """
        return finish(self._swap(), self._loop())

    def __exit__(self, *_: object) -> None:
        """Swap back."""
        finish(self._undo.aclose(), self._loop())

    async def __aenter__(self) -> Self:
        """Swap the engine."""
        await self._on_loop(self._swap())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Swap back."""
        await self._on_loop(self._undo.aclose())

    def _loop(self) -> asyncio.AbstractEventLoop | None:
        return self._installed.loop if self._installed.runs else None

    async def _on_loop(self, coroutine: Any) -> None:
        loop = self._loop()
        if loop in (None, asyncio.get_running_loop()):
            await coroutine
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))

    async def _swap(self) -> Self:
        installation, own = self._installation, ready_engine(self._installation)
        isolated = is_isolated(installation)
        was = installation.engine, installation.database

        async def build() -> Any:
            engine = await call_factory(self._engine)
            try:
                _check(installation.name, own, engine, isolated)
            except (TypeError, ValueError):
                await dispose(engine)
                raise
            return engine

        async def restore() -> None:
            built = installation.database if self._is_factory else None
            installation.engine, installation.database = was
            if not self._installed.runs:
                installation.database = None  # the end of the lifespan has closed it
            elif installation.database is None:
                await start_installation(installation)
            if self._installed.runs and built is not None:
                await dispose(built.engine)

        if not self._is_factory:
            _check(installation.name, own, self._engine, isolated)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(restore)
            installation.engine = build if self._is_factory else self._engine
            installation.database = None
            if self._installed.runs and self._installed.loop is not None:
                if self._is_factory:
                    await start_installation(installation)
                else:
                    start_with_engine(installation, self._installed.loop)
                self._show()
            self._undo = undo.pop_all()
        return self

    def _show(self) -> None:
        """Show the handle to metrics, and to the blocks that isolate it or hear its statements."""
        for observer in [*self._installed.observers]:
            if self._installation.database is not None:
                observer(self._installation.database)


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
