"""Isolated databases: what a test does is gone afterwards, commits included."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from types import TracebackType
from typing import Any, Self, cast

import anyio
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette

from .._gates import Gate
from .._registry import Installation, Registry
from ..databases import AnyDatabase, AnyEngine, database_class
from ._outer import REQUEST, IsolatedPool, IsolationError, OuterTransaction, other_loop
from ._targets import inner, is_one_database, is_running, known_engine, place, registries

GateAround = Callable[[Gate | None], Gate]


def isolated(app: Starlette, *names: str) -> Isolation:
    """Have all that is done to an application's databases within a block be gone afterwards.

    Each database gets one transaction around the block, on one connection of the application's
    own engine, which is taken at the first use. Until the end the application's transactions are
    savepoints in it. Its commits, rollbacks and savepoints behave as always, through whatever
    they come: `get_db`, handles, background work, sessions of its own, Core. A database error
    takes back only the transaction that it happened in; on PostgreSQL a deferred constraint is
    checked at each commit.

    Enter it before the application starts or while it runs, before or after `override_database`,
    or inside of another one: the inner block keeps what the outer one has. Where the application
    has an `AsyncEngine`, write `with` in synchronous tests (around `TestClient`) and `async with`
    on an event loop. The application's engines, and handles fetched before, are isolated
    themselves; an engine that is not installed is not.

    What one connection cannot be true to is refused with an `IsolationError`, or done in turn:

    - Concurrent requests wait for each other, one whole request after the other; so does work in
      the background. Whoever waits longer than the pool's timeout, 10 seconds at most, is
      refused.
    - A second session beside one that is in a transaction is refused at once: `reader(name)`
      after `get_db(name)` has been used, a handle's session in a request that has begun, a
      transaction of the test's own around a request. Two sessions one after the other work, and
      so does `reader` before the transaction begins and after it has ended.
    - An isolation level of its own, for a request or a connection, is refused; AUTOCOMMIT, which
      `reader` uses, works, and so does `read_only` on PostgreSQL and SQLite.
    - Two-phase commits, and COMMIT or ROLLBACK sent as text, are refused.
    - A SQLite connection that one thread alone may use is refused; the message has the remedy.
    - Two engines on one database are refused: they could not see each other's commits.

    And it is silent about: `now()`, which stands still on PostgreSQL; locks, which last until the
    end of the block, and tables with ON COMMIT, for which it never comes; NOTIFY, which is never
    sent; what a deferred trigger writes, which is undone after the check; sequences, which go on.
    MySQL commits at every CREATE, ALTER and DROP: that is an `IsolationError` at the end.

    Args:
        app: the application, or the outermost of those mounted in each other.
        *names: of databases; without one all that are installed, on mounted applications too.

    Raises:
        DatabaseNotInstalledError: an unknown name.
        IsolationError: see above.

    Example:
        with TestClient(app) as client, isolated(app):
            client.post("/books", json={"title": "Emma"})
    """
    return Isolation(app, names)


class Isolation:
    """Be the block of `isolated`."""

    def __init__(self, app: Starlette, names: Sequence[str]) -> None:
        self._app = app
        self._names = names
        self._restore = ExitStack()
        self._outers: list[OuterTransaction] = []
        self._databases: list[tuple[Registry, Installation]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        """Isolate the databases, without touching them.

        Raises:
            RuntimeError: on an event loop, where the end could not be awaited.
        """
        self._databases = self._choose()
        engines = [known_engine(installation) for _, installation in self._databases]
        if running_loop() is not None and not all(isinstance(each, Engine) for each in engines):
            raise RuntimeError(
                "isolated(app) has to await the end of an asynchronous engine's transaction: on "
                "an event loop write `async with isolated(app)`."
            )
        self._enter()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Roll everything back."""
        with ExitStack() as ending:
            for outer in self._outers:
                ending.callback(_end, outer)
            ending.callback(self._outers.clear)
            self._restore.close()

    async def __aenter__(self) -> Self:
        """Isolate the databases, without touching them."""
        self._loop = asyncio.get_running_loop()
        self._databases = self._choose()
        self._enter()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Roll everything back."""
        async with AsyncExitStack() as ending:
            for outer in self._outers:
                ending.push_async_callback(_end_async, outer)
            ending.callback(self._outers.clear)
            self._restore.close()

    @functools.cached_property
    def turn(self) -> anyio.CapacityLimiter:
        """Which request may use the databases; made at the first, on its event loop."""
        return anyio.CapacityLimiter(1)

    def _choose(self) -> list[tuple[Registry, Installation]]:
        if self._names:
            places = [place(self._app, name) for name in self._names]
        else:
            places = [(each, name) for each in registries(self._app) for name in each.installations]
        return [(registry, registry.installations[name]) for registry, name in places]

    def _enter(self) -> None:
        with ExitStack() as undo:
            undo.callback(self.__exit__, None, None, None)
            for registry, installation in self._databases:
                self.add(registry, installation)
            for registry in registries(self._app):
                self._take_turns(registry)
            undo.pop_all()

    def _take_turns(self, registry: Registry) -> None:
        before = registry.around_gate
        registry.around_gate = lambda gate: RequestTurn(
            self.turn, gate if before is None else before(gate)
        )

        def restore() -> None:
            registry.around_gate = before

        self._restore.callback(restore)

    def add(self, registry: Registry, installation: Installation) -> None:
        """Isolate one database, now or as soon as there is an engine."""
        engine = known_engine(installation)
        if engine is not None:
            self.isolate(installation.name, engine, registry)
        if database_class(installation.engine) is None:
            factory = cast("Callable[[], Any]", installation.engine)

            async def build() -> AnyEngine:
                built = factory()
                engine: AnyEngine = await built if inspect.isawaitable(built) else built
                if database_class(engine) is not None:
                    self.isolate(installation.name, engine, registry)
                return engine

            def restore() -> None:
                installation.engine = factory

            installation.engine = build
            self._restore.callback(restore)
        installation.isolations.append(self)
        self._restore.callback(installation.isolations.remove, self)

    def isolate(self, name: str, engine: AnyEngine, registry: Registry) -> None:
        """Isolate one engine, if this block has not done so already."""
        wanted = inner(engine)
        if any(outer.engine.dialect is wanted.dialect for outer in self._outers):
            return
        for outer in self._outers:
            if is_one_database(outer.engine, wanted) and (outer.is_open or outer.name != name):
                raise _two_engines(outer.name, name)
        self._outers.append(
            OuterTransaction(name, wanted, lambda: self._may_open(name, wanted, registry))
        )

    def _may_open(self, name: str, engine: Engine, registry: Registry) -> None:
        """Refuse to open a connection where nobody could close it."""
        if not engine.dialect.is_async:
            return
        loop = asyncio.get_running_loop()
        if loop is not self._loop and not (is_running(registry) and loop is registry.loop):
            raise other_loop(name)

    async def leave_loop(self) -> None:
        """Close, as the lifespan ends, what nobody could close afterwards."""
        loop = asyncio.get_running_loop()
        for outer in self._outers:
            if outer.loop is loop and loop is not self._loop:
                await _in_greenlet(outer.close)


class RequestTurn(Gate):
    """Have one request at a time use isolated databases, from its first session to its end."""

    def __init__(self, turn: anyio.CapacityLimiter, gate: Gate | None) -> None:
        super().__init__({})
        self._turn = turn
        self._gate = gate

    async def enter(self, request: object, endpoint: object, database: AnyDatabase) -> None:
        """Wait for the turn, then at the application's own gate."""
        pool = database.pool
        if isinstance(pool, IsolatedPool) and not self._has_turn(request):
            await self._wait_for_turn(request, pool)
            REQUEST.set(request)
        if self._gate is not None:
            await self._gate.enter(request, endpoint, database)

    def leave(self, request: object) -> None:
        """Give the turn to the next."""
        if self._gate is not None:
            self._gate.leave(request)
        if self._has_turn(request):
            self._turn.release_on_behalf_of(request)
            REQUEST.set(None)

    def _has_turn(self, request: object) -> bool:
        return request in self._turn.statistics().borrowers

    async def _wait_for_turn(self, request: object, pool: IsolatedPool) -> None:
        try:
            with anyio.fail_after(pool.timeout()):
                await self._turn.acquire_on_behalf_of(request)
        except TimeoutError:
            raise pool.outer.busy() from None


