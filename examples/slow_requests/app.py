"""Reports that may take too long, and a pool that shows who holds its connections."""

import os
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_sqlnative import AsyncDatabase, get_database_handle, get_db, install_database
from fastapi_sqlnative.cancellation import cancel_on_disconnect, deadline

Db = Annotated[AsyncSession, Depends(get_db())]
Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]

router = APIRouter()


class Holder(BaseModel):
    """The connections that a route holds."""

    route: str | None
    connections: int
    idle_in_transaction: int


@router.get("/reports/{seconds}", dependencies=[Depends(deadline(1))])
async def report(seconds: float, session: Db) -> str:
    """Run a query of this length; the route's deadline is one second."""
    await session.execute(select(func.pg_sleep(seconds)))
    return "done"


@router.get("/searches/{seconds}", dependencies=[Depends(cancel_on_disconnect())])
async def search(seconds: float, session: Db) -> str:
    """Run for as long as the client waits: press Ctrl-C, and the query is cancelled too."""
    await session.execute(select(func.pg_sleep(seconds)))
    return "found"


@router.get("/pool")
async def list_holders(database: Handle) -> list[Holder]:
    """List who holds connections; this route holds none."""
    return [
        Holder(
            route=each.route,
            connections=each.connections,
            idle_in_transaction=each.idle_in_transaction,
        )
        for each in database.pool_status().holders
    ]


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    engine = create_async_engine(os.environ["DATABASE_URL"], pool_size=2, max_overflow=0)
    app = FastAPI(title="Slow requests", dependencies=[Depends(deadline(30))])
    install_database(app, engine=engine, shutdown=engine.dispose, warn_held_after=5)
    app.include_router(router)
    return app
