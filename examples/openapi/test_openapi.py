"""Tests that the document is valid and matches the actual responses."""

from typing import Any

import psycopg
import pytest
from httpx import Response

from conftest import WorkerPostgres
from examples.openapi.app import create_app
from fastapi_sqlnative import start_draining
from tests.serving import serve, validate_openapi

BLUE = {"name": "Blue", "beds": 2}


def find(document: Any, response: Response, path: str | None = None) -> Any:
    """Find this response in the document, by path, method, status and media type."""
    request = response.request
    operation = document["paths"][path or request.url.path][request.method.lower()]
    answer = operation["responses"][str(response.status_code)]
    assert response.headers["content-type"] in answer["content"]
    return answer


@pytest.mark.usefixtures("databases")
def test_refusals_are_documented() -> None:
    """A new room, a taken name, too many beds, no body: the document has each response."""
    with serve(create_app()) as served:
        document = served.client.get("/openapi.json").json()
        validate_openapi(document)
        too_many: dict[str, Any] = {"name": "Red", "beds": 9}
        for body, status in (BLUE, 201), (BLUE, 409), (too_many, 422), ({}, 422):
            answer = served.client.post("/rooms", json=body)
            assert answer.status_code == status
            find(document, answer)


def test_a_busy_row_is_documented(databases: WorkerPostgres) -> None:
    """A 503 has the Retry-After that the document promises."""
    with serve(create_app()) as served, psycopg.connect(databases.dsn) as other:
        document = served.client.get("/openapi.json").json()
        served.client.post("/rooms", json=BLUE)
        other.execute("SELECT FROM openapi_room FOR UPDATE")
        busy = served.client.post("/rooms/1/cleaning")
        assert busy.status_code == 503
        headers = find(document, busy, "/rooms/{room_id}/cleaning")["headers"]
        assert headers["Retry-After"]["schema"] == {"type": "integer"}
        assert busy.headers["Retry-After"].isdecimal()


@pytest.mark.usefixtures("databases")
def test_health_is_documented() -> None:
    """Alive, ready and not ready: the document has each response."""
    app = create_app()
    with serve(app) as served:
        document = served.client.get("/openapi.json").json()
        for path, status in ("/health/live", 200), ("/health/ready", 200):
            answer = served.client.get(path)
            assert answer.status_code == status
            find(document, answer)
        start_draining(app)
        draining = served.client.get("/health/ready")
        assert draining.status_code == 503
        find(document, draining)


@pytest.mark.usefixtures("databases")
def test_sessions_are_no_part_of_the_document() -> None:
    """A route's inputs are its body and its path; the session is not among them."""
    paths = create_app().openapi()["paths"]
    assert "parameters" not in paths["/rooms"]["post"]
    taken = [each["name"] for each in paths["/rooms/{room_id}/cleaning"]["post"]["parameters"]]
    assert taken == ["room_id"]
