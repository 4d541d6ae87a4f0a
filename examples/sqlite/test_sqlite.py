"""Tests of SQLite over HTTP, for `async def` and `def`."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from examples.sqlite.app import create_app
from tests.serving import Served, serve

EMMA = {"titles": ["Emma"]}

each_colour = pytest.mark.parametrize("path", ["/books", "/sync/books"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the path of a new file."""
    return tmp_path / "example.db"


@pytest.fixture
def served(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve the example on that file."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite+aiosqlite:///{file}")
    with serve(create_app()) as served:
        yield served


@each_colour
def test_foreign_keys_are_checked(path: str, served: Served) -> None:
    """A book for a shelf that does not exist is refused on every connection of the pool."""
    for _ in range(3):
        answer = served.client.post(path, json=EMMA | {"shelf": 7})
        assert (answer.status_code, answer.json()["detail"]) == (422, "No such shelf.")
    assert served.client.get(path).json() == []


@each_colour
def test_a_savepoint_is_no_commit(path: str, served: Served) -> None:
    """If the third of three books is refused, the savepoints of the first two are rolled back."""
    answer = served.client.post(path, json={"titles": ["Emma", "Persuasion", "Emma"]})
    assert (answer.status_code, answer.json()["detail"]) == (409, "There is a book of this title.")
    assert served.client.get(path).json() == []


@each_colour
def test_both_engines_see_one_file(path: str, served: Served) -> None:
    """Each engine reads what the other has committed, and so do other connections."""
    assert served.client.post(path, json=EMMA).status_code == 201
    assert served.client.get("/books").json() == ["Emma"]
    assert served.client.get("/sync/books").json() == ["Emma"]


@each_colour
def test_readers_do_not_wait_for_the_writer(path: str, served: Served, file: Path) -> None:
    """While another connection writes, a reader immediately gets what is committed."""
    served.client.post(path, json=EMMA)
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO example_book (title, shelf_id) VALUES ('Sanditon', 1)")
        assert served.client.get(path).json() == ["Emma"]
        other.rollback()


@each_colour
def test_the_writer_does_not_wait_for_readers(path: str, served: Served, file: Path) -> None:
    """While another connection reads in a transaction, a writer does not wait."""
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN")
        assert other.execute("SELECT title FROM example_book").fetchall() == []
        assert served.client.post(path, json=EMMA).status_code == 201
        assert other.execute("SELECT title FROM example_book").fetchall() == []
        other.rollback()


def test_writers_come_one_after_the_other(served: Served) -> None:
    """Of twenty simultaneous requests that read, decide and write, exactly ten succeed."""

    def add(number: int) -> int:
        path = ("/books", "/sync/books")[number % 2]
        return served.client.post(path, json={"titles": [f"Volume {number}"]}).status_code

    with ThreadPoolExecutor(20) as threads:
        assert Counter(threads.map(add, range(20))) == {201: 10, 409: 10}
    assert len(served.client.get("/books").json()) == 10
