"""SQLAlchemy event listeners that keep a session honest (rules 5, 6, 7, 10 and 13).

A session of ours asks its guard before every statement, and marks the connection that its
transaction runs on. Listeners on the engine's dialect look only at connections so marked: what
the application does with its engine elsewhere is its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.sql.expression import RollbackToSavepointClause, SavepointClause

from .exceptions import (
    BlockingSessionError,
    CommitOutcomeUnknownError,
    DatabaseNotStartedError,
    ReadOnlySessionError,
    SessionFinishedError,
    TransactionAbortedError,
)

IsolationLevel: TypeAlias = Literal[
    "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"
]
# The execution option under which a connection knows the transaction that runs on it.
_TRANSACTION: Final = "fastapi_sqlnative_transaction"
# transaction_resolution_unknown and statement_completion_unknown.
_OUTCOME_UNKNOWN: Final = frozenset({"08007", "40003"})


@dataclass(frozen=True, slots=True)
class TransactionOptions:
    """Hold what a transaction asks of the server, for any database."""

    isolation_level: str | None = None
    read_only: bool = False

    @classmethod
    def checked(cls, isolation_level: IsolationLevel | None, read_only: bool) -> TransactionOptions:
        """Build options from what a user wrote.

        Raises:
            ValueError: the isolation level is not one of the standard's four.
        """
        if isolation_level is None:
            return cls(None, read_only)
        if isolation_level not in get_args(IsolationLevel):
            raise ValueError(
                f"{isolation_level!r} is no isolation level of a transaction: write one of "
                f"{', '.join(get_args(IsolationLevel))}. For reads in AUTOCOMMIT depend on "
                "reader(name)."
            )
        return cls(isolation_level, read_only)

    def __str__(self) -> str:
        return f"isolation_level={self.isolation_level!r}, read_only={self.read_only!r}"

    def lacking_in(self, dialect: Dialect) -> str | None:
        """Say what is asked for and the database does not have."""
        if self.read_only and dialect.name not in _READ_ONLY:
            return "no read-only transactions that fastapi-sqlnative knows of: leave read_only out"
        levels = _isolation_levels(dialect)
        if self.isolation_level is None or self.isolation_level in levels:
            return None
        known = ", ".join(level for level in get_args(IsolationLevel) if level in levels)
        return f"no isolation level {self.isolation_level!r}: choose one of {known}"

    def execution_options(self, dialect: Dialect) -> dict[str, Any]:
        """Translate to what the engine sets on a connection and resets when it goes back."""
        options: dict[str, Any] = {}
        if self.isolation_level is not None:
            options["isolation_level"] = self.isolation_level
        if self.read_only and dialect.name == "postgresql":
            options["postgresql_readonly"] = True
        return options


def _isolation_levels(dialect: Dialect) -> Sequence[str]:
    # SQLAlchemy would look only when it has a connection, and an async one is lost to the pool
    # then. No dialect looks at the connection that it is asked to pass.
    return dialect.get_isolation_level_values(cast("DBAPIConnection", None))


NO_OPTIONS: Final = TransactionOptions()
AUTOCOMMIT: Final = TransactionOptions(isolation_level="AUTOCOMMIT")


class EngineGuard:
    """Give the sessions of one database the engine they run on.

    Lives as long as the database's handle. `stopped` makes every session of the database refuse
    its next statement: a disposed SQLAlchemy engine would silently connect anew. `busy` holds
    the sessions that have a connection.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = False
        self.busy: set[SessionGuard] = set()
        self._lock = threading.Lock()
        self._known: set[Engine] = set()
        self._engines: dict[tuple[Engine, TransactionOptions], Engine] = {}

    def engine(self, engine: Engine, options: TransactionOptions) -> Engine:
        """Return the engine itself, or one that shares its pool and sets the options."""
        if engine not in self._known:
            with self._lock:
                _listen(engine)
                self._known.add(engine)
        if options is NO_OPTIONS:
            return engine
        # A session must see one engine, or it would open a second connection; sync sessions
        # ask from several threads.
        with self._lock:
            found = self._engines.get((engine, options))
            if found is None:
                found = self._engines[engine, options] = _with_options(engine, options)
        return found


def _with_options(engine: Engine, options: TransactionOptions) -> Engine:
    optional = engine.execution_options(**options.execution_options(engine.dialect))
    if options.read_only and engine.dialect.name == "sqlite":
        event.listen(optional, "commit", _unset_read_only)
        event.listen(optional, "rollback", _unset_read_only)
    return optional


