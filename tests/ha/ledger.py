"""A load on an application whose servers change, and a ledger of the answers."""

import itertools
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Engine, insert
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from fastapi_sqlnative import health_router, install_database, install_error_handlers, transactional
from fastapi_sqlnative.exceptions import CommitOutcomeUnknownError
from tests.serving import Item, Kind, Served, route

CLIENTS = 4


def application(kind: Kind, engine: Engine | AsyncEngine) -> FastAPI:
    """Build an application that stores a row per request and reports unknown outcomes as such."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    app.include_router(health_router(databases={"default": "writable"}, max_age=0.05))
    install_error_handlers(app)

    @app.exception_handler(CommitOutcomeUnknownError)
    async def say_unknown(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "unknown"}, 500)

    def add(session: Session, name: str) -> None:
        session.execute(insert(Item).values(name=name))

    names = itertools.count()
    prefix = kind.id

    def add_next(session: Session) -> str:
        name = f"{prefix} {next(names)}"
        session.info["name"] = name
        add(session, name)
        return name

    route(app, kind, "/items", transactional(), add_next)
    return app


@dataclass
class Ledger:
    """The answers that clients received: stored, unknown, or not stored."""

    stored: set[str] = field(default_factory=set)
    unknown: int = 0
    failed: int = 0
    unlike: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, response: httpx.Response) -> None:
        """Record one answer."""
        with self.lock:
            if response.status_code == 201:
                self.stored.add(response.json())
            elif response.json() == {"detail": "unknown"}:
                self.unknown += 1
            elif response.status_code in (503, 504):
                self.failed += 1
            else:
                self.unlike.append(f"{response.status_code} {response.text}")


@contextmanager
def load(served: Served, clients: int = CLIENTS) -> Generator[Ledger]:
    """Send requests from several clients, each one after another, until the block ends."""
    ledger, ended = Ledger(), threading.Event()

    def send() -> None:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            while not ended.is_set():
                ledger.enter(client.post("/items"))

    with ExitStack() as closing:
        threads = [threading.Thread(target=send) for _ in range(clients)]
        for thread in threads:
            thread.start()
            closing.callback(thread.join, 60)
        closing.callback(ended.set)
        yield ledger
