"""Tests of many tenants with a database each."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import URL, make_url, text

from conftest import WorkerPostgres
from examples.tenants_by_database.app import create_app
from examples.tenants_by_database.router import (
    TenantDatabases,
    TooManyTenantsError,
    UnknownTenantError,
)
from fastapi_sqlnative import AsyncDatabase
from tests.serving import Served, serve, wait_until

TOKENS = {"acme": "ada", "globex": "grace", "initech": "alan", "umbrella": "heidi"}


def call(served: Served, method: str, tenant: str, token: str = "", **query: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token or TOKENS[tenant]}"}
    return served.client.request(method, f"/{tenant}/notes", params=query, headers=headers)


# --- the application ---


def test_each_tenant_has_its_place(databases: WorkerPostgres) -> None:
    """More tenants than may be open at once each write only to their own database."""
    with serve(create_app()) as served, ThreadPoolExecutor(12) as threads:
        tenants = ["acme", "globex", "initech"]

        def add(number: int) -> tuple[str, int]:
            tenant = tenants[number % 3]
            return tenant, call(served, "POST", tenant, text=tenant).status_code

        answers = list(threads.map(add, range(30)))
        assert {status for _, status in answers} <= {201, 503}
        for tenant in tenants:
            added = answers.count((tenant, 201))
            assert call(served, "GET", tenant).json() == [tenant] * added


REFUSED = {
    "foreign": ("globex", "ada", 404),
    "unknown": ("nobody", "ada", 404),
    "own without a database": ("umbrella", "heidi", 403),
    "foreign without one": ("umbrella", "ada", 404),
    "other spelling": ("ACME", "ada", 404),
    "trailing space": ("acme%20", "ada", 404),
    "unknown token": ("acme", "unknown", 401),
}


def test_no_other_tenant_is_reached(databases: WorkerPostgres, subtests: pytest.Subtests) -> None:
    """A request for another user's tenant is refused, and opens no database."""
    app = create_app()
    with serve(app) as served:
        for name, (tenant, token, status) in REFUSED.items():
            with subtests.test(name):
                for method in "GET", "POST":
                    assert call(served, method, tenant, token, text="x").status_code == status
                assert app.state.tenants.open == []


def test_a_failed_commit_is_no_success(databases: WorkerPostgres) -> None:
    """A constraint that is checked only at COMMIT fails its tenant's request."""
    with serve(create_app()) as served, psycopg.connect(databases.dsn, autocommit=True) as owner:
        owner.execute(
            "ALTER TABLE tenant_acme.note ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED"
        )
        answers = [
            call(served, "POST", tenant, text="x") for tenant in ("acme",) * 2 + ("globex",) * 2
        ]
        assert [each.status_code for each in answers] == [201, 500, 201, 201]


def test_a_database_that_is_away_takes_no_other_with_it(databases: WorkerPostgres) -> None:
    """A tenant whose database is missing fails alone, and readiness does not change."""
    with serve(create_app()) as served:
        with psycopg.connect(databases.dsn) as owner:
            owner.execute("UPDATE tenants_by_database_tenant SET database='gone' WHERE name='acme'")
        assert call(served, "GET", "acme").status_code == 500
        assert call(served, "GET", "globex").json() == []
        assert served.client.get("/health/ready").json()["databases"] == {"default": "up"}


def test_shutdown_closes_every_database(databases: WorkerPostgres) -> None:
    """When the application has ended, it has no connection left on the server."""
    with serve(create_app()) as served:
        for tenant in "acme", "globex":
            assert call(served, "GET", tenant).status_code == 200
        assert connections(databases) > 0
    wait_until(lambda: connections(databases) == 0)


def connections(databases: WorkerPostgres) -> int:
    """Count the connections to both databases, from separate connections."""
    names = [make_url(each.dsn).database for each in (databases, databases.second)]
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = ANY(%s) AND pid <> pg_backend_pid()"
    )
    with psycopg.connect(databases.dsn) as connection:
        row = connection.execute(query, (names,)).fetchone()
        assert row is not None
        return int(row[0])


# --- the router ---


@pytest.fixture
def addresses(databases: WorkerPostgres) -> dict[str, URL]:
    """Map two tenants to the first database, and two to the second."""
    first, second = (make_url(each.url("psycopg")) for each in (databases, databases.second))
    return {"acme": first, "globex": second, "initech": first, "umbrella": second}


