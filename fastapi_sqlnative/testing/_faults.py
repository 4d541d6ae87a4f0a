"""Injected database failures: each hits an application's sessions once."""

import sqlite3
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Connection, Engine, event, exc
from starlette.applications import Starlette

from .._lifespan.running import running_of
from .._routes import name_of_route
from .._sessions.session import NativeSession
from .._sessions.shared import SharedState
from ..databases import sessions_of
from ._connections import isolated_on
from ._targets import Target, places
from ._turns import OVER, SERVED, marking_requests

StatementFailure: TypeAlias = Literal["serialization", "deadlock", "connection_lost"]
CommitFailure: TypeAlias = Literal[
    "serialization", "deadlock", "connection_lost_before", "connection_lost_after"
]

_MYSQL: Final = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {1}, MESSAGE_TEXT = 'by a test'"
# The statements that make each server fail, and the codes in them. SQLite has no server.
_PROVOKING: Final = {
    "postgresql": "DO $$BEGIN RAISE EXCEPTION 'by a test' USING ERRCODE = '{0}'; END$$",
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "sqlite": "",
}
_CODES: Final = {"serialization": ("40001", 1020), "deadlock": ("40P01", 1213)}


@contextmanager
def fail_next_statement(
    target: Target,
    failure: StatementFailure,
    *,
    name: str = "default",
    containing: str = "",
    route: str | None = None,
) -> Generator[None]:
    """Make a single statement of an application's sessions fail within a block.

    For serialization failures and deadlocks, the server itself raises the error instead of running
    the statement, and aborts the transaction. For a lost connection, SQLAlchemy's error is raised
    and the connection is discarded, except in an `isolated` block.

    Args:
        target: a running application, or a handle.
        failure: SQLite has no deadlock; its serialization failure is SQLITE_BUSY_SNAPSHOT.
        name: the name of the application's database.
        containing: a part of the statement's SQL; by default the next statement fails.
        route: the path as requested, or the route's whole pattern with every prefix; only
            requests to it fail.

    Raises:
        ValueError: the database does not have this failure.
        AssertionError: at the end, if no session has hit the failure.

    Example:
        with fail_next_statement(app, "deadlock", containing="UPDATE account"):
            assert client.post("/transfers", json=transfer).status_code == 201
    """
    with _fault(target, name, failure, route) as (state, _, happens), ExitStack() as undo:

        def fail(connection: Connection, _: Any, statement: str, parameters: Any, *__: Any) -> None:
            record = state.holders.get(connection)
            if record is None or containing not in statement or not happens():
                return
            if failure != "connection_lost":
                _provoke(connection, failure)
            lost = _lost(connection, "08006")
            if isolated_on(connection) is None:
                connection.invalidate(lost)
            else:
                record.rolled_back = lost  # so that a commit is refused, as on a lost connection
            raise exc.OperationalError(statement, parameters, lost, connection_invalidated=True)

        # In an isolated block the connection may be another engine's.
        event.listen(Engine, "before_cursor_execute", fail)
        undo.callback(event.remove, Engine, "before_cursor_execute", fail)
        yield


@contextmanager
def fail_next_commit(
    target: Target, failure: CommitFailure, *, name: str = "default", route: str | None = None
) -> Generator[None]:
    """Make a single COMMIT of an application's sessions fail, like `fail_next_statement`.

    Only `connection_lost_after` leaves the transaction stored. For a lost connection the
    application gets a `CommitOutcomeUnknownError`.

    Example:
        with fail_next_commit(app, "connection_lost_after"):
            assert client.post("/books", json={"title": "Emma"}).status_code == 500
    """
    with _fault(target, name, failure, route) as (_, sessions, happens):

        def fail(session: NativeSession) -> None:
            if session.in_nested_transaction():
                return
            session.flush()
            record = session.sqlnative
            if not record.connections or not happens():
                return
            record.check_committable()
            connection = next(iter(record.connections))
            # A code that means "outcome unknown", and keeps an isolated connection open.
            lost = exc.OperationalError(None, None, _lost(connection, "08007"))

            def lose(_: Connection, *savepoint: str) -> None:
                if not record.connections:
                    return  # the commit was refused
                if savepoint:
                    connection.dialect.do_release_savepoint(connection, savepoint[0])
                else:
                    connection.dialect.do_commit(connection.connection)
                raise lost

            if failure == "connection_lost_after":
                if connection.dialect.name == "postgresql":  # a COMMIT that is refused is not lost
                    connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
                # Not in `after_commit`: there a session cannot be rolled back, as it can after a
                # real failure.
                end = "commit" if isolated_on(connection) is None else "release_savepoint"
                event.listen(connection, end, lose, once=True)
                return
            if failure != "connection_lost_before":
                _provoke(connection, failure)
            record.committing = True
            raise lost

        event.listen(sessions, "before_commit", fail)
        yield


