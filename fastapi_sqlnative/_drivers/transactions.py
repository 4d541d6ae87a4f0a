"""What a driver knows of its connection's transaction, and what only the server can tell.

A question goes over a cursor of the driver's own, so that no listener of the application hears or
changes it.
"""

from __future__ import annotations

import math
import select
from typing import Any, Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.exc import InvalidRequestError

from .errors import driver_error
from .failures import TELLING, sqlstates

# libpq's PGTransactionStatusType, the same numbers in psycopg and psycopg2.
_IN_TRANSACTION: Final = 2
_IN_ERROR: Final = 3
# Drivers that fetch a whole result before they hand it on, unless they are asked to stream.
_BUFFERING: Final = TELLING | {"aiosqlite", "asyncmy", "aiomysql", "mysqldb", "pymysql"}
_MYSQL_DEADLOCK: Final = 1213
_LONGEST: Final = 2**31 - 1  # milliseconds


def autocommits(connection: Connection) -> bool:
    """Tell whether what is sent over a connection is stored at once."""
    if connection.closed or connection.invalidated:
        return False
    dbapi = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite":
        # Also None where the application sends BEGIN by itself, which has been sent by now.
        return (
            getattr(dbapi, "isolation_level", "") is None and not _sqlite(connection).in_transaction
        )
    ask = getattr(dbapi, "get_autocommit", None)  # PyMySQL's `autocommit` is a setter
    return (ask() if ask is not None else getattr(dbapi, "autocommit", False)) is True


def may_be_interrupted(engine: Engine) -> bool:
    """Tell whether a connection whose ROLLBACK is cancelled is discarded, and no more than that.

    Of aiosqlite's a thread would stay, which the process waits for at its end.
    """
    return engine.dialect.driver in {"asyncpg", "psycopg", "psycopg_async"}


def returns_undisturbed(engine: Engine) -> bool:
    """Tell whether nothing but a ROLLBACK happens when a connection goes back to the pool.

    SQLAlchemy resets an engine's options then, and where that talks to the driver (psycopg's
    `set_autocommit` after a cancelled ROLLBACK) it could keep the pool's place for ever.
    """
    reset: set[str] = set(getattr(engine.dialect, "connection_characteristics", ()))
    return engine.dialect.driver == "asyncpg" or not reset.intersection(
        engine.get_execution_options()
    )


def is_lost(connection: Connection) -> bool:
    """Tell whether the driver knows by now that the connection is gone."""
    if connection.closed or connection.invalidated:
        return True
    driver: Any = connection.connection.driver_connection
    closed = getattr(driver, "is_closed", None) or getattr(driver, "closed", False)
    return bool(closed() if callable(closed) else closed)


def reads_later(context: ExecutionContext) -> bool:
    """Tell whether a result may fetch over the connection after it was handed on."""
    if context.execution_options.get("stream_results"):
        return True
    return context.dialect.driver not in _BUFFERING


def changes(connection: Connection) -> int:
    """Count the rows that SQLite has changed over a connection; 0 for other databases."""
    return _sqlite(connection).total_changes if connection.dialect.name == "sqlite" else 0


def is_open_on_sqlite(connection: Connection) -> bool:
    """Tell whether SQLite has a transaction: it ends one by itself with some errors."""
    return bool(_sqlite(connection).in_transaction)


def _sqlite(connection: Connection) -> Any:
    return connection.connection.driver_connection


# -- would a COMMIT be a lie? ------------------------------------------------------------------


def has_rolled_back(connection: Connection, error: BaseException, *, before_commit: bool) -> bool:
    """Tell whether the database has given up a whole transaction, silently, with this failure.

    PostgreSQL gives it up with any, and says so when it is asked before COMMIT; `before_commit`
    means that nobody will ask any more.
    """
    if connection.closed or connection.invalidated:
        return True
    if connection.dialect.name == "sqlite":
        return not is_open_on_sqlite(connection)
    if connection.dialect.name in {"mysql", "mariadb"}:
        return driver_error(error).args[:1] == (_MYSQL_DEADLOCK,)
    in_savepoint = connection.in_nested_transaction()
    return before_commit and not in_savepoint and is_aborted(connection, doubtful=True)


def is_aborted(connection: Connection, *, doubtful: bool) -> bool:
    """Tell whether PostgreSQL would answer COMMIT with a silent ROLLBACK.

    Args:
        connection: one that holds a transaction.
        doubtful: something has happened that may have aborted it: a driver that cannot tell the
            transaction's status then has to ask the server.
    """
    if connection.closed or connection.invalidated:
        return connection.invalidated
    if connection.dialect.name != "postgresql":
        return False
    status = _status(connection)
    if status is not None:
        return status == _IN_ERROR
    doubtful = doubtful or _is_intercepted(connection)
    if not doubtful or is_lost(connection) or autocommits(connection):
        return False  # where it is lost, COMMIT fails by itself
    return not _serves(connection)


def _is_intercepted(connection: Connection) -> bool:
    """Tell whether listeners of the application may execute in the driver's place, and hide it."""
    events: Any = connection.dialect.dispatch
    return bool(events.do_execute or events.do_execute_no_params or events.do_executemany)


def begin(connection: Connection) -> None:
    """Have the server begin the transaction, before somebody uses the driver's own connection.

    With asyncpg SQLAlchemy sends BEGIN with its first statement: a COPY before that would be
    stored at once, whatever becomes of the transaction.
    """
    if connection.dialect.driver == "asyncpg" and not autocommits(connection):
        driver: Any = connection.connection.driver_connection
        if not driver.is_in_transaction():
            _serves(connection)


