"""Readiness by Alembic's revisions, with `alembic_check` on real databases."""

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from fastapi import FastAPI
from psycopg import sql
from sqlalchemy import Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from conftest import WorkerPostgres
from fastapi_sqlnative import install_database, installed_databases
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.health import CheckResult, health_router
from fastapi_sqlnative.migrations import Revisions, alembic_check
from tests.conftest import MakeEngine
from tests.in_process import running, sqlite
from tests.serving import backends, serve

ENV = """
from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
"""
CURRENT = CheckResult(ready=True, state="current")
AHEAD = CheckResult(ready=True, state="ahead")
BEHIND = CheckResult(ready=False, state="behind")


class Scripts:
    """A script directory whose revisions do nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "versions").mkdir(parents=True)
        (folder / "env.py").write_text(ENV)

    def add(self, revision: str, down: str | None = None, depends_on: str | None = None) -> None:
        (self.folder / "versions" / f"{revision}.py").write_text(
            f"revision = {revision!r}\ndown_revision = {down!r}\ndepends_on = {depends_on!r}\n"
            "def upgrade(): ...\ndef downgrade(): ...\n"
        )

    @property
    def config(self) -> Config:
        config = Config()
        config.set_main_option("script_location", str(self.folder))
        config.set_main_option("path_separator", "os")
        return config

    def run(self, alembic: Callable[..., Any], dsn: str, revision: str) -> None:
        """Run one of Alembic's commands."""
        config = self.config
        engine = create_engine(make_url(dsn).set(drivername="postgresql+psycopg"))
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            alembic(config, revision)
        engine.dispose()


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    """Return a script directory with two consecutive revisions."""
    scripts = Scripts(tmp_path / "migrations")
    scripts.add("one")
    scripts.add("two", "one")
    return scripts


class Version:
    """A version table as Alembic leaves it, and the catalog, from a separate connection."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection

    def set(self, *revisions: str, table: str = "alembic_version") -> None:
        name = sql.Identifier(*table.split("."))
        create = sql.SQL("CREATE TABLE IF NOT EXISTS {} (version_num varchar(32))")
        self.connection.execute(create.format(name))
        self.connection.execute(sql.SQL("TRUNCATE {}").format(name))
        for each in revisions:
            self.connection.execute(sql.SQL("INSERT INTO {} VALUES (%s)").format(name), [each])

    def catalog(self) -> list[tuple[Any, ...]]:
        return self.connection.execute(
            "SELECT oid, relname, relfilenode, reltuples FROM pg_class"
            " WHERE relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_')"
            " UNION ALL SELECT oid, nspname, 0, 0 FROM pg_namespace WHERE nspname !~ '^pg_'"
            " ORDER BY 1"
        ).fetchall()


@pytest.fixture
def version(postgres: WorkerPostgres) -> Iterator[Version]:
    """Yield access to a database without a version table."""
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        drop = "DROP TABLE IF EXISTS alembic_version"
        connection.execute(drop)
        yield Version(connection)
        connection.execute(drop)


def installed(engine: Engine | AsyncEngine, name: str = "default") -> FastAPI:
    app = FastAPI()
    install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    return app


def test_a_path_may_have_a_section_for_the_database(scripts: Scripts, tmp_path: Path) -> None:
    """Of a file, the section of the database's name is read, unless it names no scripts."""
    Scripts(tmp_path / "others").add("three")
    path = tmp_path / "alembic.ini"
    path.write_text(
        f"[alembic]\nscript_location = {scripts.folder}\n[loggers]\nkeys = root\n"
        f"[others]\nscript_location = {tmp_path / 'others'}\n"
    )
    assert Revisions.read(path, "others").heads == {"three"}
    assert Revisions.read(path, "loggers").heads == Revisions.read(path, "default").heads == {"two"}


def note_statements(engine: Engine | AsyncEngine) -> list[str]:
    """Return a list that every statement sent from now on is added to."""
    sent: list[str] = []
    inner = sync_engine(engine)

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(inner, "before_cursor_execute", note)
    return sent


