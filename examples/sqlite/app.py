"""Shelves and books in one file, through two engines."""

import os
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import ForeignKey, UniqueConstraint, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from examples.sqlite.engines import build_async_engine, build_sync_engine
from fastapi_sqlnative import http_errors, install_database, reader, transactional


class Base(DeclarativeBase): ...


class Shelf(Base):
    __tablename__ = "example_shelf"  # names that begin with sqlite_ are reserved

    id: Mapped[int] = mapped_column(primary_key=True)


class Book(Base):
    __tablename__ = "example_book"
    __table_args__ = (UniqueConstraint("title"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    shelf_id: Mapped[int] = mapped_column(ForeignKey(Shelf.id))


class Delivery(BaseModel):
    titles: list[str]
    shelf: int = 1


TAKEN = "There is a book of this title."
NO_SHELF = "No such shelf."
FULL = "The shelf is full."
CAPACITY = 10

router = APIRouter()


@router.post("/books", status_code=201)
async def add_books(
    new: Delivery, session: Annotated[AsyncSession, Depends(transactional())]
) -> int:
    """Store all books or none: read, decide, write, with a savepoint per book."""
    on_shelf = select(func.count()).where(Book.shelf_id == new.shelf)
    if (await session.scalars(on_shelf)).one() + len(new.titles) > CAPACITY:
        raise HTTPException(409, FULL)
    for title in new.titles:
        async with http_errors(session, unique=TAKEN, missing_parent=NO_SHELF):
            session.add(Book(title=title, shelf_id=new.shelf))
    return len(new.titles)


@router.get("/books")
async def list_books(session: Annotated[AsyncSession, Depends(reader())]) -> Sequence[str]:
    """List the titles."""
    return (await session.scalars(select(Book.title).order_by(Book.title))).all()


@router.post("/sync/books", status_code=201)
def add_books_in_a_thread(
    new: Delivery, session: Annotated[Session, Depends(transactional("sync"))]
) -> int:
    """Do the same in a `def` endpoint."""
    on_shelf = select(func.count()).where(Book.shelf_id == new.shelf)
    if session.scalars(on_shelf).one() + len(new.titles) > CAPACITY:
        raise HTTPException(409, FULL)
    for title in new.titles:
        with http_errors(session, unique=TAKEN, missing_parent=NO_SHELF):
            session.add(Book(title=title, shelf_id=new.shelf))
    return len(new.titles)


@router.get("/sync/books")
def list_books_in_a_thread(session: Annotated[Session, Depends(reader("sync"))]) -> Sequence[str]:
    """Do the same in a `def` endpoint."""
    return session.scalars(select(Book.title).order_by(Book.title)).all()


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL, a file for both engines."""
    url = make_url(os.environ["DATABASE_URL"])

    async def build_engine() -> AsyncEngine:
        engine = build_async_engine(url)
        async with engine.begin() as connection:  # in production: Alembic, before start-up
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session, session.begin():
            await session.merge(Shelf(id=1))
        return engine

    app = FastAPI(title="SQLite")
    install_database(app, engine=build_engine)
    install_database(app, name="sync", engine=lambda: build_sync_engine(url))
    app.include_router(router)
    return app
