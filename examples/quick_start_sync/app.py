"""Notes, stored and counted in `def` endpoints."""

import os
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fastapi_sqlnative import get_db, install_database, transactional

Db = Annotated[Session, Depends(get_db())]
Transaction = Annotated[Session, Depends(transactional())]


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "quick_start_sync_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class NewNote(BaseModel):
    text: str


router = APIRouter()


@router.post("/notes", status_code=201)
def add_note(new: NewNote, session: Transaction) -> int:
    """Store a note, and return the ID that the server generated."""
    session.add(note := Note(text=new.text))
    session.flush()
    return note.id


@router.get("/notes/count")
def count_notes(session: Db) -> int:
    """Count the notes."""
    return session.scalars(select(func.count()).select_from(Note)).one()


@router.get("/blocking")
async def count_on_the_event_loop(session: Db) -> int:
    """Try to block every other request: this is refused with a 500."""
    return session.scalars(select(func.count()).select_from(Note)).one()


def build_engine() -> Engine:
    """Build the engine at start-up; it is disposed of at shutdown."""
    engine = create_engine(os.environ["DATABASE_URL"], pool_size=2, max_overflow=0)
    Base.metadata.create_all(engine)  # in production: Alembic, before start-up
    return engine


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    app = FastAPI(title="Quick start, synchronous")
    install_database(app, engine=build_engine)
    app.include_router(router)
    return app
