"""What the sessions of one database share: their class, their engine, and who is at work."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from .._drivers.pools import pool_capacity
from .._drivers.statements import Effect, effect_of
from .._drivers.transactions import is_servers_word
from ..exceptions import DatabaseNotStartedError, ReadOnlySessionError, TransactionOptionsError
from .engines import AnyEngine, sync_engine
from .options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions, engine_with
from .record import Record
from .session import AnySession, NativeSession, native_class, sync_session

_FINISHING: Final = ("commit", "rollback", "close")


class SessionFactory:
    """A maker of sessions for one engine, as `sessionmaker` is, that knows those at work.

    Lives as long as the database's handle.

    Args:
        name: the database's.
        engine: the sessions' engine; a session class of the application's may choose others.
        options: keyword arguments for the sessions, as for `sessionmaker`.
        shutdown_timeout: seconds that a cancelled request may go on with its COMMIT.

    Raises:
        TypeError: options that no session can be made with, or a class whose `commit`,
            `rollback` or `close` cannot be called as SQLAlchemy's.

    Attributes:
        busy: the records of the sessions that hold a connection.
        refusal: why no new session is handed out, if so.
        stopped: every session refuses its next statement. A disposed engine would silently
            connect anew.
        overridden: those of commit, rollback and close that the application's class has itself.
    """

    def __init__(
        self, name: str, engine: AnyEngine, options: Mapping[str, Any], shutdown_timeout: float
    ) -> None:
        self.name = name
        self.shutdown_timeout = shutdown_timeout
        self.refusal: str | None = None
        self.stopped = False
        self.busy: set[Record] = set()
        self._engine = engine
        self.asynchronous = isinstance(engine, AsyncEngine)
        self.root = sync_engine(engine)
        self._lock = threading.Lock()
        self._with_options: weakref.WeakKeyDictionary[Engine, dict[TransactionOptions, Engine]] = (
            weakref.WeakKeyDictionary()
        )
        self._effects: weakref.WeakKeyDictionary[Any, tuple[Effect, str]] = (
            weakref.WeakKeyDictionary()
        )
        # What results may still be read from, when their session has ended.
        self._readers: weakref.WeakKeyDictionary[Connection, Record] = weakref.WeakKeyDictionary()
        self._on_error = _listener(weakref.ref(self))
        self._listen(self.root.dialect)
        self._class, self._options = self._prepare(dict(options))
        self.overridden = self._overridden()

    # -- their class -----------------------------------------------------------------------

    def _prepare(self, options: dict[str, Any]) -> tuple[Callable[..., AnySession], dict[str, Any]]:
        wanted: type[AnySession] = AsyncSession if self.asynchronous else Session
        for keyword in ("bind",) if self.asynchronous else ("bind", "sync_session_class"):
            if keyword in options:
                raise self._mistake(
                    f"{keyword!r} is not for you to give; the sessions use the engine that was "
                    "installed, and a class_ that fits it."
                )
        class_: Any = options.pop("class_", wanted)
        if not (isinstance(class_, type) and issubclass(class_, cast("type[Any]", wanted))):
            raise self._mistake(
                f"class_ must be a subclass of {wanted.__name__}, because its engine is an "
                f"{type(self._engine).__name__}; it is {class_!r}."
            )
        options = {"expire_on_commit": False, "close_resets_only": False} | options
        if not self.asynchronous:
            return native_class(class_), options
        base: type[Session] = options.get("sync_session_class") or class_.sync_session_class
        return class_, options | {"sync_session_class": native_class(base)}

    def _mistake(self, what: str) -> TypeError:
        return TypeError(f"session_options of database {self.name!r}: {what}")

    def _overridden(self) -> frozenset[str]:
        """Open a session: mistakes in its options show now, not in the first request."""
        try:
            session = self.open()
        except TypeError as error:
            raise self._mistake(str(error)) from error
        inner = sync_session(session)
        found = {
            method
            for method in _FINISHING
            for each, ours in ((session, AsyncSession), (inner, NativeSession))
            if isinstance(each, ours) and getattr(type(each), method) is not getattr(ours, method)
        }
        for method in found:
            self._check_override(session, method)
        NativeSession.close(inner)
        return frozenset(found)

    def _check_override(self, session: AnySession, method: str) -> None:
        override = getattr(session, method)
        try:
            inspect.signature(override).bind()
        except TypeError as error:
            raise self._mistake(
                f"{method}() of {type(session).__name__} needs arguments, and is called without "
                "any at the end of a request. Give them defaults."
            ) from error
        if isinstance(session, AsyncSession) and not inspect.iscoroutinefunction(
            inspect.unwrap(override)
        ):
            raise self._mistake(
                f"{method}() of {type(session).__name__} is no `async def`, as AsyncSession's is. "
                "Write it with `async def`."
            )

    @property
    def native(self) -> Any:
        """The class of the sessions that do the work; a test may put a subclass in its place."""
        return self._options["sync_session_class"] if self.asynchronous else self._class

    @native.setter
    def native(self, class_: type[NativeSession]) -> None:
        if self.asynchronous:
            self._options["sync_session_class"] = class_
        else:
            self._class = class_

    # -- opening ---------------------------------------------------------------------------

    def open(
        self,
        options: TransactionOptions = NO_OPTIONS,
        *,
        loop_thread: int | None = None,
        commits: bool = False,
    ) -> AnySession:
        """Open a session without a connection; the caller finishes it.

        Raises:
            DatabaseNotStartedError: the application has stopped, or is about to.
            TransactionOptionsError: the database does not have what the options ask for.
        """
        if self.refusal is not None:
            raise DatabaseNotStartedError(
                f"Database {self.name!r} is {self.refusal}: no new session is handed out. Finish "
                "work with the database before the application shuts down."
            )
        if options is not NO_OPTIONS and options is not AUTOCOMMIT:
            self.support(options)
        session = self._class(bind=self._engine, **self._options)
        record = sync_session(session).sqlnative = Record(self, options, loop_thread)
        record.commits = commits
        return session

    def support(self, options: TransactionOptions) -> None:
        """Refuse what the database cannot do, before anything is sent to it.

        Raises:
            TransactionOptionsError: an isolation level, or `read_only`, that there is not.
        """
        dialect = self.root.dialect
        lacking = options.lacking_in(dialect)
        if lacking is not None:
            raise TransactionOptionsError(
                f"Database {self.name!r} ({dialect.name}+{dialect.driver}) has {lacking}."
            )

    def engine_for(self, engine: Engine, options: TransactionOptions) -> Engine:
        """Return an engine that shares the pool of this one, and sets the options.

        A session sees one engine for one engine, or it would open a second connection.
        """
        with self._lock:
            known = self._with_options.setdefault(engine, {})
            found = known.get(options)
            if found is None:
                found = engine_with(engine, options)
                if options == AUTOCOMMIT:
                    # On an engine of our own, before the statement is sent: nothing undoes it.
                    event.listen(found, "before_cursor_execute", _refuse_writes(self))
                known[options] = found
        return found

    # -- those at work ---------------------------------------------------------------------

    def begun_on(self, record: Record, connection: Connection) -> None:
        """Note that a session's transaction has begun on a connection."""
        self.busy.add(record)
        if connection.dialect is not self.root.dialect:
            self._listen(connection.dialect)

    def connections_in_use(self) -> int:
        """Count the connections that sessions hold."""
        return sum(len(record.connections) for record in tuple(self.busy))

    def hold_all(self) -> bool:
        """Tell whether sessions hold every connection that the pool hands out."""
        capacity = pool_capacity(self.root.pool)
        return capacity is not None and self.connections_in_use() >= capacity

    def remember_reader(self, connection: Connection, record: Record) -> None:
        """Note whose results may still be read from a connection, when the session has ended."""
        self._readers[connection] = record

    def record_on(self, connection: Connection) -> Record | None:
        """Find the session that is, or was last, at work on a connection."""
        at_work = (record for record in tuple(self.busy) if connection in record.connections)
        return next(at_work, None) or self._readers.get(connection)

    def effect_of(self, context: ExecutionContext) -> tuple[Effect, str]:
        """Tell what a statement may do; read once for each compiled form."""
        compiled = context.compiled
        if compiled is None:
            return Effect.UNKNOWN, ""
        found = self._effects.get(compiled)
        if found is None:
            found = self._effects[compiled] = effect_of(compiled)
        return found

    def _listen(self, dialect: Dialect) -> None:
        # A dialect's events are its engines'. The listener goes when the handle does.
        if not event.contains(dialect, "handle_error", self._on_error):
            event.listen(dialect, "handle_error", self._on_error)
            weakref.finalize(self, _unlisten, weakref.ref(dialect), self._on_error)

    # -- errors that name the database -----------------------------------------------------

    def read_only_error(self) -> ReadOnlySessionError:
        """Build the error for a write through `reader`."""
        return ReadOnlySessionError(
            f"The session from reader({self.name!r}) only reads: every statement would be "
            f"committed on its own. Depend on transactional({self.name!r}) to write."
        )

    def autocommit_error(self) -> TransactionOptionsError:
        """Build the error for a transaction where there can be none."""
        return TransactionOptionsError(
            f"Database {self.name!r} has no transactions: its engine was made with "
            "isolation_level='AUTOCOMMIT', so that each statement is stored at once and nothing "
            "can be rolled back. Make the engine without it, or depend on "
            f"get_db({self.name!r}) and let each statement stand for itself."
        )


