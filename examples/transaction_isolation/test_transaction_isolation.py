"""Tests of concurrent transactions: the anomalies are provoked, and then prevented."""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

from conftest import WorkerPostgres
from examples.transaction_isolation.app import create_app
from tests.serving import Served, backends, serve, wait_until

SAFE = ["/tickets/locked", "/tickets/at-once", "/tickets/serializable"]


@pytest.fixture
def served(database: WorkerPostgres) -> Iterator[Served]:
    """Serve the example on an empty database: every scenario starts with the same rows."""
    with serve(create_app()) as running:
        yield running


@contextmanager
def held_up(databases: WorkerPostgres, *locks: str) -> Generator[list[Future[int]]]:
    """Lock rows until all requests that the block sends are waiting for one; then release them.

    A plain SELECT does not wait: a request that waits to write has already read.
    """
    sent: list[Future[int]] = []
    with (
        psycopg.connect(databases.dsn, autocommit=True) as watching,
        psycopg.connect(databases.dsn) as other,
    ):
        for lock in locks:
            other.execute(lock.encode())
        yield sent
        wait_until(lambda: backends(watching, wait="Lock/%") == len(sent))
        other.rollback()


def two(served: Served, databases: WorkerPostgres, lock: str, *paths: str) -> list[int]:
    """Send two overlapping requests, and return their sorted statuses."""
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
    """Two sales that read the same number both succeed, but only one ticket is subtracted."""
    assert two(served, databases, EVENT, *["/tickets/carelessly"] * 2) == [200, 200]
    assert state(served)[0] == 4


@pytest.mark.parametrize("path", SAFE)
def test_no_sale_is_lost(served: Served, databases: WorkerPostgres, path: str) -> None:
    """Two overlapping sales subtract two tickets, in each of the correct ways."""
    assert two(served, databases, EVENT, path, path) == [200, 200]
    assert state(served)[0] == 3


@pytest.mark.parametrize("path", SAFE)
def test_as_many_are_sold_as_there_are(served: Served, path: str) -> None:
    """Of twenty simultaneous buyers, five get a ticket, and the others are told there is none."""
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: status(served, path), range(20)))
    assert sorted(answers) == [200] * 5 + [409] * 15
    assert state(served)[0] == 0


def off_call(level: str) -> list[str]:
    return [f"/doctors/{name}/off-call/{level}" for name in "ab"]


def test_repeatable_read_lets_both_doctors_go(served: Served, databases: WorkerPostgres) -> None:
    """Each sees the other on call and updates its own row: no doctor is left, without an error."""
    assert two(served, databases, DOCTORS, *off_call("REPEATABLE READ")) == [200, 200]
    assert state(served)[1] == 0


def test_serializable_keeps_one_doctor(served: Served, databases: WorkerPostgres) -> None:
    """One of the two is retried after a serialization failure, sees the other gone, and stays."""
    assert two(served, databases, DOCTORS, *off_call("SERIALIZABLE")) == [200, 409]
    assert state(served)[1] == 1
