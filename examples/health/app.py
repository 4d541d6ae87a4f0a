"""A shop that reports whether it is ready: two databases, a marker row, and draining."""

import os
import secrets
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import delete, literal, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import (
    AsyncDatabase,
    health_router,
    install_database,
    install_error_handlers,
    installed_databases,
    reader,
    transactional,
)
from fastapi_sqlnative.health import drain_on_sigterm

Reader = Annotated[AsyncSession, Depends(reader())]
AnalyticsReader = Annotated[AsyncSession, Depends(reader("analytics"))]
Transaction = Annotated[AsyncSession, Depends(transactional())]
Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


class Base(DeclarativeBase): ...


class Marker(Base):
    """A marker that the shop is open: an operator deletes the row to close it."""

    __tablename__ = "health_marker"

    id: Mapped[int] = mapped_column(primary_key=True)


async def build_engine() -> AsyncEngine:
    """Build the engine, and create a table that a release step would have created."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    async with engine.begin() as connection:  # in production: Alembic, before start-up
        await connection.run_sync(Base.metadata.create_all)
    return engine


def build_analytics_engine() -> AsyncEngine:
    """Build the engine of the optional database."""
    return create_async_engine(os.environ["SECOND_DATABASE_URL"])


async def is_open(app: FastAPI) -> bool:
    """Look for the marker row; this also fails while every connection is in use."""
    database = installed_databases(app, AsyncDatabase)["default"]
    async with database.session() as session:
        return await session.get(Marker, 1) is not None


def require_operator(credentials: Credentials) -> None:
    """Refuse requests without OPERATOR_TOKEN, and all requests while it is not set."""
    token = os.environ.get("OPERATOR_TOKEN", "")  # an empty token is a 401
    given = credentials.credentials
    if not secrets.compare_digest(given.encode(), token.encode()):
        raise HTTPException(403, "For operators only.")


router = APIRouter()


@router.get("/stock")
async def count_stock(session: Reader) -> int:
    """Query the shop's own database."""
    return (await session.scalars(select(literal(3)))).one()


@router.get("/report")
async def write_report(session: AnalyticsReader) -> int:
    """Query the optional database; while it is unreachable, only this route returns a 503."""
    return (await session.scalars(select(literal(7)))).one()


@router.put("/marker", status_code=204, dependencies=[Depends(require_operator)])
async def open_shop(session: Transaction) -> None:
    """Open the shop to requests."""
    await session.merge(Marker(id=1))


@router.delete("/marker", status_code=204, dependencies=[Depends(require_operator)])
async def close_shop(session: Transaction) -> None:
    """Close the shop, for every process at once."""
    await session.execute(delete(Marker))


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL and SECOND_DATABASE_URL."""
    app = FastAPI(title="Health")
    install_database(app, engine=build_engine)
    install_database(app, name="analytics", engine=build_analytics_engine)
    install_error_handlers(app)
    app.include_router(
        health_router(
            databases={"default": "writable", "analytics": "degraded"},
            checks={"open": is_open},
        )
    )
    drain_on_sigterm(app, seconds=float(os.environ.get("DRAIN_SECONDS", "5")))
    app.include_router(router)
    return app
