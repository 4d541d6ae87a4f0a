"""Tests of textual SQL over HTTP, with hostile input."""

from typing import Any

import pytest

from examples.raw_sql.app import create_app
from tests.serving import Served, serve

SALES = [("ada", "north", 5), ("ada", "south", 2), ("grace", "south", 9), ("100%", "north", 1)]
EVERYBODY = {"100%": 1, "ada": 7, "grace": 9}

HOSTILE = [
    "'; DROP TABLE raw_sql_sale; --",
    "' OR '1'='1",
    "x') OR TRUE --",
    "%",
    "_",
    ":prefix",
    "\\",
    "$1",
    "ada'/**/UNION/**/SELECT/**/1",
]


def totals(served: Served, **filters: Any) -> Any:
    """Read the report as a mapping."""
    answer = served.client.get("/totals", params=filters)
    assert answer.status_code == 200, answer.text
    return {total["customer"]: total["total"] for total in answer.json()}


def store(served: Served, *sales: tuple[str, str, int]) -> None:
    """Store sales, one request per sale."""
    for customer, region, amount in sales:
        sale = {"customer": customer, "region": region, "amount": amount}
        assert served.client.post("/sales", json=sale).status_code == 201


@pytest.mark.usefixtures("databases")
def test_filters_are_optional() -> None:
    """Each filter narrows the report; a filter that is not set does not."""
    with serve(create_app()) as served:
        store(served, *SALES)
        assert totals(served) == EVERYBODY
        assert totals(served, prefix="a") == {"ada": 7}
        assert totals(served, regions=["south"]) == {"ada": 2, "grace": 9}
        assert totals(served, regions=["north", "south"]) == EVERYBODY
        assert totals(served, prefix="g", regions=["north"]) == {}
        assert list(totals(served, order="total")) == ["grace", "ada", "100%"]


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_are_only_words(words: str) -> None:
    """SQL and wildcards in a filter match nothing, and as a customer's name match literally."""
    with serve(create_app()) as served:
        store(served, *SALES)
        assert totals(served, prefix=words) == {}
        assert totals(served, regions=[words, "nowhere"]) == {}
        assert totals(served) == EVERYBODY
        store(served, (words, words, 3))
        assert totals(served, prefix=words) == {words: 3}
        assert totals(served, regions=[words]) == {words: 3}


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize(
    "query",
    [
        {"order": "total; DROP TABLE raw_sql_sale"},
        {"order": "total DESC, customer"},
        {"limit": "1"},
    ],
)
def test_what_cannot_be_bound_is_chosen_from_a_list(query: dict[str, str]) -> None:
    """An order that is not on the list is a 422, even if it is valid SQL."""
    with serve(create_app()) as served:
        store(served, *SALES)
        assert served.client.get("/totals", params=query).status_code == 422
        assert totals(served) == EVERYBODY
