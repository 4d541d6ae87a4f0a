"""Failures of a database, met by an application's sessions once, where a test wants them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Literal, TypeAlias, get_args

from sqlalchemy import Connection, event, exc
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.types import Scope

from .._drivers.pools import pool_status, pool_timeout
from .._lifespan.running import running_of
from .._sessions.record import Record
from .._sessions.session import NativeSession
from ..databases import AnyDatabase, sessions_of
from ._connections import isolated_on
from ._targets import SERVED, Target, marking_requests, places

StatementFailure: TypeAlias = Literal["serialization", "deadlock", "connection_lost"]
CommitFailure: TypeAlias = Literal[
    "serialization", "deadlock", "connection_lost_before", "connection_lost_after"
]
_Checkout: TypeAlias = Literal["exhausted pool"]

_POSTGRES: Final = "DO $$BEGIN RAISE EXCEPTION 'by a test' USING ERRCODE = '{code}'; END$$"
_MYSQL: Final = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = 'by a test'"
# How each server is asked to fail, with the codes that it has for it.
_FAILING: Final = {
    "postgresql": (_POSTGRES, {"serialization": "40001", "deadlock": "40P01"}),
    "mysql": (_MYSQL, {"serialization": "1020", "deadlock": "1213"}),
    "mariadb": (_MYSQL, {"serialization": "1020", "deadlock": "1213"}),
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
            if containing in statement and fault.happens():
                if failure == "connection_lost":
                    raise _statement_lost(record, connection, statement, parameters)
                _provoke(connection, failure)

        fault.listen(fault.state.root, "before_cursor_execute", fail)
        yield


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

        def before(session: Session) -> None:
            record = fault.record_of(session)
            if record is None or session.in_nested_transaction():
                return
            session.flush()
            if not record.connections or failure == "connection_lost_after" or not fault.happens():
                return
            record.check_committable()
            if failure == "connection_lost_before":
                record.committing = True
                raise _commit_lost(fault.state.root.dialect)
            _provoke(next(iter(record.connections)), failure)

        def after(session: Session) -> None:
            record = fault.record_of(session)
            if record is None or not (record.committing and record.connections):
                return
            if failure == "connection_lost_after" and fault.happens():
                record.committed = False
                raise _commit_lost(fault.state.root.dialect)

        fault.listen(NativeSession, "before_commit", before)
        fault.listen(NativeSession, "after_commit", after)
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
    with _fault(target, name, "exhausted pool", _Checkout, route) as fault:
        native: type[NativeSession] = fault.factory.native

        def get_bind(session: NativeSession, *args: Any, **arguments: Any) -> Any:
            if not session.sqlnative.connections and fault.happens():
                pool = fault.state.root.pool
                status, timeout = pool_status(pool), pool_timeout(pool)
                raise exc.TimeoutError(
                    f"{type(pool).__name__} limit of size {status.size} overflow "
                    f"{status.max_overflow} reached, connection timed out, timeout {timeout:.2f}",
                    code="3o7r",
                )
            return native.get_bind(session, *args, **arguments)

        fault.factory.native = type(native.__name__, (native,), {"get_bind": get_bind})
        fault.undo.callback(setattr, fault.factory, "native", native)
        yield


class _Fault:
    """What is to happen once within a block."""

    def __init__(self, database: AnyDatabase, route: str | None) -> None:
        self.factory = sessions_of(database)
        self.state = self.factory.state
        self.undo = ExitStack()
        self.happened = False
        self._route = route

    def happens(self) -> bool:
        """Tell whether it happens here and now."""
        request = SERVED.get()
        scope: Scope = request.scope if request is not None else {}
        paths = scope.get("path"), getattr(scope.get("route"), "path", None)
        happens = not self.happened and (self._route is None or self._route in paths)
        self.happened = self.happened or happens
        return happens

    def record_of(self, session: Session) -> Record | None:
        """Return the record of a session, if it is one of those that are meant."""
        record: Record | None = getattr(session, "sqlnative", None)
        return record if record is not None and record.state is self.state else None

    def listen(self, target: Any, name: str, listener: Callable[..., None]) -> None:
        """Listen until the block ends."""
        event.listen(target, name, listener)
        self.undo.callback(event.remove, target, name, listener)


@contextmanager
def _fault(
    target: Target, name: str, failure: str, failures: Any, route: str | None
) -> Generator[_Fault]:
    database = target
    if isinstance(target, Starlette):
        installation = places(target, [name])[0][1]
        database = installation.database or running_of(target).database(installation.name)
    fault = _Fault(database, route)  # type: ignore[arg-type] # it is a handle by now
    dialect, known = fault.state.root.dialect.name, get_args(failures)
    if failure not in known or (dialect, failure) == ("sqlite", "deadlock"):
        raise ValueError(f"{dialect} knows no {failure!r}: write one of {', '.join(known)}.")
    if dialect not in (*_FAILING, "sqlite"):
        raise ValueError(f"How {dialect} is made to fail is not known.")
    if route is not None and not isinstance(target, Starlette):
        raise ValueError("route= needs the application, not a handle.")
    with fault.undo as undo:
        if isinstance(target, Starlette):
            undo.enter_context(marking_requests(target, []))
        yield fault
    if not fault.happened:
        raise AssertionError(
            f"The {failure} failure of database {fault.state.name!r} was never met: no session "
            "got to where it waits."
        )


def _provoke(connection: Connection, failure: str) -> None:
    """Have the server fail."""
    dialect = connection.dialect
    if dialect.name != "sqlite":
        statement, codes = _FAILING[dialect.name]
        connection.exec_driver_sql(statement.format(code=codes[failure]))
    # There is no server to ask. This is what its driver raises for SQLITE_BUSY_SNAPSHOT.
    busy: Any = dialect.loaded_dbapi.OperationalError("database is locked")
    busy.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    busy.sqlite_errorname = "SQLITE_BUSY_SNAPSHOT"
    raise exc.OperationalError(None, None, busy)


def _statement_lost(record: Record, connection: Connection, sql: str, values: Any) -> Exception:
    lost = connection.dialect.loaded_dbapi.OperationalError("the connection was lost: by a test")
    if isolated_on(connection) is None:
        connection.invalidate(lost)
    else:
        record.rolled_back = lost  # so that no commit follows, as none would
    return exc.OperationalError(sql, values, lost, connection_invalidated=True)


def _commit_lost(dialect: Dialect) -> Exception:
    """Make an error that leaves the outcome open, and does not cost an isolated connection."""
    lost: Any = dialect.loaded_dbapi.OperationalError("the connection was lost: by a test")
    lost.sqlstate, lost.severity = "08007", "FATAL"
    return exc.OperationalError(None, None, lost)
