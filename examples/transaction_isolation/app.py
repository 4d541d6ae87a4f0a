"""Tickets and doctors on call: the same change, made carelessly and correctly."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import AsyncDatabase, get_database_handle, install_database, transactional

Transaction = Annotated[AsyncSession, Depends(transactional())]
Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]


class Base(DeclarativeBase):
    """The base class of all models."""


class Event(Base):
    """An event with tickets left."""

    __tablename__ = "transaction_isolation_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    tickets: Mapped[int]


class Doctor(Base):
    """A doctor, on call or not. At least one must be, which no constraint can express."""

    __tablename__ = "transaction_isolation_doctor"

    name: Mapped[str] = mapped_column(primary_key=True)
    on_call: Mapped[bool]


async def sell(session: AsyncSession, *, lock: bool = False) -> int:
    """Sell a ticket of the event: read, decide, write."""
    event = await session.get_one(Event, 1, with_for_update=lock)
    if event.tickets < 1:
        raise HTTPException(409, "Sold out.")
    event.tickets -= 1
    await session.flush()
    return event.tickets


async def go_off_call(session: AsyncSession, name: str) -> int:
    """Let a doctor go off call, if another one stays."""
    on_call = await session.scalar(select(func.count()).select_from(Doctor).where(Doctor.on_call))
    if on_call is None or on_call < 2:
        raise HTTPException(409, "Somebody has to stay.")
    (await session.get_one(Doctor, name)).on_call = False
    await session.flush()
    return on_call - 1


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL, with fresh rows at every start."""
    engine = create_async_engine(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up for the demo only: in production, use Alembic.
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session, session.begin():
            session.add_all(
                [Event(id=1, tickets=5), *(Doctor(name=each, on_call=True) for each in "ab")]
            )
        yield

    app = FastAPI(title="Transaction isolation", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)

    @app.post("/tickets/carelessly")
    async def sell_carelessly(session: Transaction) -> int:
        """READ COMMITTED: two requests read the same number, and one sale is lost."""
        return await sell(session)

    @app.post("/tickets/locked")
    async def sell_locked(session: Transaction) -> int:
        """Lock the row when reading it: a second request reads it after the first is done."""
        return await sell(session, lock=True)

    @app.post("/tickets/at-once")
    async def sell_at_once(session: Transaction) -> int:
        """Decide and write in one statement, which uses the current value."""
        one_less = update(Event).where(Event.id == 1, Event.tickets > 0)
        left: int | None = await session.scalar(
            one_less.values(tickets=Event.tickets - 1).returning(Event.tickets)
        )
        if left is None:
            raise HTTPException(409, "Sold out.")
        return left

    @app.post("/tickets/serializable")
    async def sell_serializable(database: Handle) -> int:
        """Use the careless code unchanged, and retry it after a serialization failure."""
        return await database.run_in_transaction(sell, isolation_level="SERIALIZABLE", attempts=20)

    @app.post("/doctors/{name}/off-call/{level}")
    async def let_go(
        name: str, level: Literal["REPEATABLE READ", "SERIALIZABLE"], database: Handle
    ) -> int:
        """REPEATABLE READ allows write skew: both read the same rows and write different ones."""
        return await database.run_in_transaction(
            lambda session: go_off_call(session, name), isolation_level=level, attempts=20
        )

    @app.get("/state")
    async def show(session: Transaction) -> dict[str, int | None]:
        on_call = select(func.count()).select_from(Doctor).where(Doctor.on_call)
        return {
            "tickets": await session.scalar(select(Event.tickets)),
            "on_call": await session.scalar(on_call),
        }

    return app
