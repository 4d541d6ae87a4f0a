"""What the launcher gives an example, for its test: empty databases, and where they are."""

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import NullPool, create_engine, make_url, text

from conftest import SERVER, PostgresDatabase, WorkerPostgres, fresh_database


@pytest.fixture
def worker(pytestconfig: pytest.Config) -> str:
    """Name this worker."""
    name: str = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    return name


@pytest.fixture
def databases(
    pytestconfig: pytest.Config, worker: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WorkerPostgres]:
    """Create two databases for one test, with their addresses in the environment."""
    server = pytestconfig.stash[SERVER].url
    first, second = f"sqlnative_{worker}_example", f"sqlnative_{worker}_example_second"
    with fresh_database(server, first) as dsn, fresh_database(server, second) as second_dsn:
        pair = WorkerPostgres(dsn, PostgresDatabase(second_dsn))
        monkeypatch.setenv("DATABASE_URL", pair.url("psycopg"))
        monkeypatch.setenv("SECOND_DATABASE_URL", pair.second.url("psycopg"))
        yield pair
    with psycopg.connect(server, autocommit=True) as connection:
        # Of tenants_by_row_security. A role is the server's, and outlives its database.
        role = sql.Identifier(f"{first}_app")
        connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(role))


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
