"""Tests of the same application with either driver."""

from collections.abc import Iterator

import psycopg
import pytest

from conftest import WorkerPostgres
from examples.postgresql.app import create_app
from tests.serving import Served, serve

pytestmark = pytest.mark.driver_decides


@pytest.fixture
def served(database: WorkerPostgres) -> Iterator[Served]:
    """Serve the example with each driver in turn."""
    with serve(create_app()) as served:
        yield served


def test_the_server_knows_the_limits(served: Served) -> None:
    """Both drivers pass the limits to the server, each in its own way."""
    assert served.client.get("/limits").json() == {
        "idle_in_transaction_session_timeout": "10000ms",
        "lock_timeout": "300ms",
        "statement_timeout": "1000ms",
    }


def test_a_statement_that_takes_too_long_is_ended(served: Served) -> None:
    """The client gets a 504 while the statement would still run, and the next request works."""
    assert served.client.get("/slow", params={"seconds": 60}).status_code == 504
    assert served.client.get("/slow", params={"seconds": 0}).status_code == 200


def test_a_row_that_is_locked_for_long_is_not_waited_for(
    served: Served, databases: WorkerPostgres
) -> None:
    """The client gets a 503 with a Retry-After, and a retry succeeds once the row is unlocked."""
    assert served.client.post("/counters/visits").json() == 1
    with psycopg.connect(databases.dsn) as other:
        other.execute("SELECT FROM postgresql_counter FOR UPDATE")
        busy = served.client.post("/counters/visits")
        assert (busy.status_code, "Retry-After" in busy.headers) == (503, True)
    assert served.client.post("/counters/visits").json() == 2


def test_connections_that_died_in_the_pool_cost_no_request(
    served: Served, databases: WorkerPostgres
) -> None:
    """After the server has closed every idle connection, the next request still succeeds."""
    assert served.client.post("/counters/visits").json() == 1
    with psycopg.connect(databases.dsn, autocommit=True) as other:
        ended = other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchall()
    assert (True,) in ended
    assert served.client.post("/counters/visits").json() == 2
