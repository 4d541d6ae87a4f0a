"""Tenant, user and trace in every transaction of a request, without middleware."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from pydantic import BaseModel, ConfigDict
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from examples.request_scope.database import Base, Change, ScopedSession
from examples.request_scope.scope import RequestScope, Scope, request_log
from fastapi_sqlnative import (
    AsyncDatabase,
    get_database_handle,
    get_db,
    install_database,
    transactional,
)

Db = Annotated[AsyncSession, Depends(get_db())]
Transaction = Annotated[AsyncSession, Depends(transactional())]
Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]
Log = Annotated[logging.LoggerAdapter[logging.Logger], Depends(request_log)]


async def scoped_db(session: Db, scope: Scope) -> AsyncSession:
    """Set the scope of the request's session, before a transaction begins."""
    session.info["scope"] = scope
    return session


# For every route below: a router's dependencies run before those of its routes.
router = APIRouter(dependencies=[Depends(scoped_db)])


class ChangePublic(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    what: str
    user: str
    trace: str


@router.post("/changes", status_code=201, response_model=ChangePublic)
async def add_change(
    what: str,
    scope: Scope,
    session: Transaction,
    database: Handle,
    log: Log,
    tasks: BackgroundTasks,
) -> Change:
    """Record a change, and follow up after the commit."""
    change = Change(what=what)
    session.add(change)
    await session.flush()
    log.info("A change was recorded.")
    tasks.add_task(follow_up, database, scope, change.id)
    return change


async def follow_up(database: AsyncDatabase, scope: RequestScope, change_id: int) -> None:
    """Work after the response; the scope is passed as a plain value."""
    async with database.transaction() as session:
        session.info["scope"] = scope
        session.add(Change(what=f"followed up {change_id}"))


@router.get("/changes", response_model=list[ChangePublic])
async def list_changes(scope: Scope, session: Db) -> list[Change]:
    """List your tenant's changes."""
    query = select(Change).where(Change.tenant == scope.user.tenant).order_by(Change.id)
    return list(await session.scalars(query))


@router.get("/trace")
async def show_trace(session: Db) -> str:
    """Show how this request appears in pg_stat_activity."""
    name = await session.scalar(select(func.current_setting("application_name")))
    return str(name)


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    engine = create_async_engine(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up for the demo only: in production, use Alembic.
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(title="Request scope", lifespan=lifespan)
    install_database(
        app,
        engine=engine,
        shutdown=engine.dispose,
        session_options={"sync_session_class": ScopedSession},
    )
    app.include_router(router)
    return app
