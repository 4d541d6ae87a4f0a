"""A connection's arguments, and what its driver knows about the server."""

import os
import ssl
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Engine, event

# asyncpg and asyncmy bind a connection to the event loop that made it; these do not.
LOOP_FREE: Final = frozenset({"psycopg", "psycopg_async", "aiosqlite"})


@contextmanager
def recording_arguments(engine: Engine) -> Generator[list[Mapping[str, Any]]]:
    """Collect the keyword arguments of every connection that the engine opens in this block.

    An engine with a `creator` yields none: SQLAlchemy calls it without arguments.
    """
    noted: list[Mapping[str, Any]] = []

    def note(_dialect: object, _record: object, _arguments: object, parameters: Any) -> None:
        noted.append(parameters)

    # Listen first: a listener that returns a connection skips the others. Later changes to the
    # arguments still show, because the dictionary is the same.
    event.listen(engine, "do_connect", note, insert=True)
    try:
        yield noted
    finally:
        event.remove(engine, "do_connect", note)


def parameters_of(connection: Connection, noted: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the parameters of a connection, including those that its driver has found itself."""
    info: Any = getattr(connection.connection.driver_connection, "info", None)
    # psycopg and psycopg2 also report environment variables and service files.
    of_psycopg: dict[str, Any] = getattr(info, "get_parameters", dict[str, Any])()
    of_psycopg2: dict[str, Any] = getattr(info, "dsn_parameters", {})
    given = dict[str, Any](*noted[-1:])
    if noted and connection.dialect.driver == "asyncpg":  # reads this itself, without reporting it
        given.setdefault("ssl", os.environ.get("PGSSLMODE"))
    return given | of_psycopg2 | of_psycopg


def hosts_of(connection: Connection, parameters: Mapping[str, Any]) -> list[str] | None:
    """Return the hosts that the driver was given, none for its default; `None` if unknown."""
    # asyncpg also reads PGHOST without reporting it; a `creator` keeps its arguments to itself.
    given = [parameters[each] for each in ("host", "hostaddr") if parameters.get(each)]
    if not given and (not parameters or connection.dialect.driver == "asyncpg"):
        return None
    lists = (each.split(",") if isinstance(each, str) else each for each in given)
    return [host for hosts in lists for host in hosts]


def connect_timeout(connection: Connection, parameters: Mapping[str, Any]) -> float | None:
    """Return the connect timeout in seconds; `None` for a minute or more, or no timeout."""
    # asyncpg calls it `timeout`. By default PyMySQL and asyncmy give up after ten seconds, libpq
    # and asyncpg after one to two minutes, psycopg2 never.
    given = parameters.get("connect_timeout") or parameters.get("timeout")
    own = 10.0 if connection.dialect.driver in ("pymysql", "asyncmy") else None
    return float(given or 0) or own


def server_process(connection: Connection) -> int | None:
    """Return the PID of PostgreSQL's backend, as sent to the driver when it connected."""
    raw: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return int(raw.get_server_pid())
    return getattr(getattr(raw, "info", None), "backend_pid", None)


def prepares_statements(connection: Connection, parameters: Mapping[str, Any]) -> bool:
    """Return whether the driver keeps prepared statements for later transactions."""
    if connection.dialect.driver == "asyncpg":
        sizes = ("statement_cache_size", "prepared_statement_cache_size")
        return any(int(parameters.get(size, 100)) for size in sizes)
    raw = connection.connection.driver_connection
    return getattr(raw, "prepare_threshold", None) is not None


def encrypts(connection: Connection) -> bool | None:
    """Return whether the connection uses TLS on our side; `None` if the driver can't say."""
    raw: Any = connection.connection.driver_connection
    holder = getattr(raw, "pgconn", None) or getattr(raw, "info", None)  # psycopg's, psycopg2's
    in_use = getattr(holder, "ssl_in_use", None)
    return None if in_use is None else bool(in_use)


def verifies_server(parameters: Mapping[str, Any]) -> bool:
    """Return whether TLS verifies the server's host name."""
    given = parameters.get("ssl", parameters.get("sslmode"))
    if isinstance(given, ssl.SSLContext):
        return given.check_hostname
    return given is True or str(given) == "verify-full"
