"""The application, with its two databases and its routes."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from examples.showcase.models import Account, AnalyticsBase, Base, User
from examples.showcase.routes import router
from examples.showcase.settings import Settings, read_settings
from fastapi_sqlnative import health_router, install_database, install_error_handlers


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; its engines are disposed of when its lifespan ends.

    If no settings are given, they come from the environment, for `uvicorn --factory`.
    """
    settings = settings or read_settings(os.environ)
    engine = create_async_engine(settings.database)
    analytics = create_async_engine(settings.analytics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await _create_tables(engine, analytics)
        await _seed(engine)
        yield

    app = FastAPI(title="fastapi-sqlnative showcase", lifespan=lifespan)
    # A request that writes to both commits them in this order.
    install_database(app, engine=engine, shutdown=engine.dispose, startup_wait=10)
    install_database(
        app, name="analytics", engine=analytics, shutdown=analytics.dispose, startup_wait=10
    )
    app.include_router(router)
    # For failures that no service maps: a 503 if it is temporary, and no database error text.
    install_error_handlers(app)
    # Without the second database, transfers fail, but accounts are still shown.
    app.include_router(health_router(databases={"analytics": "degraded"}))
    return app


async def _create_tables(engine: AsyncEngine, analytics: AsyncEngine) -> None:
    # At start-up for the demo only: in production, run `alembic upgrade` once,
    # before the new version goes live.
    for base, on in (Base, engine), (AnalyticsBase, analytics):
        async with on.begin() as connection:
            await connection.run_sync(base.metadata.create_all)


async def _seed(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        if await session.get(User, "ada") is None:
            session.add_all([User(name="ada"), User(name="grace")])
            await session.flush()  # there is no relationship() to order the INSERTs
            session.add_all(
                [
                    Account(number="ada-1", owner="ada", balance=1_000_00),
                    Account(number="grace-1", owner="grace", balance=1_000_00),
                ]
            )
