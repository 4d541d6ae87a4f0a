"""Notes of many tenants, each in a separate place listed in a catalogue."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import URL, NullPool, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.tenants_by_database.router import (
    TenantDatabases,
    TooManyTenantsError,
    UnknownTenantError,
)
from fastapi_sqlnative import AsyncDatabase, health_router, install_database, installed_databases

# This stands in for your identity provider, which maps tokens to users and their tenants.
USERS = {"ada": "acme", "grace": "globex", "alan": "initech", "heidi": "umbrella"}
# The number of databases that may be open: far fewer than there are tenants.
LIMIT = 2


class Catalogue(DeclarativeBase):
    """The base class of the models in the application's own database."""


class Tenant(Catalogue):
    """Where a tenant's data is. The password is stored elsewhere, with your other secrets."""

    __tablename__ = "tenants_by_database_tenant"

    name: Mapped[str] = mapped_column(primary_key=True)
    database: Mapped[str]
    schema: Mapped[str]


class Base(DeclarativeBase):
    """The base class of the models that each tenant has."""


class Note(Base):
    """A note. It has no tenant column: its place determines the tenant."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


async def current_tenant(tenant: str, credentials: Credentials) -> str:
    """Take the tenant from the user; the path may only repeat it."""
    own = USERS.get(credentials.credentials)
    if own is None:
        raise HTTPException(401, "Unknown token.")
    if tenant != own:
        raise HTTPException(404, "No such tenant.")  # do not reveal whether it exists
    return own


async def tenant_database(
    tenant: Annotated[str, Depends(current_tenant)], request: Request
) -> AsyncGenerator[AsyncDatabase]:
    """Lend the request its tenant's database."""
    databases: TenantDatabases = request.app.state.tenants
    try:
        async with databases.lend(tenant) as database:
            yield database
    except UnknownTenantError as error:
        raise HTTPException(403, "Your tenant has no database here.") from error
    except TooManyTenantsError as error:
        raise HTTPException(503, "Too many tenants at once.", {"Retry-After": "1"}) from error


async def tenant_transaction(
    database: Annotated[AsyncDatabase, Depends(tenant_database, scope="function")],
) -> AsyncGenerator[AsyncSession]:
    """Open the request's transaction on its tenant's database."""
    async with database.transaction() as session:
        yield session


# With this scope, the COMMIT comes before the response, as with `transactional`.
Transaction = Annotated[AsyncSession, Depends(tenant_transaction, scope="function")]

router = APIRouter()


@router.post("/{tenant}/notes", status_code=201)
async def add_note(text: str, session: Transaction) -> int:
    """Write to the tenant's own table."""
    note = Note(text=text)
    session.add(note)
    await session.flush()
    return note.id


@router.get("/{tenant}/notes")
async def list_notes(session: Transaction) -> list[str]:
    """Read from the tenant's own table."""
    return list(await session.scalars(select(Note.text).order_by(Note.id)))


def create_app(*, limit: int = LIMIT, idle_after: float = 60.0, max_age: float = 5.0) -> FastAPI:
    """Build the application, using DATABASE_URL, with the catalogue, and SECOND_DATABASE_URL."""
    url = make_url(os.environ["DATABASE_URL"])
    engine = create_async_engine(url)

    async def find_address(tenant: str) -> URL | None:
        catalogue = installed_databases(app, AsyncDatabase)["default"]
        async with catalogue.session() as session:
            found = await session.get(Tenant, tenant)
        return None if found is None else address(url, found)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        await create_places(url)
        tenants = TenantDatabases(find_address, limit=limit, idle_after=idle_after, max_age=max_age)
        app.state.tenants = tenants
        closing = asyncio.create_task(close_idle(tenants, idle_after))
        yield
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await closing
        await tenants.close()

    app = FastAPI(title="Tenants by database", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    app.include_router(router)
    # Only for the catalogue: one unreachable tenant database must not affect other tenants.
    app.include_router(health_router())
    return app


def address(url: URL, tenant: Tenant) -> URL:
    """Return the address of a tenant's place, with the application's own credentials."""
    place = {"options": f"-csearch_path={tenant.schema}"}
    return url.set(database=tenant.database).update_query_dict(place)


async def close_idle(tenants: TenantDatabases, idle_after: float) -> None:
    """Close idle databases for as long as the application runs."""
    while True:
        await asyncio.sleep(idle_after / 4)
        await tenants.close_idle()


# -- for the demo only --------------------------------------------------------------------------
# It has two databases, so a tenant's place is a schema in one of them. In production, the sign-up
# process creates a tenant's database, migrates it and then adds it to the catalogue.


async def create_places(url: URL) -> None:
    """Create the catalogue, and a place for each of three tenants."""
    second = make_url(os.environ["SECOND_DATABASE_URL"])
    places = {"acme": url, "globex": second, "initech": url}
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(Catalogue.metadata.create_all)
    for name, where in places.items():
        tenant = Tenant(name=name, database=str(where.database), schema=f"tenant_{name}")
        async with AsyncSession(engine) as session, session.begin():
            await session.merge(tenant)
        await create_place(address(url, tenant), tenant.schema)


async def create_place(url: URL, schema: str) -> None:
    """Create a schema with the tables of a tenant."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
        await connection.run_sync(Base.metadata.create_all)
