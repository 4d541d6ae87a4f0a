"""A primary and a standby that streams from it, with Debian's PostgreSQL."""

import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg
from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.ha.services import home
from tests.postgres_server import PostgresServer, _surroundings
from tests.serving import Kind, wait_until

Attributes = Literal["read-write", "read-only", "prefer-standby", "any"]
SCHEMA = "CREATE TABLE item (id serial PRIMARY KEY, name text NOT NULL UNIQUE, position int)"
# The launcher's defaults are for databases whose loss does not matter.
DURABLE = {"synchronous_commit": "on", "full_page_writes": "on", "wal_keep_size": "256MB"}


def address(ports: list[int], driver: str, attributes: Attributes | None = None) -> URL:
    """Return a URL that lists several servers in this order."""
    query: dict[str, Any] = {"host": [f"127.0.0.1:{port}" for port in ports]}
    if attributes:
        query["target_session_attrs"] = attributes
    return URL.create(f"postgresql+{driver}", username="postgres", database="postgres", query=query)


def engine_at(kind: Kind, url: URL, **options: Any) -> Engine | AsyncEngine:
    """Build an engine with the limits that docs/failover.md names."""
    limits: dict[str, Any] = (
        {"timeout": 2, "command_timeout": 5}
        if kind.driver == "asyncpg"
        else {"connect_timeout": 2, "tcp_user_timeout": 5000}
    )
    create = create_async_engine if kind.asynchronous else create_engine
    return create(url, **{"connect_args": limits, "pool_pre_ping": True} | options)


@dataclass
class Replication:
    """Two servers, named by the roles in which they start."""

    primary: PostgresServer
    standby: PostgresServer

    @property
    def ports(self) -> list[int]:
        """Return both ports, with the original primary's first."""
        return [self.primary.port, self.standby.port]

    def names(self, server: PostgresServer) -> set[str]:
        """List the names stored on a server."""
        with psycopg.connect(server.url) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM item").fetchall()}

    def ask(self, server: PostgresServer, query: str) -> Any:
        """Run a query on a server, and return one value."""
        with psycopg.connect(server.url, autocommit=True) as connection:
            row = connection.execute(query.encode()).fetchone()
            return row[0] if row else None

    def promote(self) -> None:
        """Promote the standby, and return when it is a primary."""
        assert self.ask(self.standby, "SELECT pg_promote()") is True

    def stop_receiving(self) -> None:
        """Cut the standby off from the primary, like a network failure."""
        configure(self.standby, "primary_conninfo", "")
        receiving = "SELECT count(*) FROM pg_stat_wal_receiver"
        wait_until(lambda: self.ask(self.standby, receiving) == 0)

    def caught_up(self) -> bool:
        """Return whether the standby has replayed everything that the primary has written."""
        written = self.ask(self.primary, "SELECT pg_current_wal_lsn()::text")
        query = f"SELECT pg_last_wal_replay_lsn() >= '{written}'::pg_lsn"
        return self.ask(self.standby, query) is True


@contextmanager
def replication(*, synchronous: bool) -> Generator[Replication]:
    """Start both servers with an empty table, and yield them when the standby streams."""
    settings = DURABLE | {"hot_standby_feedback": "on"}
    with (
        PostgresServer(settings=settings, source="system") as primary,
        home("standby") as place,
    ):
        with psycopg.connect(primary.url, autocommit=True) as connection:
            connection.execute(SCHEMA)
        copy(primary, place.path, primary.binaries)
        with PostgresServer(place.path, settings=settings, source="system") as standby:
            found = Replication(primary, standby)
            if synchronous:
                configure(primary, "synchronous_standby_names", "*")
            state = "sync" if synchronous else "async"
            asked = "SELECT sync_state FROM pg_stat_replication"
            wait_until(lambda: found.ask(primary, asked) == state, 30)
            yield found


def configure(server: PostgresServer, setting: str, value: str) -> None:
    """Change a setting that needs no restart."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET {setting} = '{value}'".encode())
        connection.execute("SELECT pg_reload_conf()")


def copy(primary: PostgresServer, folder: Path, binaries: Path) -> None:
    """Copy a running server into the folder's `data`, from which the standby starts."""
    port = make_url(primary.url).port
    command: list[str | Path] = [
        binaries / "pg_basebackup",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-U",
        "postgres",
    ]
    command += ["-D", folder / "data", "-R", "-X", "stream", "-c", "fast", "--no-sync"]
    subprocess.run(command, check=True, **_surroundings(primary._account))
