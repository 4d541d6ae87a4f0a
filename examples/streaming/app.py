"""Measurements, exported as lines of JSON; for the events, see `events.py`."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from examples.streaming.models import Base, Measurement
from fastapi_sqlnative import AsyncDatabase, get_database_handle, install_database, transactional

# The request's session has ended when a body is sent, so streams open their own.
Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]
Transaction = Annotated[AsyncSession, Depends(transactional())]


class MeasurementPublic(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    value: int


router = APIRouter()


@router.post("/measurements", status_code=201)
async def add_measurements(values: list[int], session: Transaction) -> int:
    """Store measurements, and return their number."""
    session.add_all([Measurement(value=value) for value in values])
    return len(values)


@router.get("/measurements", response_class=StreamingResponse)
async def export(database: Handle) -> StreamingResponse:
    """Send all measurements as of now, one line of JSON each, however many there are."""
    return StreamingResponse(lines(database), media_type="application/x-ndjson")


async def lines(database: AsyncDatabase) -> AsyncGenerator[str]:
    """Yield a line per row, from a server-side cursor.

    One statement sees one state, so the connection is in use until the last row is read or the
    client disconnects: each slow client holds one of the pool's connections.
    """
    # Without yield_per, the ORM would load everything before the first line.
    query = select(Measurement).order_by(Measurement.id).execution_options(yield_per=100)
    async with database.session() as session:
        async for measurement in await session.stream_scalars(query):
            yield MeasurementPublic.model_validate(measurement).model_dump_json() + "\n"


def create_app(*, pool_size: int = 5) -> FastAPI:
    """Build the application, using DATABASE_URL."""
    engine = create_async_engine(
        os.environ["DATABASE_URL"], pool_size=pool_size, max_overflow=0, pool_timeout=5
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up for the demo only: in production, use Alembic.
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(title="Streaming", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    app.include_router(router)
    if find_spec("fastapi.sse"):  # since FastAPI 0.135
        app.include_router(import_module("examples.streaming.events").router)
    return app
