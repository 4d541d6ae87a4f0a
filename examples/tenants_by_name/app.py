"""Notes of two tenants, each with its own database; each request uses one of them."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import AsyncDatabase, get_database_handle, install_database

# Each tenant's database name: a fixed set, known at deployment.
TENANTS = {"acme": "tenant-a", "globex": "tenant-b"}
# This stands in for your identity provider, which maps tokens to users and their tenants.
USERS = {"ada": "acme", "grace": "globex", "heidi": "initech"}


class Base(DeclarativeBase):
    """The base class of the models, the same in every database."""


class Note(Base):
    """A note. It has no tenant column: its database determines the tenant."""

    __tablename__ = "tenants_by_name_note"

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
    if own not in TENANTS:
        raise HTTPException(403, "Your tenant has no database here.")
    return own


async def tenant_database(
    tenant: Annotated[str, Depends(current_tenant)],
    a: Annotated[AsyncDatabase, Depends(get_database_handle("tenant-a"))],
    b: Annotated[AsyncDatabase, Depends(get_database_handle("tenant-b"))],
) -> AsyncDatabase:
    """Choose one of the installed databases; an unused handle costs nothing."""
    return {database.name: database for database in (a, b)}[TENANTS[tenant]]


TenantDatabase = Annotated[AsyncDatabase, Depends(tenant_database)]


async def tenant_transaction(database: TenantDatabase) -> AsyncGenerator[AsyncSession]:
    """Open the request's transaction on its tenant's database."""
    async with database.transaction() as session:
        yield session


# With this scope, the COMMIT comes before the response, as with `transactional`.
Transaction = Annotated[AsyncSession, Depends(tenant_transaction, scope="function")]


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL and SECOND_DATABASE_URL."""
    variables = {"tenant-a": "DATABASE_URL", "tenant-b": "SECOND_DATABASE_URL"}
    engines = {name: create_async_engine(os.environ[each]) for name, each in variables.items()}

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up only because this is a demo: in production Alembic does it, once for
        # each database.
        for engine in engines.values():
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(title="Tenants by name", lifespan=lifespan)
    for name, engine in engines.items():
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)

    @app.post("/{tenant}/notes", status_code=201)
    async def add_note(text: str, session: Transaction) -> int:
        note = Note(text=text)
        session.add(note)
        await session.flush()
        return note.id

    @app.get("/{tenant}/notes")
    async def list_notes(session: Transaction) -> list[str]:
        return list(await session.scalars(select(Note.text).order_by(Note.id)))

    return app
