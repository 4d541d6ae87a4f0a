"""docs/background.md: the effect of a failing background task on the client's connection."""

import contextlib
import socket
from collections.abc import Generator
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.concurrency import run_in_threadpool

from fastapi_sqlnative import AsyncDatabase, get_database_handle, install_database, transactional
from tests.serving import Item, Kind, Rows, Served, route, serve, using

POST = b"POST /items HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"


@contextlib.contextmanager
def served(kind: Kind, engine: Engine | AsyncEngine, *, caught: bool) -> Generator[Served]:
    """Serve an endpoint whose background task fails in the database and may catch the error."""

    async def task(database: Any) -> None:
        def fail(session: Any) -> None:
            session.execute(text("SELECT 1 / 0"))

        expected = contextlib.suppress(Exception) if caught else contextlib.nullcontext()
        with expected:
            if isinstance(database, AsyncDatabase):
                async with database.transaction() as session:
                    await session.run_sync(fail)
            else:
                await run_in_threadpool(database.run_in_transaction, fail)

    async def enlist(
        tasks: BackgroundTasks, database: Annotated[Any, Depends(get_database_handle())]
    ) -> None:
        tasks.add_task(task, database)

    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    add = using(kind, Depends(transactional()), lambda session: session.add(Item(name="x")))
    app.post("/items", status_code=201, dependencies=[Depends(enlist)])(add)
    route(app, kind, "/next", transactional(), lambda session: session.scalar(text("SELECT 42")))
    with serve(app) as running:
        yield running


def read_answer(connection: socket.socket) -> bytes:
    """Read one response with the body `null`."""
    answer = b""
    while not answer.endswith(b"\r\n\r\nnull"):
        answer += connection.recv(65536)
    return answer


@pytest.mark.parametrize("caught", [False, True], ids=["raises", "is-caught"])
def test_a_task_that_fails_costs_the_connection(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows, caught: bool
) -> None:
    """After a background task that raises, uvicorn closes the client's connection without notice.

    A task that catches its error leaves the connection open.
    """
    with served(kind, engine, caught=caught) as running:
        port = int(running.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(POST)
            answer = read_answer(connection)
            assert answer.startswith(b"HTTP/1.1 201")
            assert b"connection: close" not in answer.lower()
            if caught:
                connection.sendall(POST.replace(b"items", b"next"))
                assert connection.recv(65536).startswith(b"HTTP/1.1 201")
            else:
                assert connection.recv(1) == b""  # closed, although no header announced it
    assert rows.names == ["x"]
