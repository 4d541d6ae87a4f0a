"""Tests of the quick start over HTTP."""

import psycopg

from examples.quick_start.app import create_app
from tests.serving import serve


def test_a_stored_book_is_there_and_a_forgotten_one_is_no_success(
    owner: psycopg.Connection,
) -> None:
    """A 201 means that the row is committed; without a commit there is a 500 and no row."""
    with serve(create_app()) as served:
        assert served.client.get("/books").json() == []
        added = served.client.post("/books", json={"title": "Emma"})
        assert (added.status_code, added.json()) == (201, {"title": "Emma", "id": 1})
        stored = owner.execute("SELECT id, title FROM quick_start_book").fetchall()
        assert stored == [(1, "Emma")]
        assert served.client.post("/forgotten", json={"title": "Emma"}).status_code == 500
        assert served.client.get("/books").json() == [added.json()]
