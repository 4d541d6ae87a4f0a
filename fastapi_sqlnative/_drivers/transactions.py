"""The state of a connection's transaction, from the driver or, if need be, from the server.

Queries go through a raw cursor of the driver, so that no listener of the application sees or
changes them.
"""

import math
import select
from typing import Any, Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import InvalidRequestError

from .details import mysql_number
from .errors import driver_error
from .failures import sqlstates

# libpq's PGTransactionStatusType, the same numbers in psycopg and psycopg2.
IN_TRANSACTION: Final = 2
_IN_ERROR: Final = 3
_LONGEST: Final = 2**31 - 1  # milliseconds


def _driver_of(connection: Connection) -> Any:
    """Return the driver's own connection, also after a `detach()`: the pool no longer knows it.

    `None` if the application has closed the pool's proxy, which `connection.closed` doesn't show.
    """
    dbapi: Any = connection.connection.dbapi_connection
    return None if dbapi is None else connection.dialect.get_driver_connection(dbapi)


def autocommits(connection: Connection) -> bool:
    """Return whether each statement on a connection commits at once."""
    if connection.closed or connection.invalidated:
        return False
    dbapi = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite" and getattr(dbapi, "isolation_level", "") is None:
        # Also None if the application's listeners send BEGIN, but then one has been sent by now.
        return not is_open_on_sqlite(connection)
    ask = getattr(dbapi, "get_autocommit", None)  # PyMySQL's `autocommit` is a setter
    return (ask() if ask is not None else getattr(dbapi, "autocommit", False)) is True


def is_lost(connection: Connection) -> bool:
    """Return whether the driver already knows that the connection is lost."""
    return connection.closed or connection.invalidated or _is_closed(_driver_of(connection))


def _is_closed(driver: Any) -> bool:
    closed = getattr(driver, "is_closed", None) or getattr(driver, "closed", False)
    return bool(closed() if callable(closed) else closed)


def changes(connection: Connection) -> float:
    """Return SQLite's count of changed rows, NaN if its driver has none; 0 for other databases."""
    if connection.dialect.name != "sqlite" or connection.closed or connection.invalidated:
        return 0
    return getattr(_driver_of(connection), "total_changes", math.nan)


def is_open_on_sqlite(connection: Connection) -> bool:
    """Return whether SQLite still has a transaction open: some errors end it."""
    return bool(_driver_of(connection).in_transaction)


# -- would a COMMIT be a lie? ------------------------------------------------------------------


def has_rolled_back(
    connection: Connection, error: BaseException, *, count_before: float | None, before_commit: bool
) -> bool:
    """Return whether this failure has made the database silently roll back the transaction.

    On PostgreSQL any failure aborts it, and we ask the server about that before COMMIT. With
    `before_commit` that check is already past, so ask now. On SQLite a transaction that has
    changed nothing since `count_before` may not have begun; `None` says that it has.
    """
    if connection.closed or connection.invalidated:
        return True
    if connection.dialect.name == "sqlite":
        return changes(connection) != count_before and not is_open_on_sqlite(connection)
    if connection.dialect.name in {"mysql", "mariadb"}:
        return mysql_number(driver_error(error)) == 1213  # a deadlock
    in_savepoint = connection.in_nested_transaction()
    return before_commit and not in_savepoint and is_aborted(connection, doubtful=True)


def is_aborted(connection: Connection, *, doubtful: bool) -> bool:
    """Return whether the database would answer COMMIT with a silent ROLLBACK, as PostgreSQL does.

    If that is `doubtful` and the driver doesn't expose the transaction's status, ask the server.
    """
    if connection.closed or connection.invalidated:
        return connection.invalidated
    status = status_of(connection)
    if status is not None:
        return status == _IN_ERROR
    # Such listeners may execute statements in the driver's place and hide failures.
    events: Any = connection.dialect.dispatch
    heard = events.do_execute or events.do_execute_no_params or events.do_executemany
    goes_on = connection.dialect.name in {"sqlite", "mysql", "mariadb", "mssql", "oracle"}
    if goes_on or not (doubtful or heard) or is_lost(connection) or autocommits(connection):
        return False  # on a lost connection COMMIT fails anyway
    return not _accepts_queries(connection)


