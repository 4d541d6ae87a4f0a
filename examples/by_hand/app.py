"""Gift cards: read, decide, write, in transactions that the endpoints control."""

import os
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import (
    error_responses,
    get_db,
    http_errors,
    install_database,
    transactional,
)

Db = Annotated[AsyncSession, Depends(get_db())]
Transaction = Annotated[AsyncSession, Depends(transactional())]


class Base(DeclarativeBase): ...


class Card(Base):
    __tablename__ = "by_hand_card"

    code: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int]


class NewCard(BaseModel):
    code: str
    balance: int


class Imported(BaseModel):
    stored: list[str]
    refused: list[str]


router = APIRouter(prefix="/cards")


@router.post("", status_code=201, responses=error_responses("unique"))
async def issue(new: NewCard, session: Transaction) -> None:
    """Issue one card. The block is a savepoint, and maps a taken code to a response."""
    async with http_errors(session, unique="This code has been issued."):
        session.add(Card(code=new.code, balance=new.balance))


@router.post("/import", status_code=201)
async def import_cards(cards: list[NewCard], session: Transaction) -> Imported:
    """Issue many cards, each in a savepoint, so that a taken code does not affect the others."""
    result = Imported(stored=[], refused=[])
    for new in cards:
        try:
            async with session.begin_nested():
                session.add(Card(code=new.code, balance=new.balance))
        except IntegrityError:
            result.refused.append(new.code)
        else:
            result.stored.append(new.code)
    return result


@router.post("/{code}/payments", status_code=201)
async def pay(code: str, amount: Annotated[int, Query(gt=0)], session: Db) -> str:
    """Pay with a card, however many requests do so at the same time.

    A session from `get_db()` commits only when told to. The block ends the transaction, which
    releases the row lock before the receipt is made, which may take a while.
    """
    async with session.begin():
        card = await session.get(Card, code, with_for_update=True)  # concurrent payments wait here
        if card is None:
            raise HTTPException(404, "No such card.")
        if card.balance < amount:
            raise HTTPException(409, f"There are {card.balance} left.")
        card.balance -= amount
    return f"{amount} paid, {card.balance} left."


@router.get("/{code}")
async def read_balance(code: str, session: Db) -> int:
    """Read the remaining balance."""
    card = await session.get(Card, code)
    if card is None:
        raise HTTPException(404, "No such card.")
    return card.balance


async def build_engine() -> AsyncEngine:
    """Build the engine at start-up, and create the table."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    async with engine.begin() as connection:  # in production: Alembic, before start-up
        await connection.run_sync(Base.metadata.create_all)
    return engine


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    app = FastAPI(title="By hand")
    install_database(app, engine=build_engine)
    app.include_router(router)
    return app