class SessionGuard:
    """Remember what one session has done since its last commit or rollback.

    Args:
        engines: the guard of the session's database.
        options: what its transactions ask of the server.
        loop_thread: the thread on which the session must not block, `None` for anywhere.
    """

    __slots__ = (
        "asked",
        "committing",
        "engines",
        "finished",
        "loop_thread",
        "options",
        "transactions",
    )

    def __init__(
        self, engines: EngineGuard, options: TransactionOptions, loop_thread: int | None
    ) -> None:
        self.engines = engines
        self.options = options
        self.loop_thread = loop_thread
        self.finished = False
        self.asked = False  # for an engine: the transaction has a connection, or waits for one
        self.committing = False
        self.transactions: dict[Connection, _Transaction] = {}

    def discard_connections(self) -> None:
        """Let go of what a session holds that could not be closed: SQLAlchemy has forgotten it."""
        for connection in tuple(self.transactions):
            if not connection.closed:
                connection.invalidate()
                connection.close()
        self.forget()

    def prepare_end(self) -> None:
        """Get ready for COMMIT or ROLLBACK, after which the connection may be someone else's."""
        if not self.transactions:
            return
        self.check_thread()
        for transaction in self.transactions.values():
            for cursor in transaction.cursors:
                # A stream that was read to its end is closed, one on a lost connection fails.
                with contextlib.suppress(Exception):
                    cursor.close()

    def forget(self) -> None:
        """Start anew: the session's transaction has ended, and it holds no connection."""
        self.asked = False
        self.committing = False
        self.transactions.clear()
        self.engines.busy.discard(self)

    @property
    def has_written(self) -> bool:
        """Tell whether a recognisable insert, update or delete waits for a commit."""
        return any(transaction.written for transaction in self.transactions.values())

    @property
    def may_have_written(self) -> bool:
        """Tell whether a commit may store something: textual SQL cannot be told apart."""
        return not self.options.read_only and any(
            transaction.written or transaction.opaque for transaction in self.transactions.values()
        )

    def check_unfinished(self) -> None:
        """Refuse a session whose time is over."""
        if self.finished:
            raise self.finished_error()

    def finished_error(self) -> SessionFinishedError:
        """Build the error that tells what to use instead."""
        return SessionFinishedError(
            f"This session of database {self.engines.name!r} is finished: the request (or block) "
            "that it belongs to has ended, its connection went back to the pool. In a stream, a "
            "background task or any work that outlives the request, depend on "
            f"get_database_handle({self.engines.name!r}) and open a session there."
        )

    def check_usable(self) -> None:
        """Refuse a session that is finished or stopped, or that would block the event loop."""
        self.check_unfinished()
        if self.engines.stopped:
            raise DatabaseNotStartedError(
                f"Database {self.engines.name!r} is stopped: the application's lifespan has "
                "ended. Finish work with the database before the application shuts down."
            )
        self.check_thread()

    def check_thread(self) -> None:
        """Refuse to wait for the database on the event loop's own thread."""
        if self.loop_thread is not None and threading.get_ident() == self.loop_thread:
            raise BlockingSessionError(
                f"The synchronous session of database {self.engines.name!r} was used on the event "
                "loop's thread, where it would block every other request. Declare the endpoint or "
                "dependency with `def` instead of `async def`, call the code with "
                "`await run_in_threadpool(...)`, or install an AsyncEngine."
            )


class _Transaction:
    """Remember what happened on one connection since its transaction began."""

    __slots__ = ("aborted", "cursors", "opaque", "savepoints", "session", "suspected", "written")

    def __init__(self, session: SessionGuard) -> None:
        self.cursors: list[DBAPICursor] = []  # of streams, which fetch over the connection
        self.session = session
        self.written = False
        self.opaque = False
        self.aborted: Exception | None = None
        self.suspected: Exception | None = None  # what `aborted` was before this statement
        self.savepoints: dict[str, bool] = {}  # what `written` was when each began