def rolls_back(connection: Connection) -> bool:
    """Roll back what a failed COMMIT has left open; return whether that succeeds.

    SQLite keeps the transaction if the database is locked, and a listener fails before COMMIT.
    """
    try:
        if not (connection.closed or connection.invalidated):
            connection.dialect.do_rollback(connection.connection)
    except (OSError, connection.dialect.loaded_dbapi.Error):
        return False
    return True


def begin(connection: Connection) -> None:
    """Begin the transaction on the server, before anyone uses the driver's own connection.

    With asyncpg, SQLAlchemy sends BEGIN with its first statement. A COPY before that would be
    stored at once, even if the transaction is rolled back.
    """
    is_asyncpg = connection.dialect.driver == "asyncpg"
    if is_asyncpg and not (autocommits(connection) or _driver_of(connection).is_in_transaction()):
        _accepts_queries(connection)


def begin_before_savepoint(connection: Connection, _name: str = "") -> None:
    """Begin SQLite's transaction before a savepoint.

    Python's driver doesn't, and releasing an outermost savepoint commits.
    """
    is_sqlite = connection.dialect.name == "sqlite"
    if is_sqlite and not (autocommits(connection) or is_open_on_sqlite(connection)):
        fetch_row(connection, "BEGIN")


# The shorter of the remaining time and the current setting. The server reports the setting in a
# form that casts to an interval: 250ms, 2min.
_LIMIT: Final = text("""
SELECT set_config('statement_timeout', least(
    nullif(extract(epoch FROM current_setting('statement_timeout')::interval) * 1000, 0), :left
)::int::text, true)
""")


def limit_statements(connection: Connection, seconds: float) -> None:
    """Limit each statement of the transaction to `seconds` on the server.

    The limit doesn't apply to COMMIT. Only PostgreSQL has a limit for a single transaction, and
    in AUTOCOMMIT there is no transaction.
    """
    if connection.dialect.name == "postgresql" and not autocommits(connection):
        connection.execute(_LIMIT, {"left": min(max(math.ceil(seconds * 1000), 1), _LONGEST)})


def is_idle_in_transaction(connection: Connection, *, executing: bool) -> bool:
    """Return whether a transaction is open and no statement runs; not all drivers know the latter.

    Another thread may be using the connection, and may close it meanwhile.
    """
    try:
        if connection.closed or connection.invalidated:
            return False
        status = status_of(connection)
    except InvalidRequestError:
        return False
    return not executing if status is None else status in (IN_TRANSACTION, _IN_ERROR)


def surface_loss(connection: Connection) -> None:
    """Raise SQLAlchemy's error if the server has closed the connection.

    Unread data between statements means just that. libpq would send COMMIT anyway, and could then
    report only a lost connection. With asyncpg, once a raw cursor has seen the loss, SQLAlchemy
    skips COMMIT without an error.
    """
    if connection.closed or connection.invalidated:
        return
    driver = _driver_of(connection)
    if _is_closed(driver) or _has_unread_data(driver):
        connection.exec_driver_sql("SELECT 1")  # makes SQLAlchemy notice the loss


