"""How many requests may hold connections at a time, so that none waits for ever."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import TypeAlias

import anyio
import anyio.to_thread
from sqlalchemy import Pool, exc
from sqlalchemy.ext.asyncio import AsyncEngine

from .._drivers.pools import pool_capacity, pool_timeout
from .._sessions.engines import sync_engine
from .._sessions.holders import report_holders
from ..databases import AnyDatabase, sessions_of

# What the requests of a route open.
Opened: TypeAlias = Counter[AnyDatabase]


def key_of(route: object) -> object:
    """Return what stands for a route in a dictionary."""
    # A route has no hash; a method bound to it has one, by identity.
    return getattr(route, "matches", None)


class Gate:
    """The admission of requests, before their first session, where they could wait for ever.

    Two waits would not end by themselves. A thread that waits for a connection is lost to the
    request that holds one and needs a thread to go on: so synchronous sessions belong to three
    quarters of FastAPI's threads at most. And a request with several sessions waits for one
    connection while it holds another: so there are never enough of those to hold them all.

    Lives as long as the application runs, for all applications mounted in it.
    """

    def __init__(self) -> None:
        self.opened: dict[object, Opened] = {}  # by the route's `key_of`
        self._places: dict[object, list[anyio.CapacityLimiter]] = {}

    def learn(self, route: object, opened: Opened) -> None:
        """Remember what the requests of a route open, the most where it was included twice."""
        found = self.opened[key_of(route)] = self.opened.get(key_of(route), Counter()) | opened
        if found.total() > 1:
            self._connections.total_tokens = self._fewest()

    async def enter(self, request: object, route: object, database: AnyDatabase) -> bool:
        """Wait for a place as long as the pool would; tell whether there is one to be left."""
        several = self.opened[key_of(route)].total() > 1
        # In this order for everybody: two limiters taken crosswise would be a deadlock again.
        limiters = [self._connections] if several else []
        if not isinstance(database.engine, AsyncEngine):
            limiters.append(self._threads)
        for limiter in limiters:
            if limiter not in self._places.get(request, ()):
                await _take(limiter, request, database)
                # It may have given another place back meanwhile.
                self._places[request] = [*self._places.get(request, ()), limiter]
        return request in self._places

    def leave(self, request: object) -> None:
        """Give back what the request has."""
        for limiter in self._places.pop(request, ()):
            limiter.release_on_behalf_of(request)

    @functools.cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        # At the first request, because an application sets its number of threads as it starts.
        threads = anyio.to_thread.current_default_thread_limiter().total_tokens
        return anyio.CapacityLimiter(max(1, math.floor(threads * 3 / 4)))

    @functools.cached_property
    def _connections(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(math.inf)

    def _fewest(self) -> float:
        """Return how many requests with several sessions can never hold all connections."""
        wanted: Counter[Pool] = Counter()
        for opened in self.opened.values():
            if opened.total() > 1:
                wanted |= Counter(sync_engine(each.engine).pool for each in opened.elements())
        limits: list[float] = [math.inf]
        # What one request can hold of each pool at most, when all wait for one more.
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
    timeout = pool_timeout(sync_engine(database.engine).pool)
    try:
        limiter.acquire_on_behalf_of_nowait(request)
    except anyio.WouldBlock:
        with anyio.move_on_after(timeout) as waiting:
            await limiter.acquire_on_behalf_of(request)
        if waiting.cancelled_caught:
            # As from the pool, so that one handler fits both.
            error = exc.TimeoutError(
                f"Database {database.name!r} is busy: {limiter.total_tokens:g} requests are at "
                f"work with such sessions, and none ended within {timeout:g} s.",
                code="3o7r",
            )
            report_holders(sessions_of(database).state, error)
            raise error from None
