"""What a failure says of the transaction that it has met: unknown, refused, or never begun."""

from __future__ import annotations

from traceback import walk_tb
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from .errors import driver_error, server_of

# Drivers of PostgreSQL whose errors carry the server's severity when they are the server's.
TELLING: Final = frozenset({"asyncpg", "psycopg", "psycopg_async", "psycopg2"})
# transaction_resolution_unknown and statement_completion_unknown.
_OUTCOME_UNKNOWN: Final = frozenset({"08007", "40003"})
_EXECUTING: Final = (DefaultDialect.do_execute, DefaultDialect.do_executemany)
# idle_in_transaction_session_timeout and transaction_timeout: ended before the COMMIT came.
_ENDED_BEFORE: Final = frozenset({"25P03", "25P04"})


def leaves_outcome_unknown(error: BaseException, connection: Connection) -> bool:
    """Tell whether a COMMIT that failed with this error may have taken effect."""
    if isinstance(error, SQLAlchemyError) and not isinstance(error, DBAPIError):
        return False  # SQLAlchemy's own refusal never reached the server
    states = sqlstates(driver_error(error))
    if not states.isdisjoint(_ENDED_BEFORE) or _was_never_sent(error):
        return False
    if not states.isdisjoint(_OUTCOME_UNKNOWN):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    # A driver's error that SQLAlchemy did not recognise, not that of a listener before the COMMIT.
    return _passed(error, connection.dialect.do_commit)


def _was_never_sent(error: BaseException) -> bool:
    # asyncpg refuses to send anything over a connection that is closed, or that the server has
    # just ended: then it still waits for the rest of what the server says.
    found = driver_error(error)
    if not type(found).__module__.startswith("asyncpg."):
        return False
    return type(found).__name__ == "InterfaceError" or "cannot switch to state" in str(found)


def is_servers_word(error: BaseException, connection: Connection) -> bool:
    """Tell a failure that the server reported from one that the driver made by itself."""
    found = driver_error(error)
    if connection.dialect.driver not in TELLING:
        return isinstance(found, connection.dialect.loaded_dbapi.Error)
    # psycopg and psycopg2 keep it in `diag`; asyncpg's errors have it themselves.
    tellers = getattr(found, "diag", None), found
    return any(getattr(teller, "severity", None) is not None for teller in tellers)


def sqlstates(error: BaseException | None) -> set[str]:
    """Return the codes that an error of PostgreSQL's and its causes have."""
    # asyncpg's own "connection was closed" has the server's reason as its cause's cause.
    states: set[str] = set()
    for _ in range(4):  # not to the end: causes may go round in a circle
        states.update(filter(None, (getattr(error, "sqlstate", ""), getattr(error, "pgcode", ""))))
        error = None if error is None else error.__cause__
    return states


def recognize(error: BaseException) -> OperationalError | None:
    """Return SQLAlchemy's error for one that a driver, or the pool, has raised past it."""
    # asyncpg's are OSErrors or its own, which SQLAlchemy leaves as they are; an OSError of the
    # application's own, in a listener say, has not passed there.
    if not isinstance(error, OSError) and server_of(error) is None:
        return None
    if _passed(error, Engine.raw_connection):
        return OperationalError(None, None, error)
    if isinstance(error, OSError) and any(_passed(error, each) for each in _EXECUTING):
        return OperationalError("", None, error)  # its `command_timeout`; of some statement
    return None


def _passed(error: BaseException, function: Any) -> bool:
    """Tell whether an error has come through a function of SQLAlchemy's."""
    return any(frame.f_code is function.__code__ for frame, _ in walk_tb(error.__traceback__))
