"""What is remembered of a session of ours: its time, its thread, and what it has done.

The rules that rest on it: 5 to 7 (no lying commit), 10 (a finished session says so), 13 (the
event loop is not blocked). `_sessions` and `_statements` keep it up to date.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Dialect, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPICursor

from ._options import NO_OPTIONS, TransactionOptions, engine_with
from .exceptions import (
    BlockingSessionError,
    DatabaseNotStartedError,
    ReadOnlySessionError,
    SessionFinishedError,
    TransactionAbortedError,
    UncommittedChangesError,
)


class EngineGuard:
    """Give the sessions of one database the engine they run on.

    Lives as long as the database's handle. `stopped` makes every session of the database refuse
    its next statement: a disposed SQLAlchemy engine would silently connect anew. `busy` holds
    the sessions that have a connection.

    Args:
        name: the database's.
        root: its engine. A session class of the application's may choose others.
        listen: called once for every dialect that sessions run on.
    """

    def __init__(self, name: str, root: Engine, listen: Callable[[Engine], None]) -> None:
        self.name = name
        self.stopped = False
        self.busy: set[SessionGuard] = set()
        self._root = root
        self._listen = listen
        self._lock = threading.Lock()
        self._heard: set[Dialect] = set()
        self._with_options: dict[TransactionOptions, Engine] = {}

    def engine(self, engine: Engine, session: SessionGuard) -> Engine:
        """Return the engine itself, or one that shares its pool and sets the session's options.

        A session sees one engine for one engine, or it would open a second connection.
        """
        if engine.dialect not in self._heard:
            with self._lock:
                self._listen(engine)
                self._heard.add(engine.dialect)
        if session.options is NO_OPTIONS:
            return engine
        if engine is not self._root:
            # It may have been made for this request alone: remembered no longer than that.
            found = session.engines_with_options.get(engine)
            if found is None:
                found = session.engines_with_options[engine] = engine_with(engine, session.options)
            return found
        with self._lock:
            found = self._with_options.get(session.options)
            if found is None:
                found = self._with_options[session.options] = engine_with(engine, session.options)
        return found


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
        "discarded",
        "engines",
        "engines_with_options",
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
        self.discarded = False  # the application closed it over changes that were not committed
        self.engines_with_options: dict[Engine, Engine] = {}
        self.asked = False  # for an engine: the transaction has a connection, or waits for one
        self.committing = False
        self.transactions: dict[Connection, Transaction] = {}

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
        for connection, transaction in self.transactions.items():
            if not transaction.cursors:
                continue
            # A stream that was read to its end is closed, one on a lost connection fails.
            with contextlib.suppress(connection.dialect.loaded_dbapi.Error, OSError):
                for cursor in transaction.cursors:
                    cursor.close()

    def forget(self) -> None:
        """Start anew: the session's transaction has ended, and it holds no connection."""
        self.asked = False
        self.committing = False
        for transaction in self.transactions.values():
            transaction.statement = None  # it knows its connection: a cycle for the collector
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

    def check_discarded(self) -> None:
        """Refuse a success when a close() has thrown away what was to be stored.

        Raises:
            UncommittedChangesError: it was neither commit() nor rollback() that ended it.
        """
        if self.discarded:
            raise UncommittedChangesError(
                f"The session of database {self.engines.name!r} was closed over changes that had "
                "not been committed, and they are lost. Leave closing it to whoever opened it: no "
                "`with session`, no close(). To give changes up call rollback()."
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
        if self.finished:
            raise self.finished_error()
        if self.engines.stopped:
            raise DatabaseNotStartedError(
                f"Database {self.engines.name!r} is stopped: the application's lifespan has "
                "ended. Finish work with the database before the application shuts down."
            )
        if self.loop_thread is not None:
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

    def check_committable(self) -> None:
        """Refuse to commit what the server has given up: it would answer with a silent ROLLBACK.

        Raises:
            TransactionAbortedError: an error inside the transaction was swallowed.
        """
        for connection, transaction in self.transactions.items():
            if transaction.aborted is not None or _is_in_error(connection):
                raise TransactionAbortedError(
                    f"The transaction on database {self.engines.name!r} cannot be committed: an "
                    "error inside it was caught and ignored, and the server has given the "
                    "transaction up. Let the error propagate, call rollback(), or put the "
                    "statement that may fail into its own savepoint: `session.begin_nested()`."
                ) from transaction.aborted

    def read_only_error(self) -> ReadOnlySessionError:
        """Build the error for a write through `reader`."""
        name = self.engines.name
        return ReadOnlySessionError(
            f"The session from reader({name!r}) only reads: every statement would be committed on "
            f"its own. Depend on transactional({name!r}) to write."
        )


class Transaction:
    """Remember what happened on one connection since its transaction began."""

    __slots__ = (
        "aborted",
        "aborted_before",
        "cursors",
        "opaque",
        "savepoints",
        "session",
        "statement",
        "written",
    )

    def __init__(self, session: SessionGuard) -> None:
        self.session = session
        self.written = False
        self.opaque = False
        self.statement: ExecutionContext | None = None  # the last one that was sent
        self.aborted: BaseException | None = None
        self.aborted_before: BaseException | None = None  # when that statement was sent
        self.savepoints: dict[str, bool] = {}  # what `written` was when each began
        self.cursors: list[DBAPICursor] = []  # of streams, which fetch over the connection


def _is_in_error(connection: Connection) -> bool:
    """Ask the driver, which knows of errors on its own connection too; asyncpg cannot tell."""
    if connection.closed or connection.invalidated:
        return False
    info = getattr(connection.connection.driver_connection, "info", None)
    # libpq's PQTRANS_INERROR, the same number in psycopg and psycopg2.
    return getattr(info, "transaction_status", None) == 3