@asynccontextmanager
async def routing(addresses: dict[str, URL], **options: Any) -> AsyncGenerator[TenantDatabases]:
    async def find(tenant: str) -> URL | None:
        await asyncio.sleep(0)
        return addresses.get(tenant)

    router = TenantDatabases(find, **{"limit": 2, "max_age": 0.0, **options})
    try:
        yield router
    finally:
        await router.close()


async def name_of(database: AsyncDatabase) -> str:
    async with database.session() as session:
        found: str = (await session.scalars(text("SELECT current_database()"))).one()
        return found


@pytest.mark.anyio
async def test_the_bound_holds(addresses: dict[str, URL], databases: WorkerPostgres) -> None:
    """The least recently used database is closed to make room; one in use is not."""
    async with routing(addresses) as router:
        async with router.lend("acme") as acme:
            for tenant in "globex", "initech", "umbrella":
                async with router.lend(tenant) as other:
                    await name_of(other)
            assert await name_of(acme) == addresses["acme"].database
            assert router.open == ["acme", "umbrella"]
            async with router.lend("umbrella"):
                with pytest.raises(TooManyTenantsError):
                    async with router.lend("globex"):
                        pass
            assert router.refused == 1
            wait_until(lambda: connections(databases) == 2)
        async with router.lend("globex"):
            assert router.open == ["umbrella", "globex"]


@pytest.mark.anyio
async def test_many_first_requests_open_one_engine(addresses: dict[str, URL]) -> None:
    """Forty simultaneous requests for a tenant that is not open share one engine."""
    async with routing(addresses, limit=1) as router, AsyncExitStack() as lent:
        lending = [lent.enter_async_context(router.lend("acme")) for _ in range(40)]
        assert len({id(each.engine) for each in await asyncio.gather(*lending)}) == 1


@pytest.mark.anyio
async def test_crowds_of_tenants_respect_the_bound(addresses: dict[str, URL]) -> None:
    """Whatever concurrent requests do, the limit holds, and the responses are right."""
    async with routing(addresses) as router:
        most = 0

        async def use(tenant: str) -> bool:
            nonlocal most
            try:
                async with router.lend(tenant) as database:
                    most = max(most, len(router.open))
                    assert await name_of(database) == addresses[tenant].database
            except TooManyTenantsError:
                return False
            return True

        done = await asyncio.gather(*(use([*addresses][each % 4]) for each in range(80)))
        assert any(done)
        assert most <= 2


@pytest.mark.anyio
async def test_a_tenant_that_moves_is_followed(addresses: dict[str, URL]) -> None:
    """A new address serves new requests; requests on the old one finish there."""
    async with routing(addresses) as router:
        old, new = str(addresses["acme"].database), str(addresses["globex"].database)
        async with router.lend("acme") as before:
            addresses["acme"] = addresses["globex"]
            async with router.lend("acme") as after:
                assert [await name_of(each) for each in (before, after)] == [old, new]
            # The old one counts until it is returned.
            with pytest.raises(TooManyTenantsError):
                async with router.lend("acme"), router.lend("initech"):
                    pass
        async with router.lend("acme"), router.lend("initech"):
            pass
        del addresses["acme"]
        with pytest.raises(UnknownTenantError):
            async with router.lend("acme"):
                pass


@pytest.mark.anyio
async def test_what_nobody_uses_is_closed(
    addresses: dict[str, URL], databases: WorkerPostgres
) -> None:
    """After a while without requests, an idle database has no connections, a used one has."""
    async with routing(addresses, idle_after=0.0) as router, router.lend("acme") as acme:
        await name_of(acme)
        async with router.lend("globex") as globex:
            await name_of(globex)
        await router.close_idle()
        assert router.open == ["acme"]
        wait_until(lambda: connections(databases) == 1)


@pytest.mark.anyio
async def test_a_cancelled_request_gives_its_database_back(addresses: dict[str, URL]) -> None:
    """A request that is cancelled while using a database does not prevent closing it."""
    async with routing(addresses, limit=1) as router:
        lent = asyncio.Event()

        async def hang() -> None:
            async with router.lend("acme"):
                lent.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(hang())
        await lent.wait()
        task.cancel()
        await asyncio.wait([task])
        async with router.lend("globex"):
            assert router.open == ["globex"]
