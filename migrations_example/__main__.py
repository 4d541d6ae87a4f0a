"""Serve the application before it is migrated, on DATABASE_URL or a temporary PostgreSQL."""

import os
import re
import signal
import socket
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import uvicorn
from sqlalchemy import NullPool, create_engine, make_url, text

from migrations_example.app import create_app
from migrations_example.settings import VARIABLES
from tests.postgres_server import PostgresServer, PostgresServerError

say = partial(print, flush=True)

HERE = Path(__file__).parent


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which also stops the server
    with ExitStack() as closing:
        listener = socket.create_server(("127.0.0.1", int(os.environ.get("PORT") or 8000)))
        closing.enter_context(listener)
        if not os.environ.get("DATABASE_URL"):
            os.environ.update(_start_postgres(closing))
        app = create_app()
        say(_commands().replace(":8000", f":{listener.getsockname()[1]}"))
        uvicorn.Server(uvicorn.Config(app)).run(sockets=[listener])


def _start_postgres(closing: ExitStack) -> dict[str, str]:
    """Start the server, with empty databases: the demo begins before the first migration."""
    say("Starting a PostgreSQL that keeps nothing (which takes a few seconds) ...")
    try:
        server = closing.enter_context(PostgresServer())
    except PostgresServerError as error:
        raise SystemExit(str(error)) from error
    url = make_url(server.url).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    addresses: dict[str, str] = {}
    with engine.connect() as connection:
        for name, variable in VARIABLES.items():
            connection.execute(text(f"CREATE DATABASE bookshop_{name}"))
            address = url.set(database=f"bookshop_{name}")
            addresses[variable] = address.render_as_string(hide_password=False)
    say("In another terminal:\n")
    say(*(f"export {name}={value}\n" for name, value in addresses.items()), sep="")
    return addresses


def _commands() -> str:
    """Find the commands to try in the README."""
    readme = (HERE / "README.md").read_text("utf-8")
    return "\n".join(re.findall(r"^```sh\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE))


if __name__ == "__main__":
    main()
