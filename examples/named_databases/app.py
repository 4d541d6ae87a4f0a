"""A shop and its reports: two databases with separate metadata."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import get_db, install_database, transactional


class ShopBase(DeclarativeBase):
    """The base class of the models in the database `shop`."""


class Order(ShopBase):
    __tablename__ = "named_databases_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]


class ReportsBase(DeclarativeBase):
    """The base class of the models in the database `reports`."""


class Visit(ReportsBase):
    __tablename__ = "named_databases_visit"

    id: Mapped[int] = mapped_column(primary_key=True)
    page: Mapped[str]


# One annotated type per database: each name appears only here.
ShopDb = Annotated[AsyncSession, Depends(get_db("shop"))]
ShopTransaction = Annotated[AsyncSession, Depends(transactional("shop"))]
ReportsDb = Annotated[AsyncSession, Depends(get_db("reports"))]
ReportsTransaction = Annotated[AsyncSession, Depends(transactional("reports"))]

router = APIRouter()


@router.post("/orders", status_code=201)
async def order(article: str, session: ShopTransaction) -> int:
    """Store an order in the shop database."""
    session.add(new := Order(article=article))
    await session.flush()
    return new.id


@router.post("/visits", status_code=201)
async def visit(page: str, session: ReportsTransaction) -> int:
    """Store a visit in the reports database."""
    session.add(new := Visit(page=page))
    await session.flush()
    return new.id


@router.get("/counts")
async def count(shop: ShopDb, reports: ReportsDb) -> dict[str, int]:
    """Read both databases in one request."""
    return {
        "orders": (await shop.scalars(select(func.count()).select_from(Order))).one(),
        "visits": (await reports.scalars(select(func.count()).select_from(Visit))).one(),
    }


@router.get("/mixed-up")
async def ask_the_wrong_one(shop: ShopDb) -> int:
    """Query the shop for a table of the reports, which does not exist there."""
    return (await shop.scalars(select(func.count()).select_from(Visit))).one()


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL (shop) and SECOND_DATABASE_URL (reports)."""
    shop = create_async_engine(os.environ["DATABASE_URL"])
    reports = create_async_engine(os.environ["SECOND_DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        for engine, base in (shop, ShopBase), (reports, ReportsBase):
            async with engine.begin() as connection:  # in production: Alembic, before start-up
                await connection.run_sync(base.metadata.create_all)
        yield

    app = FastAPI(title="Named databases", lifespan=lifespan)
    install_database(app, name="shop", engine=shop, shutdown=shop.dispose)
    install_database(app, name="reports", engine=reports, shutdown=reports.dispose)
    app.include_router(router)
    return app