# --- the states ---


@pytest.mark.anyio
async def test_ready_once_migrated(scripts: Scripts, version: Version, engine: Engine) -> None:
    """On every driver, a database is behind until it has the head, and then no query is sent."""
    check = alembic_check(scripts.config)
    app = installed(engine)
    async with running(app):
        assert await check(app) == BEHIND
        version.set()
        assert await check(app) == BEHIND
        version.set("one")
        assert await check(app) == BEHIND
        version.set("two")
        assert await check(app) == CURRENT
        sent = note_statements(engine)
        version.set("one")
        assert await check(app) == CURRENT
        assert not sent


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ([], BEHIND),
        (["two"], BEHIND),
        (["two", "side"], CURRENT),
        (["one", "side"], BEHIND),
        (["side"], BEHIND),
        (["two", "side", "newer"], AHEAD),
        (["newer"], AHEAD),
        (["two", "newer"], AHEAD),
        (["one", "newer"], BEHIND),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, list) else value.state,
)
@pytest.mark.anyio
async def test_two_heads(
    scripts: Scripts,
    version: Version,
    postgres: WorkerPostgres,
    found: list[str],
    state: CheckResult,
) -> None:
    """All heads are required, and an unknown revision means ahead unless an old one is present."""
    scripts.add("side")
    version.set(*found)
    app = installed(create_async_engine(postgres.url("psycopg")))
    async with running(app):
        assert await alembic_check(scripts.config)(app) == state


@pytest.mark.parametrize("alembic", [command.upgrade, command.stamp])
@pytest.mark.anyio
async def test_heads_that_depend_on_each_other(
    scripts: Scripts, version: Version, postgres: WorkerPostgres, alembic: Callable[..., Any]
) -> None:
    """A head that another branch depends on may be missing from the version table."""
    scripts.add("side", depends_on="two")
    check = alembic_check(scripts.config)
    app = installed(create_async_engine(postgres.url("psycopg")))
    async with running(app):
        scripts.run(alembic, postgres.dsn, "two")
        assert await check(app) == BEHIND
        scripts.run(alembic, postgres.dsn, "heads")
        assert await check(app) == CURRENT


@pytest.mark.anyio
async def test_heads_are_read_once(
    scripts: Scripts, version: Version, postgres: WorkerPostgres
) -> None:
    """A revision file that is added after alembic_check() was called does not change the result."""
    check = alembic_check(scripts.config)
    scripts.add("three", "two")
    version.set("two")
    app = installed(create_async_engine(postgres.url("psycopg")))
    async with running(app):
        assert await check(app) == CURRENT


@pytest.mark.anyio
async def test_the_next_run_asks_again(
    scripts: Scripts, version: Version, postgres: WorkerPostgres
) -> None:
    """A passed check is remembered for one run of the application only."""
    check = alembic_check(scripts.config)
    app = FastAPI()
    install_database(app, engine=lambda: create_async_engine(postgres.url("psycopg")))
    handles: list[object] = []  # kept alive, so that no result is forgotten with its handle
    for revision, state in ("two", CURRENT), ("one", BEHIND), ("newer", AHEAD):
        version.set(revision)
        async with running(app):
            assert await check(app) == state
            handles.append(installed_databases(app)["default"])


# --- where it looks ---


@pytest.mark.anyio
async def test_a_version_table_of_another_name(
    scripts: Scripts, version: Version, postgres: WorkerPostgres
) -> None:
    """The version table may have another name and be in another schema."""
    version.connection.execute("CREATE SCHEMA versions")
    version.set("two", table="versions.release")
    where = {"version_table": "release", "version_table_schema": "versions"}
    app = installed(create_async_engine(postgres.url("psycopg")))
    async with running(app):
        assert await alembic_check(scripts.config)(app) == BEHIND
        assert await alembic_check(scripts.config, **where)(app) == CURRENT
        version.connection.execute("DROP SCHEMA versions CASCADE")
        assert await alembic_check(scripts.config, **where)(app) == BEHIND


