"""The application, which does not migrate, and is not ready until its databases are migrated."""

from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_sqlnative import health_router, install_database, reader, transactional
from fastapi_sqlnative.migrations import alembic_check
from migrations_example.models import Book
from migrations_example.settings import application_engine

ALEMBIC = Path(__file__).with_name("alembic.ini")

Transaction = Annotated[AsyncSession, Depends(transactional())]
Reader = Annotated[AsyncSession, Depends(reader())]

router = APIRouter()


@router.post("/books", status_code=201)
async def add_book(title: str, session: Transaction) -> int:
    """Add a book, and return its ID."""
    session.add(book := Book(title=title))
    await session.flush()
    return book.id


@router.get("/books")
async def list_titles(session: Reader) -> list[str]:
    """List the titles."""
    return list(await session.scalars(select(Book.title).order_by(Book.id)))


def create_app() -> FastAPI:
    """Build the application, using the databases that the environment names."""
    app = FastAPI(title="Bookshop")
    install_database(app, engine=partial(application_engine, "default"))
    install_database(app, name="analytics", engine=partial(application_engine, "analytics"))
    checks = {
        "migrations": alembic_check(ALEMBIC),
        "analytics migrations": alembic_check(ALEMBIC, database="analytics"),
    }
    app.include_router(health_router(checks=checks))
    app.include_router(router)
    return app