def begin_before_savepoint(connection: Connection) -> None:
    """Have SQLite begin the transaction that a savepoint is to be inside of.

    Python's driver begins none before a savepoint, whose end would then be a COMMIT.
    """
    if connection.dialect.name != "sqlite" or autocommits(connection):
        return
    if not is_open_on_sqlite(connection):
        cursor = connection.connection.cursor()
        cursor.execute("BEGIN")
        cursor.close()


# The shorter of what is left and what is set. The server writes a time as text that it reads as an
# interval: 250ms, 2min.
_LIMIT: Final = text("""
SELECT set_config('statement_timeout', least(
    nullif(extract(epoch FROM current_setting('statement_timeout')::interval) * 1000, 0), :left
)::int::text, true)
""")


def limit_statements(connection: Connection, seconds: float) -> None:
    """Have the server end each statement of the transaction within so many seconds from now.

    COMMIT has no such limit. Other databases than PostgreSQL have none for one transaction only,
    and in AUTOCOMMIT there is no transaction.
    """
    if connection.dialect.name == "postgresql" and not autocommits(connection):
        left = min(max(math.ceil(seconds * 1000), 1), _LONGEST)
        connection.execute(_LIMIT, {"left": left})


def is_idle_in_transaction(connection: Connection) -> bool | None:
    """Tell whether a transaction is open and no statement runs; `None` if the driver doesn't say.

    Another thread may use the connection, and close it meanwhile.
    """
    try:
        if connection.closed or connection.invalidated or autocommits(connection):
            return False
        status = _status(connection)
    except InvalidRequestError:
        return False
    return None if status is None else status in (_IN_TRANSACTION, _IN_ERROR)


def surface_loss(connection: Connection) -> None:
    """Raise SQLAlchemy's error where the server has ended the transaction, unasked.

    Between statements a server says nothing but that. libpq would send COMMIT all the same, and
    may then know no more than that the connection is gone; with asyncpg, SQLAlchemy sends none, and
    says nothing, once a cursor of the driver's own has met the loss.
    """
    if connection.closed or connection.invalidated:
        return
    if is_lost(connection) or _has_news(connection.connection.driver_connection):
        connection.exec_driver_sql("SELECT 1")  # SQLAlchemy is to know of the loss


def _has_news(driver: Any) -> bool:
    if not hasattr(driver, "fileno") or not hasattr(select, "poll"):
        return False  # asyncpg reads at once
    poll = select.poll()
    poll.register(driver.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _status(connection: Connection) -> int | None:
    info = getattr(connection.connection.driver_connection, "info", None)
    status = getattr(info, "transaction_status", None)
    return None if status is None else int(status)


def _serves(connection: Connection) -> bool:
    """Tell whether the server still answers in this transaction, and has not aborted it."""
    try:
        # No query, after which SET TRANSACTION would come too late.
        return _ask(connection, "SHOW transaction_isolation") is not None
    except connection.dialect.loaded_dbapi.Error:
        if is_lost(connection):
            connection.exec_driver_sql("SELECT 1")  # SQLAlchemy is to know of the loss
        raise


def _ask(connection: Connection, question: str) -> Any:
    """Return the row that answers, `None` where the transaction is aborted."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(question)
        return cursor.fetchone()
    except connection.dialect.loaded_dbapi.Error as error:
        if "25P02" in sqlstates(error):
            return None
        raise
    finally:
        cursor.close()


# -- would a COMMIT store something? -----------------------------------------------------------

# A transaction id is assigned to what writes, but also to what locks rows, fills a temporary
# table, moves a sequence on or was undone with a savepoint. A write to a permanent table holds a
# lock on it as well, and one to a foreign table holds that alone. Where there is an id and no lock
# at all it was DDL without a table, a function say.
_UNSTORED: Final = """
SELECT txid_current_if_assigned() IS NOT NULL,
       coalesce(bool_or(NOT explains AND mode <> 'AccessShareLock'), false),
       coalesce(bool_or(explains), false),
       coalesce(bool_or(relkind = 'f' AND mode = 'RowExclusiveLock'), false)
FROM (SELECT mode, relkind, mode = 'RowShareLock' OR relpersistence = 't'
             OR (relkind = 'S' AND mode = 'RowExclusiveLock') AS explains
      FROM pg_catalog.pg_locks
      JOIN pg_catalog.pg_class ON pg_class.oid = relation
      WHERE locktype = 'relation' AND pid = pg_backend_pid()
        AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
        AND relnamespace <> 'pg_catalog'::regnamespace) AS held
"""


def would_store(connection: Connection, *, id_explained: bool) -> bool | None:
    """Ask PostgreSQL whether a COMMIT would change the database; `None` where it is gone.

    Args:
        connection: one that holds a transaction.
        id_explained: a savepoint was rolled back, for which a transaction id was assigned.
    """
    if _status(connection) not in (None, _IN_TRANSACTION):
        return False
    try:
        answer = _ask(connection, _UNSTORED)
    except (OSError, connection.dialect.loaded_dbapi.Error):
        return None
    if answer is None:
        return False  # aborted
    assigned, written, explained, foreign = answer
    return bool(foreign or (assigned and (written or not (explained or id_explained))))
