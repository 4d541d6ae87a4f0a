"""The server that the faults break, with durable settings, few connections and a small disk."""

import contextlib
import subprocess
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import create_engine

from tests.faults.application import Base
from tests.postgres_server import PostgresServer

# As in production, a commit is acknowledged only when it has reached the disk.
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
CONNECTIONS = 40
DATABASE, ROLE, TABLESPACE = "faults", "app", "small"
TABLESPACE_SIZE = 2**24  # bytes
OF_THE_APPLICATION = f"usename = '{ROLE}'"


@dataclass
class Cluster:
    """The server, its database, and a separate disk that is small enough to fill."""

    server: PostgresServer
    disk: Path | None = None

    @property
    def admin(self) -> str:
        """Return the address for a superuser."""
        return f"postgresql://postgres@127.0.0.1:{self.server.port}/{DATABASE}"

    def execute(self, statement: str, *parameters: Any) -> list[Any]:
        """Run one statement as a superuser on its own connection."""
        with psycopg.connect(self.admin, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def running_cluster(folder: Path, *, with_disk: bool) -> Generator[Cluster]:
    """Start the server with the application's tables and role."""
    with contextlib.ExitStack() as stack:
        settings = DURABLE | {"max_connections": str(CONNECTIONS)}
        server = stack.enter_context(PostgresServer(settings=settings))
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute(f"CREATE ROLE {ROLE} LOGIN")
            admin.execute(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        cluster = Cluster(server)
        engine = create_engine(cluster.admin.replace("postgresql", "postgresql+psycopg", 1))
        Base.metadata.create_all(engine)
        engine.dispose()
        cluster.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}")
        if with_disk:
            cluster.disk = stack.enter_context(mounted_disk(folder / "disk", server.user))
            cluster.execute(f"CREATE TABLESPACE {TABLESPACE} LOCATION '{cluster.disk}'")
            cluster.execute(f"ALTER TABLE entry SET TABLESPACE {TABLESPACE}")
        yield cluster


@contextlib.contextmanager
def mounted_disk(folder: Path, owner: int) -> Generator[Path]:
    """Mount a small file system for one tablespace, which only root may do."""
    folder.mkdir()
    options = f"size={TABLESPACE_SIZE},uid={owner},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def make_certificate(folder: Path) -> Path:
    """Make a self-signed certificate for 127.0.0.1, with its key beside it."""
    certificate = folder / "server.pem"
    key = certificate.with_suffix(".key")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o644)  # PgBouncer reads the key as user nobody, and it protects nothing
    return certificate
