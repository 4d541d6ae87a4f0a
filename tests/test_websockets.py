"""Rule 15: a websocket's session, for the whole endpoint or, with the handle, for each message."""

import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.sync.client import ClientConnection, connect

from fastapi_sqlnative import get_database_handle, get_db, install_database, transactional
from tests.serving import Item, Kind, Rows, serve, wait_until


class Ended:
    """A middleware that records when and how the application finishes a websocket."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.errors: list[BaseException | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: BaseException | None = None
        try:
            await self.app(scope, receive, send)
        except Exception as raised:
            error = raised
            raise
        finally:
            if scope["type"] == "websocket":
                self.errors.append(error)

    def error(self) -> BaseException | None:
        """Wait for a websocket's end, and return what the application raised."""
        wait_until(lambda: bool(self.errors))
        return self.errors.pop()


@contextmanager
def connected(app: FastAPI) -> Generator[tuple[ClientConnection, Ended]]:
    ended = Ended(app)
    with serve(ended) as served:
        url = served.url.replace("http", "ws")
        with connect(f"{url}/", open_timeout=10, close_timeout=1) as client:
            yield client, ended


def make_app(engine: Engine) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app


async def run(session: Any, body: Callable[[Session], Any]) -> Any:
    """Run work with a session of either colour from the event loop."""
    if isinstance(session, AsyncSession):
        return await session.run_sync(body)
    return await run_in_threadpool(body, session)


def keep(app: FastAPI, dependency: Callable[..., Any], until: Callable[[WebSocket], Any]) -> None:
    """Add a websocket that stores messages in one session, and calls `until` after "end"."""

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, session: Annotated[Any, Depends(dependency)]) -> None:
        await websocket.accept()
        while (name := await websocket.receive_text()) != "end":

            def body(session: Session, name: str = name) -> list[str]:
                session.add(Item(name=name))
                return list(session.scalars(select(Item.name).order_by(Item.name)))

            await websocket.send_json(await run(session, body))
        await until(websocket)


async def close(websocket: WebSocket) -> None:
    await websocket.close()


async def fail(_websocket: WebSocket) -> None:
    raise ZeroDivisionError


async def wait_for_more(websocket: WebSocket) -> None:
    await websocket.receive_text()


def test_a_transaction_commits_when_the_endpoint_returns(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A websocket's messages are one transaction, which commits when the endpoint has returned."""
    app = make_app(engine)
    keep(app, transactional(), close)
    with connected(app) as (client, ended):
        for name in "a", "b":
            client.send(name)
            client.recv(10)
        assert rows.names == []
        client.send("end")
        assert ended.error() is None
        assert rows.names == ["a", "b"]
        assert rows.backends("idle in transaction%") == 0


@pytest.mark.parametrize(
    ("until", "error"), [(fail, "ZeroDivisionError"), (wait_for_more, "WebSocketDisconnect")]
)
def test_a_failure_or_a_disconnect_rolls_back(
    kind: Kind, engine: Engine, rows: Rows, until: Callable[[WebSocket], Any], error: str
) -> None:
    """Nothing is stored if the endpoint raises, as it does when the client disconnects."""
    app = make_app(engine)
    keep(app, transactional(), until)
    with connected(app) as (client, ended):
        client.send("a")
        client.recv(10)
        client.send("end")
        if until is wait_for_more:
            client.socket.shutdown(socket.SHUT_RDWR)
        assert type(ended.error()).__name__ == error
        assert rows.backends("idle in transaction%") == 0
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # it is a QueuePool
    assert rows.names == []


def test_a_forgotten_commit_is_told(kind: Kind, engine: Engine, rows: Rows) -> None:
    """With get_db, a missing commit fails a websocket as it fails a request."""
    app = make_app(engine)
    keep(app, get_db(), close)
    with connected(app) as (client, ended):
        client.send("a")
        client.recv(10)
        client.send("end")
        assert type(ended.error()).__name__ == "UncommittedChangesError"
    assert rows.names == []


def test_the_handle_has_a_transaction_for_each_message(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """With the handle, each message is stored immediately, and no connection is held in between."""
    app = make_app(engine)

    def store(database: Any, name: str) -> None:
        with database.transaction() as session:
            session.add(Item(name=name))

    @app.websocket("/")
    async def endpoint(
        websocket: WebSocket, database: Annotated[Any, Depends(get_database_handle())]
    ) -> None:
        await websocket.accept()
        async for name in websocket.iter_text():
            if kind.asynchronous:
                async with database.transaction() as session:
                    session.add(Item(name=name))
            else:
                await run_in_threadpool(store, database, name)
            await websocket.send_text("stored")

    with connected(app) as (client, ended):
        for count, name in enumerate(("a", "b"), 1):
            client.send(name)
            client.recv(10)
            assert len(rows.names) == count
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # it is a QueuePool
        client.close()
        assert ended.error() is None
