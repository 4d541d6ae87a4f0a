"""Measurements, followed as server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy import select

from examples.streaming.models import Measurement
from fastapi_sqlnative import AsyncDatabase, get_database_handle

Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]
PAUSE = 0.2  # seconds between polls

router = APIRouter()


@router.get("/events", response_class=EventSourceResponse)
async def follow(
    database: Handle, last_event_id: Annotated[int, Header()] = 0
) -> AsyncIterator[ServerSentEvent]:
    """Send new measurements, or those after the last event that the client received.

    It may run for hours without holding a connection: each session ends before
    anything is sent.
    """
    while True:
        for measurement in await measured_after(database, last_event_id):
            last_event_id = measurement.id
            yield ServerSentEvent(data=measurement.value, id=str(measurement.id))
        await asyncio.sleep(PAUSE)


async def measured_after(database: AsyncDatabase, last: int) -> Sequence[Measurement]:
    """Load new measurements, a hundred at most."""
    query = select(Measurement).where(Measurement.id > last).order_by(Measurement.id).limit(100)
    async with database.session() as session:
        return (await session.scalars(query)).all()