def _has_unread_data(driver: Any) -> bool:
    if not hasattr(driver, "fileno") or not hasattr(select, "poll"):
        return False  # asyncpg reads data as it arrives
    poll = select.poll()
    poll.register(driver.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def status_of(connection: Connection) -> int | None:
    """Return the transaction's status, if the driver exposes it."""
    driver = _driver_of(connection)
    # psycopg's and psycopg2's. In psycopg `info` tells it too, at three times the cost.
    known = getattr(driver, "pgconn", None) or getattr(driver, "info", None)
    return getattr(known, "transaction_status", None)


def _accepts_queries(connection: Connection) -> bool:
    """Return whether the transaction is not aborted, beginning it if necessary."""
    dialect: Any = connection.dialect
    is_postgres = dialect.name == "postgresql" or dialect.driver == "asyncpg"
    try:
        if not is_postgres:
            return bool(dialect.do_ping(connection.connection.dbapi_connection))
        # SHOW, because SET TRANSACTION is refused after a query.
        return fetch_row(connection, "SHOW transaction_isolation") is not None
    except dialect.loaded_dbapi.Error:
        if not is_postgres:
            return False  # DuckDB for example
        surface_loss(connection)
        raise


def fetch_row(connection: Connection, query: str) -> Any:
    """Run SQL over a raw cursor and return a row; `None` without one or if it is aborted."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(query)
        return cursor.fetchone()
    except connection.dialect.loaded_dbapi.Error as error:
        if "25P02" in sqlstates(error):
            return None
        raise
    finally:
        cursor.close()


# -- would a COMMIT store something? -----------------------------------------------------------

# A transaction gets an id when it writes, but also when it locks rows, fills a temporary table,
# advances a sequence or rolls back to a savepoint. A write to a permanent table also holds a lock
# on it (to a foreign table only that), and a temporary table that was dropped one on its schema. An
# id without any lock is DDL that involves no table, such as CREATE FUNCTION, if the catalogs were
# written to; else someone has rolled back to a savepoint in a function or over the connection. An
# ACCESS EXCLUSIVE lock is DDL's too, else LOCK TABLE's, which gets an id unless `wal_level` is
# minimal. The counts of writes go back to the last report to the statistics, a second at most.
_UNSTORED: Final = """
WITH own AS (SELECT * FROM pg_catalog.pg_locks WHERE pid = pg_backend_pid())
SELECT txid_current_if_assigned() IS NOT NULL,
       coalesce(bool_or(NOT explains AND mode !~ 'Access'), false),
       coalesce(bool_or(NOT explains AND mode = 'AccessExclusiveLock'), false),
       coalesce(bool_or(explains), false),
       coalesce(bool_or(temporary), false),
       coalesce(bool_or(relkind = 'f' AND mode = 'RowExclusiveLock'), false),
       CASE WHEN txid_current_if_assigned() IS NOT NULL THEN
           NOT current_setting('track_counts')::bool OR EXISTS (
               SELECT FROM pg_catalog.pg_stat_xact_sys_tables
               WHERE schemaname = 'pg_catalog' AND n_tup_ins + n_tup_upd + n_tup_del > 0)
       END
FROM (SELECT mode, relkind, relpersistence = 't' AS temporary,
             mode = 'RowShareLock' OR relpersistence = 't'
             OR (relkind = 'S' AND mode = 'RowExclusiveLock') AS explains
      FROM own JOIN pg_catalog.pg_class ON pg_class.oid = relation
      WHERE locktype = 'relation' AND relnamespace <> 'pg_catalog'::regnamespace
        AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
      UNION ALL SELECT mode, NULL, true, true FROM own
      WHERE locktype = 'object' AND classid = 'pg_namespace'::regclass
        AND objid = pg_my_temp_schema()) AS held
-- Without an id only a foreign table can have been written to. To list the locks takes longer the
-- more of them all sessions hold, and keeps others waiting that take one.
WHERE txid_current_if_assigned() IS NOT NULL OR EXISTS (SELECT FROM pg_catalog.pg_foreign_table)
"""


def is_open_on_mysql(connection: Connection) -> bool:
    """Return whether a transaction is open: MySQL commits in procedures. Only MariaDB can tell."""
    try:
        known = getattr(connection.dialect, "is_mariadb", False)
        return not known or fetch_row(connection, "SELECT @@in_transaction") != (0,)
    except (OSError, connection.dialect.loaded_dbapi.Error):
        return True


def would_store(connection: Connection, *, id_explained: bool, defined: bool) -> bool | None:
    """Ask PostgreSQL whether a COMMIT would change the database; `None` if it can't be asked.

    `id_explained`: a savepoint was rolled back, which accounts for a transaction id. `defined`:
    DDL was sent, so only a temporary table explains what was written to the catalogs.
    """
    if status_of(connection) not in (None, IN_TRANSACTION):
        return False
    try:
        row = fetch_row(connection, _UNSTORED)
    except (OSError, connection.dialect.loaded_dbapi.Error):
        return None
    if row is None:
        return False  # aborted
    assigned, written, locked, explained, temporary, foreign, cataloged = row
    explained = temporary if defined else explained or id_explained
    return bool(foreign or (assigned and (written or (cataloged and (locked or not explained)))))
