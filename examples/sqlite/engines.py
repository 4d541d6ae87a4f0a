"""Engines for SQLite that check foreign keys and begin transactions when SQLAlchemy does."""

from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


def build_async_engine(url: URL) -> AsyncEngine:
    """Build an engine for `async def`."""
    engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"))
    _prepare(engine.sync_engine)
    return engine


def build_sync_engine(url: URL) -> Engine:
    """Build an engine for `def`."""
    engine = create_engine(url.set(drivername="sqlite+pysqlite"))
    _prepare(engine)
    return engine


def _prepare(engine: Engine) -> None:
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)


def _on_connect(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")  # off by default, and set per connection
    cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not wait for each other
    cursor.close()


def _on_begin(connection: Connection) -> None:
    # Python's driver begins a transaction only before an INSERT, UPDATE or DELETE: not
    # before a SELECT or a SAVEPOINT, so that releasing the savepoint would commit.
    # A `reader()` begins no transaction, so it never waits for a writer.
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        # Take the write lock immediately. A transaction that reads before it writes would take it
        # too late, after another has written, and fail with "database is locked".
        connection.exec_driver_sql("BEGIN IMMEDIATE")
