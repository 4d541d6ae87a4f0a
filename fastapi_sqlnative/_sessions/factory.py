"""The session factory: the application's session class, with ours before and after it."""

import inspect
import math
import time
import weakref
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from .._drivers.transactions import begin_before_savepoint, limit_statements
from .._functions import accepts, signature_of
from .engines import AnyEngine
from .options import AUTOCOMMIT, NO_OPTIONS, begin_with
from .record import Record
from .session import AnySession, NativeSession, note_flush, sync_session
from .shared import SharedState
from .transaction import Work, depth_of, has_pending_changes

# SQLAlchemy 2.1 and later: a session sets execution options itself. That is cheaper than an engine
# with options, which costs time for each connection and statement.
_TAKES_OPTIONS: Final = "execution_options" in signature_of(Session.__init__).parameters


class Outermost(Session):
    """The first class in the MRO, whose listeners run before the application's."""

    sqlnative: Record

    def __init_subclass__(cls, **_: Any) -> None:
        """Don't call the application's `__init_subclass__` for the class that we build."""

    def get_bind(self, *args: Any, **arguments: Any) -> Engine | Connection:
        """Return the engine that the application chooses, with the session's options set.

        First in the MRO, because routing session classes seldom call `super().get_bind()`.
        """
        bind = super().get_bind(*args, **arguments)
        record = self.sqlnative
        record.asked = True
        if record.executing and record.on_wanted is not None:
            record.on_wanted(record)
        if record.options is NO_OPTIONS or not isinstance(bind, Engine):
            return bind
        given = record.options.given_to(bind.dialect)
        if _TAKES_OPTIONS and _sets_options(self, bind, given):
            self.execution_options = self.execution_options.union(given)
            if record.options is AUTOCOMMIT:
                return bind
        return record.engine_for(bind)


def _sets_options(session: Outermost, engine: Engine, given: Mapping[str, Any]) -> bool:
    """Return whether a session sets its options by itself, not only by an engine with options."""
    if session.sqlnative.options is AUTOCOMMIT and not engine.dispatch.engine_connect:
        return True  # faster, but it fails if a listener has begun the transaction before
    # The application's own would take precedence over those of such an engine.
    return bool(given.keys() & {*session.execution_options, *engine.get_execution_options()})


def native_class(base: type[Session]) -> type[Session]:
    """Combine an application's session class with ours, under the application's name."""
    bases = (Outermost, NativeSession) if base is Session else (Outermost, base, NativeSession)
    return type(base.__name__, bases, {"__module__": base.__module__})


# Events for what no method sees. They run before the application's listeners: if one of those
# fails, the record must already have the connection and the outcome of the COMMIT.
@event.listens_for(Outermost, "after_begin")
def _after_begin(
    session: Outermost, _transaction: SessionTransaction, connection: Connection
) -> None:
    record = session.sqlnative
    if connection in record.connections:
        return  # a savepoint on a connection that the record has
    record.begun_on(connection)
    if record.work.handed_out:
        record.hand_out(connection)
    if record.finished and not record.ending:
        # A task or thread that outlived the request was still waiting for the pool.
        record.discard_connections()
        record.check_unfinished()
    record.state.check_running()  # it may have stopped while this session was connecting
    if record.options is not NO_OPTIONS:
        begin_with(connection, record.options)
    if session.in_nested_transaction():
        begin_before_savepoint(connection)
    # Only a request's synchronous session: an asynchronous one is cancelled at the deadline.
    unit = None if record.loop_thread is None else record.unit
    if unit and unit.ends_at != math.inf and not unit.has_stored:
        limit_statements(connection, unit.ends_at - time.monotonic())


@event.listens_for(Outermost, "after_flush")
def _after_flush(session: Outermost, _context: object) -> None:
    record = session.sqlnative
    # What the application's listeners have added.
    note_flush(session, record, record.work.wrote or has_pending_changes(session))