@pytest.mark.anyio
async def test_several_databases(
    scripts: Scripts, version: Version, postgres: WorkerPostgres, tmp_path: Path
) -> None:
    """Each database has its own check and script directory, and spaces around names are ignored."""
    others = Scripts(tmp_path / "analytics")
    others.add("first")
    app = installed(create_async_engine(postgres.url("psycopg")))
    second = create_async_engine(postgres.second.url("psycopg"))
    install_database(app, name="analytics", engine=second, shutdown=second.dispose)
    version.set("two")
    async with running(app):
        assert await alembic_check(scripts.config, database=" default ")(app) == CURRENT
        assert await alembic_check(others.config, database="analytics")(app) == BEHIND


@pytest.mark.anyio
async def test_a_mounted_application(
    scripts: Scripts, version: Version, postgres: WorkerPostgres
) -> None:
    """A mounted application's check uses the database of the application that it is mounted in."""
    version.set("two")
    check = alembic_check(scripts.config)
    app = installed(create_async_engine(postgres.url("psycopg")))
    mounted = FastAPI()
    mounted.include_router(health_router(checks={"migrations": check}, timeout=20))
    app.mount("/mounted", mounted)
    async with running(app) as client:
        response = await client.get("/mounted/health/ready")
        assert response.json()["checks"] == {"migrations": "current"}


@pytest.mark.mariadb
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
@pytest.mark.anyio
async def test_on_mariadb(scripts: Scripts, mariadb: str, driver: str) -> None:
    """On MariaDB, too, a database is behind until it has the head."""
    url = make_url(mariadb)
    outside = create_engine(url.set(drivername="mysql+pymysql"), poolclass=NullPool)
    url = url.set(drivername=f"mysql+{driver}", database="migrated")
    engine: Engine | AsyncEngine = (
        create_async_engine(url) if driver == "asyncmy" else create_engine(url)
    )
    app, check = installed(engine), alembic_check(scripts.config)
    with outside.connect() as connection:
        connection.execute(text("CREATE OR REPLACE DATABASE migrated"))
        async with running(app):
            assert await check(app) == BEHIND
            connection.execute(text("CREATE TABLE migrated.alembic_version (version_num text)"))
            connection.execute(text("INSERT INTO migrated.alembic_version VALUES ('two')"))
            connection.commit()
            assert await check(app) == CURRENT
        connection.execute(text("DROP DATABASE migrated"))


# --- what it leaves alone ---


@pytest.mark.anyio
async def test_nothing_is_written(
    scripts: Scripts, version: Version, postgres: WorkerPostgres
) -> None:
    """A role that may only read the version table can run the check, which creates nothing."""
    connection = version.connection
    connection.execute("CREATE ROLE sqlnative_reader LOGIN")
    try:
        url = make_url(postgres.url("psycopg")).set(username="sqlnative_reader")
        app, check = installed(create_async_engine(url)), alembic_check(scripts.config)
        before = version.catalog()
        async with running(app):
            assert await check(app) == BEHIND
            assert version.catalog() == before
            version.set("two")
            connection.execute("GRANT SELECT ON alembic_version TO sqlnative_reader")
            before = version.catalog()
            assert await check(app) == CURRENT
            assert version.catalog() == before
    finally:
        connection.execute("DROP OWNED BY sqlnative_reader; DROP ROLE sqlnative_reader")


@pytest.mark.anyio
async def test_a_failure_leaves_the_connection_clean(
    scripts: Scripts, version: Version, engine: Engine | AsyncEngine
) -> None:
    """An unreadable version table fails the check, but the pooled connection remains usable."""
    version.connection.execute("CREATE TABLE alembic_version (other int)")
    check = alembic_check(scripts.config)
    app = installed(engine)
    async with running(app):
        for _ in range(2):
            with pytest.raises(Exception, match="version_num"):
                await check(app)
        assert backends(version.connection, "%transaction%") == 0
        version.connection.execute("DROP TABLE alembic_version")
        version.set("two")
        assert await check(app) == CURRENT


