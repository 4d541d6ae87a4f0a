"""PgBouncer in front of the run's server, for the tests of this folder."""

from collections.abc import Iterator

import pytest

from conftest import SERVER
from tests.ha.pgbouncer import PgBouncer, pgbouncer


@pytest.fixture
def bouncer(pytestconfig: pytest.Config) -> Iterator[PgBouncer]:
    """Run a PgBouncer with three connections for each database."""
    with pgbouncer(pytestconfig.stash[SERVER].url, connections=3) as found:
        yield found
