"""Tests of queries that are too slow or whose client has gone."""

import socket
from collections.abc import Callable, Iterator

import httpx
import psycopg
import pytest

from conftest import WorkerPostgres
from examples.slow_requests.app import create_app
from tests.serving import Served, backends, serve, wait_until

pytestmark = pytest.mark.driver_decides


@pytest.fixture
def served(database: WorkerPostgres) -> Iterator[Served]:
    """Serve the example with each driver in turn."""
    with serve(create_app()) as served:
        yield served


@pytest.fixture
def sleeping(databases: WorkerPostgres) -> Iterator[Callable[[], int]]:
    """Count the queries that sleep on the server, from a separate connection."""
    with psycopg.connect(databases.dsn, autocommit=True) as connection:
        yield lambda: backends(connection, wait="%/PgSleep")


def test_a_report_that_takes_too_long_ends(served: Served, sleeping: Callable[[], int]) -> None:
    """The client gets a 504, and the server no longer runs the query."""
    assert served.client.get("/reports/60").status_code == 504
    wait_until(lambda: sleeping() == 0)
    wait_until(lambda: served.client.get("/reports/0").json() == "done")


def test_a_search_that_nobody_waits_for_ends(served: Served, sleeping: Callable[[], int]) -> None:
    """The pool names the route while it runs, and is free once the client has gone."""
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(b"GET /searches/60 HTTP/1.1\r\nHost: app\r\n\r\n")
        holder = {"route": "GET /searches/{seconds}", "connections": 1, "idle_in_transaction": 0}
        wait_until(lambda: served.client.get("/pool").json() == [holder])
        # The server ignores a cancel request that overtakes the query.
        wait_until(lambda: sleeping() == 1)
    wait_until(lambda: sleeping() == 0)
    wait_until(lambda: served.client.get("/pool").json() == [])
