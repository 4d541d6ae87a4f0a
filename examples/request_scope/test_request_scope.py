"""Tests over HTTP of what a request's scope reaches, and what it does not."""

import logging
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from examples.request_scope.app import Transaction, create_app
from examples.request_scope.database import Change
from fastapi_sqlnative import AsyncDatabase, installed_databases
from tests.serving import Served, serve, wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Client:
    """A client for the example."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def call(self, method: str, path: str, user: str, trace: str = "") -> Any:
        headers = {"Authorization": f"Bearer {user}"}
        if trace:
            headers["traceparent"] = f"00-{trace}-b7ad6b7169203331-01"
        return self.served.client.request(method, path, headers=headers)


@contextmanager
def served() -> Generator[Client]:
    """Serve the example, and check at the end what its connections still hold of requests."""
    app = create_app()

    @app.get("/left-behind")
    async def look() -> list[str | None]:
        database = installed_databases(app, AsyncDatabase)["default"]
        async with database.session() as session:
            connection = await session.connection()
            name = await connection.exec_driver_sql("SELECT current_setting('application_name')")
            user = await connection.exec_driver_sql("SELECT current_setting('app.user', true)")
            return [name.scalar(), user.scalar()]

    @app.post("/without-a-scope")
    async def write(session: Transaction) -> None:
        session.add(Change(what="whose?"))

    with serve(app) as running:
        yield Client(running)
        before, user = running.client.get("/left-behind").json()
        assert len(before) < len(TRACE)
        assert not user


def test_the_scope_reaches_the_server(owner: psycopg.Connection) -> None:
    """A row records its user and trace, also if it is written after the response."""
    with served() as client:
        answer = client.call("POST", "/changes?what=paint", "ada", TRACE)
        assert answer.json() == {"what": "paint", "user": "ada", "trace": TRACE}
        assert answer.headers["X-Trace"] == TRACE
        assert client.call("GET", "/trace", "grace", TRACE).json() == TRACE
        wait_until(lambda: len(client.call("GET", "/changes", "ada").json()) == 2)
        assert client.call("GET", "/changes", "grace").json() == []
    rows = owner.execute('SELECT what, tenant, "user", trace FROM request_scope_change').fetchall()
    assert rows == [
        ("paint", "acme", "ada", TRACE),
        ("followed up 1", "acme", "ada", TRACE),
    ]


@pytest.mark.parametrize(
    "trace", ["x" * 32, "'; DROP TABLE request_scope_change; --", TRACE.upper()]
)
def test_a_trace_that_is_none_is_not_believed(owner: psycopg.Connection, trace: str) -> None:
    """An invalid header starts a new trace; none of it reaches the server or the log."""
    with served() as client:
        made = client.call("GET", "/trace", "ada", trace).json()
        assert len(made) == 32
        assert made != trace


def test_what_has_no_scope_writes_nothing(owner: psycopg.Connection) -> None:
    """A session without a scope cannot write, not even on a connection that has had one."""
    with served() as client:
        assert client.call("POST", "/changes?what=paint", "ada", TRACE).status_code == 201
        assert client.call("POST", "/without-a-scope", "ada", TRACE).status_code == 500
    assert owner.execute("SELECT count(*) FROM request_scope_change").fetchone() == (2,)


def test_who_is_unknown_begins_nothing(owner: psycopg.Connection) -> None:
    """Without a user there is no scope, and the request is refused before any statement."""
    with served() as client:
        for path in "/changes", "/trace":
            assert client.call("GET", path, "mallory").status_code == 401


def test_requests_at_once_keep_their_scope(owner: psycopg.Connection) -> None:
    """Many requests on few connections each write and see their own trace."""
    with served() as client, ThreadPoolExecutor(12) as threads:

        def both(number: int) -> bool:
            trace, user = f"{number + 1:032x}", ("ada", "grace")[number % 2]
            seen = client.call("GET", "/trace", user, trace).json()
            written = client.call("POST", f"/changes?what={number}", user, trace).json()
            return (seen, written["user"], written["trace"]) == (trace, user, trace)

        assert all(threads.map(both, range(24)))


def test_the_log_knows_the_trace(
    owner: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """A log line has the trace of its request."""
    caplog.set_level(logging.INFO, "examples.request_scope")
    with served() as client:
        client.call("POST", "/changes?what=paint", "ada", TRACE)
    (record,) = (each for each in caplog.records if each.name == "examples.request_scope")
    assert record.__dict__["trace"] == TRACE
    assert record.__dict__["tenant"] == "acme"
