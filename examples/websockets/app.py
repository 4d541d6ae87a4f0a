"""A board to which sockets write: each message is a separate transaction."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, WebSocket
from sqlalchemy import CheckConstraint, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_sqlnative import AsyncDatabase, get_database_handle, install_database, reader

# A session from get_db would live as long as the socket, and would hold a connection from its
# first statement on.
Handle = Annotated[AsyncDatabase, Depends(get_database_handle())]
Reader = Annotated[AsyncSession, Depends(reader())]


class Base(DeclarativeBase):
    """The base class of all models."""


class Post(Base):
    """A post on the board; the database refuses a blank one."""

    __tablename__ = "websockets_post"
    __table_args__ = (CheckConstraint("text <> ''", name="ck_websockets_post_text"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


async def store(database: AsyncDatabase, text: str) -> str:
    """Store one message in its own transaction, and return the result."""
    try:
        async with database.transaction() as session:
            post = Post(text=text)
            session.add(post)
            await session.flush()
            stored = f"{post.id} stored"
    except IntegrityError:
        return "refused"  # rolled back; the socket stays open
    return stored  # after the COMMIT


def create_app(*, pool_size: int = 5) -> FastAPI:
    """Build the application, using DATABASE_URL."""
    engine = create_async_engine(
        os.environ["DATABASE_URL"], pool_size=pool_size, max_overflow=0, pool_timeout=5
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # At start-up for the demo only: in production, use Alembic.
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield

    app = FastAPI(title="Websockets", lifespan=lifespan)
    install_database(app, engine=engine, shutdown=engine.dispose)

    @app.websocket("/board")
    async def write(socket: WebSocket, database: Handle) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(await store(database, text))

    @app.get("/posts")
    async def count_posts(session: Reader) -> int | None:
        return await session.scalar(select(func.count()).select_from(Post))

    return app
