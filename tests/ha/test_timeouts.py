"""docs/timeouts.md: each limit ends the wait that it is meant for, with the status of the guide."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ha.timeouts import CASES, Case, measure, measured_server
from tests.postgres_server import PostgresServer
from tests.serving import Kind

PAGE = Path(__file__).parents[2] / "docs" / "timeouts.md"
each_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.against.replace(" ", "-")) for case in CASES]
)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Start a server that the cases may break."""
    with measured_server() as found:
        yield found


@each_case
def test_a_limit_ends_what_it_is_for(case: Case, kind: Kind, server: PostgresServer) -> None:
    """The limit ends the request with the expected status, or not at all where none is expected."""
    assert measure(case, kind, server).status == case.answers[kind.id]


@each_case
def test_the_guide_has_it(case: Case) -> None:
    """The guide's table has a row for each limit, with the statuses that are tested here."""
    (row,) = (
        line.strip("| ").split(" | ")
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith(f"| {case.limit} | {case.against} |")
    )
    for found, status in zip(row[2:], case.answers.values(), strict=True):
        assert found.endswith(f", {status}") if status else found.startswith("not ended")
