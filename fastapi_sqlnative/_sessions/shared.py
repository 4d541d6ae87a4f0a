"""The state that the sessions of one database share, and their error messages."""

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import LRUCache

from .. import exceptions
from .._drivers.errors import server_of
from .._drivers.failures import has_stale_plan, is_half_ended, is_refused_value, reported_by_server
from .._drivers.pools import awaits_autocommit, ends_in_one_step, keep_autocommit
from .._drivers.statements import Effect, Statement, statement_of, writes
from .options import AUTOCOMMIT, TransactionOptions

ErrorT = TypeVar("ErrorT", bound=Exception)
# Engines with options set that share the pool of the engine in the key.
Engines = dict[tuple[Engine, TransactionOptions], Engine]

# The messages of errors; {0!r} is the database's name.
_MESSAGES: Final[Mapping[type[Exception], str]] = {
    exceptions.SessionFinishedError: (
        "This session of database {0!r} is finished: the request (or block) that it belongs to "
        "has ended. For a stream, a background task or other work that outlives the request, "
        "depend on get_database_handle({0!r}) and open a session from it."
    ),
    exceptions.BlockingSessionError: (
        "The synchronous session of database {0!r} was used on the event loop's thread, where it "
        "would block every other request. Declare the endpoint or dependency with `def`, call the "
        "code with `await run_in_threadpool(...)`, or install an AsyncEngine."
    ),
    exceptions.UncommittedChangesError: (
        "The session of database {0!r} was closed with uncommitted changes, which are lost. Do "
        "not close the session yourself; to discard changes, call rollback()."
    ),
    exceptions.TransactionAbortedError: (
        "The transaction on database {0!r} cannot be committed: an error inside it was caught and "
        "ignored, and the server has aborted the transaction. Let the error propagate, call "
        "rollback(), or run what may fail in a savepoint: `session.begin_nested()`."
    ),
    exceptions.CommitOutcomeUnknownError: (
        "The connection to database {0!r} was lost during COMMIT (or a second engine of the "
        "session refused it): the changes may or may not be stored. Check the database before you "
        "repeat the work."
    ),
    exceptions.AfterCommitError: (
        "The transaction on database {0!r} is stored, but code that ran after its COMMIT failed: "
        "an after_commit listener, or the session class's commit(). Do not repeat the request."
    ),
    exceptions.ReadOnlySessionError: (
        "The session from reader({0!r}) is read-only: it would commit each statement on its own. "
        "Depend on transactional({0!r}) to write."
    ),
    exceptions.TransactionOptionsError: (
        "Database {0!r} has no transactions: its engine or connection is in AUTOCOMMIT, where each "
        "statement is stored at once. Remove AUTOCOMMIT, or use a session that nothing commits at "
        "the end: the one from get_db({0!r}), or from the handle's session()."
    ),
}


