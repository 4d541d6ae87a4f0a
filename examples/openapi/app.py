"""Rooms, and the responses that their routes document."""

import os
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import CheckConstraint, UniqueConstraint
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import (
    ErrorRule,
    error_responses,
    health_router,
    install_database,
    install_error_handlers,
    transactional,
)

Transaction = Annotated[AsyncSession, Depends(transactional())]


class Base(DeclarativeBase): ...


class Room(Base):
    __tablename__ = "openapi_room"
    __table_args__ = (
        UniqueConstraint("name", name="uq_openapi_room_name"),
        CheckConstraint("beds BETWEEN 1 AND 4", name="ck_openapi_room_beds"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    beds: Mapped[int]


class RoomPublic(BaseModel, from_attributes=True):
    id: int
    name: str
    beds: int


class NewRoom(BaseModel):
    name: str
    beds: int


CONSTRAINTS = {
    "uq_openapi_room_name": ErrorRule("There is a room of this name.", pointer="#/name"),
    "ck_openapi_room_beds": ErrorRule("A room has one to four beds.", pointer="#/beds"),
}

router = APIRouter(prefix="/rooms")


@router.post(
    "",
    status_code=201,
    response_model=RoomPublic,
    # 409 and 503 are documented on every route with a database, but not the database's 422.
    responses=error_responses("check", problem_details=True),
)
async def add_room(new: NewRoom, session: Transaction) -> Room:
    """Add a room."""
    session.add(room := Room(name=new.name, beds=new.beds))
    await session.flush()
    return room


@router.post("/{room_id}/cleaning", status_code=204)
async def clean(room_id: int, session: Transaction) -> None:
    """Start cleaning; if it is already in progress, respond with a 503 that invites a retry."""
    await session.get(Room, room_id, with_for_update={"nowait": True})


async def build_engine() -> AsyncEngine:
    """Build the engine at start-up, and create the table."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    async with engine.begin() as connection:  # in production: Alembic, before start-up
        await connection.run_sync(Base.metadata.create_all)
    return engine


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    app = FastAPI(title="OpenAPI", version="1")
    install_database(app, engine=build_engine)
    install_error_handlers(app, problem_details=True, constraints=CONSTRAINTS)
    app.include_router(router)
    app.include_router(health_router())
    return app
