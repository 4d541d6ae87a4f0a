"""Counters, on an engine whose timeouts are shorter than its clients'."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy import URL, bindparam, func, make_url, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import (
    error_responses,
    install_database,
    install_error_handlers,
    reader,
    transactional,
)

Reader = Annotated[AsyncSession, Depends(reader())]
Transaction = Annotated[AsyncSession, Depends(transactional())]

# The server enforces these limits, even if the client has disconnected.
LIMITS = {
    "statement_timeout": "1s",
    "lock_timeout": "300ms",
    "idle_in_transaction_session_timeout": "10s",
}


class Base(DeclarativeBase): ...


class Counter(Base):
    __tablename__ = "postgresql_counter"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]


router = APIRouter()


@router.post("/counters/{name}", responses=error_responses("lock_not_available"))
async def count(name: str, session: Transaction) -> int:
    """Increment a counter, in one statement on the server with INSERT ... RETURNING."""
    statement = insert(Counter).values(name=name, value=1)
    statement = statement.on_conflict_do_update(
        index_elements=[Counter.name], set_={"value": Counter.value + 1}
    )
    return (await session.scalars(statement.returning(Counter.value))).one()


@router.get("/slow", responses=error_responses("statement_timeout"))
async def be_slow(seconds: float, session: Reader) -> None:
    """Run a slow statement."""
    await session.execute(select(func.pg_sleep(seconds)))


@router.get("/limits")
async def list_limits(session: Reader) -> dict[str, str]:
    """Show the server's settings for this connection."""
    query = text("SELECT name, setting || unit FROM pg_settings WHERE name IN :names")
    query = query.bindparams(bindparam("names", list(LIMITS), expanding=True))
    return dict((await session.execute(query)).all())


def build_engine(url: URL) -> AsyncEngine:
    """Build the same engine with either driver; only the arguments differ."""
    connect_args: dict[str, Any]
    if url.get_driver_name() == "asyncpg":
        connect_args = {"timeout": 5, "server_settings": LIMITS}
    else:
        options = " ".join(f"-c {name}={limit}" for name, limit in LIMITS.items())
        connect_args = {"connect_timeout": 5, "options": options}
    return create_async_engine(
        url,
        connect_args=connect_args,
        pool_size=5,
        max_overflow=5,
        pool_timeout=2,  # seconds; then a 503, while the client is still waiting
        pool_pre_ping=True,  # after a server restart, reconnect instead of failing a request
    )


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL with psycopg or asyncpg."""
    engine = build_engine(make_url(os.environ["DATABASE_URL"]))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        async with engine.begin() as connection:  # in production: Alembic, before start-up
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(title="PostgreSQL", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose, startup_wait=10)
    install_error_handlers(app)
    app.include_router(router)
    return app
