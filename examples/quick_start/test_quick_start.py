"""Tests of the quick start over HTTP."""

import psycopg
import pytest

from conftest import WorkerPostgres
from examples.quick_start.app import create_app
from tests.serving import serve


@pytest.mark.parametrize(
    "driver", ["psycopg", pytest.param("asyncpg", marks=pytest.mark.other_driver)]
)
def test_a_stored_book_is_there_and_a_forgotten_one_is_no_success(
    driver: str, databases: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 201 means that the row is committed; without a commit there is a 500 and no row."""
    monkeypatch.setenv("DATABASE_URL", databases.url(driver))
    with psycopg.connect(databases.dsn, autocommit=True) as outside, serve(create_app()) as served:
        assert served.client.get("/books").json() == []
        added = served.client.post("/books", json={"title": "Emma"})
        assert (added.status_code, added.json()) == (201, {"title": "Emma", "id": 1})
        stored = outside.execute("SELECT id, title FROM quick_start_book").fetchall()
        assert stored == [(1, "Emma")]
        assert served.client.post("/forgotten", json={"title": "Emma"}).status_code == 500
        assert served.client.get("/books").json() == [added.json()]
