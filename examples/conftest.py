"""Fixtures that provide an example with what the launcher does: empty databases and addresses."""

from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from conftest import WorkerPostgres


@pytest.fixture
def worker(pytestconfig: pytest.Config) -> str:
    """Return this worker's name."""
    name: str = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    return name


@pytest.fixture
def databases(
    empty_databases: WorkerPostgres, monkeypatch: pytest.MonkeyPatch, patient_probes: None
) -> WorkerPostgres:
    """Provide two empty databases, with their addresses in the environment."""
    monkeypatch.setenv("DATABASE_URL", empty_databases.url("psycopg"))
    monkeypatch.setenv("SECOND_DATABASE_URL", empty_databases.second.url("psycopg"))
    return empty_databases


@pytest.fixture(params=["psycopg", pytest.param("asyncpg", marks=pytest.mark.other_driver)])
def driver(request: pytest.FixtureRequest) -> str:
    """Return each asynchronous driver in turn."""
    found: str = request.param
    return found


@pytest.fixture
def database(
    driver: str, databases: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> WorkerPostgres:
    """Provide an empty database, with its address for this driver in the environment."""
    monkeypatch.setenv("DATABASE_URL", databases.url(driver))
    return databases


@pytest.fixture
def owner(database: WorkerPostgres) -> Iterator[psycopg.Connection]:
    """Connect to the example's database as its owner."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def mariadb_database(mariadb: str, worker: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Create a MariaDB database for one test, with its address in the environment."""
    server, name = make_url(mariadb), f"sqlnative_{worker}_example"
    engine = create_engine(server.set(drivername="mysql+pymysql"), poolclass=NullPool)
    url = server.set(drivername="mysql+asyncmy", database=name)
    with engine.connect() as connection:
        connection.execute(text(f"CREATE OR REPLACE DATABASE {name}"))
        monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
        yield url.render_as_string(hide_password=False)
        connection.execute(text(f"DROP DATABASE {name}"))
