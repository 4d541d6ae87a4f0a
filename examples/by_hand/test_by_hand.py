"""Tests of gift cards under contention."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from conftest import WorkerPostgres
from examples.by_hand.app import create_app
from tests.serving import backends, serve, wait_until


@pytest.mark.usefixtures("databases")
def test_a_card_pays_no_more_than_is_on_it() -> None:
    """Of forty simultaneous payments, exactly as many succeed as the balance allows."""
    with serve(create_app()) as served, ThreadPoolExecutor(40) as threads:
        served.client.post("/cards", json={"code": "xmas", "balance": 100})

        def pay(_: int) -> int:
            path = "/cards/xmas/payments"
            return served.client.post(path, params={"amount": 7}).status_code

        assert Counter(threads.map(pay, range(40))) == {201: 14, 409: 26}
        assert served.client.get("/cards/xmas").json() == 2


def test_a_payment_waits_for_the_row(databases: WorkerPostgres) -> None:
    """While another transaction locks the card, a payment waits, and then sees the new balance."""
    with (
        serve(create_app()) as served,
        ThreadPoolExecutor(1) as thread,
        psycopg.connect(databases.dsn) as other,
        psycopg.connect(databases.dsn, autocommit=True) as watching,
    ):
        served.client.post("/cards", json={"code": "xmas", "balance": 100})
        other.execute("UPDATE by_hand_card SET balance = 10")
        path = "/cards/xmas/payments"
        answer = thread.submit(served.client.post, path, params={"amount": 70})
        wait_until(lambda: backends(watching, wait="Lock/%") == 1)
        other.commit()
        assert answer.result().json() == {"detail": "There are 10 left."}


@pytest.mark.usefixtures("databases")
def test_a_savepoint_fails_alone() -> None:
    """A taken code, also within the same import, fails alone."""
    with serve(create_app()) as served:
        cards = [{"code": code, "balance": 1} for code in ("a", "b", "a", "c")]
        answer = served.client.post("/cards/import", json=cards)
        assert (answer.status_code, answer.json()["refused"]) == (201, ["a"])
        assert [served.client.get(f"/cards/{code}").json() for code in "abc"] == [1, 1, 1]


@pytest.mark.usefixtures("databases")
def test_a_taken_code_is_answered_in_its_own_words() -> None:
    """The second of two equal codes is a 409, and the first keeps its balance."""
    with serve(create_app()) as served:
        assert served.client.post("/cards", json={"code": "a", "balance": 1}).status_code == 201
        taken = served.client.post("/cards", json={"code": "a", "balance": 9})
        assert (taken.status_code, taken.json()["detail"]) == (409, "This code has been issued.")
        assert served.client.get("/cards/a").json() == 1


@pytest.mark.usefixtures("databases")
def test_a_refused_payment_releases_the_row() -> None:
    """An exception inside the block ends the transaction, so the next payment does not wait."""
    with serve(create_app()) as served:
        served.client.post("/cards", json={"code": "a", "balance": 5})
        path = "/cards/a/payments"
        assert served.client.post(path, params={"amount": 9}).status_code == 409
        assert served.client.post(path, params={"amount": 5}).status_code == 201
        assert served.client.get("/cards/a").json() == 0
