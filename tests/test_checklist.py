"""The checklist's findings for databases that are misconfigured on purpose."""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from psycopg import sql
from sqlalchemy import URL, Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from fastapi_sqlnative import install_database, installed_databases
from fastapi_sqlnative.__main__ import main
from fastapi_sqlnative._drivers.pools import OUTSIDE
from fastapi_sqlnative.checklist import Finding, FindingStatus, check_databases, log_findings
from fastapi_sqlnative.checklist._findings import FIXES, GUIDE, finding
from tests.conftest import find_pgbouncer
from tests.mariadb_server import _reachable_home
from tests.postgres_server import (
    Account,
    PostgresServer,
    _free_port,
    _surroundings,
    _unprivileged_account,
)
from tests.serving import KINDS, Kind, wait_until

ROOT = Path(__file__).parents[1]
ROLES = """
CREATE ROLE shop LOGIN;
ALTER ROLE shop SET statement_timeout = '5s';
ALTER ROLE shop SET lock_timeout = '2s';
ALTER ROLE shop SET idle_in_transaction_session_timeout = '30s';
CREATE ROLE passing LOGIN BYPASSRLS;
CREATE ROLE limited LOGIN CONNECTION LIMIT 10;
CREATE ROLE readonly LOGIN;
ALTER ROLE readonly SET default_transaction_read_only = on;
CREATE ROLE owner LOGIN;
CREATE TABLE tenant (id int);
ALTER TABLE tenant ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant OWNER TO owner;
"""
LIMITS = "-c statement_timeout=5s -c lock_timeout=2s -c idle_in_transaction_session_timeout=30s"
DRIVERS = (*KINDS, Kind("psycopg2", "psycopg2", False))
each_driver = pytest.mark.parametrize("kind", DRIVERS, ids=lambda kind: kind.id)


