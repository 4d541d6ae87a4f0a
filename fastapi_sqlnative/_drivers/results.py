"""Results that are still read when `execute()` has returned."""

from contextlib import ExitStack
from typing import Final

from sqlalchemy.engine import ExecutionContext

from .failures import SEVERITY_DRIVERS
from .transactions import IN_TRANSACTION, fetch_row, status_of

# Drivers that fetch the whole result at once, unless asked to stream.
_BUFFERING: Final = SEVERITY_DRIVERS | {"aiosqlite", "asyncmy", "aiomysql", "mysqldb", "pymysql"}


def reads_later(context: ExecutionContext) -> bool:
    """Return whether a result may still fetch from the connection after `execute` returned."""
    if context.execution_options.get("stream_results"):
        return True
    return context.dialect.driver not in _BUFFERING


def ends_with_transaction(context: ExecutionContext) -> bool:
    """Return whether a result is read from a cursor that the server closes at COMMIT or ROLLBACK.

    SQLite goes on reading after both.
    """
    streams: bool = context.execution_options.get("stream_results", False)
    return streams and context.dialect.name != "sqlite"


def close_cursor(context: ExecutionContext) -> None:
    """Close a result's cursor, unless PostgreSQL has: it does when a savepoint is rolled back.

    psycopg and pg8000 would send CLOSE for a named cursor, and its failure would abort the
    transaction.
    """
    connection, cursor = context.root_connection, context.cursor
    is_pg8000 = connection.dialect.driver == "pg8000"  # which knows no status
    name = getattr(cursor, "ident" if is_pg8000 else "name", None)
    usable = name is not None and not (connection.closed or connection.invalidated)
    with ExitStack() as closing:  # also if the question fails
        closing.callback(cursor.close)
        if usable and (is_pg8000 or status_of(connection) == IN_TRANSACTION):
            # SQLAlchemy has made the name, out of hexadecimal numbers.
            found = f"SELECT 1 FROM pg_catalog.pg_cursors WHERE name = '{name}'"  # noqa: S608
            if fetch_row(connection, found) is None:
                closing.pop_all()