@contextmanager
def fail_next_checkout(
    target: Target, *, name: str = "default", route: str | None = None
) -> Generator[None]:
    """Make a single checkout fail as if the pool were exhausted, like `fail_next_statement`.

    Example:
        with fail_next_checkout(app):
            assert client.get("/books").status_code == 503
    """
    with _fault(target, name, "exhausted pool", route) as (_, sessions, happens):

        def get_bind(session: NativeSession, *args: Any, **arguments: Any) -> Any:
            if not session.sqlnative.connections and happens():
                raise exc.TimeoutError("The pool is exhausted (simulated by a test)", code="3o7r")
            return super(sessions, session).get_bind(*args, **arguments)

        sessions.get_bind = get_bind
        yield


@contextmanager
def _fault(
    target: Target, name: str, failure: str, route: str | None
) -> Generator[tuple[SharedState, Any, Callable[[], bool]]]:
    """Yield the database's state, a session class, and a function that is true for one call."""
    met: list[str] = []

    def happens() -> bool:
        scope = SERVED.get() or {}
        declared = (name_of_route(scope) or "").partition(" ")[2]
        paths = () if scope.get(OVER) else (scope.get("path"), declared)
        if met or route not in (None, *paths):
            return False
        met.append(failure)
        return True

    with ExitStack() as undo:
        if isinstance(target, Starlette):
            undo.enter_context(marking_requests(target))
            installation = places(target, [name])[0][1]
            target = installation.database or running_of(target).database(installation.name)
        factory = sessions_of(target)
        state, native = factory.state, factory.native
        dialect = state.root.dialect.name
        known = dialect in _PROVOKING and (dialect, failure) != ("sqlite", "deadlock")
        if failure in _CODES and not known:
            raise ValueError(f"{dialect} has no {failure!r} failure.")
        factory.native = type(native.__name__, (native,), {})
        undo.callback(setattr, factory, "native", native)
        yield state, factory.native, happens
    if not met:
        missed = f"The {failure} failure of database {state.name!r} never hit a session"
        if route is not None:
            missed += f" of a request to {route!r}: pass the application, and the path as requested"
            missed += " or the route's whole pattern"
        raise AssertionError(f"{missed}.")


def _provoke(connection: Connection, failure: str) -> None:
    """Make the server fail."""
    dialect = connection.dialect
    if statement := _PROVOKING[dialect.name].format(*_CODES[failure]):
        connection.exec_driver_sql(statement)
    # SQLite: raise the error that its driver raises for SQLITE_BUSY_SNAPSHOT.
    busy: Any = dialect.loaded_dbapi.OperationalError("database is locked")
    busy.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    busy.sqlite_errorname = "SQLITE_BUSY_SNAPSHOT"
    raise exc.OperationalError(None, None, busy)


def _lost(connection: Connection, sqlstate: str) -> Any:
    """Build the driver's error for a lost connection."""
    lost = connection.dialect.loaded_dbapi.OperationalError("connection lost (simulated by a test)")
    lost.sqlstate, lost.severity = sqlstate, "FATAL"  # type: ignore[attr-defined] # as servers do
    return lost
