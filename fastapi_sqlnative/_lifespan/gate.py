"""A limit on the requests that may hold connections at a time, which prevents deadlocks."""

import functools
import math
from collections import Counter, defaultdict
from typing import TypeAlias

import anyio.to_thread
from sqlalchemy import Pool, exc
from sqlalchemy.ext.asyncio import AsyncEngine

from .._drivers.pools import pool_capacity, pool_timeout
from .._functions import is_awaitable
from .._sessions.engines import sync_engine
from .._sessions.holders import report_holders
from ..databases import AnyDatabase, sessions_of

# The sessions that a request of a route opens, by database.
Opened: TypeAlias = Counter[AnyDatabase]


def key_of(route: object) -> object:
    # Routes are not hashable. Their bound methods are, by the identity of the route.
    return getattr(route, "matches", None)


class Gate:
    """Admission control for requests, before their first session, that prevents two deadlocks.

    If every thread waited for a connection, the requests that hold connections would find no thread
    to go on: so requests with synchronous sessions take at most three quarters of FastAPI's
    threads. A request with several sessions waits for one connection while it holds another: so
    never enough of these are admitted to hold all connections.

    Lives as long as the application runs, for all applications mounted in it.
    """

    def __init__(self) -> None:
        self.opened: defaultdict[object, Opened] = defaultdict(Counter)  # by the route's `key_of`
        self._awaits: dict[object, bool] = {}
        self._places: dict[object, list[anyio.CapacityLimiter]] = {}

    def register(self, route: object, opened: Opened) -> None:
        """Record what the requests of a route open; the maximum for a route included twice."""
        key = key_of(route)
        found = self.opened[key] = self.opened[key] | opened
        if found.total() > 1:
            self._connections.total_tokens = self._max_with_several()

    def limiters(self, route: object, database: AnyDatabase) -> list[anyio.CapacityLimiter]:
        # Always in this order: acquiring two limiters in opposite orders could deadlock.
        limiters = [self._connections] if self.opened[key_of(route)].total() > 1 else []
        if not isinstance(database.engine, AsyncEngine):
            limiters.append(self._threads)
        return limiters

    async def enter(
        self, request: object, limiters: list[anyio.CapacityLimiter], database: AnyDatabase
    ) -> None:
        """Wait for a place in each limiter, up to the pool's timeout."""
        for limiter in limiters:
            if limiter not in self._places.get(request, ()):
                await _take(limiter, request, database)
                # Look up again: the request may have released a place while it waited.
                self._places[request] = [*self._places.get(request, ()), limiter]

    def awaits(self, route: object) -> bool:
        """Return whether a route's endpoint awaits; a `def` keeps the thread."""
        key = key_of(route)
        if key not in self._awaits:
            self._awaits[key] = is_awaitable(getattr(route, "endpoint", None))
        return self._awaits[key]

    def leave(self, request: object) -> None:
        for limiter in self._places.pop(request, ()):
            limiter.release_on_behalf_of(request)

    @functools.cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        # Read at the first request: applications set the number of threads during start-up.
        threads = anyio.to_thread.current_default_thread_limiter().total_tokens
        return anyio.CapacityLimiter(max(1, math.floor(threads * 3 / 4)))

    @functools.cached_property
    def _connections(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(math.inf)

    def _max_with_several(self) -> float:
        """Return the most requests with several sessions that cannot hold all connections."""
        wanted: Counter[Pool] = Counter()
        for opened in self.opened.values():
            if opened.total() > 1:
                wanted |= Counter(sync_engine(each.engine).pool for each in opened.elements())
        limits: list[float] = [math.inf]
        # For each pool, the fewest requests that can exhaust it.
        shares: list[int] = []
        for pool, sessions in wanted.items():
            capacity = pool_capacity(pool)
            if capacity is not None:
                shares.append(math.ceil(capacity / sessions))
                if sessions > 1:
                    limits.append((capacity - 1) // (sessions - 1))
        if len(shares) > 1:
            limits.append(sum(sorted(shares)[:2]) - 1)
        return max(1, min(limits))


async def _take(limiter: anyio.CapacityLimiter, request: object, database: AnyDatabase) -> None:
    try:
        limiter.acquire_on_behalf_of_nowait(request)
    except anyio.WouldBlock:
        timeout = pool_timeout(sync_engine(database.engine).pool)
        with anyio.move_on_after(timeout) as waiting:
            await limiter.acquire_on_behalf_of(request)
        if waiting.cancelled_caught:
            # The pool's own exception, so that one handler covers both.
            error = exc.TimeoutError(
                f"Database {database.name!r} is busy: the gate's limit of {limiter.total_tokens:g} "
                f"requests is reached, and none of them ended within {timeout:g} s.",
                code="3o7r",
            )
            report_holders(sessions_of(database).state, error)
            raise error from None
