"""A router that keeps a limited number of tenant databases open."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import create_async_engine

from fastapi_sqlnative import AsyncDatabase


class UnknownTenantError(LookupError):
    """This tenant has no database."""


class TooManyTenantsError(RuntimeError):
    """All databases that may be open are in use."""


@dataclass(eq=False)
class _Opened:
    """An open database, its number of users, and since when it has been idle."""

    database: AsyncDatabase
    url: URL
    users: int = 0
    unused_since: float = field(default_factory=time.monotonic)


class TenantDatabases:
    """The open databases of an application's tenants, for use on one event loop.

    The server must allow `limit` times `pool_size` connections to each process.

    Args:
        find_address: called for a tenant's address at most once per `max_age` seconds; `None` for
            a tenant without one. Only you know where addresses and passwords come from.
        limit: the maximum number of open databases, including those being closed.
        pool_size: connections to each database.
        idle_after: seconds after which `close_idle` closes an unused database.
        max_age: seconds for which an address is cached.
    """

    def __init__(
        self,
        find_address: Callable[[str], Awaitable[URL | None]],
        *,
        limit: int,
        pool_size: int = 2,
        idle_after: float = 60.0,
        max_age: float = 5.0,
    ) -> None:
        self._find_address = find_address
        self._limit = limit
        self._pool_size = pool_size
        self._idle_after = idle_after
        self._max_age = max_age
        self._addresses: dict[str, tuple[float, URL]] = {}
        self._open: OrderedDict[str, _Opened] = OrderedDict()  # the most recently used is last
        self._replaced: list[_Opened] = []  # their tenants have moved, but requests still use them
        self._changing = asyncio.Lock()
        self.refused = 0  # for the metrics

    @property
    def open(self) -> list[str]:
        """List the tenants whose databases are open, for the metrics, without addresses."""
        return list(self._open)

    @asynccontextmanager
    async def lend(self, tenant: str) -> AsyncGenerator[AsyncDatabase]:
        """Lend a tenant's database to a block, and keep it open until the block ends.

        The caller must have authorised the request for this tenant: this is not checked here.

        Raises:
            UnknownTenantError: the tenant has no address.
            TooManyTenantsError: all databases that may be open are in use.
        """
        opened = await self._take(tenant, await self._address(tenant))
        try:
            yield opened.database
        finally:
            opened.users -= 1
            opened.unused_since = time.monotonic()

    async def close_idle(self) -> None:
        """Close the databases that have been idle for too long; call it periodically."""
        before = time.monotonic() - self._idle_after
        async with self._changing:
            await self._close(
                [
                    tenant
                    for tenant, each in self._open.items()
                    if not each.users and each.unused_since <= before
                ]
            )

    async def close(self) -> None:
        """Close everything, when the application ends."""
        async with self._changing:
            self._replaced += self._open.values()
            self._open.clear()
            for each in self._replaced:
                await each.database.engine.dispose()

    async def _address(self, tenant: str) -> URL:
        known = self._addresses.get(tenant)
        if known is None or known[0] < time.monotonic():
            url = await self._find_address(tenant)
            if url is None:
                self._addresses.pop(tenant, None)
                raise UnknownTenantError(f"Tenant {tenant!r} has no database.")
            known = self._addresses[tenant] = time.monotonic() + self._max_age, url
        return known[1]

    async def _take(self, tenant: str, url: URL) -> _Opened:
        opened = self._open.get(tenant)
        if opened is None or opened.url != url:
            async with self._changing:
                opened = await self._opened(tenant, url)
                opened.users += 1  # before another task gets the lock
        else:
            opened.users += 1
        self._open.move_to_end(tenant)
        return opened

    async def _opened(self, tenant: str, url: URL) -> _Opened:
        opened = self._open.get(tenant)  # by a task that held the lock before
        if opened is not None and opened.url == url:
            return opened
        if opened is not None:
            self._replaced.append(self._open.pop(tenant))
        await self._make_room()
        engine = create_async_engine(
            url, pool_size=self._pool_size, max_overflow=0, pool_timeout=2, pool_pre_ping=True
        )
        opened = _Opened(AsyncDatabase(engine, name=f"tenant {tenant}"), url)
        self._open[tenant] = opened
        return opened

    async def _make_room(self) -> None:
        await self._close([])
        if len(self._open) + len(self._replaced) < self._limit:
            return
        idle = next((tenant for tenant, each in self._open.items() if not each.users), None)
        if idle is None:
            self.refused += 1
            raise TooManyTenantsError("Every database that may be open is in use.")
        await self._close([idle])

    async def _close(self, tenants: list[str]) -> None:
        # Remove it first, so that it is not lent while it is being closed.
        closing = [self._open.pop(tenant) for tenant in tenants]
        closing += [each for each in self._replaced if not each.users]
        self._replaced = [each for each in self._replaced if each.users]
        for each in closing:
            await each.database.engine.dispose()