def isolation_of(engine: AnyEngine) -> OuterTransaction | None:
    """Return the innermost transaction around a test that an engine is in."""
    pool = inner(engine).pool
    return pool.outer if isinstance(pool, IsolatedPool) else None


def _two_engines(one: str, other: str) -> IsolationError:
    if one == other:
        return IsolationError(
            f"Database {one!r} has been used in this isolated block, and an engine of the test's "
            "for the same database would not see what was committed. Override it before its "
            "first use."
        )
    return IsolationError(
        f"Databases {one!r} and {other!r} are one database with two engines, and in two isolated "
        "transactions they would not see what the other commits. Isolate one of them, "
        f"isolated(app, {one!r}), and inside of the block let both use its engine: "
        f"override_database(app, {other!r}, ...)."
    )


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread, if one runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _in_greenlet(function: Callable[[], None]) -> None:
    # A session without an engine, for SQLAlchemy's way to run what awaits inside.
    await AsyncSession().run_sync(lambda _: function())


async def _end_on_its_loop(outer: OuterTransaction) -> None:
    await _in_greenlet(outer.end)


def _end(outer: OuterTransaction) -> None:
    if outer.loop is None or not outer.loop.is_running():
        outer.end()  # of a loop that has ended it says that the connection is lost
    else:
        asyncio.run_coroutine_threadsafe(_end_on_its_loop(outer), outer.loop).result()


async def _end_async(outer: OuterTransaction) -> None:
    if outer.loop is None:
        outer.end()
    elif outer.loop is asyncio.get_running_loop():
        await _end_on_its_loop(outer)
    else:
        ending = asyncio.run_coroutine_threadsafe(_end_on_its_loop(outer), outer.loop)
        await asyncio.wrap_future(ending)
