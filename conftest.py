"""Shared setup of tests/ and examples/: a PostgreSQL per run, two databases per worker, MariaDB.

This file is in the root folder because pytest offers a conftest's fixtures only to folders below.
"""

import gc
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import event, make_url
from sqlalchemy.dialects.mysql.pymysql import MySQLDialect_pymysql

from tests.mariadb_server import REMEDIES, MariadbServer, MariadbServerError, find_server
from tests.postgres_choice import CHOICES, RunningPostgres, start_postgres
from tests.postgres_server import PostgresServerError
from tests.progress import Progress

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

# --- the run's server: started by the controller, handed to xdist's workers ---

# Each worker imports and collects everything, which takes five CPU seconds. Five keep two
# processors busy, because tests also wait for databases and for servers to stop: a run of 112 s
# took 139 s with three, and 117 s with seven.
WORKERS = 5
# Otherwise Hypothesis would import trio in each worker, and then look up every object's referrers.
os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"
SERVER = pytest.StashKey[RunningPostgres]()
CLOSING = pytest.StashKey[ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres", choices=CHOICES, help="take this PostgreSQL or fail (default: what there is)"
    )
    parser.addoption(
        "--drivers",
        choices=("few", "all"),
        default="few",
        help="few: one driver of each colour, all of them where a driver decides, fewer random"
        " examples, and in a run of everything no slow tests; all: always all",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mariadb: needs a MariaDB server")
    config.addinivalue_line("markers", "other_driver: one of its colour has shown as much")
    config.addinivalue_line("markers", "driver_decides: shows something else with each driver")
    config.addinivalue_line("markers", "slow(reason): left to `make check`, unless it is selected")
    handed_over: dict[str, str] | None = getattr(config, "workerinput", {}).get("postgres")
    if handed_over:
        config.stash[SERVER] = RunningPostgres(**handed_over)
    elif not (config.option.collectonly or config.option.help):
        progress = Progress()
        config.pluginmanager.register(progress)
        progress.says("Finding or starting PostgreSQL")
        config.stash[CLOSING] = ExitStack()
        try:
            config.stash[SERVER] = start_postgres(config.option.postgres, config.stash[CLOSING])
        except PostgresServerError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Start no workers for selected tests, because each worker would only collect them again."""
    return 0 if _selects(config) else int(os.environ.get("WORKERS") or WORKERS)


def _selects(config: pytest.Config) -> bool:
    """Return whether the command line selects files, or tests by name, marker or last failure."""
    option = config.option
    files = config.args_source is config.ArgsSource.ARGS and all(".py" in e for e in config.args)
    return bool(files or option.keyword or option.markexpr or getattr(option, "lf", False))


ON_MARIADB = re.compile("mariadb|mysql|asyncmy")
# These import Schemathesis, which takes one and a half CPU seconds.
SCHEMATHESIS = {"tests/test_docs.py", "tests/test_hostile_input.py"}
# The files that take longest, mostly because they wait. Started last, they would prolong the run.
LONG = {"test_health_servers.py", "test_slow_requests.py", "test_testing_isolation.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Assign the tests of a file to one worker, and all MariaDB tests to one worker.

    So are the two files that import Schemathesis. A worker then sets up once what the tests of a
    file share. It requests its next file when it begins the last test of the current file. Single
    tests would have to be assigned one by one, which costs as much as a test that does nothing.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types here
        def _split_scope(self, nodeid: str) -> str:
            if ON_MARIADB.search(nodeid):
                return "mariadb"
            file = nodeid.partition("::")[0]
            return "schemathesis" if file in SCHEMATHESIS else file

        def remove_node(self, node: "WorkerController") -> str | None:
            """Return the test that has ended a worker, which xdist would run again and again."""
            work = self.assigned_work[node]
            crashed = next(
                (test for unit in work.values() for test in unit if not unit[test]), None
            )
            if crashed is not None:
                work[self._split_scope(crashed)][crashed] = True
            for scope in [each for each, unit in work.items() if all(unit.values())]:
                del work[scope]
            super().remove_node(node)
            return crashed

        def _reschedule(self, node: "WorkerController") -> None:
            if node in self.registered_collections:  # another worker is still being replaced
                super()._reschedule(node)

    config.option.loadscopereorder = False  # the tests are already in order, the longest first
    return ByFile(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: "WorkerController") -> None:
    node.workerinput["postgres"] = asdict(node.config.stash[SERVER])


def pytest_unconfigure(config: pytest.Config) -> None:
    if CLOSING in config.stash:
        config.stash[CLOSING].close()


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"PostgreSQL: {config.stash[SERVER].description}" if SERVER in config.stash else None


# --- this worker's databases ---


@dataclass(frozen=True)
class PostgresDatabase:
    """The address of one database, without a driver or for one."""

    dsn: str

    def url(self, driver: str) -> str:
        """Return SQLAlchemy's URL with that driver: ``psycopg``, ``asyncpg``, ``psycopg2``."""
        url = make_url(self.dsn).set(drivername=f"postgresql+{driver}")
        return url.render_as_string(hide_password=False)


@dataclass(frozen=True)
class WorkerPostgres(PostgresDatabase):
    """The worker's own database, and a second one for tests that need two."""

    second: PostgresDatabase


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[WorkerPostgres]:
    """Create this worker's databases, and drop them at the end."""
    worker = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    server = pytestconfig.stash[SERVER].url
    first, second = f"sqlnative_{worker}", f"sqlnative_{worker}_second"
    with fresh_database(server, first) as dsn, fresh_database(server, second) as second_dsn:
        yield WorkerPostgres(dsn, PostgresDatabase(second_dsn))


@contextmanager
def fresh_database(server: str, name: str) -> Generator[str]:
    """Create an empty database, and replace one that an interrupted run may have left behind."""
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    create = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(drop)
        connection.execute(create)
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
        connection.execute(drop)


@pytest.fixture(scope="session")
def _spare_databases(pytestconfig: pytest.Config, postgres: WorkerPostgres) -> Iterator[list[str]]:
    """Create two more databases for this worker, for tests that need empty ones."""
    server, name = pytestconfig.stash[SERVER].url, str(make_url(postgres.dsn).database)
    with (
        fresh_database(server, f"{name}_spare") as first,
        fresh_database(server, f"{name}_spare_second") as second,
    ):
        yield [first, second]


@pytest.fixture(scope="session")
def _beside_databases(pytestconfig: pytest.Config) -> Iterator[psycopg.Connection]:
    """Connect to the server, but to none of the databases that tests use."""
    with psycopg.connect(pytestconfig.stash[SERVER].url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def empty_databases(
    _beside_databases: psycopg.Connection, _spare_databases: list[str]
) -> Iterator[WorkerPostgres]:
    """Yield two empty databases, and empty them again at the end."""
    first, second = _spare_databases
    yield WorkerPostgres(first, PostgresDatabase(second))
    for dsn in first, second:
        empty_database(_beside_databases, dsn)


def empty_database(beside: psycopg.Connection, dsn: str) -> None:
    """Drop everything in a database, which takes a fraction of the time for a new one."""
    name = str(make_url(dsn).database)
    for change in "ALTER DATABASE {} ALLOW_CONNECTIONS true", "ALTER DATABASE {} RESET ALL":
        beside.execute(sql.SQL(change).format(sql.Identifier(name)))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        schemas = connection.execute(
            "SELECT nspname FROM pg_namespace"
            " WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
        ).fetchall()
        for (schema,) in schemas:
            drop = sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema))
            connection.execute(drop)
        connection.execute("CREATE SCHEMA public AUTHORIZATION pg_database_owner")
        connection.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
        # An example's role: a role belongs to the server, and would outlive what it owns here.
        role = sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(f"{name}_app"))
        connection.execute(role)


