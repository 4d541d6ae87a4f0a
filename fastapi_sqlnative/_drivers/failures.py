"""What a failure means for its transaction: outcome unknown, refused, or never begun."""

from traceback import walk_tb
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.engine.characteristics import ConnectionCharacteristic
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from .details import details_of, sqlstate_of, text_of
from .errors import CODES, driver_error, server_of

# PostgreSQL drivers whose errors carry a severity if, and only if, the server reported them.
SEVERITY_DRIVERS: Final = frozenset({"asyncpg", "pg8000", "psycopg", "psycopg_async", "psycopg2"})
# The second queries the server before the first statement: MySQL, and PostgreSQL with pg8000.
_CONNECTING: Final = (
    Engine.raw_connection,
    ConnectionCharacteristic.set_connection_characteristic,
)
_EXECUTING: Final = (DefaultDialect.do_execute, DefaultDialect.do_executemany)
# idle_in_transaction_session_timeout and transaction_timeout end it before COMMIT arrives.
_ENDED_BEFORE: Final = frozenset({"25P03", "25P04"})
_HALF_ENDED: Final = (
    ("InternalClientError", "cannot switch to state"),
    ("OperationalError", "MySQL Connection not available"),
)


def leaves_outcome_unknown(error: BaseException, connection: Connection) -> bool:
    """Return whether a COMMIT that failed with this error may have taken effect."""
    by_sqlalchemy = isinstance(error, SQLAlchemyError) and not isinstance(error, DBAPIError)
    if by_sqlalchemy or ended_before_commit(error):
        return False
    if not sqlstates(driver_error(error)).isdisjoint(CODES["outcome_unknown"].split()):
        return True
    if isinstance(error, DBAPIError):
        # Without a statement or in the second phase, else a before_commit listener's has failed.
        second = _passed(error, connection.dialect.do_commit_twophase)  # MySQL's is a statement
        return error.connection_invalidated and (error.statement is None or second)
    # A driver's error that SQLAlchemy did not wrap, rather than a before_commit listener's error.
    return _passed(error, connection.dialect.do_commit)


def ended_before_commit(error: BaseException) -> bool:
    """Return whether a COMMIT that failed with this error was never sent, or met no transaction."""
    found = driver_error(error)
    # asyncpg sends nothing over a closed connection.
    is_asyncpg = type(found).__module__.startswith("asyncpg.")
    unsent = (is_asyncpg and type(found).__name__ == "InterfaceError") or is_half_ended(found)
    return unsent or not sqlstates(found).isdisjoint(_ENDED_BEFORE)


def is_half_ended(error: BaseException) -> bool:
    """Return whether the driver sends nothing more, but SQLAlchemy doesn't see the lost connection.

    asyncpg is still reading the server's last messages; mysql.connector has closed its socket.
    """
    found = driver_error(error)
    return any(name == type(found).__name__ and said in str(found) for name, said in _HALF_ENDED)


def has_stale_plan(error: BaseException) -> bool:
    """Return whether the server refused a prepared statement because a table has changed since.

    psycopg keeps the statement until a ROLLBACK, so in AUTOCOMMIT it would fail again each time.
    """
    found = details_of(driver_error(error))
    return text_of(found, "source_function") == "RevalidateCachedQuery"


def reported_by_server(error: BaseException, connection: Connection) -> bool:
    """Return whether the server reported a failure, rather than the driver or network."""
    found = driver_error(error)
    if connection.dialect.driver not in SEVERITY_DRIVERS:
        return isinstance(found, connection.dialect.loaded_dbapi.Error)
    # pg8000 says "in failed transaction block" where the server has answered COMMIT with ROLLBACK.
    rolled_back = "in failed transaction block" in str(found)
    sources = details_of(found), found  # the toolkit states it on psycopg's error itself
    return rolled_back or any(getattr(each, "severity", None) is not None for each in sources)


def sqlstates(error: BaseException | None) -> set[str]:
    """Return the SQLSTATEs of an error and its causes."""
    # In asyncpg's "connection was closed" the server's error is the cause of the cause.
    states: set[str] = set()
    for _ in range(4):  # bounded, because causes may form a cycle
        states.update(filter(None, [sqlstate_of(error)]))
        error = None if error is None else error.__cause__
    return states


def recognize(error: BaseException) -> OperationalError | None:
    """Wrap a driver's connect error or timeout that SQLAlchemy did not wrap; `None` for others."""
    # SQLAlchemy leaves asyncpg's OSErrors and some of its own errors unwrapped. The traceback
    # rules out an OSError of the application's, raised in a listener for example.
    if not isinstance(error, OSError) and server_of(error) is None:
        return None
    if any(_passed(error, each) for each in _CONNECTING):
        return OperationalError(None, None, error)
    if isinstance(error, OSError) and any(_passed(error, each) for each in _EXECUTING):
        return OperationalError("", None, error)  # asyncpg's `command_timeout`, in a statement
    return None


def is_refused_value(error: BaseException, connection: Connection) -> bool:
    """Return whether the driver could not send a value: text that it can't encode, a big number.

    A listener may raise a ValueError of its own, which is none of the database's. Some drivers
    fetch at once; there, a value that they can't read counts as well.
    """
    dialect = connection.dialect
    sending = dialect.do_execute, dialect.do_executemany, dialect.do_execute_no_params
    is_value = isinstance(error, ValueError | OverflowError)
    return is_value and any(_passed(error, each) for each in sending)


def _passed(error: BaseException, function: Any) -> bool:
    """Return whether an error's traceback includes this function of SQLAlchemy's."""
    return any(frame.f_code is function.__code__ for frame, _ in walk_tb(error.__traceback__))
