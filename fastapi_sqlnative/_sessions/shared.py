"""What the sessions of one database share: who is at work, and what errors say."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.exc import DBAPIError

from .. import exceptions
from .._drivers.errors import server_of
from .._drivers.failures import reported_by_server
from .._drivers.statements import Effect, Statement, statement_of, writes
from .._drivers.transactions import may_be_interrupted, returns_by_rollback_only
from .options import TransactionOptions

ErrorT = TypeVar("ErrorT", bound=Exception)

# What an error says of a database, by its name.
_MESSAGES: Final[Mapping[type[Exception], str]] = {
    exceptions.SessionFinishedError: (
        "This session of database {0!r} is finished: the request (or block) that it belongs to "
        "has ended. In a stream, a background task or any work that outlives the request, depend "
        "on get_database_handle({0!r}) and open a session there."
    ),
    exceptions.BlockingSessionError: (
        "The synchronous session of database {0!r} was used on the event loop's thread, where it "
        "would block every other request. Declare the endpoint or dependency with `def`, call the "
        "code with `await run_in_threadpool(...)`, or install an AsyncEngine."
    ),
    exceptions.UncommittedChangesError: (
        "The session of database {0!r} was closed over changes that had not been committed, and "
        "they are lost. Leave closing it to whoever opened it; to give changes up call rollback()."
    ),
    exceptions.TransactionAbortedError: (
        "The transaction on database {0!r} cannot be committed: an error inside it was caught and "
        "ignored, and the server has given the transaction up. Let the error propagate, call "
        "rollback(), or put what may fail into a savepoint: `session.begin_nested()`."
    ),
    exceptions.CommitOutcomeUnknownError: (
        "The connection to database {0!r} was lost during COMMIT: what was written may or may not "
        "be stored. Look before you repeat it."
    ),
    exceptions.AfterCommitError: (
        "The transaction on database {0!r} is stored, but what ran after its COMMIT has failed: "
        "an after_commit listener, or a commit() of the session's class. Do not repeat the request."
    ),
    exceptions.ReadOnlySessionError: (
        "The session from reader({0!r}) only reads: every statement would be committed on its "
        "own. Depend on transactional({0!r}) to write."
    ),
    exceptions.TransactionOptionsError: (
        "Database {0!r} has no transactions: its engine is in AUTOCOMMIT, where each statement is "
        "stored at once. Make the engine without it, or depend on get_db({0!r})."
    ),
}


class SharedState:
    """What the sessions of one database share. Lives as long as the database's handle."""

    def __init__(
        self, name: str, root: Engine, shutdown_timeout: float, warn_held_after: float | None
    ) -> None:
        self.name = name
        self.root = root  # a session class of the application's may choose other engines
        self.shutdown_timeout = shutdown_timeout
        self.warn_held_after = warn_held_after
        self.holders_reported: tuple[float, str] | None = None  # when, and what
        # Once it is stopped every session refuses its next statement: a disposed engine would
        # silently connect anew.
        self.stopping: Literal["shutting down", "stopped"] | None = None
        # Those of commit, rollback and close that the application's class has itself.
        self.overridden: frozenset[str] = frozenset()
        self.may_be_interrupted: bool = may_be_interrupted(root)
        self.returns_by_rollback_only: bool = returns_undisturbed(root)
        # The records of the sessions that hold a connection, by it.
        self.holders: dict[Connection, Any] = {}
        # Engines that share a pool and set the options, by the engine and the options.
        self.engines: dict[tuple[Engine, TransactionOptions], Engine] = {}
        # Whose results may still be read from a connection, when the session has ended.
        self.readers: weakref.WeakKeyDictionary[Connection, Any] = weakref.WeakKeyDictionary()
        self._statements: weakref.WeakKeyDictionary[Any, Statement] = weakref.WeakKeyDictionary()
        self._on_error = _listener(weakref.ref(self))
        self.listen(root.dialect)

    def check_running(self, *, new_session: bool = False) -> None:
        """Refuse to send anything once it is stopped, and a new session when it is about to be."""
        if self.stopping == "stopped" or (new_session and self.stopping):
            raise exceptions.DatabaseNotStartedError(
                f"Database {self.name!r} is {self.stopping}: the application's lifespan has ended. "
                "Finish work with the database before the application shuts down."
            )

    def error(self, kind: type[ErrorT]) -> ErrorT:
        """Build the error of this kind that names the database and the fix."""
        return kind(_MESSAGES[kind].format(self.name))

    def tag(self, error: ErrorT) -> ErrorT:
        """Note the database's name on an error that is not ours, for the log."""
        setattr(error, "database_name", self.name)  # noqa: B010 - the class has no such attribute
        return error

    def statement_of(self, context: ExecutionContext) -> Statement:
        """Tell what a statement may do; read once for each compiled form."""
        compiled = context.compiled
        if compiled is None:
            return Statement(Effect.UNKNOWN)
        found = self._statements.get(compiled)
        if found is None:
            found = self._statements[compiled] = statement_of(compiled)
        return found

    def refuse_writes(
        self, _connection: Connection, _cursor: object, statement: str, *_: object
    ) -> None:
        """Refuse what `reader` must not send over a connection that it has handed out."""
        if writes(statement):
            raise self.error(exceptions.ReadOnlySessionError)

    def listen(self, dialect: Dialect) -> None:
        """Hear of failures on a dialect's connections, as long as the handle lives."""
        # A dialect's events are its engines'.
        if not event.contains(dialect, "handle_error", self._on_error):
            event.listen(dialect, "handle_error", self._on_error)
            weakref.finalize(self, _unlisten, weakref.ref(dialect), self._on_error)

    def record_on(self, connection: Connection) -> Any:
        """Return the record of the session that is, or was last, at work on a connection."""
        return self.holders.get(connection) or self.readers.get(connection)


def _listener(state: weakref.ref[SharedState]) -> Any:
    """Hear of failures that no method of a session lets through: mapper events, streams, Core."""

    def on_error(context: ExceptionContext) -> BaseException | None:
        found, connection = state(), context.connection
        record = None if found is None or connection is None else found.record_on(connection)
        if found is None or connection is None or record is None:
            return None
        if context.execution_context is None and context.statement is None:
            # COMMIT or ROLLBACK did not get through, or was not even sent: SQLAlchemy would keep a
            # connection that may still be in its transaction.
            if not reported_by_server(context.original_exception, connection):
                context.is_disconnect = True
        elif not record.finished:
            record.note_failure(context.original_exception)
            if record.committing and record.rolled_back is not None:
                # A listener that runs after the last look may swallow this: COMMIT is to fail.
                context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
            return _translated(context)
        elif context.statement is None:  # a fetch: a stream may fail long after it has begun
            return found.error(exceptions.SessionFinishedError)
        return None

    return on_error


def _translated(context: ExceptionContext) -> DBAPIError | None:
    """Make SQLAlchemy's error of what it leaves as it is: a driver's own way to refuse a value."""
    error = context.original_exception
    made = getattr(context, "chained_exception", None)  # by a listener of the application's
    if context.sqlalchemy_exception is not None or made is not None:
        return None
    # Text that cannot be encoded, a number that is too large; asyncpg's, while a stream is read.
    if not (isinstance(error, ValueError | OverflowError) or server_of(error)):
        return None
    return DBAPIError(context.statement, context.parameters, error)


def _unlisten(dialect: weakref.ref[Dialect], listener: Any) -> None:
    found = dialect()
    if found is not None and event.contains(found, "handle_error", listener):
        event.remove(found, "handle_error", listener)
