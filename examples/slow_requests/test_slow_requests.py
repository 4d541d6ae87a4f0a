"""Tests of queries that are too slow or whose client has gone."""

import socket
from collections.abc import Callable, Iterator

import httpx
import psycopg
import pytest

from conftest import WorkerPostgres
from examples.slow_requests.app import create_app
from tests.serving import Served, serve, wait_until


@pytest.fixture(params=["psycopg", "asyncpg"])
def served(
    request: pytest.FixtureRequest, databases: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    """Serve the example with each driver in turn."""
    monkeypatch.setenv("DATABASE_URL", databases.url(request.param))
    with serve(create_app()) as served:
        yield served


Running = Callable[[], list[tuple[str | None]]]


@pytest.fixture
def running(databases: WorkerPostgres) -> Iterator[Running]:
    """Tell what the queries that the server runs wait for, from a separate connection."""
    query = (
        "SELECT wait_event FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND state <> 'idle'"
    )
    with psycopg.connect(databases.dsn, autocommit=True) as connection:
        yield lambda: connection.execute(query).fetchall()


def test_a_report_that_takes_too_long_ends(served: Served, running: Running) -> None:
    """The client gets a 504, and the server no longer runs the query."""
    assert served.client.get("/reports/60").status_code == 504
    wait_until(lambda: running() == [])
    wait_until(lambda: served.client.get("/reports/0").json() == "done")


def test_a_search_that_nobody_waits_for_ends(served: Served, running: Running) -> None:
    """The pool names the route while it runs, and is free once the client has gone."""
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(b"GET /searches/60 HTTP/1.1\r\nHost: app\r\n\r\n")
        holder = {"route": "GET /searches/{seconds}", "connections": 1, "idle_in_transaction": 0}
        wait_until(lambda: served.client.get("/pool").json() == [holder])
        # The server ignores a cancel request that overtakes the query.
        wait_until(lambda: running() == [("PgSleep",)])
    wait_until(lambda: running() == [])
    wait_until(lambda: served.client.get("/pool").json() == [])
