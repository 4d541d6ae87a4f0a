"""The application: two databases, installed, and its routes."""

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
    """Build the application, with engines of its own that end with its lifespan.

    Without settings they come from the environment, as `uvicorn --factory` wants it.
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
    # A failure that no service has words for: a 503 where it may pass, and never what it said.
    install_error_handlers(app)
    # Without the second database no money is moved, and accounts are still shown.
    app.include_router(health_router(databases={"analytics": "degraded"}))
    return app


async def _create_tables(engine: AsyncEngine, analytics: AsyncEngine) -> None:
    # At start-up only because this is a demo: in production `alembic upgrade` does it, once,
    # before the new version is served.
    for base, on in (Base, engine), (AnalyticsBase, analytics):
        async with on.begin() as connection:
            await connection.run_sync(base.metadata.create_all)


async def _seed(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        if await session.get(User, "ada") is None:
            session.add_all([User(name="ada"), User(name="grace")])
            await session.flush()  # no relationship() tells SQLAlchemy that users come first
            session.add_all(
                [
                    Account(number="ada-1", owner="ada", balance=1_000_00),
                    Account(number="grace-1", owner="grace", balance=1_000_00),
                ]
            )
