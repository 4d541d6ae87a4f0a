"""Another engine for a database of an application, for as long as a block lasts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

from starlette.applications import Starlette

from .._lifespan import start_installation, start_with_engine
from .._registry import EngineFactory, Installation, Registry
from ..databases import AnyEngine, database_class
from ._isolation import Isolation, isolation_of, running_loop
from ._targets import inner, is_one_database, is_running, known_engine, place


def override_database(app: Starlette, name: str, engine: AnyEngine | EngineFactory) -> Override:
    """Have an application use another engine for one of its databases within a block.

    It is swapped where names are looked up, so that routes, handles, background work, websockets,
    mounted applications and health follow. A handle that was fetched before does not. The
    session options and times are those of the installation.

    Enter it before the application starts, which then does not call a factory of its own, or
    while it runs; as `with` or as `async with`. Overrides of one name end in reverse order.

    Who builds, closes: a ready engine is the test's, and is not disposed of here; one that a
    factory given here has built is. The application's `shutdown` hook belongs to its own engine
    and is called at the end of the lifespan. An async engine's connections belong to the
    application's event loop: with `TestClient`, give a factory.

    Args:
        app: the application that has the name installed, or the one it is mounted in.
        name: of the database.
        engine: as for `install_database`, of the same kind as the installed one.

    Raises:
        DatabaseNotInstalledError: an unknown name.
        TypeError: an engine of the other kind.
        ValueError: the engine leads to the very database that is installed, whoever logs in:
            tests would write to the one of development. Inside of `isolated(app)`, which then
            has this engine too, it is allowed.

    Example:
        with override_database(app, "analytics", create_engine(test_url)), TestClient(app): ...
    """
    registry, name = place(app, name)
    return Override(registry, name, engine)


class Override:
    """Be the block of `override_database`."""

    def __init__(self, registry: Registry, name: str, engine: AnyEngine | EngineFactory) -> None:
        self._registry = registry
        self._name = name
        self._engine = engine
        self._installation: Installation | None = None

    def __enter__(self) -> Self:
        """Swap the engine.

        Raises:
            RuntimeError: on the application's event loop, where a factory had to be awaited.
        """
        installation = self._new_installation()
        loop = self._registry.loop
        if is_running(self._registry) and loop is not None:
            if database_class(installation.engine) is None:
                _run_on(loop, start_installation(installation))
            else:
                start_with_engine(installation, loop)
        self._registry.installations[self._name] = self._installation = installation
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Swap back."""
        ending = self._swap_back()
        if ending and self._registry.loop is not None:
            _run_on(self._registry.loop, _await_all(ending))

    async def __aenter__(self) -> Self:
        """Swap the engine."""
        installation = self._new_installation()
        if is_running(self._registry) and self._registry.loop is not None:
            await _await_on(self._registry.loop, start_installation(installation))
        self._registry.installations[self._name] = self._installation = installation
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Swap back."""
        ending = self._swap_back()
        if ending and self._registry.loop is not None:
            await _await_on(self._registry.loop, _await_all(ending))

    def _new_installation(self) -> Installation:
        installed = self._registry.installations[self._name]
        installation = replace(
            installed,
            engine=self._engine,
            shutdown=None,
            database=None,
            overridden=installed,
            isolations=[],
        )
        if database_class(self._engine) is None:
            installation.engine = self._checked_factory(installed)
        else:
            self._check(installed, cast("AnyEngine", self._engine))
        if installed.isolations:
            # Whatever the application does in that block is to be gone after it.
            cast("Isolation", installed.isolations[-1]).add(self._registry, installation)
        return installation

    def _check(self, installed: Installation, engine: AnyEngine) -> None:
        own = known_engine(installed.chain()[-1])
        if own is None:
            return
        if database_class(own) is not database_class(engine):
            raise TypeError(
                f"Database {self._name!r} is installed with an {_kind(own)}, which an "
                f"{_kind(engine)} cannot stand in for: the routes expect the other sessions."
            )
        isolated = installed.isolations or isolation_of(engine) is not None
        if is_one_database(inner(own), inner(engine)) and not isolated:
            raise ValueError(
                f"The engine given for database {self._name!r} leads to the very database that "
                "is installed: the tests would write to it. Give one for a database of their "
                "own, or enter isolated(app) first, which takes everything back."
            )

    def _checked_factory(self, installed: Installation) -> EngineFactory:
        factory = cast("Any", self._engine)

        async def build() -> AnyEngine:
            engine = factory()
            engine = await engine if inspect.isawaitable(engine) else engine
            kind = database_class(engine)
            if kind is not None:
                try:
                    self._check(installed, engine)
                except (TypeError, ValueError):
                    await kind(engine).dispose()
                    raise
            return cast("AnyEngine", engine)

        return build

    def _swap_back(self) -> list[Coroutine[Any, Any, None]]:
        """Take the override out, and list what is left to await on the application's loop."""
        installation, installations = self._installation, self._registry.installations
        assert installation is not None
        assert installation.overridden is not None
        above = [
            each for each in installations[self._name].chain() if each.overridden is installation
        ]
        if above:
            above[0].overridden = installation.overridden
        else:
            installations[self._name] = installation.overridden
        if not is_running(self._registry):
            return []  # the end of the lifespan has closed what was started
        ending: list[Coroutine[Any, Any, None]] = []
        if not above and installation.overridden.database is None:
            ending.append(start_installation(installation.overridden))
        if database_class(installation.engine) is None and installation.database is not None:
            ending.append(installation.database.dispose())
        return ending


def _kind(engine: AnyEngine) -> str:
    kind = database_class(engine)
    return "Engine" if kind is None else kind.engine_type.__name__


async def _await_all(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    for each in coroutines:
        await each


def _run_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]) -> None:
    if running_loop() is loop:
        coroutine.close()
        raise RuntimeError(
            "override_database has to await an engine's factory: on the application's event loop "
            "write `async with override_database(...)`."
        )
    asyncio.run_coroutine_threadsafe(coroutine, loop).result()


async def _await_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]) -> None:
    if asyncio.get_running_loop() is loop:
        await coroutine
    else:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))