class GuardedSession(Session):
    """Be a `Session` that asks its guard before it works.

    Mixed in front of the application's own session class, so its `get_bind` still routes.
    """

    def __init__(self, *args: Any, guard: SessionGuard, **options: Any) -> None:
        self.sqlnative = guard
        super().__init__(*args, **options)

    def get_bind(self, *args: Any, **arguments: Any) -> Engine | Connection:
        """Choose the engine: SQLAlchemy asks before every statement, flush and connection."""
        self.sqlnative.check_usable()
        self.sqlnative.asked = True
        bind = super().get_bind(*args, **arguments)
        if isinstance(bind, Engine):
            return self.sqlnative.engines.engine(bind, self.sqlnative.options)
        return bind

    # What a background task calls first, without asking for an engine: SQLAlchemy would refuse a
    # closed session too, but its message knows no remedy.

    def add(self, instance: object, **options: Any) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().add(instance, **options)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        return super().begin(nested)

    def commit(self) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().commit()

    def delete(self, instance: object) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().delete(instance)

    def refresh(self, instance: object, *args: Any, **options: Any) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().refresh(instance, *args, **options)

    def rollback(self) -> None:
        """Refuse to wait for a ROLLBACK on the event loop's thread."""
        self.sqlnative.prepare_end()
        super().rollback()

    def close(self) -> None:
        """Refuse to wait for a ROLLBACK on the event loop's thread."""
        self.sqlnative.prepare_end()
        super().close()


def guard_of(session: Session) -> SessionGuard:
    """Return the guard of a session that `guarded_class` made."""
    return cast("GuardedSession", session).sqlnative


def guarded_class(base: type[Session]) -> type[Session]:
    """Put the guard in front of an application's session class, under the same name."""
    return type(base.__name__, (GuardedSession, base), {"__module__": base.__module__})


def has_pending_changes(session: Session) -> bool:
    """Tell whether objects of the session wait for a flush."""
    # Whatever is added or changed begins a transaction: asking for one first is cheap.
    return session.in_transaction() and bool(
        session.new or session.deleted or any(session.is_modified(row) for row in session.dirty)
    )


# -- what the session tells ------------------------------------------------------------------


# Before the application's own listeners: one that fails must not hide the connection from us.
@event.listens_for(GuardedSession, "after_begin", insert=True)
def _remember_connection(
    session: GuardedSession, _transaction: SessionTransaction, connection: Connection
) -> None:
    guard = session.sqlnative
    if connection in guard.transactions:
        return  # a savepoint on a connection that is known
    guard.engines.busy.add(guard)
    transaction = guard.transactions[connection] = _Transaction(guard)
    if guard.finished:
        # A task or thread that the request left behind has waited for the pool all the while.
        guard.discard_connections()
        guard.check_unfinished()
    connection.execution_options(**{_TRANSACTION: transaction})
    if guard.options.read_only:
        _set_read_only(connection)


@event.listens_for(GuardedSession, "before_flush")
def _refuse_flush(session: GuardedSession, *_: object) -> None:
    if session.sqlnative.options == AUTOCOMMIT:
        raise _read_only_session(session.sqlnative)


@event.listens_for(GuardedSession, "before_commit")
def _before_commit(session: GuardedSession) -> None:
    # RELEASE SAVEPOINT of an aborted transaction fails by itself, COMMIT does not.
    if not session.in_nested_transaction():
        check_committable(session)
        session.sqlnative.prepare_end()
        session.sqlnative.committing = True


def check_committable(session: Session) -> None:
    """Refuse to commit what the server has given up: it would answer with a silent ROLLBACK.

    Raises:
        TransactionAbortedError: an error inside the transaction was swallowed.
    """
    guard = guard_of(session)
    for transaction in guard.transactions.values():
        if transaction.aborted is not None:
            raise TransactionAbortedError(
                f"The transaction on database {guard.engines.name!r} cannot be committed: an error "
                "inside it was caught and ignored, and the server has given the transaction up. "
                "Let the error propagate, call rollback(), or put the statement that may fail "
                "into its own savepoint: `session.begin_nested()`."
            ) from transaction.aborted


