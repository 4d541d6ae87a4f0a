"""An application started in the test process, for tests that promise nothing about a server."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, StaticPool, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from starlette.applications import Starlette

from fastapi_sqlnative import AsyncDatabase, Database, install_database
from fastapi_sqlnative._sessions.engines import sync_engine
from tests.serving import Kind, Rows, route, until


def client_of(app: Starlette) -> httpx.AsyncClient:
    """Return a client that calls the application without running its lifespan."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app")


@asynccontextmanager
async def running(app: Starlette) -> AsyncGenerator[httpx.AsyncClient]:
    """Run the application's lifespan, and yield a client."""
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client


async def start_and_stop(app: Starlette) -> None:
    """Run the application's start-up and shutdown, with nothing in between."""
    async with app.router.lifespan_context(app):
        pass


def application(
    engine: Engine | AsyncEngine,
    kind: Kind,
    dependency: Callable[..., Any],
    body: Callable[[Session], Any],
    **options: Any,
) -> FastAPI:
    """Make an application with one database and one route, which passes its session to the body."""
    app = FastAPI()
    install_database(app, engine=engine, **{"shutdown": engine.dispose, **options})
    route(app, kind, "/", dependency, body)
    return app


async def ask(
    engine: Engine | AsyncEngine,
    kind: Kind,
    dependency: Callable[..., Any],
    body: Callable[[Session], Any],
    **options: Any,
) -> int:
    """Make such an application, send it one request, and return the status.

    An exception that the application does not handle is raised here.
    """
    async with asking(engine, kind, dependency, **options) as request:
        return await request(body)


@asynccontextmanager
async def asking(
    engine: Engine | AsyncEngine, kind: Kind, dependency: Callable[..., Any], **options: Any
) -> AsyncGenerator[Callable[[Callable[[Session], Any]], Awaitable[int]]]:
    """Run such an application, and yield a function that sends a request with the given body."""
    bodies: list[Callable[[Session], Any]] = []

    def last(session: Session) -> Any:
        return bodies[-1](session)

    async def request(body: Callable[[Session], Any]) -> int:
        bodies.append(body)
        return (await client.post("/")).status_code

    async with running(application(engine, kind, dependency, last, **options)) as client:
        yield request


async def run_work(engine: Engine | AsyncEngine, work: Any, **options: Any) -> None:
    """Run work in a transaction of a handle, without a pause between attempts."""
    try:
        if isinstance(engine, AsyncEngine):
            await AsyncDatabase(engine, **options).run_in_transaction(work, backoff=0)
        else:
            Database(engine, **options).run_in_transaction(work, backoff=0)
    finally:
        await dispose(engine)


async def dispose(engine: Engine | AsyncEngine) -> None:
    """Dispose of an engine of either colour."""
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        engine.dispose()


async def run_in_transaction(
    engine: Engine | AsyncEngine, work: Callable[[Session], Any], **options: Any
) -> None:
    """Run work that takes a `Session`, on an engine of either colour."""
    asynchronous = isinstance(engine, AsyncEngine)
    await run_work(engine, (lambda s: s.run_sync(work)) if asynchronous else work, **options)


def session_class(kind: Kind, class_: type[Session]) -> dict[str, Any]:
    """Return the session options that select the application's own `Session` class."""
    return {"sync_session_class" if kind.asynchronous else "class_": class_}


class Hearing(Session):
    """A session class with a `before_commit` listener, so it commits even without changes."""


event.listen(Hearing, "before_commit", lambda _session: None)


def sqlite() -> Engine:
    """Build a synchronous in-memory engine, whose one connection any thread may use and close."""
    options = {"check_same_thread": False}
    return create_engine("sqlite://", connect_args=options, poolclass=StaticPool)


def async_sqlite() -> AsyncEngine:
    """Build an asynchronous in-memory engine."""
    return create_async_engine("sqlite+aiosqlite://")


def note_disposal(engine: Engine | AsyncEngine, log: list[str], note: str = "disposed") -> None:
    """Add a note to the log when the engine is disposed of."""
    inner = sync_engine(engine)
    event.listen(inner, "engine_disposed", lambda _engine: log.append(note))


async def turns() -> None:
    """Let the event loop run whatever is ready, and whatever becomes ready as a result."""
    for _ in range(50):
        await asyncio.sleep(0)


def counted_waits(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Record each call of `asyncio.wait` from now on.

    Code that spins calls it at every turn of the event loop.
    """
    waits: list[object] = []
    wait = asyncio.wait

    async def counted(*arguments: Any, **options: Any) -> Any:
        waits.append(arguments)
        return await wait(*arguments, **options)

    monkeypatch.setattr(asyncio, "wait", counted)
    return waits


def noting(log: list[str], note: str = "disposed") -> Callable[[], AsyncEngine]:
    """Make a factory of asynchronous engines that add a note to the log when disposed of."""

    def build() -> AsyncEngine:
        engine = async_sqlite()
        note_disposal(engine, log, note)
        return engine

    return build


async def is_kept(use: Callable[[FastAPI], Awaitable[None]]) -> bool:
    """Return whether something keeps an application alive after it has been used."""
    app = FastAPI()
    left = weakref.ref(app)
    await use(app)
    del app
    await turns()  # for the callbacks of tasks that have ended
    for thread in threading.enumerate():
        if thread.name == "fastapi_sqlnative":
            thread.join()  # the thread refers to its finished work until it ends
    gc.collect()
    return left() is not None


async def quiet(rows: Rows) -> None:
    """Wait until no connection is running a statement or has an open transaction.

    The server notices a closed connection late.
    """

    def is_quiet() -> bool:
        return rows.backends("active") == rows.backends("idle in transaction%") == 0

    await until(is_quiet)
