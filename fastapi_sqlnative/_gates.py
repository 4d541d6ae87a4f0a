"""How many requests may hold connections at a time, so that none waits for ever."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping

import anyio
import anyio.to_thread
from sqlalchemy import Pool, exc

from ._pools import pool_capacity, pool_timeout
from .databases import AnyDatabase


class Gate:
    """Admit a request before it opens its first session, where it could come to wait for ever.

    Two waits would not end by themselves. A thread that waits for a connection is lost to the
    request that holds one and needs a thread to go on: so synchronous sessions belong to three
    quarters of FastAPI's threads at most. And a request with several sessions waits for one
    connection while it holds another: so there are never enough of those to hold them all.

    Lives as long as the application runs, for all applications mounted in it.

    Args:
        several: what the endpoints with more than one session open, known from their routes.
    """

    def __init__(self, several: Mapping[object, Counter[AnyDatabase]]) -> None:
        self._several = several
        self._places: dict[object, list[anyio.CapacityLimiter]] = {}

    async def enter(self, request: object, endpoint: object, database: AnyDatabase) -> None:
        """Wait for a place, for as long as the pool would make its callers wait.

        Raises:
            sqlalchemy.exc.TimeoutError: as from the pool, so that one handler fits both.
        """
        # In this order for everybody: two limiters taken crosswise would be a deadlock again.
        if endpoint in self._several:
            await self._take(request, self._connections, database)
        if database.blocking:
            await self._take(request, self._threads, database)

    def leave(self, request: object) -> None:
        """Give back what the request has."""
        for limiter in self._places.pop(request, ()):
            limiter.release_on_behalf_of(request)

    async def _take(
        self, request: object, limiter: anyio.CapacityLimiter, database: AnyDatabase
    ) -> None:
        places = self._places.get(request, [])
        if limiter in places:
            return
        timeout = pool_timeout(database.pool)
        try:
            limiter.acquire_on_behalf_of_nowait(request)
        except anyio.WouldBlock:
            await self._wait(request, limiter, database, timeout)
        self._places[request] = [*places, limiter]

    async def _wait(
        self,
        request: object,
        limiter: anyio.CapacityLimiter,
        database: AnyDatabase,
        timeout: float,
    ) -> None:
        try:
            with anyio.fail_after(timeout):
                await limiter.acquire_on_behalf_of(request)
        except TimeoutError:
            raise exc.TimeoutError(
                f"Database {database.name!r} is busy: {limiter.total_tokens:g} requests are at "
                f"work with such sessions, and none ended within {timeout:g} s.",
                code="3o7r",
            ) from None

    @functools.cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        # At the first request, because an application sets its number of threads as it starts.
        threads = anyio.to_thread.current_default_thread_limiter().total_tokens
        return anyio.CapacityLimiter(max(1, math.floor(threads * 3 / 4)))

    @functools.cached_property
    def _connections(self) -> anyio.CapacityLimiter:
        sessions: Counter[Pool] = Counter()
        for databases in self._several.values():
            sessions |= Counter(database.pool for database in databases.elements())
        capacities = {pool: pool_capacity(pool) for pool in sessions}
        limits: list[float] = [math.inf]
        # What one request can hold of each pool at most, when all wait for one more.
        shares: list[int] = []
        for pool, wanted in sessions.items():
            capacity = capacities[pool]
            if capacity is not None:
                shares.append(math.ceil(capacity / wanted))
                if wanted > 1:
                    limits.append((capacity - 1) // (wanted - 1))
        if len(shares) > 1:
            limits.append(sum(sorted(shares)[:2]) - 1)
        return anyio.CapacityLimiter(max(1, min(limits)))
