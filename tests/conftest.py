"""Fixtures for the package's own tests: one parameter for colours and drivers, two databases."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from conftest import WorkerPostgres
from tests.proxy import Proxy
from tests.serving import ASYNCPG, KINDS, Kind, Rows

# --- PgBouncer, for the tests marked `pgbouncer` ---


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "pgbouncer: needs PgBouncer")


def find_pgbouncer() -> str | None:
    """Find the PgBouncer program, which distributions install outside a user's PATH."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def _leaves_pgbouncer_out() -> bool:
    """Return whether to leave out the tests for PgBouncer: it is missing, and this is not CI."""
    return not os.environ.get("CI") and find_pgbouncer() is None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _leaves_pgbouncer_out():
        needing = [item for item in items if item.get_closest_marker("pgbouncer")]
        items[:] = [item for item in items if item not in needing]
        config.hook.pytest_deselected(items=needing)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _leaves_pgbouncer_out():
        terminalreporter.section("PgBouncer was not found: its tests were left out", yellow=True)
        terminalreporter.line("Install it: apt-get install pgbouncer")


# --- databases ---

SCHEMA = """
CREATE TABLE IF NOT EXISTS item (
    id serial PRIMARY KEY,
    name text NOT NULL UNIQUE,
    position int UNIQUE DEFERRABLE INITIALLY DEFERRED
)
"""


EACH_KIND = [
    pytest.param(each, id=each.id, marks=[pytest.mark.other_driver] * (each is ASYNCPG))
    for each in KINDS
]
# For tests that involve engines of one colour.
asynchronous = pytest.mark.parametrize("kind", EACH_KIND[:2], indirect=True)
synchronous = pytest.mark.parametrize("kind", EACH_KIND[2:], indirect=True)


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return each colour in turn, and with `--drivers=all` each driver.

    A test marked `driver_decides` always runs with all drivers.
    """
    found: Kind = request.param
    return found


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Return whether random tests try many examples, which they do with `--drivers=all`."""
    return bool(pytestconfig.option.drivers == "all")


@pytest.fixture(scope="session")
def _connections(postgres: WorkerPostgres) -> Iterator[tuple[psycopg.Connection, ...]]:
    with (
        psycopg.connect(postgres.dsn, autocommit=True) as first,
        psycopg.connect(postgres.second.dsn, autocommit=True) as second,
    ):
        for connection in first, second:
            connection.execute(SCHEMA)
        yield first, second


@pytest.fixture
def rows(_connections: tuple[psycopg.Connection, ...]) -> Rows:
    """Empty the first database's table, and return `Rows` with its own connection to it."""
    return Rows(_connections[0])


@pytest.fixture
def second_rows(_connections: tuple[psycopg.Connection, ...]) -> Rows:
    """Empty the second database's table, and return `Rows` with its own connection to it."""
    return Rows(_connections[1])


MakeEngine = Callable[..., Engine | AsyncEngine]


@pytest.fixture
def make_engine(kind: Kind, postgres: WorkerPostgres, rows: Rows) -> Iterator[MakeEngine]:
    """Yield a function that builds engines of this kind, and check that no connection stays in use.

    Install them with ``shutdown=engine.dispose``, because their event loop ends with the server.
    """
    in_use: set[object] = set()
    # Saves a query, which takes as long as connecting, for a type that no test uses.
    without = {"use_native_hstore": False} if kind.driver == "psycopg" else {}

    def make(*, second: bool = False, **options: Any) -> Engine | AsyncEngine:
        url = (postgres.second if second else postgres).url(kind.driver)
        options = without | options
        engine = (create_async_engine if kind.asynchronous else create_engine)(url, **options)
        pool = engine.pool  # a pool that replaces it has the same listeners
        event.listen(pool, "checkout", lambda _driver, record, _proxy: in_use.add(record))
        for end in "checkin", "detach":
            event.listen(pool, end, lambda _driver, record: in_use.discard(record))
        return engine

    yield make
    assert not in_use


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine | AsyncEngine:
    """Build an engine with a pool of one connection, so that every request uses the same one.

    The pool's timeout is shorter than a client's, so the client receives the error.
    """
    return make_engine(pool_size=1, max_overflow=0, pool_timeout=10)


@pytest.fixture
def proxy(postgres: WorkerPostgres) -> Iterator[Proxy]:
    """Yield a proxy in front of the server."""
    url = make_url(postgres.dsn)
    assert url.host is not None
    with Proxy(url.host, url.port or 5432).listening() as proxy:
        yield proxy


@pytest.fixture
def behind_proxy(kind: Kind, make_engine: MakeEngine, proxy: Proxy) -> Engine | AsyncEngine:
    """Build an engine whose one connection goes through the proxy, in plain text."""
    plain = {"ssl": False} if kind.driver == "asyncpg" else {"sslmode": "disable"}
    connect_args = plain | {"host": "127.0.0.1", "port": proxy.own_port}
    return make_engine(pool_size=1, max_overflow=0, connect_args=connect_args)
