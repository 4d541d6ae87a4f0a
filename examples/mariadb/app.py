"""Articles, written through asyncmy and read through PyMySQL in a `def` endpoint."""

import os
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import URL, CheckConstraint, Engine, String, create_engine, func, make_url, select
from sqlalchemy.dialects.mysql import DATETIME
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fastapi_sqlnative import install_database, install_error_handlers, reader, transactional

Transaction = Annotated[AsyncSession, Depends(transactional())]
SyncReader = Annotated[Session, Depends(reader("sync"))]


class Base(DeclarativeBase): ...


class Article(Base):
    __tablename__ = "mariadb_article"
    # The server's default may not support every character.
    __table_args__ = {"mysql_default_charset": "utf8mb4"}  # noqa: RUF012 # as SQLAlchemy spells it
    # There is no UPDATE ... RETURNING, and MySQL has no RETURNING at all. Values that the server
    # computes are then loaded on first access, which an AsyncSession cannot do. With this
    # option, the flush loads them.
    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012 # as SQLAlchemy spells it

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(80))  # a VARCHAR needs a length here
    stock: Mapped[int] = mapped_column(CheckConstraint("stock >= 0"))
    changed_at: Mapped[datetime] = mapped_column(
        DATETIME(fsp=6), server_default=func.now(6), onupdate=func.now(6)
    )


class NewArticle(BaseModel):
    title: str
    stock: int


class ArticlePublic(NewArticle, from_attributes=True):
    id: int
    changed_at: datetime


router = APIRouter()


@router.post("/articles", status_code=201, response_model=ArticlePublic)
async def add_article(new: NewArticle, session: Transaction) -> Article:
    """Store an article; the server generates its ID and time."""
    session.add(article := Article(title=new.title, stock=new.stock))
    await session.flush()
    return article


@router.post("/articles/{article_id}/sales", response_model=ArticlePublic)
async def sell(article_id: int, number: int, session: Transaction) -> Article:
    """Sell some: lock, decide, write. PostgreSQL could use UPDATE ... RETURNING."""
    article = await session.get(Article, article_id, with_for_update=True)
    if article is None:
        raise HTTPException(404, "No such article.")
    if article.stock < number:
        raise HTTPException(409, f"There are {article.stock} left.")
    article.stock -= number
    await session.flush()
    return article


@router.get("/stock")
def read_stock(session: SyncReader) -> dict[str, int]:
    """Read the stock of all articles."""
    rows = session.execute(select(Article.title, Article.stock).order_by(Article.title))
    return dict(rows.all())


OPTIONS = {
    # Each statement sees what is committed at that moment, as on PostgreSQL. With the default,
    # REPEATABLE READ, a SELECT sees a snapshot, but a SELECT ... FOR UPDATE sees newer rows.
    "isolation_level": "READ COMMITTED",
    "pool_recycle": 1800,  # seconds; less than the server's wait_timeout
    # Seconds to wait for a row lock, and for a statement. On MySQL: max_execution_time.
    "connect_args": {
        "init_command": "SET SESSION innodb_lock_wait_timeout = 1, max_statement_time = 5"
    },
}


def build_async_engine(url: URL) -> AsyncEngine:
    """Build the engine for `async def`, and create the table."""
    return create_async_engine(url.set(drivername="mysql+asyncmy"), **OPTIONS)


def build_sync_engine(url: URL) -> Engine:
    """Build the engine for `def`."""
    return create_engine(url.set(drivername="mysql+pymysql"), **OPTIONS)


def create_app() -> FastAPI:
    """Build the application on DATABASE_URL, one database for both drivers."""
    url = make_url(os.environ["DATABASE_URL"])

    async def build_engine() -> AsyncEngine:
        engine = build_async_engine(url)
        async with engine.begin() as connection:  # in production: Alembic, before start-up
            await connection.run_sync(Base.metadata.create_all)
        return engine

    app = FastAPI(title="MariaDB")
    install_database(app, engine=build_engine)
    install_database(app, name="sync", engine=lambda: build_sync_engine(url))
    install_error_handlers(app)
    app.include_router(router)
    return app
