"""Tests over HTTP of what reaches the primary and the replica."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

import psycopg
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Executable, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from conftest import WorkerPostgres
from examples.read_replica.app import Article, create_app
from fastapi_sqlnative import describe_database_error, get_db, reader, transactional
from tests.serving import Served, serve

INSERT = "INSERT INTO read_replica_article (title) VALUES ('x')"


@contextmanager
def served(app: FastAPI | None = None) -> Generator[Served]:
    with serve(app or create_app()) as running:
        yield running


def stored(databases: WorkerPostgres) -> tuple[int, int]:
    """Count the articles in both databases, from separate connections."""
    counted = []
    for database in databases, databases.second:
        with psycopg.connect(database.dsn) as connection:
            row = connection.execute("SELECT count(*) FROM read_replica_article").fetchone()
            assert row is not None
            counted.append(row[0])
    return counted[0], counted[1]


def test_routes_say_what_they_read_from(databases: WorkerPostgres) -> None:
    """A write is on the primary immediately, and on the replica once it has caught up."""
    with served() as running:
        client = running.client
        emma = {"id": 1, "title": "Emma"}
        assert client.post("/articles?title=Emma").json() == emma
        assert stored(databases) == (1, 0)
        assert client.get("/articles").json() == []
        assert client.get("/articles/1").json() == emma
        assert client.get("/statistics").json() == {"articles": 0, "longest": None}
        assert client.post("/demo/catch-up").json() == 1
        assert client.post("/demo/catch-up").json() == 0
        assert client.get("/articles").json() == [emma]
        assert client.get("/statistics").json() == {"articles": 1, "longest": 4}
        assert client.get("/articles/2").status_code == 404
    assert stored(databases) == (1, 1)


def add_mistakes(app: FastAPI) -> None:
    """Add routes that write to the replica."""
    orm = insert(Article).values(title="x")
    statements: dict[str, Executable] = {"orm": orm, "text": text(INSERT)}

    @app.post("/transaction/{how}")
    async def write_in_a_transaction(
        how: str, session: Annotated[AsyncSession, Depends(transactional("replica"))]
    ) -> None:
        await session.execute(statements[how])

    @app.post("/session/{how}")
    async def write_in_a_session(
        how: str, session: Annotated[AsyncSession, Depends(get_db("replica"))]
    ) -> None:
        await session.execute(statements[how])
        await session.commit()

    @app.post("/reader/{how}")
    async def write_through_a_reader(
        how: str, session: Annotated[AsyncSession, Depends(reader("replica"))]
    ) -> None:
        await session.execute(statements[how])

    @app.exception_handler(DBAPIError)
    async def tell(_request: Request, error: DBAPIError) -> JSONResponse:
        failure = describe_database_error(error)
        return JSONResponse(failure and failure.kind, 500)


@pytest.mark.parametrize(
    "path",
    ["/transaction/orm", "/transaction/text", "/session/orm", "/session/text"],
)
def test_the_server_refuses_to_write_to_the_replica(databases: WorkerPostgres, path: str) -> None:
    """A write to the replica fails there, however it is sent."""
    app = create_app()
    add_mistakes(app)
    with served(app) as running:
        answer = running.client.post(path)
        assert (answer.status_code, answer.json()) == (500, "read_only")
        assert running.client.get("/articles").json() == []
    assert stored(databases) == (0, 0)


def test_a_replica_that_is_away_stops_no_write(databases: WorkerPostgres) -> None:
    """Without its replica, the application still writes to and reads from the primary."""
    with served() as running:
        with psycopg.connect(databases.second.dsn) as owner:
            owner.execute("DROP TABLE read_replica_article")
        assert running.client.get("/articles").status_code == 500
        assert running.client.post("/articles?title=Emma").status_code == 201
        assert running.client.get("/articles/1").status_code == 200
