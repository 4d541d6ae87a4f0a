"""What a connection was given when it was made, and what its driver knows of the other end."""

from __future__ import annotations

import ssl
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Engine, event

# Seconds after which a driver gives up connecting by itself. psycopg2 is not here: libpq never
# does. From psycopg 3.3, asyncpg 0.32, PyMySQL 1.1 and asyncmy 0.2.
_CONNECT_TIMEOUTS: Final = {
    "psycopg": 130.0,
    "psycopg_async": 130.0,
    "asyncpg": 60.0,
    "pymysql": 10.0,
    "asyncmy": 10.0,
}


@contextmanager
def noting_arguments(engine: Engine) -> Generator[list[Mapping[str, Any]]]:
    """Collect the keyword arguments of every connection that the engine makes in this block.

    None are collected where the engine has a `creator`: SQLAlchemy hands that one no arguments.
    """
    noted: list[Mapping[str, Any]] = []

    def note(_dialect: object, _record: object, _arguments: object, parameters: Any) -> None:
        noted.append(parameters)

    # First, as a listener that connects by itself ends the round; those that change the
    # arguments change what was noted.
    event.listen(engine, "do_connect", note, insert=True)
    try:
        yield noted
    finally:
        event.remove(engine, "do_connect", note)


def parameters_of(connection: Connection, noted: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a connection was made with; what libpq found by itself included."""
    info: Any = getattr(connection.connection.driver_connection, "info", None)
    # psycopg and psycopg2 know of environment variables and service files too.
    of_psycopg: dict[str, Any] = getattr(info, "get_parameters", dict[str, Any])()
    of_psycopg2: dict[str, Any] = getattr(info, "dsn_parameters", {})
    given = dict[str, Any](*noted[-1:])
    return given | of_psycopg2 | of_psycopg


def connect_timeout(connection: Connection, parameters: Mapping[str, Any]) -> float | None:
    """Return the seconds after which connecting is given up; `None` for never."""
    driver = connection.dialect.driver
    given = parameters.get("timeout" if driver == "asyncpg" else "connect_timeout")
    return float(given or 0) or _CONNECT_TIMEOUTS.get(driver)


def server_process(connection: Connection) -> int | None:
    """Return the process of PostgreSQL's that the driver was told of when it connected."""
    raw: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return int(raw.get_server_pid())
    return getattr(getattr(raw, "info", None), "backend_pid", None)


def prepares_statements(connection: Connection, parameters: Mapping[str, Any]) -> bool:
    """Tell whether statements are prepared, for later transactions to find them."""
    if connection.dialect.driver == "asyncpg":
        sizes = ("statement_cache_size", "prepared_statement_cache_size")
        return any(int(parameters.get(size, 100)) for size in sizes)
    raw = connection.connection.driver_connection
    return getattr(raw, "prepare_threshold", None) is not None


def encrypts(connection: Connection) -> bool | None:
    """Tell whether this end of a connection is encrypted; `None` where the driver does not say."""
    info: Any = connection.connection.driver_connection
    for holder in ("pgconn", "info"):  # psycopg's, psycopg2's
        told = getattr(getattr(info, holder, None), "ssl_in_use", None)
        if told is not None:
            return bool(told)
    return None


def verifies_server(parameters: Mapping[str, Any]) -> bool:
    """Tell whether a connection that is encrypted goes to nobody but the server of that name."""
    given = parameters.get("ssl", parameters.get("sslmode"))
    if isinstance(given, ssl.SSLContext):
        return given.check_hostname
    return given is True or str(given) == "verify-full"
