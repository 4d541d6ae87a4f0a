"""Serve the showcase: on DATABASE_URL, or on a PostgreSQL kept in `.demo/postgres`."""

import errno
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import uvicorn
from sqlalchemy import NullPool, create_engine, make_url, text

from examples.showcase.app import create_app
from examples.showcase.settings import Settings, read_settings
from tests.postgres_server import PostgresServer, PostgresServerError

say = partial(print, flush=True)

WHERE_TO_LOOK = """
The showcase is served on {url}
Every endpoint, to try out: {url}/docs

List ada's accounts:
  curl -w '\\n' {url}/accounts -H 'X-User: ada'
Transfer 5.00, with both ledger entries:
  curl -w '\\n' {url}/transfers -H 'X-User: ada' -H 'Content-Type: application/json' -d '{small}'
Transfer more than there is, which changes nothing:
  curl -w '\\n' {url}/transfers -H 'X-User: ada' -H 'Content-Type: application/json' -d '{large}'
Look into the ledger:
  curl -w '\\n' {url}/ledger -H 'X-User: ada'

Ctrl-C stops everything.
"""
SMALL = '{"source": "ada-1", "target": "grace-1", "amount": 500}'
LARGE = '{"source": "ada-1", "target": "grace-1", "amount": 100000000}'


class Server(uvicorn.Server):
    """Say where to look once requests are answered."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()
        say(WHERE_TO_LOOK.format(url=f"http://{host}:{port}", small=SMALL, large=LARGE))


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    for each in signal.SIGINT, signal.SIGTERM:
        signal.signal(each, _stop)
    with ExitStack() as closing:
        listener = closing.enter_context(_listen(int(os.environ.get("PORT") or 8000)))
        settings = _settings(closing)
        say(f"Starting the application on {settings.database.get_backend_name()} ...")
        # Somebody who still reads a stream cannot keep the demo from stopping.
        config = uvicorn.Config(create_app(settings), timeout_graceful_shutdown=3)
        Server(config).run(sockets=[listener])


def _stop(*_: object) -> None:
    # Uvicorn shuts down by itself and then raises the signal again: leave through every `with`,
    # undisturbed by an impatient second Ctrl-C.
    for each in signal.SIGINT, signal.SIGTERM:
        signal.signal(each, signal.SIG_IGN)
    say("Stopping ...")
    raise SystemExit(0)


def _listen(port: int) -> socket.socket:
    """Take the port, or the next that is free."""
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            say(f"Port {port} is taken, trying the next ...")
            port += 1


def _settings(closing: ExitStack) -> Settings:
    if os.environ.get("DATABASE_URL"):
        return read_settings(os.environ)
    directory = Path(".demo/postgres")
    say(f"Starting PostgreSQL in {directory} (the first time takes a few seconds) ...")
    try:
        server = closing.enter_context(PostgresServer(directory))
    except PostgresServerError as error:
        raise SystemExit(str(error)) from error
    return read_settings(_create_databases(server.url))


def _create_databases(server: str) -> Mapping[str, str]:
    """Create the databases that are not there yet, and return where both are."""
    url = make_url(server).set(drivername="postgresql+psycopg")
    names = {"DATABASE_URL": "showcase", "ANALYTICS_DATABASE_URL": "showcase_analytics"}
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        existing = connection.scalars(text("SELECT datname FROM pg_database")).all()
        for name in names.values():
            if name not in existing:
                say(f"Creating database {name} ...")
                connection.execute(text(f"CREATE DATABASE {name}"))
    return {
        variable: url.set(database=name).render_as_string(hide_password=False)
        for variable, name in names.items()
    }


if __name__ == "__main__":
    main()
