"""The databases' addresses and connection settings, for both the application and Alembic."""

import os
from typing import Any

from sqlalchemy import URL, Engine, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

VARIABLES = {"default": "DATABASE_URL", "analytics": "ANALYTICS_DATABASE_URL"}

# The same settings, in each driver's terms. TLS settings would go here too.
CONNECT_ARGS: dict[str, dict[str, Any]] = {
    "psycopg": {"connect_timeout": 5, "application_name": "bookshop"},
    "asyncpg": {"timeout": 5, "server_settings": {"application_name": "bookshop"}},
    "pymysql": {"connect_timeout": 5},
    "asyncmy": {"connect_timeout": 5},
}


def application_engine(name: str) -> AsyncEngine:
    """Build the engine of a database for the application."""
    url = _url(VARIABLES[name])
    return create_async_engine(url, connect_args=_connect_args(url), pool_size=5, max_overflow=10)


def migration_engine(name: str) -> Engine | AsyncEngine:
    """Build the engine of a database for one run of Alembic, with the same driver and settings."""
    url = migration_url(name)
    create = create_async_engine if url.get_dialect().is_async else create_engine
    return create(url, connect_args=_connect_args(url), poolclass=NullPool)


def migration_url(name: str) -> URL:
    """Find the address for migrations, which may differ to use another role or avoid PgBouncer."""
    variable = VARIABLES[name]
    own = f"MIGRATION_{variable}"
    return _url(own if os.environ.get(own) else variable)


def _url(variable: str) -> URL:
    if not os.environ.get(variable):
        raise ValueError(f"{variable} is not set, as in postgresql+psycopg://user@host/bookshop")
    try:
        return make_url(os.environ[variable])
    except ArgumentError:  # in SQLAlchemy 2.0 it contains the password
        example = "postgresql+psycopg://user@host/bookshop"
        raise ValueError(f"{variable} is no address, as {example} is") from None


def _connect_args(url: URL) -> dict[str, Any]:
    return CONNECT_ARGS.get(url.get_driver_name(), {})
