"""Tests of the example and its README on PostgreSQL and MariaDB."""

import asyncio
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    NullPool,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from conftest import WorkerPostgres
from fastapi_sqlnative import AsyncDatabase
from migrations_example.app import ALEMBIC, create_app
from migrations_example.backfill import backfill
from migrations_example.locking import one_at_a_time
from migrations_example.releases import RELEASES, RUNNING, book
from migrations_example.settings import application_engine, migration_engine
from tests.serving import Served, serve, wait_until

LOCK = "bookshop migrations"
ROOT = Path(__file__).parents[1]
REVISIONS = list(RUNNING)
DRIVERS = "postgresql+psycopg", "postgresql+asyncpg", "mysql+pymysql", "mysql+asyncmy"
SYNCHRONOUS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}


@dataclass
class Place:
    """The database that a test migrates, as seen from a separate connection."""

    url: URL
    outside: Engine

    @property
    def name(self) -> str:
        return self.url.get_backend_name()

    @contextmanager
    def connection(self) -> Generator[Connection]:
        """Connect with a transaction per statement."""
        with self.outside.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    def others(self, connection: Connection) -> int:
        """Count the connections to the database besides this one."""
        others = {
            "postgresql": "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            "mysql": "SELECT count(*) FROM information_schema.processlist"
            " WHERE db = database() AND id <> connection_id()",
        }
        return int(connection.scalar(text(others[self.name])) or 0)

    def tables(self) -> set[str]:
        with self.connection() as connection:
            return set(inspect(connection).get_table_names())

    def version(self) -> str:
        with self.connection() as connection:
            return str(connection.scalar(text("SELECT version_num FROM alembic_version")))

    def titles(self, release: int = 4) -> list[str]:
        with self.connection() as connection:
            return list(connection.scalars(RELEASES[release].titles()))


@contextmanager
def fresh_pair(kind: str, request: pytest.FixtureRequest) -> Generator[tuple[URL, URL]]:
    if kind == "postgresql":
        pair: WorkerPostgres = request.getfixturevalue("empty_databases")
        yield make_url(pair.dsn), make_url(pair.second.dsn)
        return
    worker = getattr(request.config, "workerinput", {}).get("workerid", "main")
    first, second = f"sqlnative_{worker}_bookshop", f"sqlnative_{worker}_bookshop_analytics"
    url = make_url(request.getfixturevalue("mariadb"))
    engine = create_engine(url.set(drivername=SYNCHRONOUS["mysql"]), poolclass=NullPool)
    with engine.connect() as connection:
        for name in first, second:
            connection.execute(text(f"CREATE OR REPLACE DATABASE {name}"))
        yield url.set(database=first), url.set(database=second)
        for name in first, second:
            connection.execute(text(f"DROP DATABASE {name}"))


