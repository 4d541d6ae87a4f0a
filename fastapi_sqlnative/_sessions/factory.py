"""The sessions of one database: the application's own class, with ours in front and behind."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from .._drivers.transactions import begin_before_savepoint, limit_statements
from .engines import AnyEngine
from .options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions, begin_with
from .pending import would_be_flushed
from .record import Record
from .session import TAKES_OPTIONS, AnySession, NativeSession, sync_session
from .shared import SharedState
from .transaction import depth_of

_AUTOCOMMIT: Final = {"isolation_level": "AUTOCOMMIT"}


class Outermost(Session):
    """What stands in front of the application's class, so that its listeners hear first."""

    sqlnative: Record

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep the application's own from hearing of a subclass that is none of its."""

    def get_bind(self, *args: Any, **arguments: Any) -> Engine | Connection:
        """Let the application choose the engine, and give it as one that sets the options.

        In front, because routing classes seldom call SQLAlchemy's own.
        """
        bind = super().get_bind(*args, **arguments)
        record = self.sqlnative
        record.asked = True
        if record.options is NO_OPTIONS or not isinstance(bind, Engine):
            return bind
        if record.options is AUTOCOMMIT and TAKES_OPTIONS:
            return bind
        return record.engine_for(bind)


def native_class(base: type[Session]) -> type[Session]:
    """Put ours behind an application's session class, under the same name."""
    bases = (Outermost, NativeSession) if base is Session else (Outermost, base, NativeSession)
    return type(base.__name__, bases, {"__module__": base.__module__})


# The few events, where no method is passed. Before the application's own listeners: one that fails
# must hide neither the connection nor that the COMMIT got through.
@event.listens_for(Outermost, "after_begin")
def _after_begin(
    session: Outermost, _transaction: SessionTransaction, connection: Connection
) -> None:
    record = session.sqlnative
    if connection in record.connections:
        return  # a savepoint on a connection that is known
    record.begun_on(connection)
    if record.finished:
        # A task or thread that the request left behind has waited for the pool all the while.
        record.discard_connections()
        record.forget()
        record.check_unfinished()
    if record.options is not NO_OPTIONS:
        begin_with(connection, record.options)
    if session.in_nested_transaction():
        begin_before_savepoint(connection)
    if record.ends_at != math.inf:
        limit_statements(connection, record.ends_at - time.monotonic())


@event.listens_for(Outermost, "after_flush")
def _after_flush(session: Outermost, _context: object) -> None:
    record = session.sqlnative
    record.work.wrote = record.work.wrote or would_be_flushed(session)


@event.listens_for(Outermost, "after_commit")
def _after_commit(session: Outermost) -> None:
    record = session.sqlnative
    if record.committing:  # else it was a savepoint
        record.committed = True
        record.stored = record.stored or record.may_have_written


@event.listens_for(Outermost, "after_soft_rollback")
def _after_soft_rollback(session: Outermost, previous: SessionTransaction) -> None:
    if previous.nested:
        record = session.sqlnative
        record.work.savepoint_undone(depth_of(previous), record.connections)


@event.listens_for(Outermost, "after_transaction_end")
def _after_transaction_end(session: Outermost, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.sqlnative.forget()


class SessionFactory:
    """A maker of sessions for one engine, as `sessionmaker` is. Lives as long as its handle.

    It refuses options that no session can be made with, and a class whose `commit`, `rollback` or
    `close` cannot be called as SQLAlchemy's. `class_` is that of the sessions handed out, and
    `native` of those that do the work; a test may put a subclass in its place.
    """

    def __init__(self, engine: AnyEngine, state: SharedState, options: Mapping[str, Any]) -> None:
        self.state = state
        self.asynchronous: bool = isinstance(engine, AsyncEngine)
        self._engine = engine
        given: dict[str, Any] = {"expire_on_commit": False, "close_resets_only": False}
        self._options = given | dict(options)
        self.class_: Any = self._options.pop("class_", self._plain)
        self._check_options()
        base: Any = self.class_
        if self.asynchronous:
            base = self._options.pop("sync_session_class", None) or base.sync_session_class
        self.native: Any = native_class(base)
        self._reader_options = self._options
        if TAKES_OPTIONS:
            reading = dict(self._options.get("execution_options", {})) | _AUTOCOMMIT
            self._reader_options = self._options | {"execution_options": reading}
        self._look_for_overrides()

    @property
    def _plain(self) -> type[Any]:
        return AsyncSession if self.asynchronous else Session

    def _check_options(self) -> None:
        for keyword in ("bind",) if self.asynchronous else ("bind", "sync_session_class"):
            if keyword in self._options:
                raise self._mistake(
                    f"{keyword!r} cannot be given: the sessions use the engine that was "
                    "installed, and a class_ that fits it."
                )
        if not (isinstance(self.class_, type) and issubclass(self.class_, self._plain)):
            raise self._mistake(
                f"class_ must be a subclass of {self._plain.__name__}, because its engine is an "
                f"{type(self._engine).__name__}; it is {self.class_!r}."
            )

    def _mistake(self, what: str) -> TypeError:
        return TypeError(f"session_options of database {self.state.name!r}: {what}")

    def _look_for_overrides(self) -> None:
        """Find what the application's classes have themselves of what ends a session."""
        classes: list[tuple[type[Any], type[Any]]] = [(self.native, NativeSession)]
        if self.asynchronous:
            classes.append((self.class_, AsyncSession))
        overridden = [
            (class_, method)
            for class_, ours in classes
            for method in ("commit", "rollback", "close")
            if getattr(class_, method) is not getattr(ours, method)
        ]
        for override in overridden:
            self._check_override(*override)
        self.state.overridden = frozenset(method for _, method in overridden)
        # Not one of a class that the application constructs: that may need a request.
        if all(class_.__init__ is ours.__init__ for class_, ours in classes):
            try:  # mistakes in the options show now, not in the first request
                NativeSession.close(sync_session(self.open()))
            except TypeError as error:
                raise self._mistake(str(error)) from error

    def _check_override(self, class_: type[Any], method: str) -> None:
        override = getattr(class_, method)
        try:
            inspect.signature(override).bind(None)
        except TypeError as error:
            raise self._mistake(
                f"{method}() of {class_.__name__} needs arguments, and is called without any at "
                "the end of a request. Give them defaults."
            ) from error
        asynchronous = inspect.iscoroutinefunction(inspect.unwrap(override))
        if issubclass(class_, AsyncSession) and not asynchronous:
            raise self._mistake(
                f"{method}() of {class_.__name__} is not an `async def`, as AsyncSession's is. "
                "Write it with `async def`."
            )

    def open(
        self, options: TransactionOptions = NO_OPTIONS, *, loop_thread: int | None = None
    ) -> AnySession:
        """Open a session without a connection; the caller finishes it."""
        self.state.check_running(new_session=True)
        given = self._options
        if options is AUTOCOMMIT:
            given = self._reader_options
        elif options is not NO_OPTIONS:
            options.check_known_to(self.state.root.dialect, self.state.name)
        session: AnySession
        if self.asynchronous:
            session = self.class_(bind=self._engine, sync_session_class=self.native, **given)
        else:
            session = self.native(bind=self._engine, **given)
        sync_session(session).sqlnative = Record(self.state, options, loop_thread)
        return session
