"""Writes go to the primary, lists come from the replica, and each route declares which it uses."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from sqlalchemy import NullPool, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import (
    AsyncDatabase,
    get_database_handle,
    install_database,
    reader,
    transactional,
)

Transaction = Annotated[AsyncSession, Depends(transactional())]
Reader = Annotated[AsyncSession, Depends(reader())]
ReplicaReader = Annotated[AsyncSession, Depends(reader("replica"))]
# Several consistent reads need one transaction, on a replica too.
ReplicaSnapshot = Annotated[
    AsyncSession,
    Depends(transactional("replica", isolation_level="REPEATABLE READ", read_only=True)),
]


class Base(DeclarativeBase):
    """The base class of all models."""


class Article(Base):
    """An article."""

    __tablename__ = "read_replica_article"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class ArticlePublic(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    title: str


router = APIRouter()


@router.post("/articles", status_code=201, response_model=ArticlePublic)
async def add_article(title: str, session: Transaction) -> Article:
    """Write to the primary."""
    article = Article(title=title)
    session.add(article)
    await session.flush()
    return article


@router.get("/articles/{article_id}", response_model=ArticlePublic)
async def read_article(article_id: int, session: Reader) -> Article:
    """Read from the primary, for users who have just saved an article."""
    article = await session.get(Article, article_id)
    if article is None:
        raise HTTPException(404, "No such article.")
    return article


@router.get("/articles", response_model=list[ArticlePublic])
async def list_articles(session: ReplicaReader) -> list[Article]:
    """Read from the replica, which may be a little behind."""
    return list(await session.scalars(select(Article).order_by(Article.id)))


@router.get("/statistics")
async def read_statistics(session: ReplicaSnapshot) -> dict[str, int | None]:
    """Read twice from one state of the replica."""
    return {
        "articles": await session.scalar(select(func.count()).select_from(Article)),
        "longest": await session.scalar(select(func.max(func.length(Article.title)))),
    }


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL (primary) and SECOND_DATABASE_URL (replica)."""
    primary = create_async_engine(os.environ["DATABASE_URL"])
    # The server refuses every write; these are psycopg's arguments. A real replica does so
    # without them, and so does a role that has only SELECT.
    replica = create_async_engine(
        os.environ["SECOND_DATABASE_URL"],
        connect_args={"options": "-c default_transaction_read_only=on"},
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await create_tables()
        yield

    app = FastAPI(title="Read replica", lifespan=lifespan)
    install_database(app, engine=primary, shutdown=primary.dispose)
    install_database(app, name="replica", engine=replica, shutdown=replica.dispose)
    app.include_router(router)
    app.include_router(replication)
    return app


# -- for the demo only --------------------------------------------------------------------------
# The "replica" is a second database without replication. Replication is simulated here, over
# connections that may write, so that you can see it lag.

replication = APIRouter(prefix="/demo")


async def create_tables() -> None:
    """Create the tables in both; in production, use Alembic, on the primary only."""
    for variable in "DATABASE_URL", "SECOND_DATABASE_URL":
        engine = create_async_engine(os.environ[variable], poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)


@replication.post("/catch-up")
async def catch_up(
    primary: Annotated[AsyncDatabase, Depends(get_database_handle())],
) -> int:
    """Copy missing rows to the "replica", and return their number."""
    table = Base.metadata.tables[Article.__tablename__]
    engine = create_async_engine(os.environ["SECOND_DATABASE_URL"], poolclass=NullPool)
    async with primary.session() as session, engine.begin() as connection:
        last = await connection.scalar(select(func.coalesce(func.max(table.c.id), 0)))
        rows = (await session.execute(select(table).where(table.c.id > last))).mappings().all()
        if rows:
            await connection.execute(insert(table), [dict(row) for row in rows])
        return len(rows)