@contextmanager
def placed(
    driver: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Generator[Place]:
    """Create both databases, and put their addresses into the environment."""
    kind = driver.partition("+")[0]
    with fresh_pair(kind, request) as pair:
        for variable, url in zip(("DATABASE_URL", "ANALYTICS_DATABASE_URL"), pair, strict=True):
            address = url.set(drivername=driver).render_as_string(hide_password=False)
            monkeypatch.setenv(variable, address)
        outside = create_engine(pair[0].set(drivername=SYNCHRONOUS[kind]), poolclass=NullPool)
        yield Place(pair[0].set(drivername=driver), outside)


def with_marks(*drivers: str, few: tuple[str, ...] = ("postgresql+psycopg",)) -> list[Any]:
    """Mark the drivers that need MariaDB, and those that `few` represent."""
    return [
        pytest.param(
            each,
            id=each,
            marks=[
                *[pytest.mark.mariadb] * each.startswith("mysql"),
                *[pytest.mark.other_driver] * (each not in few),
            ],
        )
        for each in drivers
    ]


# Where PostgreSQL and MariaDB behave differently: locks, and DDL in a transaction.
the_database_decides = pytest.mark.parametrize(
    "place", with_marks(*DRIVERS, few=("postgresql+psycopg", "mysql+asyncmy")), indirect=True
)


@pytest.fixture(params=with_marks(*DRIVERS))
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Provide each driver that Alembic may use in turn."""
    with placed(request.param, request, monkeypatch) as place:
        yield place


@pytest.fixture(params=with_marks("postgresql+psycopg", "postgresql+asyncpg", "mysql+asyncmy"))
def served_place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """Provide each driver that the application may use in turn."""
    with placed(request.param, request, monkeypatch) as place:
        yield place


@pytest.fixture
def postgresql(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Provide a PostgreSQL database, for tests that need only one driver."""
    with placed("postgresql+psycopg", request, monkeypatch) as place:
        yield place


def config(section: str = "alembic", **options: Any) -> Config:
    """Read the configuration, as a process that embeds Alembic does."""
    found = Config(ALEMBIC, ini_section=section, stdout=io.StringIO(), **options)
    found.set_main_option("lock_wait", "10")
    return found


# --- up, down, check ---


@pytest.mark.parametrize("section", ["alembic", "analytics"])
def test_up_and_down(place: Place, section: str) -> None:
    """Every revision runs up, down and up again, and then the models match the database."""
    for _ in range(2):
        command.upgrade(config(section), "head")
        command.check(config(section))
        command.downgrade(config(section), "base")
    assert place.tables() <= {"alembic_version"}


def test_databases_are_apart(place: Place) -> None:
    """A section migrates its own database, with its own revisions."""
    command.upgrade(config("analytics"), "head")
    assert place.tables() == set()
    command.upgrade(config(), "head")
    assert place.tables() == {"book", "alembic_version"}


def test_a_model_without_a_revision_fails_the_check(postgresql: Place) -> None:
    """`alembic check` finds what the models have and the database lacks."""
    command.upgrade(config(), "head")
    with postgresql.connection() as connection:
        connection.execute(text("DROP INDEX ix_book_title"))
    with pytest.raises(CommandError, match="New upgrade operations detected"):
        command.check(config())


def test_offline_sql(place: Place) -> None:
    """The output of `--sql` has the same effect when applied by hand."""
    buffer = io.StringIO()
    command.upgrade(config(output_buffer=buffer), "head", sql=True)
    assert place.tables() == set()
    with place.connection() as connection:
        for statement in filter(str.strip, buffer.getvalue().split(";\n")):
            connection.exec_driver_sql(statement)
    assert place.version() == REVISIONS[-1]
    command.check(config())


# --- addresses ---


def test_the_same_settings(postgresql: Place) -> None:
    """Alembic connects with the settings of the application."""
    shown = text("SHOW application_name")

    async def of_the_application() -> str | None:
        engine = application_engine("default")
        async with engine.connect() as connection:
            name: str | None = await connection.scalar(shown)
        await engine.dispose()
        return name

    engine = migration_engine("default")
    assert isinstance(engine, Engine)
    with engine.connect() as connection:
        assert connection.scalar(shown) == asyncio.run(of_the_application()) == "bookshop"


def test_an_address_for_migrations(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alembic can use a separate address, to bypass PgBouncer or use another role."""
    monkeypatch.setenv("MIGRATION_DATABASE_URL", os.environ["DATABASE_URL"])
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:1/nowhere")
    command.upgrade(config(), "0001")
    assert "book" in place.tables()


# --- several runners ---


def hold_the_lock(place: Place) -> ExitStack:
    """Act as another runner, until closed."""
    held = ExitStack()
    connection = held.enter_context(place.outside.connect())
    held.enter_context(one_at_a_time(connection, LOCK, 0))
    return held


# Separate processes, forked after Alembic and the drivers are imported once.
FOUR = """
import logging, os, sys
import asyncmy, psycopg, sqlalchemy.ext.asyncio
import migrations_example.settings
from alembic.config import main

mine = logging.getLogger("mine")
for _ in range(4):
    if not os.fork():
        main(["-c", "migrations_example/alembic.ini", "upgrade", "head"])
        sys.exit(mine.disabled)
print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)])
"""


@pytest.mark.timeout(240)  # five processes, possibly on a busy machine
@pytest.mark.parametrize("place", with_marks("postgresql+psycopg", "mysql+asyncmy"), indirect=True)
def test_four_runners(place: Place) -> None:
    """Four simultaneous commands apply each revision once, succeed, and disable no logger."""
    with hold_the_lock(place) as held, place.connection() as watching:
        words, pipe = [sys.executable, "-c", FOUR], subprocess.PIPE
        with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as runners:  # noqa: S603 # our own command
            wait_until(lambda: place.others(watching) == 5, seconds=120)
            assert place.tables() == set()
            held.close()
            codes, said = runners.communicate(timeout=60)
    assert json.loads(codes) == [0] * 4, said
    assert re.findall(r"Running upgrade \S* ?-> (\d+)", said) == REVISIONS, said
    command.check(config())


@the_database_decides
def test_a_runner_gives_up(place: Place) -> None:
    """A runner waits for another one for a limited time, and then reports what it waited for."""
    impatient = config()
    impatient.set_main_option("lock_wait", "0.2")
    with (
        hold_the_lock(place),
        pytest.raises(CommandError, match=r"more than 0\.2 s, and holds the lock 'bookshop mig"),
    ):
        command.upgrade(impatient, "head")
    command.upgrade(config(), "head")


def test_a_table_in_use_is_not_queued_for(postgresql: Place) -> None:
    """A change that cannot lock its table fails after seconds, and then blocks no one."""
    command.upgrade(config(), "0001")
    with postgresql.outside.begin() as reader:
        reader.execute(RELEASES[1].titles())
        with pytest.raises(DBAPIError, match="lock timeout"):
            command.upgrade(config(), "head")
    command.upgrade(config(), "head")


@the_database_decides
def test_a_failed_revision(place: Place) -> None:
    """A failed revision is rolled back, earlier ones stay applied, and the lock is released."""
    command.upgrade(config(), "0002")
    with place.connection() as connection:
        connection.execute(RELEASES[1].add("Emma"))
    given = config()
    with place.outside.connect() as connection:
        given.attributes["connection"] = connection
        with pytest.raises(DBAPIError):
            command.upgrade(given, "head")
        # The connection is still open, as it would be in a pool.
        hold_the_lock(place).close()
    assert place.version() == "0002"
    backfill_all(place)
    command.upgrade(config(), "head")


def test_a_revision_that_stopped_half_way(postgresql: Place) -> None:
    """What a revision outside a transaction leaves behind does not prevent the next attempt."""
    command.upgrade(config(), "0002")
    with postgresql.connection() as connection:
        connection.execute(insert(book), [{"name": "Emma", "title": "Emma"}] * 2)
        connection.execute(
            text("ALTER TABLE book ADD CONSTRAINT book_title_is_backfilled CHECK (false) NOT VALID")
        )
        with pytest.raises(DBAPIError, match="could not create unique index"):
            connection.execute(
                text("CREATE UNIQUE INDEX CONCURRENTLY ix_book_title ON book (title)")
            )
        command.upgrade(config(), "head")
        valid = text("SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_book_title'::regclass")
        assert connection.scalar(valid) is True
    command.check(config())


# --- embedded in another process ---


@pytest.mark.anyio
async def test_on_a_connection_that_is_given(served_place: Place) -> None:
    """With a running event loop, Alembic uses a given connection, and the loggers are unchanged."""
    before = {name: logging.getLogger(name).disabled for name in ("mine", "sqlalchemy")}
    handlers = list(logging.getLogger().handlers)
    engine = create_async_engine(served_place.url, poolclass=NullPool)
    async with engine.connect() as connection:
        await run(connection, command.upgrade, "head")
        await run(connection, command.downgrade, "0003")
        assert not connection.in_transaction()
    await engine.dispose()
    assert {name: logging.getLogger(name).disabled for name in before} == before
    assert logging.getLogger().handlers == handlers
    assert "book" in served_place.tables()


async def run(
    connection: AsyncConnection, do: Callable[[Config, str], None], revision: str
) -> None:
    def work(given: Connection) -> None:
        do(config(attributes={"connection": given}), revision)

    await connection.run_sync(work)


def test_a_transaction_is_refused(postgresql: Place) -> None:
    """A connection with an open transaction is refused: an index could not be built."""
    with postgresql.outside.begin() as connection:
        connection.execute(text("SELECT 1"))
        given = config(attributes={"connection": connection})
        with pytest.raises(CommandError, match=r"give Alembic `engine\.connect"):
            command.upgrade(given, "head")


# --- expand and contract ---


@the_database_decides
def test_both_releases_work_on_every_revision(place: Place) -> None:
    """On every revision, up and down, each release reads what the other writes."""
    for revision in REVISIONS:
        command.upgrade(config(), revision)
        work_together(place, revision)
        if revision == "0002":
            backfill_all(place)
    for revision in reversed(REVISIONS[:-1]):
        command.downgrade(config(), revision)
        work_together(place, revision)
    assert len(set(place.titles(1))) == 2 * (len(REVISIONS) + len(REVISIONS) - 1)


def work_together(place: Place, revision: str) -> None:
    """Two releases each add a title, both change it, and both see all changes."""
    running = [RELEASES[number] for number in RUNNING[revision]]
    with place.connection() as connection:

        def seen() -> list[list[str]]:
            return [list(connection.scalars(each.titles())) for each in running]

        for number, writer in enumerate(running):
            title = f"{revision} {number} {len(seen()[0])}"
            connection.execute(writer.add(title))
            # Each is the last to change it once.
            for renamer in running[::-1] if number else running:
                assert [each[-1] for each in seen()] == [title] * 2
                connection.execute(renamer.rename(title, f"{title}!"))
                title += "!"
            old, new = seen()
            assert old == new
            assert new[-1] == title


# --- the backfill ---


def asynchronous(place: Place) -> AsyncEngine:
    driver = {"postgresql": "postgresql+psycopg", "mysql": "mysql+asyncmy"}[place.name]
    return create_async_engine(place.url.set(drivername=driver), poolclass=NullPool)


def backfill_all(place: Place) -> int:
    async def run() -> int:
        return await backfill(AsyncDatabase(asynchronous(place)), size=7, pause=0)

    return asyncio.run(run())


def add_books(place: Place, number: int) -> None:
    command.upgrade(config(), "0002")
    with place.connection() as connection:
        rows = [{"name": f"title {each}"} for each in range(number)]
        connection.execute(insert(book), rows)


def copied(place: Place) -> int:
    with place.connection() as connection:
        same = select(func.count()).select_from(book).where(book.c.title == book.c.name)
        return connection.scalar(same) or 0


# A batch pauses in its UPDATE, at the row with this ID, while a test holds the lock.
STOP_AT = {
    "postgresql": (
        "SELECT pg_advisory_lock(1)",
        "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_lock_shared(1); RETURN NEW; END $$",
        "CREATE TRIGGER stop BEFORE UPDATE ON book FOR EACH ROW WHEN (NEW.id = 15)"
        " EXECUTE FUNCTION stop()",
    ),
    "mysql": (
        "SELECT GET_LOCK('stop', 0)",
        "CREATE TRIGGER stop BEFORE UPDATE ON book FOR EACH ROW"
        " DO IF(NEW.id = 15, GET_LOCK('stop', 60), 0)",
    ),
}
STOPPED = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'"
    " AND datname = current_database()",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE state = 'User lock'"
    " AND db = database()",
}


def test_a_backfill_that_is_killed(served_place: Place) -> None:
    """If killed in the middle of a batch, it keeps earlier batches; the next run does the rest."""
    add_books(served_place, 25)
    words = [sys.executable, "-m", "migrations_example.backfill", "--size", "10", "--pause", "0"]
    with served_place.connection() as holder:
        for statement in STOP_AT[served_place.name]:
            holder.execute(text(statement))
        with subprocess.Popen(words, cwd=ROOT) as process:  # noqa: S603 # our own command
            stopped = text(STOPPED[served_place.name])
            wait_until(lambda: bool(holder.scalar(stopped)), seconds=60)
            process.kill()
    with served_place.connection() as watching:
        wait_until(lambda: served_place.others(watching) == 0)
    assert copied(served_place) == 10
    assert backfill_all(served_place) == 15
    command.upgrade(config(), "head")


def test_two_backfills_at_once(served_place: Place) -> None:
    """Two simultaneous backfills share the rows, and copy no row twice."""
    add_books(served_place, 200)

    async def two() -> list[int]:
        engine = asynchronous(served_place)
        runs = [backfill(AsyncDatabase(engine), size=7, pause=0) for _ in range(2)]
        return await asyncio.gather(*runs)

    assert sum(asyncio.run(two())) == 200
    assert copied(served_place) == 200


@pytest.mark.anyio
async def test_a_backfill_goes_round_what_is_locked(served_place: Place) -> None:
    """A row locked by another session does not delay the others, and is copied at the end."""
    await asyncio.to_thread(add_books, served_place, 25)
    engine, batches = asynchronous(served_place), Counter[str]()

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "SKIP LOCKED" in statement:
            batches["asked"] += 1

    with served_place.outside.connect() as somebody:
        somebody.execute(update(book).where(book.c.id == 3).values(name="locked"))
        running = asyncio.create_task(backfill(AsyncDatabase(engine), size=10, pause=0))
        # The only rows left are locked: it has found nothing and retried more than once.
        await asyncio.to_thread(wait_until, lambda: batches["asked"] > 10)
        assert copied(served_place) == 24
        assert not running.done()
        somebody.commit()
        assert await running == 25
    assert copied(served_place) == 25


# --- readiness ---


def test_an_application_that_starts_too_early(served_place: Place) -> None:
    """It is alive but not ready before the release step, and ready after it without a restart."""
    with serve(create_app()) as served:
        assert served.client.get("/health/live").status_code == 200
        expect_checks(served, 503, "behind", "behind")
        command.upgrade(config(), "head")
        expect_checks(served, 503, "current", "behind")
        command.upgrade(config("analytics"), "head")
        expect_checks(served, 200, "current", "current")
        assert served.client.post("/books?title=Emma").status_code == 201
        assert served.client.get("/books").json() == ["Emma"]


def test_an_application_that_is_being_replaced(served_place: Place) -> None:
    """A database migrated by a newer release is ahead, and the old release still serves."""
    for section in "alembic", "analytics":
        command.upgrade(config(section), "head")
    with served_place.connection() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0007'"))
    with serve(create_app()) as served:
        expect_checks(served, 200, "ahead", "current")
        assert served.client.get("/books").json() == []


def expect_checks(served: Served, status: int, default: str, analytics: str) -> None:
    checks = {"migrations": default, "analytics migrations": analytics}

    def answered() -> bool:
        response = served.client.get("/health/ready")
        return (response.status_code, response.json()["checks"]) == (status, checks)

    wait_until(answered)


# --- the README ---


@pytest.mark.slow("Alembic starts three times, 3 s")
@pytest.mark.timeout(120)
def test_the_steps_to_copy_it(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A project copied as the README says has a first revision that matches the models."""
    copied = tmp_path / "migrations_example"
    shutil.copytree(
        ROOT / "migrations_example", copied, ignore=shutil.ignore_patterns("__pycache__")
    )
    readme = (copied / "README.md").read_text("utf-8")
    steps = re.findall(r"^```console\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert len(steps) == 2
    tools = Path(sys.executable).parent
    with placed("postgresql+psycopg", request, monkeypatch) as place:
        for command_line in "".join(steps).splitlines():
            subprocess.run(  # noqa: S602 # a line of the README
                command_line,
                shell=True,
                cwd=tmp_path,
                env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
                check=True,
            )
        assert place.tables() == {"alembic_version", "book"}
        assert place.version() == "0001"
    left = [path.name for path in (tmp_path / "migrating").glob("*.py")]
    assert sorted(left) == ["__init__.py", "locking.py", "models.py", "settings.py"]


@pytest.mark.slow("a cluster and three processes, 4 s: what they do is tested above")
@pytest.mark.timeout(180)  # five processes, possibly on a busy machine
def test_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that the README's program prints get the responses that the README shows."""
    for variable in ("DATABASE_URL", "ANALYTICS_DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    with started(tmp_path) as printed:
        for name, value in re.findall(r"^export (\w+)=(.+)$", printed, re.MULTILINE):
            monkeypatch.setenv(name, value)
        answers = paste(printed)
    assert answers == 4
    assert list(tmp_path.iterdir()) == []


@contextmanager
def started(folder: Path) -> Generator[str]:
    """Run `python -m migrations_example`, and yield its output once it serves."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PORT": "0"}
    with subprocess.Popen(  # ours
        [sys.executable, "-m", "migrations_example"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = ""
        try:
            while not printed.endswith("# 201 1\n"):
                printed += (line := process.stdout.readline())
                assert line, printed
            yield printed
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def paste(printed: str) -> int:
    """Run the commands, and count the responses that match the line below."""
    answers = 0
    lines = printed.splitlines()
    for place, line in enumerate(lines):
        if line.startswith(".venv/bin/alembic "):
            words = [sys.executable, "-m", "alembic", *shlex.split(line)[1:]]
            subprocess.run(words, cwd=ROOT, check=True)  # noqa: S603 # our own command
        if line.startswith("curl "):
            method = "POST" if "-X POST" in line else "GET"
            _, status, body = lines[place + 1].split(" ", 2)
            expect(method, shlex.split(line)[-1], (int(status), json.loads(body)))
            answers += 1
    return answers


def expect(method: str, url: str, answer: tuple[int, Any]) -> None:
    """Retry until the response is the expected one: at first no server is listening."""

    def answered() -> bool:
        try:
            response = httpx.request(method, url, timeout=10)
        except httpx.ConnectError:
            return False
        return (response.status_code, response.json()) == answer

    wait_until(answered)
