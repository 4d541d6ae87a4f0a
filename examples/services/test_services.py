"""Tests of two services, by the rows that they leave."""

from typing import Any

import pytest

from examples.services.app import create_app
from tests.serving import Served, serve

START = {"seats": {"chess": 5, "go": 0}, "credit": {"ada": 150, "grace": 20}, "payments": 0}


def state(served: Served) -> Any:
    """Read every row, in a separate request."""
    return served.client.get("/state").json()


@pytest.mark.usefixtures("databases")
def test_both_services_are_committed_together() -> None:
    """A 201 means that the seat is taken, the credit is reduced and the payment is booked."""
    with serve(create_app()) as served:
        answer = served.client.post("/enrolments", json={"student": "ada", "course": "chess"})
        assert (answer.status_code, answer.json()) == (201, 1)
        enrolled = {"seats": {"chess": 4, "go": 0}, "credit": {"ada": 50, "grace": 20}}
        assert state(served) == enrolled | {"payments": 1}


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize(
    ("student", "course", "status", "detail"),
    [
        pytest.param("grace", "chess", 409, "Not enough credit.", id="the second refuses"),
        pytest.param("ada", "go", 409, "The course is full.", id="the first refuses"),
        pytest.param("alan", "chess", 404, "No such student.", id="the second finds nobody"),
        pytest.param("ada", "bridge", 404, "No such course.", id="the first finds nothing"),
    ],
)
def test_a_refusal_by_either_leaves_no_row(
    student: str, course: str, status: int, detail: str
) -> None:
    """Whichever service raises, and whatever the other has flushed, every row is unchanged."""
    with serve(create_app()) as served:
        wanted = {"student": student, "course": course}
        answer = served.client.post("/enrolments", json=wanted)
        assert (answer.status_code, answer.json()) == (status, {"detail": detail})
        assert state(served) == START


@pytest.mark.usefixtures("databases")
def test_a_service_alone_has_a_transaction_too() -> None:
    """If an endpoint calls a service directly, its changes are committed too."""
    with serve(create_app()) as served:
        assert served.client.post("/courses/chess/guests").status_code == 201
        assert state(served) == START | {"seats": {"chess": 4, "go": 0}}
        assert served.client.post("/courses/go/guests").status_code == 409
