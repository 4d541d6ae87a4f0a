"""Serve an example, on DATABASE_URL or on an empty, temporary database.

    python -m examples quick_start

It sets DATABASE_URL and SECOND_DATABASE_URL, and serves `examples.quick_start.app:create_app()`.
It prints the commands in the `sh` blocks of the example's README.md, in which the address is
always http://127.0.0.1:8000, and their responses.
"""

import errno
import importlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import uvicorn
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from sqlalchemy import URL, NullPool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError

from tests.mariadb_server import MariadbServer, MariadbServerError
from tests.postgres_server import PostgresServer, PostgresServerError

say = partial(print, flush=True)

HERE = Path(__file__).parent
ADDRESS = "http://127.0.0.1:8000"
ANSWER = re.compile(r"# (\d{3}(?: .+)?)")
TO_TRY = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Server(uvicorn.Server):
    """A server that prints what to try once it accepts requests."""

    readme: str
    empty: bool

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()
        address = f"http://{host}:{port}"
        commands, answers = to_try(self.readme)
        say(f"\nThe example is served on {address}\nEvery endpoint, to try out: {address}/docs\n")
        say(*(line.replace(ADDRESS, address) for line in commands), sep="\n")
        first = "" if self.empty else "if the database was empty, "
        say(f"\nIn this order they answer, {first}with status and body:\n")
        say(*(f"{number:3}. {answer}" for number, answer in enumerate(answers, 1)), sep="\n")
        say("\nCtrl-C stops everything.")


def to_try(readme: str) -> tuple[list[str], list[str]]:
    """Separate the commands from the text around them: zsh's prompt does not accept comments."""
    commands: list[str] = []
    answers: list[str] = []
    title = ""
    for line in filter(None, "".join(TO_TRY.findall(readme)).splitlines()):
        if found := ANSWER.fullmatch(line):
            answers.append(f"{title}{found[1]}")
            title = ""
        elif line.startswith("# "):
            title = f"{line.removeprefix('# ')}: "
        else:
            commands.append(line.partition(" # ")[0])
    return commands, answers


def main(arguments: list[str]) -> None:
    """Run until SIGINT or SIGTERM."""
    name = _example(arguments)
    for each in signal.SIGINT, signal.SIGTERM:
        signal.signal(each, _stop)
    with ExitStack() as closing:
        listener = closing.enter_context(_listen(int(os.environ.get("PORT") or 8000)))
        given = bool(os.environ.get("DATABASE_URL"))
        os.environ.update(_addresses(name, closing))
        say(f"Starting {name} on {make_url(os.environ['DATABASE_URL']).get_backend_name()} ...")
        app = _build(name)
        # A client that is still reading a stream must not keep the example from stopping.
        server = Server(uvicorn.Config(app, timeout_graceful_shutdown=3))
        server.readme = (HERE / name / "README.md").read_text("utf-8")
        server.empty = not given
        server.run(sockets=[listener])


def _example(arguments: list[str]) -> str:
    names = sorted(path.parent.name for path in HERE.glob("*/app.py"))
    match arguments:
        case [name] if name in names:
            return name
    raise SystemExit("Which one? make example NAME=..., one of:\n  " + "\n  ".join(names))


def _build(name: str) -> FastAPI:
    app: FastAPI = importlib.import_module(f"examples.{name}.app").create_app()
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    return app


def _stop(*_: object) -> None:
    # Uvicorn shuts down and then raises the signal again: leave through every `with`,
    # undisturbed by an impatient second Ctrl-C.
    for each in signal.SIGINT, signal.SIGTERM:
        signal.signal(each, signal.SIG_IGN)
    say("Stopping ...")
    raise SystemExit(0)


def _listen(port: int) -> socket.socket:
    """Return the port, or the next one that is free."""
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            say(f"Port {port} is taken, trying the next ...")
            port += 1


# --- where the databases are ---


def _addresses(name: str, closing: ExitStack) -> Mapping[str, str]:
    if os.environ.get("DATABASE_URL"):
        return _given(name)
    try:
        return OF_THEIR_OWN.get(name, _postgres)(name, closing)
    except (PostgresServerError, MariadbServerError) as error:
        raise SystemExit(str(error)) from error


def _given(name: str) -> Mapping[str, str]:
    """Pass on the addresses in the environment, adding a driver where there is none."""
    # Some examples read it when they build the application, others when they build the engine.
    wanted = "SECOND_DATABASE_URL" in (HERE / name / "app.py").read_text("utf-8")
    if wanted and not os.environ.get("SECOND_DATABASE_URL"):
        raise SystemExit(f"{name} has two databases: set SECOND_DATABASE_URL too.")
    names = "DATABASE_URL", "SECOND_DATABASE_URL"
    urls = {name: _read(name) for name in names if os.environ.get(name)}
    return {name: _text(_with_driver(url)) for name, url in urls.items()}


def _read(variable: str) -> URL:
    try:
        return make_url(os.environ[variable])
    except ArgumentError:  # in SQLAlchemy 2.0 it contains the password
        raise SystemExit(f"{variable} is no address, as postgresql://me@host/shop is.") from None


def _with_driver(url: URL) -> URL:
    # SQLAlchemy 2.0 would choose psycopg2 here, which does not support asyncio.
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _postgres(name: str, closing: ExitStack) -> Mapping[str, str]:
    say("Starting a PostgreSQL that keeps nothing (which takes a few seconds) ...")
    server = closing.enter_context(PostgresServer())
    url = make_url(server.url).set(drivername="postgresql+psycopg")
    databases = {"DATABASE_URL": name, "SECOND_DATABASE_URL": f"{name}_second"}
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for database in databases.values():
            connection.execute(text(f"CREATE DATABASE {database}"))
    return {variable: _text(url.set(database=each)) for variable, each in databases.items()}


def _mariadb(name: str, closing: ExitStack) -> Mapping[str, str]:
    say("Starting a MariaDB that keeps nothing ...")
    url = make_url(closing.enter_context(MariadbServer()).url)
    engine = create_engine(url.set(drivername="mysql+pymysql"), poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return {"DATABASE_URL": _text(url.set(drivername="mysql+asyncmy", database=name))}


def _sqlite(name: str, closing: ExitStack) -> Mapping[str, str]:
    folder = closing.enter_context(TemporaryDirectory(prefix="sqlnative-"))
    return {"DATABASE_URL": f"sqlite+aiosqlite:///{folder}/{name}.db"}


# All others are served on PostgreSQL.
OF_THEIR_OWN: Mapping[str, Callable[[str, ExitStack], Mapping[str, str]]] = {
    "mariadb": _mariadb,
    "sqlite": _sqlite,
}

if __name__ == "__main__":
    main(sys.argv[1:])
