"""Mapping at a route: each failure is mapped where it may happen, all others stay a 500."""

from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from examples.error_mapping.database import create_app_with_database
from examples.error_mapping.models import Booking, Event
from fastapi_sqlnative import ErrorRule, error_responses, http_errors, transactional

router = APIRouter()
Transaction = Annotated[AsyncSession, Depends(transactional())]


class NewEvent(BaseModel):
    title: str
    seats: int


class Guests(BaseModel):
    names: list[str]


@router.post("/events", status_code=201, responses=error_responses("unique", "check"))
async def add_event(new: NewEvent, session: Transaction) -> int:
    """Add an event; its title must be unique."""
    event = Event(title=new.title, seats=new.seats)
    async with http_errors(
        session,
        unique="There is an event of this title.",
        constraints={"ck_mapping_event_seats": "An event has seats."},
    ):
        session.add(event)
    return event.id


@router.post("/events/{event_id}/bookings", responses=error_responses("unique"))
async def book(event_id: int, guests: Guests, session: Transaction) -> list[str]:
    """Book seats for several guests; guests who already have one are left out."""
    booked: list[str] = []
    for name in guests.names:
        # One savepoint per guest: a refused one does not undo the bookings before it.
        async with http_errors(
            session,
            unique=f"{name} has a seat.",
            missing_parent=ErrorRule("No such event.", 404),
        ):
            session.add(Booking(event_id=event_id, guest=name))
        booked.append(name)
    return booked


def create_app(database_url: str | None = None) -> FastAPI:
    """Build the application."""
    app = create_app_with_database(database_url)
    app.include_router(router)
    return app
