"""The application that test_draining restarts, which drains on SIGTERM."""

import logging
import os
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, insert, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from fastapi_sqlnative import health_router, install_database, transactional
from fastapi_sqlnative.health import drain_on_sigterm
from tests.serving import Item, Kind, named, using

# Takes as long as the test holds the lock.
SLOW = text("SELECT 'done' FROM (SELECT pg_advisory_xact_lock(9)) AS waited")


def add(session: Session, name: str) -> None:
    session.execute(insert(Item).values(name=name))


async def add_async(name: str, session: Annotated[AsyncSession, Depends(transactional())]) -> int:
    await session.run_sync(add, name)
    return os.getpid()


def add_sync(name: str, session: Annotated[Session, Depends(transactional())]) -> int:
    add(session, name)
    return os.getpid()


def make_app(kind: Kind, url: str, drain_seconds: float) -> FastAPI:
    app = FastAPI()
    engine = (create_async_engine if kind.asynchronous else create_engine)(
        url, connect_args=named(kind.driver, "draining")
    )
    install_database(app, engine=engine, shutdown=engine.dispose, startup_wait=30)
    app.include_router(health_router(timeout=20))
    drain_on_sigterm(app, seconds=drain_seconds)
    app.post("/items/{name}", status_code=201)(add_async if kind.asynchronous else add_sync)
    app.post("/slow")(using(kind, Depends(transactional()), lambda session: session.scalar(SLOW)))
    return app


def run(kind: Kind, url: str, drain_seconds: float, log: Path) -> None:
    """Serve the application from this process, with its output redirected to the log file."""
    with log.open("wb") as output:
        for stream in 1, 2:
            os.dup2(output.fileno(), stream)
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(make_app(kind, url, drain_seconds), port=0, access_log=False)
