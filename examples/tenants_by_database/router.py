"""Keep the databases of many tenants open, but never too many at once."""

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
    """Nobody knows of a database for this tenant."""


class TooManyTenantsError(RuntimeError):
    """Every database that may be open is in use."""


@dataclass(eq=False)
class _Opened:
    """An open database, by how many it is used, and since when by nobody."""

    database: AsyncDatabase
    url: URL
    users: int = 0
    unused_since: float = field(default_factory=time.monotonic)


class TenantDatabases:
    """The open databases of an application's tenants; it belongs to one event loop.

    The server must allow `limit` times `pool_size` connections to each process.

    Args:
        find_address: asked for a tenant's address once in `max_age` seconds; `None` for a tenant
            that has none. Only you know where addresses and passwords come from.
        limit: how many databases are open at most, those that are being closed included.
        pool_size: connections to each.
        idle_after: seconds after which `close_idle` closes a database that nobody uses.
        max_age: seconds for which an address is believed.
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
        self._open: OrderedDict[str, _Opened] = OrderedDict()  # what was used last stands last
        self._replaced: list[_Opened] = []  # their tenants have moved, and some still use them
        self._changing = asyncio.Lock()
        self.refused = 0  # for the metrics

    @property
    def open(self) -> list[str]:
        """List the tenants whose databases are open, for the metrics; no addresses."""
        return list(self._open)

    @asynccontextmanager
    async def lend(self, tenant: str) -> AsyncGenerator[AsyncDatabase]:
        """Give a tenant's database for a block, in which it is not closed.

        The tenant is one that this request was authorised for: nothing here asks who it is.

        Raises:
            UnknownTenantError: there is no address for it.
            TooManyTenantsError: all that may be open are in use.
        """
        opened = await self._take(tenant, await self._address(tenant))
        try:
            yield opened.database
        finally:
            opened.users -= 1
            opened.unused_since = time.monotonic()

    async def close_idle(self) -> None:
        """Close what nobody has used for long; call it now and then."""
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
        """Close everything, at the end of the application."""
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
                opened.users += 1  # before anybody else has the lock
        else:
            opened.users += 1
        self._open.move_to_end(tenant)
        return opened

    async def _opened(self, tenant: str, url: URL) -> _Opened:
        opened = self._open.get(tenant)  # by somebody who had the lock before
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
        # Out of sight first: nobody is lent what is about to be closed.
        closing = [self._open.pop(tenant) for tenant in tenants]
        closing += [each for each in self._replaced if not each.users]
        self._replaced = [each for each in self._replaced if each.users]
        for each in closing:
            await each.database.engine.dispose()
