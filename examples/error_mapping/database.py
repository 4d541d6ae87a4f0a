"""The application of both examples, without its routes and answers."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from examples.error_mapping.models import Base
from fastapi_sqlnative import install_database


def create_app_with_database(database_url: str | None = None) -> FastAPI:
    """Build an application on the given database, on DATABASE_URL or on a file."""
    url = make_url(
        database_url or os.environ.get("DATABASE_URL") or "sqlite+aiosqlite:///error_mapping.db"
    )
    engine = create_async_engine(url)
    if url.get_backend_name() == "sqlite":
        # Without it SQLite takes a booking for an event that does not exist.
        event.listen(
            engine.sync_engine,
            "connect",
            lambda connection, _: connection.execute("PRAGMA foreign_keys = ON"),
        )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At the start-up only because this is an example: in production Alembic does it.
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app
