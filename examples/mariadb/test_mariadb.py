"""Tests of the application on a real MariaDB."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pymysql
import pytest
from sqlalchemy import make_url

from examples.mariadb.app import create_app
from tests.serving import Served, serve

pytestmark = pytest.mark.mariadb

LAMP = {"title": "Lamp 💡", "stock": 10}


@pytest.fixture
def served(mariadb_database: str) -> Iterator[Served]:
    """Serve the example on an empty database."""
    with serve(create_app()) as served:
        yield served


def test_what_the_server_computes_is_shown(served: Served) -> None:
    """After an INSERT and an UPDATE, the response has the server-generated ID and time."""
    added = served.client.post("/articles", json=LAMP)
    assert added.status_code == 201
    sold = served.client.post("/articles/1/sales", params={"number": 3})
    assert (sold.status_code, sold.json()["stock"]) == (200, 7)
    assert sold.json()["changed_at"] > added.json()["changed_at"]


def test_both_drivers_see_one_database(served: Served) -> None:
    """PyMySQL reads what asyncmy committed, every character of it."""
    served.client.post("/articles", json=LAMP)
    assert served.client.get("/stock").json() == {"Lamp 💡": 10}
    served.client.post("/articles/1/sales", params={"number": 4})
    assert served.client.get("/stock").json() == {"Lamp 💡": 6}


def test_no_more_is_sold_than_there_is(served: Served) -> None:
    """Of twenty simultaneous sales, exactly as many succeed as there are articles."""
    served.client.post("/articles", json=LAMP)

    def sell(_: int) -> int:
        return served.client.post("/articles/1/sales", params={"number": 1}).status_code

    with ThreadPoolExecutor(20) as threads:
        assert Counter(threads.map(sell, range(20))) == {200: 10, 409: 10}
    assert served.client.get("/stock").json() == {"Lamp 💡": 0}


def test_a_locked_row_is_not_waited_for_forever(served: Served, mariadb_database: str) -> None:
    """A sale that waits for another session's lock ends in a 503, and can be retried."""
    served.client.post("/articles", json=LAMP)
    url = make_url(mariadb_database)
    assert url.host is not None
    assert url.port is not None
    with pymysql.connect(
        host=url.host,
        port=url.port,
        user=url.username,
        password=url.password or "",
        database=url.database,
    ) as other:
        other.cursor().execute("SELECT * FROM mariadb_article FOR UPDATE")
        busy = served.client.post("/articles/1/sales", params={"number": 1})
        assert (busy.status_code, "Retry-After" in busy.headers) == (503, True)
    assert served.client.post("/articles/1/sales", params={"number": 1}).json()["stock"] == 9


def test_the_database_has_the_last_word(served: Served) -> None:
    """The CHECK constraint refuses a negative stock, and nothing is stored."""
    assert served.client.post("/articles", json=LAMP | {"stock": -1}).status_code == 422
    assert served.client.get("/stock").json() == {}