@event.listens_for(Outermost, "after_commit")
def _after_commit(session: Outermost) -> None:
    record = session.sqlnative
    if record.committing and not session.in_nested_transaction():  # else it is a savepoint's
        record.committed = record.work.committed = True
        record.stored = record.stored or record.may_have_written


@event.listens_for(Outermost, "after_soft_rollback")
def _after_soft_rollback(session: Outermost, previous: SessionTransaction) -> None:
    record = session.sqlnative
    # A failed flush, in a transaction of its own, rolls back what is around it.
    undone = previous if previous.nested else previous.parent
    if undone is not None and undone.nested:
        record.work.savepoint_undone(depth_of(undone), record.connections)
    elif record.joined:
        record.work = Work()  # the transaction of the connection goes on


@event.listens_for(Outermost, "after_transaction_end")
def _after_transaction_end(session: Outermost, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.sqlnative.forget()


class SessionFactory:
    """A factory of sessions for one engine, like `sessionmaker`. Lives as long as its handle.

    It refuses invalid options, and a class whose `commit`, `rollback` or `close` cannot be called
    like SQLAlchemy's. `class_` is the class of the sessions handed out, `native` the synchronous
    class behind it, which a test may replace with a subclass.
    """

    def __init__(self, engine: AnyEngine, state: SharedState, options: Mapping[str, Any]) -> None:
        self.state = state
        self.asynchronous: bool = isinstance(engine, AsyncEngine)
        self._plain: type[Any] = AsyncSession if self.asynchronous else Session
        self._options: dict[str, Any] = {"expire_on_commit": False} | dict(options)
        self.class_: Any = self._options.pop("class_", self._plain)
        self._check_options(engine)
        self._options["bind"] = engine
        base: Any = self.class_
        if self.asynchronous:
            base = self._options.pop("sync_session_class", None) or base.sync_session_class
        self.native: Any = native_class(base)
        self._look_for_overrides()

    def _check_options(self, engine: AnyEngine) -> None:
        for keyword in ("bind",) if self.asynchronous else ("bind", "sync_session_class"):
            if keyword in self._options:
                raise self._mistake(
                    f"{keyword!r} is not allowed: the sessions use the installed engine and a "
                    "class_ that fits it."
                )
        if not (isinstance(self.class_, type) and issubclass(self.class_, self._plain)):
            raise self._mistake(
                f"class_ must be a subclass of {self._plain.__name__}, because the engine is an "
                f"{type(engine).__name__}; it is {self.class_!r}."
            )

    def _mistake(self, what: str) -> TypeError:
        return TypeError(f"session_options of database {self.state.name!r}: {what}")

    def _look_for_overrides(self) -> None:
        """Find the application's overrides of the methods that end a session."""
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
        # Skip a class with a constructor of its own: that may need a request.
        if all(class_.__init__ is ours.__init__ for class_, ours in classes):
            try:  # so that wrong options fail now, not in the first request
                NativeSession.close(sync_session(self.open()))
            except TypeError as error:
                raise self._mistake(str(error)) from error

    def _check_override(self, class_: type[Any], method: str) -> None:
        override = getattr(class_, method)
        if not accepts(override, None):
            raise self._mistake(
                f"{method}() of {class_.__name__} has required arguments, but is called without "
                "any at the end of a request. Give them defaults."
            )
        asynchronous = inspect.iscoroutinefunction(inspect.unwrap(override))
        if issubclass(class_, AsyncSession) and not asynchronous:
            raise self._mistake(
                f"{method}() of {class_.__name__} is not an `async def`, unlike AsyncSession's. "
                "Write it with `async def`."
            )

    def open(self) -> AnySession:
        """Open a session, which has no connection yet. The caller finishes it."""
        self.state.check_running(new_session=True)
        session: AnySession
        if self.asynchronous:
            session = self.class_(sync_session_class=self.native, **self._options)
        else:
            session = self.native(**self._options)
        sync_session(session).sqlnative = Record(self.state, given=weakref.ref(session))
        return session
