"""Products: what Pydantic rejects never reaches the database."""

import os
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel, Field, StringConstraints
from sqlalchemy import CheckConstraint, String, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import get_db, install_database, transactional


class Base(DeclarativeBase): ...


class Product(Base):
    __tablename__ = "validation_product"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(String(8))
    name: Mapped[str] = mapped_column(String(40))
    price: Mapped[int] = mapped_column(CheckConstraint("price > 0"))
    note: Mapped[str | None] = mapped_column(String(200))


class NewProduct(BaseModel, extra="forbid", str_strip_whitespace=True):
    """A product as a client may send it. A test compares it with the table.

    Other fields, such as `id` or `is_admin`, are rejected.
    """

    sku: Annotated[str, StringConstraints(to_upper=True, max_length=8, pattern=r"^[A-Za-z]+-\d+$")]
    name: Annotated[str, Field(min_length=1, max_length=40)]
    price: Annotated[int, Field(gt=0, lt=2**31)]  # the range of the column's INTEGER
    note: Annotated[str, Field(max_length=200)] | None = None


class ProductPublic(NewProduct, from_attributes=True):
    id: int


router = APIRouter(prefix="/products")


@router.post("", status_code=201, response_model=ProductPublic)
async def add_product(
    new: NewProduct, session: Annotated[AsyncSession, Depends(transactional())]
) -> Product:
    """Store a product. If it is invalid, this function is not called and no session is opened."""
    session.add(product := Product(**new.model_dump()))
    await session.flush()
    return product


@router.get("/count")
async def count(session: Annotated[AsyncSession, Depends(get_db())]) -> int:
    """Count the products."""
    return (await session.scalars(select(func.count()).select_from(Product))).one()


async def build_engine() -> AsyncEngine:
    """Build the engine at start-up, and create the table."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    async with engine.begin() as connection:  # in production: Alembic, before start-up
        await connection.run_sync(Base.metadata.create_all)
    return engine


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    app = FastAPI(title="Validation")
    install_database(app, engine=build_engine)
    app.include_router(router)
    return app