@event.listens_for(GuardedSession, "after_transaction_end")
def _forget_connections(session: GuardedSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.sqlnative.forget()


def _read_only_session(guard: SessionGuard) -> ReadOnlySessionError:
    name = guard.engines.name
    return ReadOnlySessionError(
        f"The session from reader({name!r}) only reads: every statement would be committed on its "
        f"own. Depend on transactional({name!r}) to write."
    )


# -- what the connection tells ---------------------------------------------------------------


def _listen(engine: Engine) -> None:
    """Hear of every statement and failure, of connections that carry a transaction of ours.

    These events belong to the dialect, and so to all of the application's engine; events of the
    engine itself would cost each connection far more.
    """
    if not event.contains(engine, "handle_error", _on_error):
        event.listen(engine, "do_execute", _on_statement)
        event.listen(engine, "do_executemany", _on_statement)
        event.listen(engine, "do_execute_no_params", _on_statement_without_parameters)
        event.listen(engine, "handle_error", _on_error)


def _transaction_on(connection: Connection | None) -> _Transaction | None:
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
    transaction.session.check_thread()
    # An aborted transaction answers nothing but errors, each of which says so again. When the
    # statement succeeds, the application has rolled back to a savepoint.
    transaction.suspected, transaction.aborted = transaction.aborted, None
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
    transaction: _Transaction, connection: Connection, statement: object
) -> None:
    name: str = getattr(statement, "ident", "")
    if isinstance(statement, SavepointClause):
        transaction.savepoints[name] = transaction.written
    elif isinstance(statement, RollbackToSavepointClause):
        transaction.written = transaction.savepoints.get(name, transaction.written)
    else:
        transaction.opaque = True
        _on_write(transaction, connection, getattr(statement, "is_dml", False))


def _on_write(transaction: _Transaction, connection: Connection, is_dml: bool) -> None:
    if is_dml and transaction.session.options == AUTOCOMMIT:
        raise _read_only_session(transaction.session)
    if is_dml and not _autocommits(connection):
        transaction.written = True


def _has_dml_cte(compiled: Any) -> bool:
    return any(getattr(cte.element, "is_dml", False) for cte in compiled.ctes)


def _on_error(context: ExceptionContext) -> BaseException | None:
    transaction = _transaction_on(context.connection)
    error = context.original_exception
    # A cancellation stays one: it invalidates the connection, and it is nobody's failure.
    if transaction is None or not isinstance(error, Exception):
        return None
    committing, transaction.session.committing = transaction.session.committing, False
    if context.statement is not None:
        transaction.aborted = transaction.suspected
    if context.statement is not None or context.execution_context is not None:
        return _on_failed_statement(transaction, context, error)
    if not committing or not _loses_outcome(context, error):
        return None
    # A raw OSError is no error of the driver's, so SQLAlchemy would keep the connection.
    context.is_disconnect = True
    return CommitOutcomeUnknownError(
        f"The connection to database {transaction.session.engines.name!r} was lost during COMMIT: "
        "what was written may or may not be stored. Look before you repeat it."
    )


def _on_failed_statement(
    transaction: _Transaction, context: ExceptionContext, error: Exception
) -> SessionFinishedError | None:
    # Without the statement it is a fetch: a stream may fail long after it has begun.
    if context.statement is None and transaction.session.finished:
        return transaction.session.finished_error()
    if context.is_disconnect or _server_aborts(context, error):
        transaction.aborted = transaction.aborted or error
    return None


def _loses_outcome(context: ExceptionContext, error: Exception) -> bool:
    if context.is_disconnect or context.sqlalchemy_exception is None:
        return True
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state in _OUTCOME_UNKNOWN


def _server_aborts(context: ExceptionContext, error: Exception) -> bool:
    """Tell a failure that the server reported from one that the driver made by itself."""
    if context.dialect.name != "postgresql" or _autocommits(context.connection):
        return False
    # psycopg and psycopg2; asyncpg, and asyncpg while a stream is read.
    tellers = getattr(error, "diag", None), error.__cause__, error
    return any(getattr(teller, "severity", None) is not None for teller in tellers)


def _autocommits(connection: Connection | None) -> bool:
    if connection is None or connection.invalidated or connection.closed:
        return False
    # A method on some drivers (PyMySQL), which is not the setting.
    return getattr(connection.connection.dbapi_connection, "autocommit", False) is True


# -- read-only transactions ------------------------------------------------------------------

# PostgreSQL takes an execution option instead, and resets it when the connection goes back.
_READ_ONLY: Final[Mapping[str, str | None]] = {
    "postgresql": None,
    "mysql": "SET TRANSACTION READ ONLY",
    "mariadb": "SET TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = ON",
}


def _set_read_only(connection: Connection) -> None:
    statement = _READ_ONLY[connection.dialect.name]
    if statement is not None:
        connection.exec_driver_sql(statement)


def _unset_read_only(connection: Connection) -> None:
    # SQLite's pragma belongs to the connection, not to the transaction.
    cursor = connection.connection.cursor()
    cursor.execute("PRAGMA query_only = OFF")
    cursor.close()
