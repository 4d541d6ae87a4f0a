"""Books, stored and listed through the request's session."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import get_db, install_database, transactional

Db = Annotated[AsyncSession, Depends(get_db())]
Transaction = Annotated[AsyncSession, Depends(transactional())]


class Base(DeclarativeBase): ...


class Book(Base):
    __tablename__ = "quick_start_book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class NewBook(BaseModel):
    title: str


class BookPublic(NewBook, from_attributes=True):
    id: int


router = APIRouter()


@router.post("/books", status_code=201, response_model=BookPublic)
async def add_book(new: NewBook, session: Transaction) -> Book:
    """Store a book; it is committed before the response is sent."""
    session.add(book := Book(title=new.title))
    await session.flush()  # the server generates the id; the COMMIT comes after this function
    return book


@router.get("/books", response_model=list[BookPublic])
async def list_books(session: Db) -> list[Book]:
    """List all books."""
    return list(await session.scalars(select(Book).order_by(Book.id)))


@router.post("/forgotten", status_code=201)
async def forget_book(new: NewBook, session: Db) -> None:
    """Add a book without committing it: the response is a 500, never a 201."""
    session.add(Book(title=new.title))


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    engine = create_async_engine(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        async with engine.begin() as connection:  # in production: Alembic, before start-up
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(title="Quick start", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    app.include_router(router)
    return app
