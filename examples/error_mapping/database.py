"""The application that both examples share, without its routes and error mapping."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from sqlalchemy import Connection, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from examples.error_mapping.models import Base
from fastapi_sqlnative import install_database


def create_app_with_database(database_url: str | None = None) -> FastAPI:
    """Build an application on the given database, or on DATABASE_URL, or on a file."""
    url = make_url(
        database_url or os.environ.get("DATABASE_URL") or "sqlite+aiosqlite:///error_mapping.db"
    )
    engine = create_async_engine(url)
    if url.get_backend_name() == "sqlite":
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_on_sqlite)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up for the demo only: in production, use Alembic.
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # Otherwise SQLite accepts a booking for an event that does not exist, and its driver begins no
    # transaction before a savepoint, so that releasing the savepoint would commit.
    connection.execute("PRAGMA foreign_keys = ON")
    connection.isolation_level = None


def _begin_on_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # one writer at a time
