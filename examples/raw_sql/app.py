"""Reports in plain SQL."""

import os
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Query
from pydantic import BaseModel
from sqlalchemy import bindparam, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from fastapi_sqlnative import install_database, reader, transactional

Reader = Annotated[AsyncSession, Depends(reader())]
Transaction = Annotated[AsyncSession, Depends(transactional())]

TABLE = text("""
    CREATE TABLE IF NOT EXISTS raw_sql_sale (
        id serial PRIMARY KEY,
        customer text NOT NULL,
        region text NOT NULL,
        amount integer NOT NULL
    )
""")
# A column or a direction cannot be bound, so it is chosen from these constants.
ORDERS = {"customer": "customer", "total": "total DESC, customer"}


class Sale(BaseModel):
    customer: str
    region: str
    amount: int


class Total(BaseModel):
    customer: str
    total: int


class Filters(BaseModel, extra="forbid"):
    """A report's parameters; a filter that is not set adds nothing to the SQL."""

    prefix: str | None = None
    regions: list[str] = []
    order: Literal["customer", "total"] = "customer"


router = APIRouter()


@router.post("/sales", status_code=201)
async def add_sale(sale: Sale, session: Transaction) -> int:
    """Store a sale. Textual SQL that writes needs `transactional`."""
    statement = text("""
        INSERT INTO raw_sql_sale (customer, region, amount)
        VALUES (:customer, :region, :amount) RETURNING id
    """)
    stored: int = (await session.scalars(statement, sale.model_dump())).one()
    return stored


@router.get("/totals")
async def list_totals(filters: Annotated[Filters, Query()], session: Reader) -> list[Total]:
    """Sum up the sales by customer."""
    conditions = ["TRUE"]
    if filters.prefix is not None:
        conditions.append("starts_with(customer, :prefix)")  # unlike in LIKE, % is literal
    if filters.regions:
        conditions.append("region IN :regions")
    statement = text(f"""
        SELECT customer, sum(amount) AS total FROM raw_sql_sale
        WHERE {" AND ".join(conditions)}
        GROUP BY customer ORDER BY {ORDERS[filters.order]}
    """)  # noqa: S608 # every fragment is written above
    values = {"prefix": filters.prefix, "regions": filters.regions}
    if filters.regions:
        statement = statement.bindparams(bindparam("regions", expanding=True))
    found = await session.execute(statement, values)
    return [Total.model_validate(row) for row in found.mappings()]


async def build_engine() -> AsyncEngine:
    """Build the engine at start-up, and create the table."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    async with engine.begin() as connection:  # in production: Alembic, before start-up
        await connection.execute(TABLE)
    return engine


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    app = FastAPI(title="Raw SQL")
    install_database(app, engine=build_engine)
    app.include_router(router)
    return app
