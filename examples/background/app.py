"""Members who are greeted after they are stored, and only then."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from sqlalchemy import UniqueConstraint, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import (
    AsyncDatabase,
    get_database_handle,
    http_errors,
    install_database,
    install_error_handlers,
    reader,
    transactional,
)

Transaction = Annotated[AsyncSession, Depends(transactional())]
Reader = Annotated[AsyncSession, Depends(reader())]
Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]
logger = logging.getLogger("examples.background")


class Base(DeclarativeBase):
    """The base class of all models."""


class Member(Base):
    """A member. The badge is checked at COMMIT, to show a COMMIT that fails."""

    __tablename__ = "background_member"
    __table_args__ = (
        UniqueConstraint("name", name="uq_background_member_name"),
        UniqueConstraint(
            "badge", name="uq_background_member_badge", deferrable=True, initially="DEFERRED"
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    badge: Mapped[int]
    greeted: Mapped[bool] = mapped_column(default=False)


async def greet(database: AsyncDatabase, member_id: int) -> None:
    """Greet a stored member, in a separate transaction.

    It takes the ID and loads the row again: the request's object is detached, and may be out
    of date. The response has been sent, so a failure can only be logged.
    """
    try:
        async with database.transaction() as session:
            member = await session.get_one(Member, member_id, with_for_update=True)
            member.greeted = True  # a real application would send a mail here
    except SQLAlchemyError:
        logger.exception("Member %s has not been greeted.", member_id)


def create_app() -> FastAPI:
    """Build the application, using DATABASE_URL."""
    engine = create_async_engine(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up for the demo only: in production, use Alembic.
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(title="Background tasks", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)
    install_error_handlers(app)  # for the constraint that is checked at COMMIT

    @app.post("/members", status_code=201)
    async def sign_up(
        name: str, badge: int, session: Transaction, database: Handle, tasks: BackgroundTasks
    ) -> int:
        member = Member(name=name, badge=badge)
        async with http_errors(session, unique="This name is taken."):
            session.add(member)
        tasks.add_task(greet, database, member.id)  # runs only after a successful COMMIT
        if badge < 0:
            raise HTTPException(422, "A badge has a number.")  # and the task does not run
        return member.id

    @app.get("/members")
    async def list_members(session: Reader) -> dict[str, bool]:
        query = select(Member.name, Member.greeted).order_by(Member.id)
        return {row.name: row.greeted for row in await session.execute(query)}

    return app