@pytest.fixture
def patient_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the timeout of health routers in pages and examples: the machine may be busy."""
    from fastapi_sqlnative import health_router

    assert health_router.__kwdefaults__ is not None
    monkeypatch.setitem(health_router.__kwdefaults__, "timeout", 20.0)


# --- memory ---


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable garbage collection while tests are collected, of which it takes a tenth."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Exempt what all tests share from garbage collection: traversing it is slow and pointless.

    Garbage is also collected less often from here on, which saves 3 % of the tests' time.
    """
    gc.freeze()
    gc.set_threshold(5_000)


@pytest.fixture(scope="module")
def collecting() -> None:
    """Also exempt what earlier modules left, for tests that collect their own garbage."""
    gc.collect()
    gc.freeze()


# --- what the server saw ---


@pytest.fixture
def server_log(pytestconfig: pytest.Config) -> Callable[[], str] | None:
    """Return a callable that returns what the server has logged since this test began.

    With TEST_DATABASE_URL this is None: query ``pg_settings`` and ``pg_stat_activity`` instead.
    All workers share the log: identify a test's lines by its own ``application_name``.
    """
    server = pytestconfig.stash[SERVER]
    if not server.log:
        return None
    mark = len(server.read_log())
    return lambda: server.read_log()[mark:]


# --- MariaDB, for the tests marked `mariadb` ---


def _leaves_mariadb_out() -> bool:
    """Return whether there is no server and neither CI nor TEST_MARIADB_URL requires one."""
    if os.environ.get("TEST_MARIADB_URL") or os.environ.get("CI"):
        return False
    try:
        find_server()
    except MariadbServerError:
        return True
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without_mariadb = _leaves_mariadb_out()
    few = config.option.drivers == "few"
    without_slow = few and not _selects(config)

    def is_left_out(item: pytest.Item) -> bool:
        if without_mariadb and item.get_closest_marker("mariadb"):
            return True
        if without_slow and item.get_closest_marker("slow"):
            return True
        other = few and item.get_closest_marker("other_driver")
        return bool(other) and not item.get_closest_marker("driver_decides")

    left_out = [item for item in items if is_left_out(item)]
    items[:] = [item for item in items if not is_left_out(item)]

    def is_short(item: pytest.Item) -> bool:
        return item.path.name not in LONG and item.get_closest_marker("timeout") is None

    items.sort(key=is_short)
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _leaves_mariadb_out():
        terminalreporter.section("MariaDB was not found: its tests were left out", yellow=True)
        terminalreporter.line(REMEDIES)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[str]:
    """Yield TEST_MARIADB_URL, or the URL of a server that is started here, without a driver."""
    given = os.environ.get("TEST_MARIADB_URL")
    if given:
        yield given
        return
    event.listen(MySQLDialect_pymysql, "do_connect", _without_tls)
    with MariadbServer() as server:
        yield server.url
    event.remove(MySQLDialect_pymysql, "do_connect", _without_tls)


def _without_tls(dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
    """Skip the system's certificates, which take longer to read than the rest of connecting."""
    if not dialect.is_async:  # asyncmy's dialect is a subclass
        options["ssl_disabled"] = True


# --- async tests ---


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run tests marked ``anyio`` on asyncio, the only library that SQLAlchemy's async API uses."""
    return "asyncio"
