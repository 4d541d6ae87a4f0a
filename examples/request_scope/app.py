"""Tenant, user and trace in every transaction of a request; no context variable, no middleware."""

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
    """Give the request's session its scope, before anything begins a transaction on it."""
    session.info["scope"] = scope
    return session


# For every route below: dependencies of a router come before those of its routes.
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
    """Record a change, and something more once it is stored."""
    change = Change(what=what)
    session.add(change)
    await session.flush()
    log.info("A change was recorded.")
    tasks.add_task(follow_up, database, scope, change.id)
    return change


async def follow_up(database: AsyncDatabase, scope: RequestScope, change_id: int) -> None:
    """Work after the request, and for it: the scope is handed on like any other value."""
    async with database.transaction() as session:
        session.info["scope"] = scope
        session.add(Change(what=f"followed up {change_id}"))


@router.get("/changes", response_model=list[ChangePublic])
async def list_changes(scope: Scope, session: Db) -> list[Change]:
    """List what your tenant has changed."""
    query = select(Change).where(Change.tenant == scope.user.tenant).order_by(Change.id)
    return list(await session.scalars(query))


@router.get("/trace")
async def show_trace(session: Db) -> str:
    """Show what an administrator sees of this request in pg_stat_activity."""
    name = await session.scalar(select(func.current_setting("application_name")))
    return str(name)


def create_app() -> FastAPI:
    """Build the application on DATABASE_URL."""
    engine = create_async_engine(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up only because this is a demo: in production Alembic does it.
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
