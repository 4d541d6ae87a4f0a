"""The choice of a test run's PostgreSQL: a given URL, a container, or local binaries.

The result is a server or a readable error. A test is never skipped because a database is missing.
"""

import os
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from sqlalchemy import make_url

from tests.postgres_server import PostgresServer, PostgresServerError

Choice = Literal["url", "docker", "wheel", "system"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

IMAGE = os.environ.get("TEST_POSTGRES_IMAGE", "postgres:18")
PING_TIMEOUT = 2.0
DOCKER_TIMEOUT = 30
SETTINGS = {
    "max_connections": "200",
    "max_prepared_transactions": "20",
    "log_line_prefix": "%m [%p] %a ",  # tests that need statements set log_statement
    "max_wal_senders": "0",
    "autovacuum": "off",
    "jit": "off",
}


@dataclass(frozen=True)
class RunningPostgres:
    """The address of the run's server, as strings only, so that it can be sent to xdist's workers.

    ``log`` is ``file:PATH`` or ``container:ID``, or empty for a server that the run did not start.
    """

    url: str
    description: str
    log: str = ""

    def read_log(self) -> str:
        """Return everything that the server has logged so far."""
        kind, _, place = self.log.partition(":")
        if kind == "file":
            return Path(place).read_text(errors="replace")
        import docker

        logs: bytes = docker.from_env().containers.get(place).logs()
        return logs.decode(errors="replace")


def start_postgres(forced: Choice | None, closing: ExitStack) -> RunningPostgres:
    """Find the server, or start one that is stopped when ``closing`` is closed."""
    if forced == "url" or (forced is None and os.environ.get("TEST_DATABASE_URL")):
        return _given()
    if forced == "docker":
        return _container(closing)
    if forced is not None:
        return _own_server(forced, closing)
    try:
        return _container(closing)
    except PostgresServerError as error:
        why = str(error).splitlines()[0]
    own = _own_server(None, closing)
    return RunningPostgres(own.url, f"{own.description} ({why})", own.log)


def _given() -> RunningPostgres:
    given = os.environ.get("TEST_DATABASE_URL")
    if not given:
        raise PostgresServerError("--postgres=url was asked for and TEST_DATABASE_URL is not set.")
    url = make_url(given).set(drivername="postgresql")
    return RunningPostgres(url.render_as_string(hide_password=False), f"TEST_DATABASE_URL {url!r}")


def _own_server(source: Literal["wheel", "system"] | None, closing: ExitStack) -> RunningPostgres:
    server = closing.enter_context(PostgresServer(settings=SETTINGS, source=source))
    return RunningPostgres(
        server.url, f"{server.binaries}, port {server.port}", f"file:{server.log}"
    )


def _container(closing: ExitStack) -> RunningPostgres:
    engine = next(filter(_answers, _engine_addresses()), None)
    if engine is None:
        raise PostgresServerError("no Docker engine answers")
    # Imported only here, because the import takes two seconds.
    os.environ["DOCKER_HOST"] = engine
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        from testcontainers.community.postgres import PostgresContainer
    except ModuleNotFoundError:  # testcontainers before 4.15
        from testcontainers.postgres import PostgresContainer

    options = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
    try:
        container = PostgresContainer(
            IMAGE,
            username="postgres",
            password="postgres",
            dbname="postgres",
            driver=None,
            docker_client_kw={"timeout": DOCKER_TIMEOUT},
        ).with_command(["postgres", *options])
        closing.enter_context(container)
    except (DockerException, RequestException, TimeoutError) as error:
        why = " ".join(str(error).split())
        raise PostgresServerError(f"Docker could not start {IMAGE}: {why:.200}") from error
    identity = container.get_wrapped_container().id
    return RunningPostgres(
        container.get_connection_url(driver=None), f"{IMAGE} in Docker", f"container:{identity}"
    )


def _engine_addresses() -> Iterable[str]:
    if given := os.environ.get("DOCKER_HOST"):
        return [given]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "/run/user/0")
    sockets = ["/var/run/docker.sock", f"{runtime}/docker.sock", f"{runtime}/podman/podman.sock"]
    return [f"unix://{path}" for path in sockets]


def _answers(address: str) -> bool:
    """Return whether a Docker engine answers a ping.

    A ``docker`` command on the PATH would not prove that an engine is running.
    """
    try:
        with _connect(address) as connection:
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b" 200 " in connection.recv(64)
    except OSError:
        return False


def _connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    if parts.scheme != "unix":
        return socket.create_connection((parts.hostname, parts.port or 2375), PING_TIMEOUT)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PING_TIMEOUT)
    try:
        connection.connect(parts.path)
    except OSError:
        connection.close()
        raise
    return connection
