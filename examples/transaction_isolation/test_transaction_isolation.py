"""Transactions that meet: the damage is done on purpose, and then prevented."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

from conftest import WorkerPostgres
from examples.transaction_isolation.app import create_app
from tests.serving import Served, serve, wait_until

SAFE = ["/tickets/locked", "/tickets/at-once", "/tickets/serializable"]


@pytest.fixture(params=["psycopg", pytest.param("asyncpg", marks=pytest.mark.other_driver)])
def served(
    request: pytest.FixtureRequest, databases: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    """Serve the example on an empty database: every scenario begins with the same rows."""
    monkeypatch.setenv("DATABASE_URL", databases.url(request.param))
    with serve(create_app()) as running:
        yield running


@contextmanager
def held_up(databases: WorkerPostgres, *locks: str) -> Iterator[list[Future[int]]]:
    """Keep rows locked until all requests that the block sends wait for one; then let go.

    A plain SELECT waits for nobody: a request that waits to write has read by now.
    """
    sent: list[Future[int]] = []
    with (
        psycopg.connect(databases.dsn, autocommit=True) as watching,
        psycopg.connect(databases.dsn) as other,
    ):
        for lock in locks:
            other.execute(lock.encode())
        yield sent
        wait_until(lambda: waiting(watching) == len(sent))
        other.rollback()


def waiting(watching: psycopg.Connection) -> int:
    """Count the sessions that wait for a lock."""
    row = watching.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ).fetchone()
    assert row is not None
    return int(row[0])


def two(served: Served, databases: WorkerPostgres, lock: str, *paths: str) -> list[int]:
    """Send two requests that meet, and give their statuses, sorted."""
    with ThreadPoolExecutor(2) as threads:
        with held_up(databases, lock) as sent:
            sent += [threads.submit(status, served, path) for path in paths]
        return sorted(each.result() for each in sent)


def status(served: Served, path: str) -> int:
    return served.client.post(path).status_code


def state(served: Served) -> tuple[int, int]:
    found = served.client.get("/state").json()
    return found["tickets"], found["on_call"]


EVENT = "SELECT FROM transaction_isolation_event FOR UPDATE"
DOCTORS = "SELECT FROM transaction_isolation_doctor FOR UPDATE"


def test_a_careless_sale_is_lost(served: Served, databases: WorkerPostgres) -> None:
    """Two sales that have read the same number both succeed, and one ticket is gone."""
    assert two(served, databases, EVENT, *["/tickets/carelessly"] * 2) == [200, 200]
    assert state(served)[0] == 4


@pytest.mark.parametrize("path", SAFE)
def test_no_sale_is_lost(served: Served, databases: WorkerPostgres, path: str) -> None:
    """Two sales that meet take two tickets, in each of the ways that are right."""
    assert two(served, databases, EVENT, path, path) == [200, 200]
    assert state(served)[0] == 3


@pytest.mark.parametrize("path", SAFE)
def test_as_many_are_sold_as_there_are(served: Served, path: str) -> None:
    """Of twenty buyers at once five get a ticket, and all others are told that there is none."""
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: status(served, path), range(20)))
    assert sorted(answers) == [200] * 5 + [409] * 15
    assert state(served)[0] == 0


def off_call(level: str) -> list[str]:
    return [f"/doctors/{name}/off-call/{level}" for name in "ab"]


def test_repeatable_read_lets_both_doctors_go(served: Served, databases: WorkerPostgres) -> None:
    """Each sees the other on call and writes a row of its own: nobody is left, and no error."""
    assert two(served, databases, DOCTORS, *off_call("REPEATABLE READ")) == [200, 200]
    assert state(served)[1] == 0


def test_serializable_keeps_one_doctor(served: Served, databases: WorkerPostgres) -> None:
    """One of the two cannot have been right: it is run again, sees the other gone, and stays."""
    assert two(served, databases, DOCTORS, *off_call("SERIALIZABLE")) == [200, 409]
    assert state(served)[1] == 1
