"""Notes of many tenants, each in a place of its own that a catalogue knows."""

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
# How many databases may be open: far fewer than there are tenants.
LIMIT = 2


class Catalogue(DeclarativeBase):
    """Collect the tables of the application's own database."""


class Tenant(Catalogue):
    """Say where a tenant's data is. The password is not in here: it comes from where yours do."""

    __tablename__ = "tenants_by_database_tenant"

    name: Mapped[str] = mapped_column(primary_key=True)
    database: Mapped[str]
    schema: Mapped[str]


class Base(DeclarativeBase):
    """Collect the tables that each tenant has."""


class Note(Base):
    """Hold a note. No tenant stands in it: whose it is, the place tells."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


async def current_tenant(tenant: str, credentials: Credentials) -> str:
    """Know the tenant by the user; the path may only repeat it."""
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
    """Write into the tenant's own table."""
    note = Note(text=text)
    session.add(note)
    await session.flush()
    return note.id


@router.get("/{tenant}/notes")
async def list_notes(session: Transaction) -> list[str]:
    """Read the tenant's own table."""
    return list(await session.scalars(select(Note.text).order_by(Note.id)))


def create_app(*, limit: int = LIMIT, idle_after: float = 60.0, max_age: float = 5.0) -> FastAPI:
    """Build the application on DATABASE_URL, which has the catalogue, and SECOND_DATABASE_URL."""
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
    # Of the catalogue alone: one tenant's database that is away takes nobody else's from them.
    app.include_router(health_router())
    return app


def address(url: URL, tenant: Tenant) -> URL:
    """Return the address of a tenant's place, with the application's own account."""
    place = {"options": f"-csearch_path={tenant.schema}"}
    return url.set(database=tenant.database).update_query_dict(place)


async def close_idle(tenants: TenantDatabases, idle_after: float) -> None:
    """Close what nobody uses, for as long as the application runs."""
    while True:
        await asyncio.sleep(idle_after / 4)
        await tenants.close_idle()


# -- for the demo only --------------------------------------------------------------------------
# It has two databases, so a tenant's place is a schema in one of them. In production whoever signs
# a tenant up creates its database, migrates it and then enters it into the catalogue.


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