# --- the router and the log ---


def test_ready_over_http(
    scripts: Scripts,
    version: Version,
    make_engine: MakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An application that starts before the migration becomes ready after it.

    The log says why it was not ready.
    """
    app = installed(make_engine())
    checks = {"migrations": alembic_check(scripts.config)}
    app.include_router(health_router(checks=checks, timeout=20, max_age=0.001))
    with caplog.at_level(logging.INFO, "fastapi_sqlnative"), serve(app) as served:
        for _ in range(3):
            early = served.client.get("/health/ready")
            assert (early.status_code, early.json()["checks"]) == (503, {"migrations": "behind"})
        version.set("two")
        response = served.client.get("/health/ready")
        assert (response.status_code, response.json()["checks"]) == (200, {"migrations": "current"})
    said = [(each.levelname, each.getMessage()) for each in caplog.records]
    of_both = "Migrations of database 'default' are"
    assert [each for each in said if each[1].startswith("Migrations of")] == [
        ("WARNING", f"{of_both} behind: it has none, this release needs two."),
        ("INFO", f"{of_both} current: it has two, this release needs two."),
    ]


# --- immediate errors ---


@pytest.mark.parametrize("spelt", [Path, str])
@pytest.mark.anyio
async def test_a_path(
    scripts: Scripts,
    version: Version,
    postgres: WorkerPostgres,
    tmp_path: Path,
    spelt: Callable[[Path], Path | str],
) -> None:
    """The configuration may be the path of an ini file."""
    ini = tmp_path / "alembic.ini"
    ini.write_text(f"[alembic]\nscript_location = {scripts.folder}\npath_separator = os\n")
    version.set("two")
    app = installed(create_async_engine(postgres.url("psycopg")))
    async with running(app):
        assert await alembic_check(spelt(ini))(app) == CURRENT


def test_a_missing_file_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path raises FileNotFoundError when the check is made.

    The error names the path and the working directory.
    """
    monkeypatch.chdir(tmp_path)
    message = rf"no Alembic configuration 'nowhere\.ini' .*{re.escape(str(Path.cwd()))}"
    with pytest.raises(FileNotFoundError, match=message):
        alembic_check("nowhere.ini")


def test_a_missing_script_directory_fails_at_once(scripts: Scripts) -> None:
    """A wrong script location raises Alembic's own error when the check is made."""
    config = scripts.config
    config.set_main_option("script_location", "nowhere")
    with pytest.raises(CommandError, match="nowhere"):
        alembic_check(config)


def test_no_revisions_fail_at_once(tmp_path: Path) -> None:
    """A script directory without revisions raises ValueError, because it would always be behind."""
    with pytest.raises(ValueError, match="has no revisions"):
        alembic_check(Scripts(tmp_path / "empty").config)


def test_a_database_that_is_not_installed(
    scripts: Scripts, caplog: pytest.LogCaptureFixture
) -> None:
    """A check of a database that is not installed is down, and the log lists those that are."""
    app = installed(sqlite())
    checks = {"migrations": alembic_check(scripts.config, database="analitics")}
    app.include_router(health_router(checks=checks))
    with serve(app) as served:
        response = served.client.get("/health/ready")
        assert (response.status_code, response.json()["checks"]) == (503, {"migrations": "down"})
    assert "Installed: 'default'." in caplog.text


# --- the extra ---


def test_without_alembic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the import raises ImportError with the command that installs it."""
    for each in [name for name in sys.modules if name.partition(".")[0] == "alembic"]:
        monkeypatch.setitem(sys.modules, each, None)
    monkeypatch.delitem(sys.modules, "fastapi_sqlnative.migrations")
    with pytest.raises(ImportError, match=r'pip install "fastapi-sqlnative\[alembic\]"'):
        importlib.import_module("fastapi_sqlnative.migrations")
