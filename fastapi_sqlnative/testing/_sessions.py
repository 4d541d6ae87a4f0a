"""The sessions on an isolated connection: the application's, and the test's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial, partialmethod
from typing import Any, ClassVar, Self, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction
from sqlalchemy.util import immutabledict

from .._sessions.options import AUTOCOMMIT
from .._sessions.session import NativeSession
from ._connections import IsolatedConnection
from ._turns import Turn, joins_flow


def without_level(given: Mapping[str, Any]) -> immutabledict[str, Any]:
    """Leave out the isolation level, even AUTOCOMMIT, from execution options."""
    return immutabledict({key: given[key] for key in given if key != "isolation_level"})


def _use_options(connection: Connection, given: Mapping[str, Any]) -> Callable[[], object]:
    """Set a connection's execution options as if it were new; return a function to undo it."""
    before = connection.get_execution_options()
    connection.execution_options(**dict.fromkeys(before) | without_level(given))
    return partial(_use_options, connection, before)


class IsolatedSession(NativeSession):
    """A session of the application, whose transactions are savepoints."""

    # Returns the isolated connection for an engine.
    connection_of: ClassVar[staticmethod[[str, Engine], IsolatedConnection]]

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {"join_transaction_mode": "create_savepoint", "twophase": False}
        super().__init__(*args, **options)
        self.isolated = ExitStack()  # closed at the end of the transaction
        joins_flow(self)

    def get_bind(self, *args: Any, **arguments: Any) -> Engine | Connection:
        """Wait for the turn and return the isolated connection; for inspection, the engine."""
        bind = super().get_bind(*args, **arguments)
        begins = self.autobegin or self.in_transaction()  # else nothing would end the turn
        if not (isinstance(bind, Engine) and self.sqlnative.executing and begins):
            return bind
        # SQLAlchemy 2.0 sets no options here.
        self.execution_options = without_level(getattr(self, "execution_options", {}))
        isolated = self.connection_of(self.sqlnative.state.name, bind)
        connection = isolated.begin(self, transaction=self.sqlnative.options is not AUTOCOMMIT)
        if connection not in self.sqlnative.connections:
            self.isolated.callback(isolated.end, self)
            self.isolated.callback(_use_options(connection, bind.get_execution_options()))
        return connection


@event.listens_for(IsolatedSession, "do_orm_execute")
def _read_in_savepoint(state: ORMExecuteState) -> Any:
    """Execute a statement of a `reader` in a savepoint of its own, as in AUTOCOMMIT."""
    session = cast("IsolatedSession", state.session)
    record = session.sqlnative
    if record.options is not AUTOCOMMIT or record.connections:
        return None
    try:
        result = state.invoke_statement()
        for connection in record.connections:
            if (savepoint := connection.get_nested_transaction()) is not None:
                savepoint.commit()
        return result
    finally:
        if (transaction := session.get_transaction()) is not None:
            transaction.close()


@event.listens_for(IsolatedSession, "after_transaction_end")
def _after_transaction_end(session: IsolatedSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.isolated.close()


class OwnSession(Session):
    """The test's own session, which doesn't block the application's.

    It takes its turn only for each call. Its pending changes are committed when the application
    begins a transaction, and its queries load fresh values, unless it has changes that these would
    replace. In the MRO it comes after the application's own session class, whose `super()` calls
    arrive here.
    """

    turn: ClassVar[Turn]
    own_connection: ClassVar[staticmethod[[], IsolatedConnection]]  # returns the connection
    crosses: ClassVar[bool]  # whether calls run on the connection's event loop, in another thread

    def get_bind(self, *_: Any, **__: Any) -> Engine | Connection:
        """Return the isolated connection for statements, else its engine."""
        isolated = self.own_connection()
        return isolated.opened() if self.turn.holds(self) else isolated.engine

    def get(self, *args: Any, **options: Any) -> Any:
        """Load by primary key, with fresh values like a query."""
        if _flushes_first(self, options.get("execution_options") or {}):
            options["populate_existing"] = True
        return super().get(*args, **options)

    def flush(self, objects: Any = None) -> None:
        """Flush with autoflush off, so that queries of listeners keep the changes."""
        self.in_turn(self.no_autoflush(super().flush), objects)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin a transaction or savepoint."""
        if nested and self.autobegin:
            self.connection()  # so that the transaction around is none that the test has begun
        begun = self.in_turn(super().begin, nested)
        return cast("SessionTransaction", _Begun(self, begun))

    def super_in_turn(self, name: str, *args: Any, **options: Any) -> Any:
        """Call a method of SQLAlchemy's session in this session's turn."""
        return self.in_turn(getattr(super(), name), *args, **options)

    def in_turn(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a method in this session's turn, where the connection may be used."""
        call = partial(method, *args, **options)
        # At the end a factory's engine may be gone, or the event loop closed.
        if self.turn.holds(self) or (method.__name__ in _UNDO and not self.in_transaction()):
            return call()
        joins_flow(self)  # here, not in the other thread
        isolated = self.own_connection()

        def work() -> Any:
            with self.turn.during(self, isolated):
                if method.__name__ in _ENDS and not self.in_nested_transaction():
                    # Store what other sessions have begun inside.
                    others = [*isolated.own_sessions, self]
                    isolated.settle(others[others.index(self) + 1 : -1])
                return call()

        return isolated.run(work) if self.crosses else work()


_UNDO = ("close", "rollback", "reset")
_ENDS = (*_UNDO, "commit", "__exit__")

_LOADS = ("execute", "scalars", "scalar")  # all others call `execute`
_BULK = ("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings")
for _name in (*_LOADS, *_BULK, *_UNDO, "connection", "commit"):
    setattr(OwnSession, _name, partialmethod(OwnSession.super_in_turn, _name))


class _Begun:
    """A transaction whose methods take the session's turn as well."""

    def __init__(self, session: OwnSession, transaction: SessionTransaction) -> None:
        self._session = session
        self._transaction = transaction

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._transaction, name)
        return partial(self._session.in_turn, found) if callable(found) else found

    def __enter__(self) -> Self:
        self._transaction.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._session.in_turn(self._transaction.__exit__, *error)


def _flushes_first(session: Session, options: Mapping[str, Any]) -> bool:
    """Return whether fresh values lose no change: a query flushes all before, or there are none."""
    return not session.dirty or (session.autoflush and options.get("autoflush", True))


@event.listens_for(OwnSession, "do_orm_execute")
def _load_fresh_values(state: ORMExecuteState) -> None:
    session = cast("OwnSession", state.session)
    if session.crosses:  # rows can only be fetched during the call
        state.update_execution_options(yield_per=None, stream_results=False)
    loads_more = state.is_column_load or state.is_relationship_load
    if state.is_select and not loads_more and _flushes_first(session, state.execution_options):
        state.update_execution_options(populate_existing=True)
