"""The application's test suite: isolated where that is enough, on a clone elsewhere."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from examples.testing.app import Show
from examples.testing.conftest import ShowFactory
from fastapi_sqlnative.testing import (
    CapturedStatements,
    fail_next_checkout,
    fail_next_commit,
    fail_next_statement,
)

SHOW = {"title": "Hamlet", "left": 1}
SALE = {"show": "Hamlet", "customer": "Ada"}


@pytest.fixture
def hamlet(isolated_session: Session) -> Show:
    """Store a show with one ticket, for one test."""
    isolated_session.add(show := Show(**SHOW))
    isolated_session.commit()
    return show


# --- isolated: queries, constraints, routes ---


def test_a_ticket_is_sold_once(
    isolated_client: TestClient, isolated_session: Session, hamlet: Show
) -> None:
    """The second customer gets no ticket, and is not stored."""
    assert isolated_client.post("/tickets", json=SALE).status_code == 201
    late = isolated_client.post("/tickets", json=SALE | {"customer": "Grace"})
    assert (late.status_code, late.json()) == (409, {"detail": "There is no ticket."})
    assert isolated_client.get("/customers").json() == {"Ada": 1}
    isolated_session.refresh(hamlet)
    assert hamlet.left == 0


def test_shows_sell_apart(
    isolated_client: TestClient, show_factory: type[ShowFactory], isolated_session: Session
) -> None:
    """A sale for one show does not change the others, which a factory creates."""
    shows = show_factory.create_batch(3)
    sale = {"show": shows[1].title, "customer": "Ada"}
    assert isolated_client.post("/tickets", json=sale).status_code == 201
    isolated_session.expire_all()
    assert [show.left for show in shows] == [1, 0, 1]


@pytest.mark.usefixtures("hamlet")
def test_one_title_is_one_show(isolated_client: TestClient) -> None:
    """A refused request does not undo earlier changes."""
    again = isolated_client.post("/shows", json=SHOW)
    assert (again.status_code, again.json()["detail"]) == (409, "There is a show of this title.")
    assert isolated_client.post("/tickets", json=SALE).status_code == 201


def test_a_ticket_is_for_a_show(isolated_client: TestClient) -> None:
    """A constraint that is checked at COMMIT gets a response like any other, and stores nothing."""
    imported = isolated_client.post("/imported-tickets?show_id=99&customer=Ada")
    assert imported.status_code == 422, imported.text
    assert isolated_client.get("/customers").json() == {}


def test_nothing_is_left_by_the_others(isolated_client: TestClient) -> None:
    """A show that other tests stored does not exist here."""
    assert isolated_client.post("/shows", json=SHOW).status_code == 201


@pytest.mark.anyio
async def test_on_the_event_loop(isolated_async_client: httpx.AsyncClient) -> None:
    """The same works with an asynchronous client."""
    assert (await isolated_async_client.post("/shows", json=SHOW)).status_code == 201
    assert (await isolated_async_client.post("/tickets", json=SALE)).status_code == 201
    assert (await isolated_async_client.get("/customers")).json() == {"Ada": 1}


# --- how many queries ---


@pytest.mark.parametrize("customers", [1, 5])
def test_customers_are_two_queries(
    isolated_client: TestClient, statements: CapturedStatements, customers: int
) -> None:
    """However many customers there are: one query for them, and one for all of their tickets."""
    isolated_client.post("/shows", json=SHOW | {"left": customers})
    for number in range(customers):
        isolated_client.post("/tickets", json=SALE | {"customer": f"customer-{number}"})
    statements.clear()
    assert len(isolated_client.get("/customers").json()) == customers
    assert len(statements.queries) == 2


# --- how the application handles failures ---


@pytest.mark.usefixtures("hamlet")
def test_a_deadlock_is_not_seen(app: FastAPI, isolated_client: TestClient) -> None:
    """The sale is retried, and the ticket is sold once."""
    with fail_next_statement(app, "deadlock", containing="UPDATE testing_show"):
        assert isolated_client.post("/tickets", json=SALE).status_code == 201
    assert isolated_client.get("/customers").json() == {"Ada": 1}


@pytest.mark.usefixtures("hamlet")
def test_a_lost_commit_is_not_repeated(app: FastAPI, isolated_client: TestClient) -> None:
    """The outcome is unknown: the client is told so, and no second ticket is sold."""
    with fail_next_commit(app, "connection_lost_after"):
        assert isolated_client.post("/tickets", json=SALE).status_code == 500
    assert isolated_client.get("/customers").json() == {"Ada": 1}


def test_a_busy_pool_is_answered(app: FastAPI, isolated_client: TestClient) -> None:
    """The client is invited to retry."""
    with fail_next_checkout(app):
        busy = isolated_client.get("/customers")
    assert busy.status_code == 503
    assert "retry-after" in busy.headers


# --- real commits: what only several connections can show ---


def test_the_last_ticket_is_sold_once(cloned_client: TestClient) -> None:
    """Many customers buy at the same time, and one gets the ticket."""
    cloned_client.post("/shows", json=SHOW)

    def buy(number: int) -> int:
        sale = SALE | {"customer": f"customer-{number}"}
        return cloned_client.post("/tickets", json=sale).status_code

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(buy, range(8))) == [201, *[409] * 7]
