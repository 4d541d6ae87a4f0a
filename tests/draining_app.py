"""The application that test_draining restarts, which drains on SIGTERM."""

import logging
import os
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, insert, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from fastapi_sqlnative import health_router, install_database, transactional
from fastapi_sqlnative.health import drain_on_sigterm
from tests.serving import KINDS, Item, named, using

logging.basicConfig(level=logging.INFO)
SECONDS = float(os.environ["DRAIN_SECONDS"])
kind = next(each for each in KINDS if each.id == os.environ["KIND"])


app = FastAPI()
engine = (create_async_engine if kind.asynchronous else create_engine)(
    os.environ["DATABASE_URL"], connect_args=named(kind.driver, "draining")
)
install_database(app, engine=engine, shutdown=engine.dispose, startup_wait=30)
app.include_router(health_router(timeout=20))
drain_on_sigterm(app, seconds=SECONDS)


def add(session: Session, name: str) -> None:
    session.execute(insert(Item).values(name=name))


if kind.asynchronous:

    @app.post("/items/{name}", status_code=201)
    async def add_async(
        name: str, session: Annotated[AsyncSession, Depends(transactional())]
    ) -> int:
        await session.run_sync(add, name)
        return os.getpid()

else:

    @app.post("/items/{name}", status_code=201)
    def add_sync(name: str, session: Annotated[Session, Depends(transactional())]) -> int:
        add(session, name)
        return os.getpid()


# For as long as the test holds the lock.
SLOW = text("SELECT 'done' FROM (SELECT pg_advisory_xact_lock(9)) AS waited")
app.post("/slow")(using(kind, Depends(transactional()), lambda session: session.scalar(SLOW)))
