"""A box office that sells each ticket once, and lists customers with their tickets."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import ForeignKey, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from fastapi_sqlnative import (
    AsyncDatabase,
    get_database_handle,
    get_db,
    http_errors,
    install_database,
    install_error_handlers,
    transactional,
)

Db = Annotated[AsyncSession, Depends(get_db())]
Transaction = Annotated[AsyncSession, Depends(transactional())]
Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]


class Base(DeclarativeBase):
    """The base class of all models."""


class Show(Base):
    """A show, and the number of tickets left for it."""

    __tablename__ = "testing_show"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)
    left: Mapped[int]


class Customer(Base):
    """A customer."""

    __tablename__ = "testing_customer"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    tickets: Mapped[list["Ticket"]] = relationship()


class Ticket(Base):
    """A ticket for one customer."""

    __tablename__ = "testing_ticket"

    id: Mapped[int] = mapped_column(primary_key=True)
    # Checked at COMMIT, so that an import can write rows in any order.
    show_id: Mapped[int] = mapped_column(ForeignKey(Show.id, deferrable=True, initially="DEFERRED"))
    customer_id: Mapped[int] = mapped_column(ForeignKey(Customer.id))


class NewShow(BaseModel):
    """The request body for a new show."""

    title: str
    left: int


class Sale(BaseModel):
    """The request body for a sale."""

    show: str
    customer: str


router = APIRouter()


@router.post("/shows", status_code=201)
async def add_show(new: NewShow, session: Transaction) -> int:
    """Add a show; its title must be unique."""
    async with http_errors(session, unique="There is a show of this title."):
        session.add(show := Show(title=new.title, left=new.left))
    return show.id


@router.post("/tickets", status_code=201)
async def sell(sale: Sale, database: Handle) -> int:
    """Sell a ticket; the whole transaction is retried after a conflict with another sale."""

    async def work(session: AsyncSession) -> int | None:
        show = await session.scalar(select(Show).where(Show.title == sale.show).with_for_update())
        if show is None or not show.left:
            return None
        customer = await session.scalar(select(Customer).where(Customer.name == sale.customer))
        if customer is None:
            session.add(customer := Customer(name=sale.customer))
            await session.flush()
        show.left -= 1
        session.add(ticket := Ticket(show_id=show.id, customer_id=customer.id))
        await session.flush()
        return ticket.id

    sold = await database.run_in_transaction(work)
    if sold is None:
        raise HTTPException(409, "There is no ticket.")
    return sold


@router.get("/customers")
async def list_customers(session: Db) -> dict[str, int]:
    """List all customers with their number of tickets."""
    customers = select(Customer).options(selectinload(Customer.tickets)).order_by(Customer.name)
    return {each.name: len(each.tickets) for each in await session.scalars(customers)}


@router.post("/imported-tickets", status_code=201)
async def import_ticket(show_id: int, customer: str, session: Transaction) -> None:
    """Store tickets sold elsewhere; the show may follow later in the same transaction."""
    session.add(customer_row := Customer(name=customer))
    await session.flush()
    session.add(Ticket(show_id=show_id, customer_id=customer_row.id))


def create_app(database_url: str | None = None) -> FastAPI:
    """Build the application, using the given database or DATABASE_URL."""
    engine = create_async_engine(database_url or os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        async with engine.begin() as connection:  # in production: Alembic, before start-up
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(title="Testing", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    install_error_handlers(app, missing_parent="There is no such show.")
    app.include_router(router)
    return app
