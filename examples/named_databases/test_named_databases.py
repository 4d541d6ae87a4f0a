"""Tests of two names for two databases."""

from typing import Annotated

import psycopg
import pytest
from fastapi import Depends
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.testclient import TestClient

from conftest import PostgresDatabase, WorkerPostgres
from examples.named_databases.app import create_app
from fastapi_sqlnative import get_db
from fastapi_sqlnative.exceptions import DatabaseNotInstalledError
from tests.serving import serve


def tables(database: PostgresDatabase) -> list[str]:
    """List the database's tables, according to the server."""
    with psycopg.connect(database.dsn) as connection:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        return [name for (name,) in connection.execute(query)]


def test_each_name_leads_to_its_own_database(databases: WorkerPostgres) -> None:
    """A write under one name goes to that database; the other does not have the table."""
    with serve(create_app()) as served:
        assert served.client.post("/orders", params={"article": "lamp"}).status_code == 201
        assert served.client.post("/orders", params={"article": "chair"}).status_code == 201
        assert served.client.post("/visits", params={"page": "home"}).status_code == 201
        assert served.client.get("/counts").json() == {"orders": 2, "visits": 1}
        assert tables(databases) == ["named_databases_order"]
        assert tables(databases.second) == ["named_databases_visit"]


@pytest.mark.usefixtures("databases")
def test_the_wrong_name_finds_no_table() -> None:
    """A query through the wrong name fails, and never reaches the other database."""
    with TestClient(create_app()) as client:
        with pytest.raises(ProgrammingError, match="named_databases_visit"):
            client.get("/mixed-up")
        assert client.get("/counts").json() == {"orders": 0, "visits": 0}


@pytest.mark.usefixtures("databases")
def test_a_misspelt_name_fails_the_start() -> None:
    """It fails without a request, and the message lists the installed names."""
    app = create_app()

    @app.get("/misspelt")
    async def read(session: Annotated[AsyncSession, Depends(get_db("raports"))]) -> None: ...

    with pytest.raises(DatabaseNotInstalledError) as refused, TestClient(app):
        pass
    for name in "/misspelt", "'raports'", "'reports'", "'shop'":
        assert name in str(refused.value)
