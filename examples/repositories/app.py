"""Authors in a repository; an endpoint for one author runs only if that author exists."""

import os
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import get_db, install_database, transactional


class Base(DeclarativeBase): ...


class Author(Base):
    __tablename__ = "repositories_author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Authors:
    """A repository of authors in the request's session; the endpoint decides about the commit."""

    def __init__(self, session: Annotated[AsyncSession, Depends(get_db())]) -> None:
        self.session = session

    async def list(self) -> Sequence[Author]:
        """List all authors by name."""
        return (await self.session.scalars(select(Author).order_by(Author.name))).all()

    async def find(self, author_id: int) -> Author | None:
        """Return an author, or `None`."""
        return await self.session.get(Author, author_id)

    async def add(self, name: str) -> Author:
        """Add an author, with the ID that the server generates."""
        self.session.add(author := Author(name=name))
        await self.session.flush()
        return author

    async def remove(self, author: Author) -> None:
        """Remove an author from the database."""
        await self.session.delete(author)


Repository = Annotated[Authors, Depends()]


async def find_author(author_id: int, authors: Repository) -> Author:
    """Find the author in the path, for every endpoint that concerns one."""
    author = await authors.find(author_id)
    if author is None:
        raise HTTPException(404, "No such author.")
    return author


Found = Annotated[Author, Depends(find_author)]


class NewAuthor(BaseModel):
    name: str


class AuthorPublic(NewAuthor, from_attributes=True):
    id: int


router = APIRouter(prefix="/authors")
commits = [Depends(transactional())]


@router.get("", response_model=list[AuthorPublic])
async def list_authors(authors: Repository) -> Sequence[Author]:
    """List all authors."""
    return await authors.list()


@router.post("", status_code=201, response_model=AuthorPublic, dependencies=commits)
async def add_author(new: NewAuthor, authors: Repository) -> Author:
    """Add an author."""
    return await authors.add(new.name)


@router.get("/{author_id}", response_model=AuthorPublic)
async def read_author(author: Found) -> Author:
    """Show one author."""
    return author


@router.put("/{author_id}", response_model=AuthorPublic, dependencies=commits)
async def rename_author(author: Found, new: NewAuthor) -> Author:
    """Rename an author."""
    author.name = new.name
    return author


@router.delete("/{author_id}", status_code=204, dependencies=commits)
async def remove_author(author: Found, authors: Repository) -> None:
    """Remove an author."""
    await authors.remove(author)


async def build_engine() -> AsyncEngine:
    """Build the engine at start-up, and create the table."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    async with engine.begin() as connection:  # in production: Alembic, before start-up
        await connection.run_sync(Base.metadata.create_all)
    return engine


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    app = FastAPI(title="Repositories")
    install_database(app, engine=build_engine)
    app.include_router(router)
    return app