class Badly(PostgresServer):
    """A server that can become a standby, which reports its readiness with another word."""

    def _is_ready(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            if len(lines) > 7 and lines[7].strip() == "standby":
                return True
        return super()._is_ready()

    def become_standby(self) -> None:
        """Restart as a standby without a primary, which accepts no writes."""
        self.stop()
        (self._data / "standby.signal").touch()
        self.start()


@pytest.fixture(scope="module")
def server() -> Iterator[Badly]:
    """Yield a server for these tests only, with few connections and a role for each mistake."""
    settings = {
        "max_connections": "30",
        "superuser_reserved_connections": "3",
        "listen_addresses": "127.0.0.1,127.0.0.2",  # the second stands for another machine
    }
    with Badly(settings=settings) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(ROLES)
            connection.execute("CREATE DATABASE second")
            connection.execute("CREATE DATABASE narrow CONNECTION LIMIT 5")
        yield server


def url_of(server: PostgresServer, driver: str, role: str = "shop", database: str = "") -> str:
    url = make_url(server.url).set(drivername=f"postgresql+{driver}", username=role)
    return str(url.set(database=database or url.database))


def engine_for(kind: Kind, url: str | URL, **options: Any) -> Engine | AsyncEngine:
    return (create_async_engine if kind.asynchronous else create_engine)(url, **options)


def wait_for_others(server: Badly, role: str = "shop") -> None:
    """Wait until the server has ended the connections that earlier tests made for other roles."""
    query = """
        SELECT count(*) FROM pg_stat_activity
        WHERE usename <> current_user AND datname IS NOT NULL
    """
    url = url_of(server, "psycopg", role).replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        wait_until(lambda: connection.execute(query).fetchone() == (0,))


def well(kind: Kind) -> dict[str, Any]:
    """Return engine options that pass every check."""
    timeout = "timeout" if kind.driver == "asyncpg" else "connect_timeout"
    return {"pool_pre_ping": True, "connect_args": {timeout: 5}}


def check(*engines: Any, **options: Any) -> list[Finding]:
    """Return the findings for an application with these databases, the first as the default one."""
    app = FastAPI()
    for number, engine in enumerate(engines):
        install_database(app, name=f"db{number}" if number else "default", engine=engine)
    return asyncio.run(check_databases(app, **options))


def warnings(findings: list[Finding]) -> dict[str, str]:
    return {each.subject: each.detail for each in findings if each.status == "warning"}


def row(findings: list[Finding], subject: str) -> tuple[str, str]:
    (found,) = (each for each in findings if each.subject == subject)
    return found.status, found.detail


# --- findings -----------------------------------------------------------------------------------


@each_driver
def test_what_is_missing_is_found(kind: Kind, server: Badly) -> None:
    """A superuser's engine as in the tutorial, without options, has a warning for each omission."""
    wait_for_others(server, "postgres")
    findings = check(engine_for(kind, url_of(server, kind.driver, "postgres")), processes=2)
    assert set(warnings(findings)) == {
        "connect timeout",
        "pre-ping",
        "statement timeout",
        "lock timeout",
        "idle in transaction",
        "role",
        "connections",
    }
    assert row(findings, "role") == ("warning", "superuser")
    assert row(findings, "connections") == ("warning", "32 needed by 2 process(es), 30 available")
    assert all(each.fix and each.link for each in findings if each.status != "ok")


@each_driver
def test_what_is_well_is_not_complained_about(kind: Kind, server: Badly) -> None:
    """An engine that is fully configured gets only `ok` findings, without fixes or links."""
    wait_for_others(server)
    findings = check(engine_for(kind, url_of(server, kind.driver), **well(kind)))
    assert {each.status for each in findings} == {"ok"}, findings
    assert row(findings, "statement timeout") == ("ok", "5s")
    assert row(findings, "connect timeout") == ("ok", "5 s")
    assert row(findings, "connections") == ("ok", "16 needed by 1 process(es), 27 available")
    assert not any(each.fix or each.link for each in findings)


def test_limits_of_the_connection_count(server: Badly) -> None:
    """Timeouts that the engine sends with each connection count like those of the role."""
    url = url_of(server, "psycopg", "limited")
    findings = check(create_async_engine(url, connect_args={"options": LIMITS}))
    assert not {"statement timeout", "lock timeout", "idle in transaction"} & set(
        warnings(findings)
    )


def test_a_connect_timeout_of_the_environment_counts(
    server: Badly, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connect timeout that libpq reads from the environment counts."""
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    findings = check(create_engine(url_of(server, "psycopg")))
    assert row(findings, "connect timeout") == ("ok", "7 s")


@pytest.mark.parametrize(
    ("role", "subject", "detail"),
    [
        ("passing", "role", "bypasses row-level security"),
        ("owner", "role", "owns tables whose row-level security is not forced on their owner"),
        ("readonly", "writes", "read only"),
    ],
)
def test_roles_are_seen_through(server: Badly, role: str, subject: str, detail: str) -> None:
    """A role that sees every tenant's rows, or that cannot write, gets a warning."""
    findings = check(create_engine(url_of(server, "psycopg", role)))
    assert row(findings, subject) == ("warning", detail)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_an_engine_in_autocommit_is_found(kind: Kind, server: Badly) -> None:
    """An engine in AUTOCOMMIT, which has no transactions, is reported."""
    url = url_of(server, kind.driver)
    findings = check(
        engine_for(kind, url, isolation_level="AUTOCOMMIT"),
        engine_for(kind, url, execution_options={"isolation_level": "AUTOCOMMIT"}),
    )
    found = [each.detail for each in findings if each.subject == "transactions"]
    assert found == ["AUTOCOMMIT", "AUTOCOMMIT"]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_connection_without_tls_is_found(driver: str, server: Badly) -> None:
    """An unencrypted connection to another machine gets a warning."""
    # 0.0.0.0 leads to this machine, but does not look like a local address.
    url = make_url(url_of(server, driver)).set(host="0.0.0.0")
    assert row(check(create_async_engine(url)), "TLS") == ("warning", "off")
    assert row(check(create_async_engine(url_of(server, driver))), "TLS")[0] == "ok"


def test_a_host_that_no_url_names_is_found(server: Badly, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host from the environment, a creator or `hostaddr` is not mistaken for this machine."""
    url = URL.create("postgresql+psycopg", "shop", port=server.port, database="postgres")
    addressed = create_engine(url.update_query_dict({"hostaddr": "0.0.0.0"}))
    assert row(check(addressed), "TLS") == ("warning", "off")

    def create() -> Any:
        return asyncpg.connect(host="127.0.0.2", port=url.port, user="shop", database="postgres")

    created = create_async_engine("postgresql+asyncpg://", async_creator=create)
    assert row(check(created), "TLS") == ("warning", "off")
    url = url.set(drivername="postgresql+asyncpg")
    for host, expected in ("127.0.0.2", "warning"), ("127.0.0.1", "ok"):
        monkeypatch.setenv("PGHOST", host)
        assert row(check(create_async_engine(url)), "TLS")[0] == expected


# --- connections --------------------------------------------------------------------------------


def test_pools_on_one_server_are_added_up(server: Badly) -> None:
    """Pools of databases on one server are added up, and an engine with two names counts once."""
    wait_for_others(server)
    first, second = (
        create_async_engine(url_of(server, "psycopg", database=name), pool_size=4, max_overflow=1)
        for name in ("postgres", "second")
    )
    (found,) = (
        each for each in check(first, second, first, processes=2) if each.subject == "connections"
    )
    assert found.database == "default, db1, db2"
    assert found.detail == "24 needed by 2 process(es), 27 available"


def test_an_engine_under_two_names_is_asked_twice(server: Badly) -> None:
    """Two checks of a new engine get all answers, although only one initializes the dialect."""
    other_done = asyncio.Event()
    queries: list[object] = []

    class Slow(psycopg.AsyncCursor[Any]):
        async def execute(self, query: Any, *args: Any, **options: Any) -> Any:
            queries.append(query)
            if len(queries) == 1:  # the query with which the dialect is initialized
                await other_done.wait()
            return await super().execute(query, *args, **options)

    engine = create_async_engine(
        url_of(server, "psycopg"),
        connect_args={"cursor_factory": Slow, "application_name": "twice"},
    )
    findings = check(
        engine, engine, progress=lambda line: other_done.set() if "done" in line else None
    )
    assert {each.database for each in findings} == {"default", "db1", "default, db1"}
    assert not {"unknown", "no answer"} & {each.status for each in findings}
    with psycopg.connect(server.url, autocommit=True) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'twice'"
        wait_until(lambda: connection.execute(query).fetchone() == (0,))


def test_connections_of_others_are_not_to_be_had(server: Badly) -> None:
    """Connections of other roles are subtracted from those available, but not the role's own."""
    wait_for_others(server)
    engine = create_engine(url_of(server, "psycopg"))
    with (
        psycopg.connect(url_of(server, "psycopg").replace("+psycopg", "")),
        psycopg.connect(server.url),
        psycopg.connect(server.url),
    ):
        found = row(check(engine), "connections")
    assert found == ("ok", "16 needed by 1 process(es), 25 available")


@pytest.mark.parametrize(
    ("role", "databases", "expected"),
    [
        ("limited", ["postgres"], "16 needed by 1 process(es), 10 available"),
        ("limited", ["postgres", "second"], "32 needed by 1 process(es), 10 available"),
        ("shop", ["narrow"], "16 needed by 1 process(es), 5 available"),
    ],
    ids=str,
)
def test_a_limit_of_the_role_or_the_database_counts(
    server: Badly, role: str, databases: list[str], expected: str
) -> None:
    """A CONNECTION LIMIT bounds the pools' connections, and a role's covers all its databases."""
    engines = (create_engine(url_of(server, "psycopg", role, each)) for each in databases)
    assert row(check(*engines), "connections") == ("warning", expected)


def test_as_many_connections_as_needed_are_enough(server: Badly) -> None:
    """Pools that need exactly the connections available, one for readiness included, are ok."""
    engine = create_engine(url_of(server, "psycopg", "limited"), pool_size=4, max_overflow=5)
    expected = ("ok", "10 needed by 1 process(es), 10 available")
    assert row(check(engine), "connections") == expected


@pytest.mark.parametrize("options", [{"max_overflow": -1}, {"poolclass": NullPool}], ids=str)
def test_a_pool_without_a_limit_is_named(server: Badly, options: dict[str, Any]) -> None:
    """A pool without a limit gets its own warning."""
    found = row(check(create_engine(url_of(server, "psycopg"), **options)), "connections")
    assert found == ("warning", "a pool has no limit")


# --- poolers, TLS, standbys and migrations ------------------------------------------------------


# A test key and its certificate for db.example and 0.0.0.0, valid until 2126.
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgyjVgEjnWbEZ+3pnS
lN/y8DCVID6/LdausmwSFMYpjxehRANCAAQEbBrVlWMqkOMFa9t03uDkJY+KZ9L4
+VIX9lZVtybXpHapYRvtY7orDQhdNICbP9v6Hdqj2VN+GCQCG7ryxu7G
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBnjCCAUSgAwIBAgIUKJIMDKVLchtK35DsNE2pV71GAR4wCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKZGIuZXhhbXBsZTAgFw0yNjExMjYxMzI3MzlaGA8yMTI2MTEw
MjEzMjczOVowFTETMBEGA1UEAwwKZGIuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABARsGtWVYyqQ4wVr23Te4OQlj4pn0vj5Uhf2VlW3JtekdqlhG+1j
uisNCF00gJs/2/od2qPZU34YJAIbuvLG7sajcDBuMB0GA1UdDgQWBBQWusWoOIu9
ghSlSvBpY72jprl0VjAfBgNVHSMEGDAWgBQWusWoOIu9ghSlSvBpY72jprl0VjAP
BgNVHRMBAf8EBTADAQH/MBsGA1UdEQQUMBKCCmRiLmV4YW1wbGWHBAAAAAAwCgYI
KoZIzj0EAwIDSAAwRQIgZ9MfHX4033jBBoc8hNaneRYU1ddcZg/3W0xYE4jbFwQC
IQDzcGFDaUtQCB/pxro0DROVtFmtqLt0eVjT1i9oo5l78g==
-----END CERTIFICATE-----
"""


@dataclass(frozen=True)
class PgBouncer:
    """A running PgBouncer: its port and the certificate that it presents."""

    port: int
    certificate: str


@pytest.fixture(scope="module")
def pgbouncer(server: Badly) -> Iterator[PgBouncer]:
    """Run PgBouncer in front of the server, in transaction mode and with TLS."""
    program = find_pgbouncer()
    assert program is not None, "PgBouncer was not found: apt-get install pgbouncer"
    account = _unprivileged_account() if os.geteuid() == 0 else Account()
    home, port = _reachable_home(account), _free_port()
    for name, content in {"key": KEY, "certificate": CERTIFICATE}.items():
        (home / name).write_text(content)
    (home / "ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port} user=shop\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        "pool_mode = transaction\nignore_startup_parameters = extra_float_digits\n"
        f"client_tls_sslmode = allow\nclient_tls_cert_file = {home / 'certificate'}\n"
        f"client_tls_key_file = {home / 'key'}\n"
    )
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, home / "ini"], stdout=log, stderr=log, **_surroundings(account)
        )

    def listens() -> bool:
        assert process.poll() is None, (home / "log").read_text()
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    try:
        wait_until(listens)
        yield PgBouncer(port, str(home / "certificate"))
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(home)


WITHOUT_PREPARED: dict[str, dict[str, Any]] = {
    "psycopg": {"prepare_threshold": None},
    "asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
}


@pytest.mark.pgbouncer
@pytest.mark.parametrize("driver", WITHOUT_PREPARED)
def test_pgbouncer_is_found(server: Badly, pgbouncer: PgBouncer, driver: str) -> None:
    """PgBouncer is detected, with a warning if the driver prepares statements.

    The connections are not counted then, because PgBouncer's clients are not the server's.
    """
    url = make_url(url_of(server, driver)).set(port=pgbouncer.port)
    findings = check(create_async_engine(url))
    assert row(findings, "pooler") == ("warning", "present, but the driver prepares statements")
    assert "connections" not in {each.subject for each in findings}
    findings = check(create_async_engine(url, connect_args=WITHOUT_PREPARED[driver]))
    assert row(findings, "pooler") == ("ok", "present, and the driver prepares no statements")
    # psycopg2 prepares no statements.
    findings = check(create_engine(url.set(drivername="postgresql+psycopg2")))
    assert row(findings, "pooler")[0] == "ok"


ANYBODY = "server not verified"


@pytest.mark.pgbouncer
def test_a_pooler_that_no_url_names_is_not_this_machine(pgbouncer: PgBouncer) -> None:
    """A pooler whose address only a creator has is not mistaken for this machine."""

    def create() -> Any:
        where = {"host": "127.0.0.1", "port": pgbouncer.port}
        return asyncpg.connect(**where, user="shop", database="postgres", statement_cache_size=0)

    created = create_async_engine("postgresql+asyncpg://", async_creator=create)
    assert row(check(created), "TLS") == ("warning", ANYBODY)


OF_LIBPQ = {"host": "db.example", "hostaddr": "127.0.0.1"}


@pytest.mark.pgbouncer
@pytest.mark.parametrize(
    ("driver", "arguments", "expected"),
    [
        ("psycopg", OF_LIBPQ | {"sslmode": "disable"}, "off"),
        ("psycopg", OF_LIBPQ, f"on, but {ANYBODY}"),
        ("psycopg", OF_LIBPQ | {"sslmode": "verify-full"}, "on"),
        ("psycopg2", OF_LIBPQ | {"sslmode": "verify-ca"}, f"on, but {ANYBODY}"),
        ("psycopg2", OF_LIBPQ | {"sslmode": "verify-full"}, "on"),
        ("asyncpg", {"host": "0.0.0.0"}, ANYBODY),
        ("asyncpg", {"host": "0.0.0.0", "ssl": "believing"}, ANYBODY),
        ("asyncpg", {"host": "0.0.0.0", "ssl": "verifying"}, "on"),
    ],
    ids=str,
)
def test_a_server_that_nobody_verifies_is_found(
    server: Badly, pgbouncer: PgBouncer, driver: str, arguments: dict[str, Any], expected: str
) -> None:
    """An encrypted connection passes only if the server's name is verified."""
    if str(arguments.get("sslmode")).startswith("verify"):
        arguments = arguments | {"sslrootcert": pgbouncer.certificate}
    if "ssl" in arguments:
        context = ssl.create_default_context(cafile=pgbouncer.certificate)
        context.check_hostname = arguments["ssl"] == "verifying"
        arguments = arguments | {"ssl": context}
    url = make_url(url_of(server, driver)).set(port=pgbouncer.port)
    kind = Kind(driver, driver, driver != "psycopg2")
    found = row(check(engine_for(kind, url, connect_args=arguments)), "TLS")
    assert found == ("ok" if expected == "on" else "warning", expected)


@pytest.mark.pgbouncer
def test_verification_may_come_from_the_environment(
    server: Badly, pgbouncer: PgBouncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TLS mode that asyncpg reads from the environment counts."""
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", str(pgbouncer.certificate))
    url = make_url(url_of(server, "asyncpg")).set(host="0.0.0.0", port=pgbouncer.port)
    assert row(check(create_async_engine(url)), "TLS") == ("ok", "on")


def test_a_standby_is_found() -> None:
    """A standby, which accepts no writes, gets a warning."""
    with Badly() as server:
        server.become_standby()
        findings = check(create_engine(url_of(server, "psycopg", "postgres")))
    assert row(findings, "writes") == ("warning", "standby")


def test_a_missing_migration_is_found(tmp_path: Path, server: Badly) -> None:
    """With Alembic's configuration, a database gets a warning unless it is at the heads."""
    config = Config(tmp_path / "alembic.ini")
    url = url_of(server, "psycopg", "postgres", "second")
    config.set_main_option("script_location", str(tmp_path / "script"))
    command.init(config, str(tmp_path / "script"))
    command.revision(config, rev_id="abc")
    engine = create_engine(url)
    found = row(check(engine, alembic={"default": config}), "migrations")
    assert found == ("warning", "behind (none)")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num text)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('abc')"))
    engine.dispose()
    assert row(check(engine, alembic={"default": config}), "migrations") == ("ok", "current (abc)")


# --- other databases ----------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["pysqlite", "aiosqlite"])
def test_sqlite_as_it_comes_is_found(driver: str, tmp_path: Path) -> None:
    """SQLite without WAL, foreign keys or a busy timeout gets a warning for each."""
    make = create_async_engine if driver == "aiosqlite" else create_engine
    url = f"sqlite+{driver}:///{tmp_path / 'database'}"
    found = warnings(check(make(url, connect_args={"timeout": 0})))
    assert found == {"journal mode": "delete", "foreign keys": "0", "busy timeout": "none"}
    engine = make(url)

    @event.listens_for(getattr(engine, "sync_engine", engine), "connect")
    def set_pragmas(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    assert {each.status for each in check(engine)} == {"ok"}


@pytest.mark.mariadb
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
def test_mariadb_as_it_comes_is_found(driver: str, mariadb: str) -> None:
    """MariaDB gets the findings that apply to it, and none without an answer."""
    url = make_url(mariadb).set(drivername=f"mariadb+{driver}")
    make = create_async_engine if driver == "asyncmy" else create_engine
    findings = check(make(url), processes=20)
    assert not {each.status for each in findings} & {"unknown", "no answer"}, findings
    assert set(warnings(findings)) == {
        *("statement timeout", "idle in transaction", "pre-ping", "role", "connections")
    }
    assert row(findings, "role") == ("warning", "has all privileges")
    assert row(findings, "writes") == ("ok", "writable")
    limits = "SET SESSION max_statement_time = 5, idle_transaction_timeout = 30"
    options: dict[str, Any] = {"connect_args": {"init_command": limits}, "pool_pre_ping": True}
    assert set(warnings(check(make(url, **options)))) == {"role"}


@pytest.mark.mariadb
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
def test_a_connection_to_mariadb_without_tls_is_found(driver: str, mariadb: str) -> None:
    """An unencrypted connection to a MariaDB server on another machine gets a warning."""
    # 0.0.0.0 leads to this machine, but does not look like a local address.
    url = make_url(mariadb).set(drivername=f"mariadb+{driver}", host="0.0.0.0")
    make = create_async_engine if driver == "asyncmy" else create_engine
    assert row(check(make(url)), "TLS") == ("warning", "off")


# --- databases that do not answer ---------------------------------------------------------------


def test_a_database_that_is_away_is_one_row(server: Badly, tmp_path: Path) -> None:
    """A database that is unavailable is a single row, and the other databases are still checked.

    The causes are a closed port, a wrong name or path, and a factory that fails.
    """

    def fails() -> Engine:
        raise KeyError("DATABASE_URL")

    findings = check(
        create_engine(url_of(server, "psycopg")),
        create_async_engine("postgresql+psycopg://127.0.0.1:1/shop"),
        create_async_engine("postgresql+asyncpg://127.0.0.1:1/shop"),
        create_engine(url_of(server, "psycopg", database="nowhere")),
        fails,
        lambda: "postgresql://",
        create_engine(f"sqlite:///{tmp_path / 'no' / 'folder'}"),
    )
    found = {each.database: each.detail for each in findings if each.status == "no answer"}
    assert set(found) == {"db1", "db2", "db3", "db4", "db5", "db6"}
    assert "refused" in found["db1"]
    assert 'database "nowhere" does not exist' in found["db3"]
    assert found["db4"] == "KeyError: 'DATABASE_URL'"
    assert found["db5"].startswith("TypeError: The engine factory of database 'db5' must return")
    assert len([each for each in findings if each.database in found]) == len(found)
    assert row([each for each in findings if each.database == "default"], "writes")[0] == "ok"


@each_driver
def test_a_database_that_hangs_is_one_row(kind: Kind) -> None:
    """A server that accepts but never answers costs only the given timeout and is a single row."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = f"postgresql+{kind.driver}://shop@127.0.0.1:{port}/shop"
        (found,) = check(engine_for(kind, url), timeout=0.2)
    assert found.status == "no answer"
    assert found.detail == "no answer within 0.2 s (connecting)"


def test_what_a_server_does_not_tell_is_unknown(server: Badly) -> None:
    """A query that the server denies makes its row `unknown`, and the other queries still run."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("REVOKE SELECT ON pg_stat_activity FROM public")
        try:
            findings = check(create_engine(url_of(server, "psycopg")))
        finally:
            connection.execute("GRANT SELECT ON pg_stat_activity TO public")
    status, detail = row(findings, "connections")
    assert status == "unknown"
    assert detail == "InsufficientPrivilege: permission denied for view pg_stat_activity"
    assert row(findings, "pooler") == ("ok", "none")


def test_a_connection_that_is_lost_is_one_row(server: Badly) -> None:
    """A connection lost during a check makes a single `no answer` row, not one for each query."""

    class Losing(psycopg.Cursor[Any]):
        def execute(self, query: Any, *args: Any, **options: Any) -> Any:
            if "lock_timeout" in str(query):
                with psycopg.connect(server.url) as other:
                    pid = self.connection.info.backend_pid
                    other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
            return super().execute(query, *args, **options)

    losing = {"cursor_factory": Losing}
    (found,) = check(create_engine(url_of(server, "psycopg"), connect_args=losing))
    assert (found.subject, found.status) == ("answer", "no answer")


# --- side effects -------------------------------------------------------------------------------


@each_driver
def test_nothing_of_the_application_runs_or_stays(kind: Kind, server: Badly) -> None:
    """A check runs no lifespan, leaves pools as they are, and leaves no connection open.

    Its connections are marked, so that the pool's metrics leave them out.
    """

    ran: list[FastAPI] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        ran.append(app)
        yield

    name = f"checked_{kind.id}"
    url = url_of(server, kind.driver)
    ready = engine_for(kind, url)
    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=ready)
    disposed: list[object] = []
    outside: list[bool] = []  # whether marked, so that the pool's metrics leave it out
    event.listen(ready.pool, "connect", lambda _, record: outside.append(OUTSIDE in record.info))

    def build() -> Engine | AsyncEngine:
        made = engine_for(kind, url)
        event.listen(getattr(made, "sync_engine", made), "engine_disposed", disposed.append)
        return made

    install_database(app, name="made", engine=build)
    with psycopg.connect(server.url, autocommit=True) as connection:
        set_name = sql.SQL("ALTER ROLE shop SET application_name = {}")
        connection.execute(set_name.format(sql.Literal(name)))
        findings = asyncio.run(check_databases(app))
        assert not ran
        assert (len(disposed), outside) == (1, [True])
        assert {each.database for each in findings} == {"default", "made", "default, made"}
        assert ready.pool.checkedin() == 0  # type: ignore[attr-defined] # it is a QueuePool
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        wait_until(lambda: connection.execute(query, (name,)).fetchone() == (0,))
    with pytest.raises(RuntimeError, match="lifespan is not running"):
        installed_databases(app)["default"]


@pytest.mark.anyio
async def test_a_running_application_logs_a_line(
    server: Badly, caplog: pytest.LogCaptureFixture
) -> None:
    """In a lifespan, a check uses the running engines, and its result is logged as one line."""
    built: list[AsyncEngine] = []

    def build() -> AsyncEngine:
        built.append(create_async_engine(url_of(server, "psycopg"), pool_pre_ping=True))
        return built[-1]

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        log_findings(await check_databases(app))
        yield

    app = FastAPI(lifespan=lifespan)
    install_database(app, engine=build)
    with caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        async with app.router.lifespan_context(app):
            assert len(built) == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "Checklist: 11 ok, 1 warning (default: connect timeout). "
        "`python -m fastapi_sqlnative check` names the fixes."
    )


def test_findings_that_are_all_well_are_logged_as_information(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If every row is ok, the log has one line at the level INFO, without a hint."""
    with caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        log_findings([finding("default", "TLS", "on", FindingStatus.OK)])
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("INFO", "Checklist: 1 ok.")


def test_a_pool_that_keeps_no_connections_needs_no_pre_ping(server: Badly) -> None:
    """With NullPool, there is no row about pre-ping, because each connection is new."""
    engine = create_engine(url_of(server, "psycopg"), poolclass=NullPool)
    assert "pre-ping" not in {each.subject for each in check(engine)}


def test_mounted_applications_are_asked_too(server: Badly) -> None:
    """Databases of mounted applications have their own rows, numbered if they share a name."""
    app, mounted, between = FastAPI(), FastAPI(), FastAPI()
    for each in app, mounted:
        install_database(each, engine=create_engine(url_of(server, "psycopg")))
    for path, above in ("/mounted", app), ("/again", app), ("/mounted", between):
        above.mount(path, mounted)
    app.mount("/between", between)
    lines: list[str] = []
    findings = asyncio.run(check_databases(app, progress=lines.append))
    assert {"default", "default (2)"} < {each.database for each in findings}
    assert lines[:2] == ["Asking database 'default' ...", "Asking database 'default (2)' ..."]
    assert sorted(lines[2:]) == [
        "Database 'default (2)': done.",
        "Database 'default': done.",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "at least 1"),
        ({"timeout": 0}, "above 0"),
        ({"alembic": {"other": str(ROOT / "migrations_example" / "alembic.ini")}}, "'default'"),
    ],
    ids=str,
)
def test_mistakes_are_refused(options: dict[str, Any], message: str) -> None:
    """Options that make no sense raise ValueError."""
    with pytest.raises(ValueError, match=message):
        check(create_engine("sqlite://"), **options)


def test_every_link_leads_to_the_guide() -> None:
    """Each warning links to the row of the guide that explains it."""
    assert (ROOT / "pyproject.toml").read_text().count(f'"{GUIDE}index.md"') == 1
    page = (ROOT / "docs" / "checklist.md").read_text()
    for subject in FIXES:
        link = finding("default", subject, "", FindingStatus.WARNING).link
        anchor = link.removeprefix(f"{GUIDE}checklist.md#")
        assert page.count(f'<a id="{anchor}"></a>') == 1, link


# --- the command line ---------------------------------------------------------------------------

MAIN = """
from fastapi import FastAPI
from sqlalchemy import create_engine
from fastapi_sqlnative import install_database

def create_app():
    app = FastAPI()
    install_database(app, engine=create_engine({url!r}))
    return app

def fail():
    raise ValueError("1 error:\\n  url is missing")

app = create_app()
"""


@pytest.fixture
def application(server: Badly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write an application that gets two warnings, and yield the folder to import it from."""
    (tmp_path / "main.py").write_text(MAIN.format(url=url_of(server, "psycopg")))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in "main", "failing", "leaving", "empty", "away", "partly":
        sys.modules.pop(name, None)


def run(*arguments: str) -> object:
    """Run the command in this process, and return its status."""
    try:
        return main(["check", *arguments])
    except SystemExit as ended:
        return ended.code


def test_the_command_prints_a_table(application: Path) -> None:
    """The command prints all rows as a table, fixes below warnings, and its progress to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "fastapi_sqlnative", "check", "main:app", "--processes", "1"],
        cwd=application,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "default"
    place = next(i for i, line in enumerate(lines) if "pre-ping" in line)
    assert lines[place].split() == ["warning", "pre-ping", "off"]
    assert "pool_pre_ping=True" in lines[place + 1]
    assert lines[place + 2].strip().startswith("https://")
    assert lines[-1] == "10 ok, 2 warning"
    assert done.stderr.splitlines() == [
        "Asking database 'default' ...",
        "Database 'default': done.",
    ]


def test_the_command_fails_a_pipeline_on_request(
    application: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--strict`, the command fails if a warning has not been accepted."""
    accepted = ("--accept", "default:pre-ping", "--accept", "default:connect timeout")
    assert run("main:create_app", "--factory", "--strict") == 1
    capsys.readouterr()
    assert run("main", "--strict", *accepted) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "10 ok, 2 accepted"
    assert "pool_pre_ping" not in printed


@pytest.mark.parametrize("accepted", ["default", "other", "default, other"])
def test_a_row_about_several_databases_is_accepted_by_any_of_their_names(
    application: Path, accepted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row of pools that share a server is accepted under any of the databases' names."""
    one = (application / "main.py").read_text()
    installing = re.search(r"(install_database\(app, )(.+)", one)
    assert installing is not None
    (application / "main.py").write_text(f"{one}\n{installing[1]}name='other', {installing[2]}\n")
    assert run("main:app", "--processes", "50", "--accept", f"{accepted}:connections") == 0
    rows = capsys.readouterr().out.splitlines()
    place = rows.index("default, other")
    assert rows[place + 1].split()[:2] == ["accepted", "connections"]


def test_the_command_prints_json(application: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--json`, the command prints the rows as JSON and nothing else."""
    run("main:app", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert {"default: pre-ping: warning", "default: writes: ok"} < {
        f"{each['database']}: {each['subject']}: {each['status']}" for each in rows
    }
    assert set(rows[0]) == {"database", "subject", "status", "detail", "fix", "link"}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere:app", "ModuleNotFoundError: No module named 'nowhere'"),
        ("main:nothing", "AttributeError: module 'main' has no attribute 'nothing'"),
        ("main:create_app", "TypeError: this is a function, not an application. Pass --factory"),
        ("main:app --factory", "TypeError: this is an application, not a function. Leave out"),
        ("main:fail --factory", "ValueError: 1 error: url is missing"),
        ("failing:app", "KeyError: 'SHOP_DATABASE_URL'"),
        ("leaving:app", "SystemExit"),
        ("empty:app", "no database is installed on it. Call install_database(app, ...)."),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(
    application: Path, target: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed import, or an application without a database, is a one-line error with status 2."""
    (application / "failing.py").write_text("import os; os.environ['SHOP_DATABASE_URL']")
    (application / "leaving.py").write_text("raise SystemExit")
    (application / "empty.py").write_text("from fastapi import FastAPI; app = FastAPI()")
    name, *options = target.split()
    assert run(name, *options) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{name} cannot be checked: ")
    assert says in line
    assert not printed.out


def test_a_database_that_is_away_is_no_success(
    application: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A database that does not answer makes the command's status 2, whatever is accepted."""
    away = MAIN.format(url="postgresql+psycopg://127.0.0.1:1/shop")
    (application / "away.py").write_text(away)
    assert run("away:app", "--accept", "default:pooler") == 2
    assert "no answer" in capsys.readouterr().out
    # Another database that answers does not change that.
    another = "install_database(app, name='other', engine=create_engine('sqlite://'))\n"
    (application / "partly.py").write_text(away + another)
    assert run("partly:app") == 2


def test_the_commands_timeout_is_that_of_each_database(
    application: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--timeout`, the command waits that long for each database."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://127.0.0.1:{silent.getsockname()[1]}/shop"
        (application / "away.py").write_text(MAIN.format(url=url))
        assert run("away:app", "--timeout", "0.2") == 2
    assert "no answer within 0.2 s" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "default="])
def test_the_command_compares_with_alembics_heads(
    application: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--alembic`, the command checks the revision of the named or the default database."""
    path = ROOT / "migrations_example" / "alembic.ini"
    assert run("main", "--alembic", f"{name}{path}") == 0
    assert "migrations" in capsys.readouterr().out


def test_the_command_reads_the_section_of_the_database(
    application: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several databases in one Alembic configuration, each is compared with its own heads."""
    url = f"sqlite:///{application / 'analytics.db'}"
    with create_engine(url).begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num text)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('0001')"))
    (application / "partly.py").write_text(
        MAIN.format(url=url).replace("app, engine", "app, name='analytics', engine")
    )
    path = ROOT / "migrations_example" / "alembic.ini"
    assert run("partly", "--alembic", f"analytics={path}") == 0
    assert "current (0001)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("accepted", "says"),
    [
        ("default:poler", "no row 'poler' can be accepted; these can: TLS,"),
        ("default:answer", "no row 'answer' can be accepted"),
        ("defult:pooler", "--accept names ['defult'], and installed are: ['default']"),
        ("pooler", "--accept names ['']"),
    ],
)
def test_a_row_that_does_not_exist_cannot_be_accepted(
    application: Path, accepted: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accepting a row that does not exist is an error that names the rows or the databases."""
    assert run("main", "--accept", accepted) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert not printed.out