@dataclass(eq=False, repr=False)
class SharedState:
    """The state that the sessions of one database share. Lives as long as the handle."""

    name: str
    root: Engine  # the application's session class may choose other engines
    shutdown_timeout: float
    warn_held_after: float | None
    holders_reported: tuple[float, str] | None = None  # when, and the text
    reporting: threading.Lock = field(default_factory=threading.Lock)
    # Once stopped, every session refuses its next statement: a disposed engine would silently
    # reconnect.
    stopping: Literal["shutting down", "stopped"] | None = None
    overridden: frozenset[str] = frozenset()  # the application's commit, rollback and close
    # The session records, by the connections that they hold.
    holders: dict[Connection, Any] = field(default_factory=dict[Connection, Any])
    engines: Engines = field(default_factory=Engines)
    # The records of ended sessions, by the connection that their results may still be read on.
    readers: WeakKeyDictionary[Connection, Any] = field(default_factory=WeakKeyDictionary[Any, Any])
    _statements: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary[Any, Any])

    def __post_init__(self) -> None:
        self.ends_in_one_step: bool = ends_in_one_step(self.root)
        self.awaits_autocommit: bool = awaits_autocommit(self.root)
        if self.awaits_autocommit:
            keep_autocommit(self.root)
        self._writing = LRUCache[Any, bool](500)  # like SQLAlchemy's cache
        self.listen(self.root.dialect)

    def check_running(self, *, new_session: bool = False) -> None:
        """Refuse all use once the database is stopped, and new sessions during shutdown."""
        if self.stopping == "stopped" or (new_session and self.stopping):
            raise exceptions.DatabaseNotStartedError(
                f"Database {self.name!r} is {self.stopping}: the application's lifespan has ended. "
                "Finish work with the database before the application shuts down."
            )

    def error(self, kind: type[ErrorT]) -> ErrorT:
        """Build an error of this class, with its message for this database."""
        return kind(_MESSAGES[kind].format(self.name))

    def statement_of(self, context: ExecutionContext) -> Statement:
        """Return a statement's effect, which is read once for each compiled form."""
        compiled = context.compiled
        if compiled is None:
            return Statement(Effect.UNKNOWN)
        found: Statement | None = self._statements.get(compiled)
        if found is None:
            found = self._statements[compiled] = statement_of(compiled)
        return found

    def writes(self, statement: Any) -> bool:
        """Return whether a statement writes, which is read once for each structure."""
        # The private key of SQLAlchemy's own statement cache. To read every statement anew would
        # cost a reader a twentieth of a request, more for a longer statement.
        key: Any = getattr(statement, "_generate_cache_key", bool)()
        if not key:
            return writes(statement, self.root.dialect)
        found: bool | None = self._writing.get(key.key)
        if found is None:
            found = self._writing[key.key] = writes(statement, self.root.dialect)
        return found

    def refuse_writes(
        self, connection: Connection, _cursor: object, statement: str, *_: object
    ) -> None:
        """Refuse a write over a connection that a `reader` session has handed out, and has."""
        holder = self.holders.get(connection)
        if holder and holder.options is AUTOCOMMIT and writes(statement):
            raise self.error(exceptions.ReadOnlySessionError)

    def note_commit(self, connection: Connection) -> None:
        """Record what the application commits on a connection that a session has handed out."""
        holder = self.holders.get(connection)
        if holder and not holder.committing:
            holder.stored = holder.stored or holder.count_unstored() > 0

    def listen(self, dialect: Dialect) -> None:
        """Listen for failures on a dialect's connections for as long as the handle lives."""
        # Listeners on a dialect cover all engines that use it.
        heard = [*dialect.dispatch.handle_error]  # another thread may add one meanwhile
        listener = next((each for each in heard if isinstance(each, _Listener)), None)
        if listener is None:
            listener = _Listener()
            event.listen(dialect, "handle_error", listener)
        if weakref.ref(self) not in listener.states:
            listener.states.append(weakref.ref(self, listener.states.remove))

    def record_on(self, connection: Connection) -> Any:
        """Return the record of the session that uses a connection or last used it."""
        return self.holders.get(connection) or self.readers.get(connection)


class _Listener:
    """The listener for failures outside session methods: mapper events, streams, Core.

    There is one on each dialect, for all handles. It is never removed, because SQLAlchemy may be
    calling a dialect's listeners in another thread.
    """

    def __init__(self) -> None:
        self.states: list[weakref.ref[SharedState]] = []

    def __call__(self, context: ExceptionContext) -> BaseException | None:
        """Tell the sessions on whose connection something has failed."""
        heard = None
        for each in self.states[:]:
            state, connection = each(), context.connection
            if state and connection is not None and (record := state.record_on(connection)):
                heard = _heard(record, context, connection) or heard
        return heard


def _heard(record: Any, context: ExceptionContext, connection: Connection) -> BaseException | None:
    if context.execution_context is None and context.statement is None:
        # COMMIT or ROLLBACK failed or was never sent. SQLAlchemy would keep the connection,
        # which may still be in its transaction.
        if not reported_by_server(context.original_exception, connection):
            context.is_disconnect = True
    elif not record.finished:
        record.note_failure(context.original_exception)
        if has_stale_plan(context.original_exception):
            connection.connection.invalidate(soft=True)  # its next user gets another one
        context.is_disconnect = context.is_disconnect or is_half_ended(context.original_exception)
        if record.committing and record.rolled_back is not None:
            # A listener that runs after our check may swallow this, so make COMMIT fail.
            context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
        translated = _translated(context, connection)
        if (raised := translated or context.sqlalchemy_exception) is not None:
            record.tag(raised)  # the end of a savepoint passes no method of the session
        return translated
    elif context.statement is None:  # a fetch by a stream that has outlived its session
        error: Exception = record.state.error(exceptions.SessionFinishedError)
        return error
    return None


def _translated(context: ExceptionContext, connection: Connection) -> DBAPIError | None:
    """Wrap a driver's error that SQLAlchemy leaves unwrapped, such as a rejected value."""
    error = context.original_exception
    made = getattr(context, "chained_exception", None)  # by a listener of the application
    if context.sqlalchemy_exception is not None or made is not None:
        return None
    if not (is_refused_value(error, connection) or server_of(error)):  # asyncpg's, in a stream
        return None
    return DBAPIError(context.statement, context.parameters, error)
