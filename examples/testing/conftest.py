"""What the suite shares: two databases for the run, the application, and a client of it."""

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from conftest import SERVER, PostgresDatabase, fresh_database
from examples.testing.app import Base, create_app
from fastapi_sqlnative.testing import override_database
from fastapi_sqlnative.testing.fixtures import (
    isolated_async_client,
    isolated_client,
    statements,
)

__all__ = ["isolated_async_client", "isolated_client", "statements"]


@pytest.fixture(scope="module")
def database_url(pytestconfig: pytest.Config, worker_name: str) -> Iterator[str]:
    """Create the database that all isolated tests share: none of them leaves anything there."""
    server = pytestconfig.stash[SERVER].url
    with fresh_database(server, f"sqlnative_{worker_name}_testing") as dsn:
        yield PostgresDatabase(dsn).url("psycopg")


@pytest.fixture
def other_database_url(pytestconfig: pytest.Config, worker_name: str) -> Iterator[str]:
    """Create an empty database for one test that really commits."""
    server = pytestconfig.stash[SERVER].url
    with fresh_database(server, f"sqlnative_{worker_name}_testing_other") as dsn:
        yield PostgresDatabase(dsn).url("psycopg")


@pytest.fixture(scope="module")
def worker_name(pytestconfig: pytest.Config) -> str:
    """Name this worker of pytest-xdist: each has databases of its own."""
    name: str = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    return name


@pytest.fixture(scope="module")
def app(database_url: str) -> FastAPI:
    """Build the application once; `isolated_client` starts it for each test."""
    return create_app(database_url)


@pytest.fixture
def committing_client(app: FastAPI, other_database_url: str) -> Iterator[TestClient]:
    """Give a client of the application on a database where COMMIT is one."""

    async def build_engine() -> AsyncEngine:
        engine = create_async_engine(other_database_url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        return engine

    with override_database(app, "default", build_engine), TestClient(app) as client:
        yield client
