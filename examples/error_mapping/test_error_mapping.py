"""Tests of the error mapping examples over HTTP."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url

from conftest import WorkerPostgres
from examples.error_mapping import app_wide, at_a_route
from examples.error_mapping.models import Base
from tests.serving import serve

PARTY = {"title": "Party", "seats": 3}


@pytest.fixture(
    params=["psycopg", pytest.param("asyncpg", marks=pytest.mark.other_driver), "sqlite"]
)
def url(request: pytest.FixtureRequest, postgres: WorkerPostgres, tmp_path: Path) -> Iterator[str]:
    """Provide an empty database of each kind in turn."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path}/example.db"
        return
    given = postgres.url(request.param)
    yield given
    engine = create_engine(make_url(given).set(drivername="postgresql+psycopg"))
    Base.metadata.drop_all(engine)
    engine.dispose()


def test_a_route_answers_in_its_own_words(url: str) -> None:
    """Each failure has the text of the block around it, and its status if one is set."""
    with serve(at_a_route.create_app(url)) as served:
        assert served.client.post("/events", json=PARTY).json() == 1
        taken = served.client.post("/events", json=PARTY)
        assert (taken.status_code, taken.json()["detail"]) == (
            409,
            "There is an event of this title.",
        )
        empty = served.client.post("/events", json={"title": "Fast", "seats": 0})
        assert (empty.status_code, empty.json()["detail"]) == (422, "An event has seats.")
        guests = {"names": ["ada", "grace"]}
        assert served.client.post("/events/1/bookings", json=guests).json() == ["ada", "grace"]
        again = served.client.post("/events/1/bookings", json={"names": ["alan", "ada"]})
        assert (again.status_code, again.json()["detail"]) == (409, "ada has a seat.")
        # The failure rolled back the whole request.
        alan = served.client.post("/events/1/bookings", json={"names": ["alan"]})
        assert alan.json() == ["alan"]
        nowhere = served.client.post("/events/9/bookings", json={"names": ["alan"]})
        assert nowhere.status_code == 404


def test_an_application_answers_with_problem_details(url: str) -> None:
    """A failure that no route handles is a problem, with the field that it is mapped to."""
    with serve(app_wide.create_app(url)) as served:
        assert served.client.post("/events", json=PARTY).json() == 1
        taken = served.client.post("/events", json=PARTY)
        assert taken.headers["content-type"] == "application/problem+json"
        assert taken.json() == {
            "type": "about:blank",
            "title": "Conflict",
            "status": 409,
            "detail": "There is an event of this title.",
            "errors": [{"detail": "There is an event of this title.", "pointer": "#/title"}],
        }
        nowhere = served.client.post("/bookings", json={"event_id": 9, "guest": "ada"})
        assert (nowhere.status_code, "errors" in nowhere.json()) == (422, False)
        invalid = served.client.post("/bookings", json={"event_id": 1})
        assert invalid.json()["errors"] == [{"detail": "Field required", "pointer": "#/guest"}]
        document = served.client.get("/openapi.json").json()["paths"]
        assert set(document["/events"]["post"]["responses"]) == {"201", "409", "422", "503"}


def test_the_last_seat_is_booked_once(url: str) -> None:
    """Exactly as many bookings succeed as there are seats, however many run at the same time."""
    with serve(app_wide.create_app(url)) as served:
        served.client.post("/events", json=PARTY)

        def book(number: int) -> bool:
            order = {"event_id": 1, "guest": f"guest-{number}"}
            answer: bool = served.client.post("/bookings", json=order).json()
            return answer

        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(book, range(8))) == PARTY["seats"]
