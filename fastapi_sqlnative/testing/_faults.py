"""Failures of a database, met by an application's sessions once, where a test wants them."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from sqlalchemy import Connection, event, exc
from sqlalchemy.engine import Dialect
from starlette.applications import Starlette

from .._lifespan.running import running_of
from .._sessions.session import NativeSession
from .._sessions.shared import SharedState
from ..databases import sessions_of
from ._connections import isolated_on
from ._targets import SERVED, Target, marking_requests, places

StatementFailure: TypeAlias = Literal["serialization", "deadlock", "connection_lost"]
CommitFailure: TypeAlias = Literal[
    "serialization", "deadlock", "connection_lost_before", "connection_lost_after"
]

_POSTGRES: Final = "DO $$BEGIN RAISE EXCEPTION 'by a test' USING ERRCODE = '{}'; END$$"
_SIGNAL: Final = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {}, MESSAGE_TEXT = 'by a test'"
_MYSQL: Final = {"serialization": _SIGNAL.format(1020), "deadlock": _SIGNAL.format(1213)}
# How each server is asked to fail. SQLite has none.
_PROVOKING: Final = {
    "postgresql": {
        "serialization": _POSTGRES.format("40001"),
        "deadlock": _POSTGRES.format("40P01"),
    },
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "sqlite": {"serialization": ""},
}


@contextmanager
def fail_next_statement(
    target: Target,
    failure: StatementFailure,
    *,
    name: str = "default",
    containing: str = "",
    route: str | None = None,
) -> Generator[None]:
    """Make one statement of an application's sessions fail, once, within a block.

    Serialization failures and deadlocks are the server's own, asked for in place of the
    statement: they abort the transaction. A lost connection is what SQLAlchemy raises for one;
    the connection is discarded, unless it is that of an `isolated` block.

    Args:
        target: an application while it runs, or a handle.
        failure: SQLite knows no deadlock, and its serialization failure is SQLITE_BUSY_SNAPSHOT.
        name: of the application's database.
        containing: what stands in the statement's SQL, for one that is not the next.
        route: the path, as declared or requested, of the route whose request is to meet it.

    Raises:
        ValueError: a failure that the database does not have.
        AssertionError: at the end, if it was never met.

    Example:
        with fail_next_statement(app, "deadlock", containing="UPDATE account"):
            assert client.post("/transfers", json=transfer).status_code == 201
    """
    with _fault(target, name, failure, StatementFailure, route) as fault:

        def fail(connection: Connection, _: Any, statement: str, parameters: Any, *__: Any) -> None:
            record = fault.state.record_on(connection)
            if record is None or connection not in record.connections:
                return
            if containing not in statement or not fault.happens():
                return
            if failure != "connection_lost":
                _provoke(connection, failure)
            lost = _lost(connection.dialect, "08006")
            if isolated_on(connection) is None:
                connection.invalidate(lost)
            else:
                record.rolled_back = lost  # so that no commit follows, as none would
            raise exc.OperationalError(statement, parameters, lost, connection_invalidated=True)

        listener = fault.state.root, "before_cursor_execute", fail
        event.listen(*listener)
        try:
            yield
        finally:
            event.remove(*listener)


@contextmanager
def fail_next_commit(
    target: Target, failure: CommitFailure, *, name: str = "default", route: str | None = None
) -> Generator[None]:
    """Make one COMMIT of an application's sessions fail, once, as `fail_next_statement` does.

    After `connection_lost_after` the transaction is stored, after the others it is not. Of a
    lost connection the application learns by `CommitOutcomeUnknownError`.

    Example:
        with fail_next_commit(app, "connection_lost_after"):
            assert client.post("/books", json={"title": "Emma"}).status_code == 500
    """
    with _fault(target, name, failure, CommitFailure, route) as fault:

        def before(session: NativeSession) -> None:
            if session.in_nested_transaction() or failure == "connection_lost_after":
                return
            session.flush()
            record = session.sqlnative
            if not record.connections or not fault.happens():
                return
            record.check_committable()
            if failure != "connection_lost_before":
                _provoke(next(iter(record.connections)), failure)
            record.committing = True
            raise _commit_lost(fault)

        def after(session: NativeSession) -> None:
            record = session.sqlnative
            if failure != "connection_lost_after" or not (record.committing and record.connections):
                return
            if fault.happens():
                record.committed = False
                raise _commit_lost(fault)

        event.listen(fault.session_class, "before_commit", before)
        event.listen(fault.session_class, "after_commit", after)
        yield


@contextmanager
def fail_next_checkout(
    target: Target, *, name: str = "default", route: str | None = None
) -> Generator[None]:
    """Make one session find the pool exhausted, once, at once, as `fail_next_statement` does.

    Example:
        with fail_next_checkout(app):
            assert client.get("/books").status_code == 503
    """
    failure: Final = "exhausted pool"
    with _fault(target, name, failure, Literal["exhausted pool"], route) as fault:
        native = fault.session_class

        def get_bind(session: NativeSession, *args: Any, **arguments: Any) -> Any:
            if not session.sqlnative.connections and fault.happens():
                raise exc.TimeoutError("The pool is exhausted: by a test", code="3o7r")
            return super(native, session).get_bind(*args, **arguments)

        native.get_bind = get_bind
        yield


@dataclass
class _Fault:
    """What is to happen once within a block, to sessions of a class that it alone has."""

    state: SharedState
    session_class: Any
    route: str | None
    happened: bool = False

    def happens(self) -> bool:
        """Tell whether it happens here and now."""
        scope = SERVED.get() or {}
        paths = scope.get("path"), getattr(scope.get("route"), "path", None)
        happens = not self.happened and (self.route is None or self.route in paths)
        self.happened = self.happened or happens
        return happens


@contextmanager
def _fault(
    target: Target, name: str, failure: str, failures: Any, route: str | None
) -> Generator[_Fault]:
    marking: AbstractContextManager[None] = nullcontext()
    if isinstance(target, Starlette):
        marking = marking_requests(target)
        installation = places(target, [name])[0][1]
        target = installation.database or running_of(target).database(installation.name)
    elif route is not None:
        raise ValueError("route= needs the application, not a handle.")
    factory = sessions_of(target)
    native, dialect = factory.native, factory.state.root.dialect.name
    own, provoked = _PROVOKING.get(dialect, {}), _PROVOKING["postgresql"]
    known = [each for each in get_args(failures) if each in own or each not in provoked]
    if failure not in known:
        raise ValueError(f"{dialect} knows no {failure!r}: write one of {', '.join(known)}.")
    fault = _Fault(factory.state, type(native.__name__, (native,), {}), route)
    factory.native = fault.session_class
    try:
        with marking:
            yield fault
    finally:
        factory.native = native
    if not fault.happened:
        raise AssertionError(
            f"The {failure} failure of database {fault.state.name!r} was never met: no session "
            "got to where it waits."
        )


def _provoke(connection: Connection, failure: str) -> None:
    """Have the server fail."""
    dialect = connection.dialect
    if statement := _PROVOKING[dialect.name][failure]:
        connection.exec_driver_sql(statement)
    # There is no server to ask. This is what its driver raises for SQLITE_BUSY_SNAPSHOT.
    busy: Any = dialect.loaded_dbapi.OperationalError("database is locked")
    busy.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    busy.sqlite_errorname = "SQLITE_BUSY_SNAPSHOT"
    raise exc.OperationalError(None, None, busy)


def _commit_lost(fault: _Fault) -> Exception:
    """Make an error that leaves the outcome of a COMMIT open."""
    return exc.OperationalError(None, None, _lost(fault.state.root.dialect, "08007"))


def _lost(dialect: Dialect, sqlstate: str) -> Any:
    """Make the error of a lost connection, which does not cost an isolated one."""
    lost: Any = dialect.loaded_dbapi.OperationalError("the connection was lost: by a test")
    lost.sqlstate, lost.severity = sqlstate, "FATAL"
    return lost
