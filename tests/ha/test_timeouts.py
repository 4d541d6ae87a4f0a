"""docs/timeouts.md: each limit ends what it is there for, and the request is answered so."""

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
    """Start a server to which things may happen."""
    with measured_server() as found:
        yield found


@each_case
def test_a_limit_ends_what_it_is_for(case: Case, kind: Kind, server: PostgresServer) -> None:
    """With this limit the request is answered, in this way; without one that fits it is not."""
    assert measure(case, kind, server).status == case.answers[kind.id]


@each_case
def test_the_guide_has_it(case: Case) -> None:
    """The table of the guide has a row for each limit, with the answers that are tested here."""
    (row,) = (
        line.strip("| ").split(" | ")
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith(f"| {case.limit} | {case.against} |")
    )
    for found, status in zip(row[2:], case.answers.values(), strict=True):
        assert found.endswith(f", {status}") if status else found.startswith("not ended")
