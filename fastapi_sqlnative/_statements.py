"""What a connection tells: every statement and every failure, for the guard of its session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.sql.expression import RollbackToSavepointClause, SavepointClause

from ._guards import SessionGuard, Transaction
from ._options import AUTOCOMMIT
from .exceptions import CommitOutcomeUnknownError, SessionFinishedError

# The execution option under which a connection knows the transaction that runs on it.
_TRANSACTION: Final = "fastapi_sqlnative_transaction"
# Under this key of its `info` a connection knows that a test has it do AUTOCOMMIT by savepoints.
AUTOCOMMITS: Final = "fastapi_sqlnative_autocommits"
# transaction_resolution_unknown and statement_completion_unknown.
_OUTCOME_UNKNOWN: Final = frozenset({"08007", "40003"})
# Drivers of PostgreSQL whose errors carry the server's severity when they are the server's.
_TELLING: Final = frozenset({"asyncpg", "psycopg", "psycopg_async", "psycopg2"})


def listen(engine: Engine) -> None:
    """Hear of every statement and failure, of connections that carry a transaction of ours.

    These events belong to the dialect, and so to all of the application's engine; events of the
    engine itself would cost each connection far more.
    """
    # SQLAlchemy keeps one listener of a kind for a dialect, however often it is asked. It keeps
    # them by the address of the object given, and an engine's address may be another's before.
    event.listen(engine.dialect, "do_execute", _on_statement)
    event.listen(engine.dialect, "do_executemany", _on_statement)
    event.listen(engine.dialect, "do_execute_no_params", _on_statement_without_parameters)
    event.listen(engine.dialect, "handle_error", _on_error)


def mark(connection: Connection, session: SessionGuard) -> None:
    """Have a connection's statements and failures told to the guard of a session."""
    transaction = session.transactions[connection] = Transaction(session)
    connection.execution_options(**{_TRANSACTION: transaction})


def _transaction_on(connection: Connection | None) -> Transaction | None:
    if connection is None:
        return None
    options: Mapping[str, Any] = connection.get_execution_options()
    return options.get(_TRANSACTION)


def _on_statement_without_parameters(
    cursor: DBAPICursor, statement: str, context: ExecutionContext
) -> None:
    _on_statement(cursor, statement, None, context)


def _on_statement(
    cursor: DBAPICursor, _statement: str, _parameters: object, context: ExecutionContext
) -> None:
    transaction = _transaction_on(context.root_connection)
    if transaction is None:
        return
    if transaction.session.loop_thread is not None:
        transaction.session.check_thread()
    # An aborted transaction answers nothing but errors. If this statement is none, the
    # application has rolled back to a savepoint; if it fails, `_on_error` restores the mark.
    transaction.statement = context
    transaction.aborted_before, transaction.aborted = transaction.aborted, None
    if context.execution_options.get("stream_results"):
        transaction.cursors.append(cursor)
    compiled = context.compiled
    statement = None if compiled is None else compiled.statement
    # text(...).columns(...) is a select by its shape only.
    if not getattr(statement, "is_select", False) or getattr(statement, "is_text", False):
        _on_other_than_select(transaction, context.root_connection, statement)
    elif compiled is not None and getattr(compiled, "ctes", None):
        _on_write(transaction, context.root_connection, _has_dml_cte(compiled))


def _on_other_than_select(
    transaction: Transaction, connection: Connection, statement: object
) -> None:
    name: str = getattr(statement, "ident", "")
    if isinstance(statement, SavepointClause):
        transaction.savepoints[name] = transaction.written
    elif isinstance(statement, RollbackToSavepointClause):
        transaction.written = transaction.savepoints.get(name, transaction.written)
    else:
        transaction.opaque = True
        _on_write(transaction, connection, getattr(statement, "is_dml", False))


def _on_write(transaction: Transaction, connection: Connection, is_dml: bool) -> None:
    if is_dml and transaction.session.options == AUTOCOMMIT:
        raise transaction.session.read_only_error()
    if is_dml and not autocommits(connection):
        transaction.written = True


def _has_dml_cte(compiled: Any) -> bool:
    return any(getattr(cte.element, "is_dml", False) for cte in compiled.ctes)


def _on_error(context: ExceptionContext) -> BaseException | None:
    transaction = _transaction_on(context.connection)
    error = context.original_exception
    if transaction is None:
        return None
    committing, transaction.session.committing = transaction.session.committing, False
    if context.statement is not None or context.execution_context is not None:
        return _on_failed_statement(transaction, context, error)
    lost = committing and _loses_outcome(context, error)
    if lost or (context.dialect.name == "postgresql" and not _server_says(context, error)):
        # COMMIT or ROLLBACK did not get through, or was not even sent: SQLAlchemy would keep a
        # connection that may still be in its transaction.
        context.is_disconnect = True
    if not lost:
        return None
    return CommitOutcomeUnknownError(
        f"The connection to database {transaction.session.engines.name!r} was lost during COMMIT: "
        "what was written may or may not be stored. Look before you repeat it."
    )


def _on_failed_statement(
    transaction: Transaction, context: ExceptionContext, error: BaseException
) -> SessionFinishedError | None:
    # Without the statement it is a fetch: a stream may fail long after it has begun.
    if context.statement is None and transaction.session.finished:
        return transaction.session.finished_error()
    if context.execution_context is transaction.statement:
        # It was sent, and has failed: what the transaction was before it, it still is.
        transaction.aborted = transaction.aborted_before
    if context.is_disconnect or _server_aborts(context, error):
        transaction.aborted = transaction.aborted or error
    return None


def _loses_outcome(context: ExceptionContext, error: BaseException) -> bool:
    # A cancellation stays one, and SQLAlchemy's own refusals never reached the server.
    if not isinstance(error, Exception) or isinstance(error, SQLAlchemyError):
        return False
    if context.is_disconnect or context.sqlalchemy_exception is None:
        return True
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state in _OUTCOME_UNKNOWN


def _server_aborts(context: ExceptionContext, error: BaseException) -> bool:
    if context.dialect.name != "postgresql" or autocommits(context.connection):
        return False
    return _server_says(context, error)


def _server_says(context: ExceptionContext, error: BaseException) -> bool:
    """Tell a failure that the server reported from one that the driver made by itself."""
    if context.dialect.driver not in _TELLING:
        return isinstance(context.sqlalchemy_exception, DBAPIError)  # to be safe
    # psycopg and psycopg2; asyncpg, and asyncpg while a stream is read.
    tellers = getattr(error, "diag", None), error.__cause__, error
    return any(getattr(teller, "severity", None) is not None for teller in tellers)


def autocommits(connection: Connection | None) -> bool:
    """Tell whether what is sent over a connection is stored at once."""
    if connection is None or connection.invalidated or connection.closed:
        return False
    if connection.info.get(AUTOCOMMITS):
        return True
    # A method on some drivers (PyMySQL), which is not the setting.
    return getattr(connection.connection.dbapi_connection, "autocommit", False) is True
