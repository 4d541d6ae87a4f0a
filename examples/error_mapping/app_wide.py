"""App-wide mapping: routes without error handling, and problem details for all failures."""

from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from examples.error_mapping.database import create_app_with_database
from examples.error_mapping.models import Base, Booking, Event
from fastapi_sqlnative import (
    AsyncDatabase,
    ErrorRule,
    error_responses,
    get_database_handle,
    install_error_handlers,
    transactional,
)

router = APIRouter()
Transaction = Annotated[AsyncSession, Depends(transactional())]
Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]

# Only these constraints name a field to the client.
CONSTRAINTS = {
    "uq_mapping_event_title": ErrorRule("There is an event of this title.", pointer="#/title"),
    "ck_mapping_event_seats": ErrorRule("An event has seats.", pointer="#/seats"),
    "uq_mapping_booking_guest": ErrorRule("This guest has a seat.", pointer="#/guest"),
}


class NewEvent(BaseModel):
    title: str
    seats: int


class NewBooking(BaseModel):
    event_id: int
    guest: str


@router.post("/events", status_code=201)
async def add_event(new: NewEvent, session: Transaction) -> int:
    """Add an event."""
    event = Event(title=new.title, seats=new.seats)
    session.add(event)
    await session.flush()
    return event.id


@router.post("/bookings", status_code=201)
async def book(new: NewBooking, database: Handle) -> bool:
    """Book a seat if one is left, however many requests do so at the same time."""

    async def take_a_seat(session: AsyncSession) -> bool:
        bookings = select(func.count()).where(Booking.event_id == new.event_id)
        seats = select(Event.seats).where(Event.id == new.event_id)
        left = await session.scalar(select(seats.scalar_subquery() - bookings.scalar_subquery()))
        if left is not None and left < 1:
            return False
        session.add(Booking(event_id=new.event_id, guest=new.guest))
        return True

    # If two requests count the last seat at once, the later one is retried and counts again.
    return await database.run_in_transaction(
        take_a_seat, isolation_level="SERIALIZABLE", attempts=10
    )


def create_app(database_url: str | None = None) -> FastAPI:
    """Build the application."""
    app = create_app_with_database(database_url)
    install_error_handlers(
        app,
        problem_details=True,
        every_error=True,
        metadata=Base.metadata,
        constraints=CONSTRAINTS,
    )
    # 409 and 503 are documented automatically.
    failures = error_responses("check", "missing_parent", problem_details=True)
    app.include_router(router, responses=failures)
    return app
