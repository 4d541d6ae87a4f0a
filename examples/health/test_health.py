"""Tests of what a load balancer and an operator see while databases fail and recover."""

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from conftest import PostgresDatabase, WorkerPostgres
from examples.health.app import create_app
from tests.serving import Served, launch, serve, wait_until

ROOT = Path(__file__).parents[2]
OPERATOR = {"Authorization": "Bearer let-me-in"}


@pytest.fixture
def served(databases: WorkerPostgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve a shop that is open."""
    monkeypatch.setenv("OPERATOR_TOKEN", "let-me-in")
    with serve(create_app()) as served:
        assert served.client.put("/marker", headers=OPERATOR).status_code == 204
        yield served


def becomes(
    served: Served, status: int, overall: str, *databases: str, check: str = "up"
) -> Callable[[], bool]:
    """Check whether readiness has this status; a result may be a second old."""
    states = dict(zip(("default", "analytics"), databases, strict=True))
    body = {"status": overall, "databases": states, "checks": {"open": check}}

    def condition() -> bool:
        response = served.client.get("/health/ready")
        return (response.status_code, response.json()) == (status, body)

    return condition


@contextmanager
def away(database: PostgresDatabase) -> Generator[None]:
    """Make a database refuse all connections, and close those that it has."""
    url = make_url(database.dsn)
    assert url.database is not None
    server = url.set(database="postgres").render_as_string(hide_password=False)
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    end = "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE datname = %s"
    with psycopg.connect(server, autocommit=True) as connection:
        name = sql.Identifier(url.database)
        connection.execute(allow.format(name, sql.SQL("false")))
        connection.execute(end, [url.database])
        try:
            yield
        finally:
            connection.execute(allow.format(name, sql.SQL("true")))


def test_readiness_follows_the_marker_row(served: Served) -> None:
    """Without the row the shop is not ready, with it it is, without a restart."""
    wait_until(becomes(served, 200, "ready", "up", "up"))
    assert served.client.delete("/marker", headers=OPERATOR).status_code == 204
    wait_until(becomes(served, 503, "not_ready", "up", "up", check="down"))
    assert served.client.put("/marker", headers=OPERATOR).status_code == 204
    wait_until(becomes(served, 200, "ready", "up", "up"))


def test_a_required_database_takes_readiness_with_it(
    served: Served, databases: WorkerPostgres
) -> None:
    """While it is unreachable, the process is alive but not ready; then it is ready again."""
    with away(databases):
        wait_until(becomes(served, 503, "not_ready", "down", "up", check="down"))
        body = served.client.get("/health/ready").text
        assert served.client.get("/health/live").status_code == 200
        assert served.client.get("/stock").status_code == 503
    wait_until(becomes(served, 200, "ready", "up", "up"))
    assert served.client.get("/stock").json() == 3
    assert '"default":"down"' in body
    url = make_url(databases.dsn)
    for secret in url.database, url.host, "FATAL", "connection", "psycopg":
        assert secret is not None
        assert secret not in body


def test_a_degraded_database_is_reported_only(served: Served, databases: WorkerPostgres) -> None:
    """Without it, the application is degraded but ready, and only its own routes fail."""
    with away(databases.second):
        wait_until(becomes(served, 200, "degraded", "up", "down"))
        assert served.client.get("/stock").json() == 3
        assert served.client.get("/report").status_code == 503
    wait_until(becomes(served, 200, "ready", "up", "up"))
    assert served.client.get("/report").json() == 7


def test_the_shop_is_opened_by_operators(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and closing require the token, and always fail if none is configured."""
    assert served.client.delete("/marker").status_code == 401
    wrong = {"Authorization": "Bearer guessed"}
    assert served.client.delete("/marker", headers=wrong).status_code == 403
    monkeypatch.setenv("OPERATOR_TOKEN", "")
    assert served.client.delete("/marker", headers=OPERATOR).status_code == 403
    nothing = {"Authorization": "Bearer"}
    assert served.client.delete("/marker", headers=nothing).status_code == 401


@contextmanager
def read_only(database: PostgresDatabase) -> Generator[None]:
    """Make a database read-only for new connections, and close those that it has."""
    name = make_url(database.dsn).database
    assert name is not None
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        change = sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}")
        end = (
            "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
            " WHERE datname = %s AND pid <> pg_backend_pid()"
        )
        for value in "on", "off":
            connection.execute(change.format(sql.Identifier(name), sql.SQL(value)))
            connection.execute(end, [name])
            if value == "on":
                yield


def test_a_database_that_takes_no_writes_is_no_place_to_sell(
    served: Served, databases: WorkerPostgres
) -> None:
    """As after a failover to a standby: reads would work, but the shop is not ready."""
    with read_only(databases):
        wait_until(becomes(served, 503, "not_ready", "read_only", "up"))
        assert served.client.get("/health/live").status_code == 200
    wait_until(becomes(served, 200, "ready", "up", "up"))


@pytest.mark.usefixtures("databases")
@pytest.mark.slow("a process, 1 s: what it does is tested in test_draining")
def test_sigterm_drains_before_it_stops() -> None:
    """The process reports that it is draining, and serves until a second signal."""
    command = ["-m", "uvicorn", "--factory", "examples.health.app:create_app", "--port", "0"]
    with launch([sys.executable, *command], ROOT, DRAIN_SECONDS="60") as (process, client):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").json()["status"] == "draining")
        assert client.get("/health/ready").status_code == 503
        assert client.get("/stock").json() == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
