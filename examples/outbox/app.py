"""Orders in one database, parcels in another: none is lost, and none is packed twice."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from examples.outbox import worker
from examples.outbox.models import Base, Message, Order, Parcel, WarehouseBase
from fastapi_sqlnative import (
    AsyncDatabase,
    install_database,
    installed_databases,
    reader,
    transactional,
)

Transaction = Annotated[AsyncSession, Depends(transactional())]
Reader = Annotated[AsyncSession, Depends(reader())]
WarehouseReader = Annotated[AsyncSession, Depends(reader("warehouse"))]

router = APIRouter()


@router.post("/orders", status_code=201)
async def order(item: str, session: Transaction) -> int:
    """Store the order and its message in one transaction of one database."""
    order = Order(item=item)
    session.add_all([order, Message(item=item)])
    await session.flush()
    return order.id


@router.get("/messages")
async def list_messages(session: Reader) -> list[str]:
    """List the messages that wait to be delivered."""
    return list(await session.scalars(select(Message.item).order_by(Message.id)))


@router.get("/parcels")
async def list_parcels(session: WarehouseReader) -> list[str]:
    """List the parcels that have arrived in the second database."""
    return list(await session.scalars(select(Parcel.item).order_by(Parcel.message_id)))


@asynccontextmanager
async def working(app: FastAPI) -> AsyncGenerator[None]:
    """Run a worker in the lifespan: the databases are up before it starts and until it ends."""
    databases = installed_databases(app, AsyncDatabase)
    task = asyncio.create_task(worker.run(databases["default"], databases["warehouse"]))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL and SECOND_DATABASE_URL."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    warehouse = create_async_engine(os.environ["SECOND_DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        # At start-up for the demo only: in production, use Alembic.
        for base, on in (Base, engine), (WarehouseBase, warehouse):
            async with on.begin() as connection:
                await connection.run_sync(base.metadata.create_all)
        async with working(app):
            yield

    app = FastAPI(title="Outbox", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    install_database(app, name="warehouse", engine=warehouse, shutdown=warehouse.dispose)
    app.include_router(router)
    return app
