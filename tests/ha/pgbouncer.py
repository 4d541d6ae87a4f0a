"""PgBouncer in transaction mode, in front of one server."""

import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy import URL, make_url

from tests.ha.services import home, program, running
from tests.postgres_server import _free_port

ROLE = "sqlnative_bounced"  # may also log in through PgBouncer, if the server has it


def version() -> str:
    """Return the version of the installed PgBouncer."""
    said = subprocess.run(
        [program("pgbouncer", "pgbouncer"), "--version"], capture_output=True, text=True, check=True
    )
    return said.stdout.split()[1]


@dataclass(frozen=True)
class PgBouncer:
    """A running PgBouncer, with its addresses and its admin commands."""

    server: URL
    port: int

    def dsn(self, url: str) -> str:
        """Return an address of the server, changed to go through PgBouncer."""
        return self.through(make_url(url)).render_as_string(hide_password=False)

    def through(self, url: URL) -> URL:
        """Return a URL of the server, changed to go through PgBouncer."""
        return url.set(host="127.0.0.1", port=self.port)

    def command(self, command: str) -> list[tuple[object, ...]]:
        """Run one of PgBouncer's commands, such as `PAUSE`, `RESUME` and `SHOW POOLS`."""
        address = f"host=127.0.0.1 port={self.port} user=postgres dbname=pgbouncer"
        with psycopg.connect(address, autocommit=True) as admin:
            # The admin console supports only the simple protocol.
            cursor = psycopg.ClientCursor(admin).execute(command.encode())
            return cursor.fetchall() if cursor.description else []


@contextmanager
def pgbouncer(
    url: str, *, connections: int, options: Mapping[str, str] | None = None
) -> Generator[PgBouncer]:
    """Run PgBouncer in front of the server at `url`, with `connections` for each database."""
    server, port = make_url(url), _free_port()
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(port),
        "unix_socket_dir": "",
        "auth_type": "trust",
        "admin_users": "postgres",
        "pool_mode": "transaction",
        "default_pool_size": str(connections),
        "max_client_conn": "500",
        # Rotate the connections, so that a client hardly ever gets the same one twice.
        "server_round_robin": "1",
        **(options or {}),
    }
    lines = ["[databases]", f"* = host={server.host} port={server.port or 5432}", "[pgbouncer]"]
    found = PgBouncer(server, port)

    def answers() -> bool:
        try:
            found.command("SHOW VERSION")
        except psycopg.OperationalError:
            return False
        return True

    with home("pgbouncer") as place:
        known = {"postgres": "", ROLE: "", str(server.username): server.password or ""}
        users = [f'"{name}" "{password}"' for name, password in known.items()]
        settings["auth_file"] = str(place.write("users.txt", "\n".join(users) + "\n"))
        lines += [f"{name} = {value}" for name, value in settings.items()]
        configuration = place.write("pgbouncer.ini", "\n".join(lines) + "\n")
        command: list[str | Path] = [program("pgbouncer", "pgbouncer"), configuration]
        with running(place, command, answers):
            yield found