def _listener(factory: weakref.ref[SessionFactory]) -> Callable[[ExceptionContext], Any]:
    """Hear of failures that no method of a session lets through: mapper events, streams, Core."""

    def on_error(context: ExceptionContext) -> BaseException | None:
        found = factory()
        if found is None or context.connection is None:
            return None
        record = found.record_on(context.connection)
        if record is None:
            return None
        if context.execution_context is None and context.statement is None:
            # COMMIT or ROLLBACK did not get through, or was not even sent: SQLAlchemy would keep a
            # connection that may still be in its transaction.
            if not is_servers_word(context.original_exception, context.connection):
                context.is_disconnect = True
        elif not record.finished:
            record.hears(context.original_exception)
        elif context.statement is None:  # a fetch: a stream may fail long after it has begun
            return record.finished_error()
        return None

    return on_error


def _unlisten(dialect: weakref.ref[Dialect], listener: Any) -> None:
    found = dialect()
    if found is not None and event.contains(found, "handle_error", listener):
        event.remove(found, "handle_error", listener)


def _refuse_writes(factory: SessionFactory) -> Callable[..., None]:
    # Weakly: the engine that calls it is the factory's own.
    known = weakref.ref(factory)

    def refuse(*call: Any) -> None:
        found, context = known(), call[4]
        if found is not None and found.effect_of(context)[0] is Effect.WRITE:
            raise found.read_only_error()

    return refuse
