"""An engine's dialect, while a test has something to say in it.

SQLAlchemy asks the dialect for every BEGIN, COMMIT, ROLLBACK and statement, whoever is above it:
a session, a handle, Core, an engine with options of its own. So this is the one place where a
test's engine differs from the application's: everything above is left as it is.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from sqlalchemy import Connection, Pool
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.pool import PoolProxiedConnection

from .._statements import AUTOCOMMITS


class Outer(ABC):
    """Be the transaction around a test, on one connection."""

    @property
    @abstractmethod
    def dbapi_connection(self) -> DBAPIConnection | None:
        """The connection, once it is open."""

    @property
    @abstractmethod
    def root_pool(self) -> Pool:
        """The application's own pool."""

    @abstractmethod
    def begin(self, holder: PoolProxiedConnection) -> None:
        """Pretend BEGIN."""

    @abstractmethod
    def commit(self, holder: PoolProxiedConnection) -> None:
        """Pretend COMMIT."""

    @abstractmethod
    def rollback(self, holder: PoolProxiedConnection) -> None:
        """Pretend ROLLBACK."""

    @abstractmethod
    def execute(
        self,
        holder: PoolProxiedConnection,
        send: Callable[[], None],
        statement: str,
        parameters: object,
    ) -> None:
        """Send a statement of the application's."""

    @abstractmethod
    def autocommits(self) -> bool:
        """Tell the setting of who has got the connection last."""

    @abstractmethod
    def set_isolation_level(self, level: str) -> None:
        """Pretend an isolation level."""

    @abstractmethod
    def set_read_only(self, read_only: bool) -> None:
        """Have the next transaction read only."""

    @abstractmethod
    def refuse_two_phases(self) -> None:
        """Refuse what cannot be pretended."""


class StatementFault(Protocol):
    """Make one statement fail."""

    def on_statement(
        self, dialect: TestedDialect, connection: DBAPIConnection, statement: str
    ) -> None:
        """Raise, if this is the statement."""


class CommitFault(Protocol):
    """Make one COMMIT fail."""

    def on_commit(
        self, dialect: TestedDialect, connection: DBAPIConnection, commit: Callable[[], None]
    ) -> None:
        """Commit or not, and raise."""


class Tests:
    """Hold what tests have to say to one dialect.

    Attributes:
        outers: transactions around tests, the innermost last.
        statement_faults: failures of statements that are to come.
        commit_faults: failures of commits that are to come.
        losses: errors that stand for a lost connection.
    """

    __slots__ = ("commit_faults", "dialect_class", "losses", "outers", "statement_faults")

    def __init__(self, dialect_class: type[Dialect]) -> None:
        self.dialect_class = dialect_class
        self.outers: list[Outer] = []
        self.statement_faults: list[StatementFault] = []
        self.commit_faults: list[CommitFault] = []
        self.losses: list[BaseException] = []

    def __bool__(self) -> bool:
        return bool(self.outers or self.statement_faults or self.commit_faults)


class TestedDialect(DefaultDialect):
    """Stand in front of an engine's own dialect class, for the connections of a test."""

    __test__ = False  # its name is no invitation to pytest
    sqlnative_tests: Tests

    def outer_on(self, connection: PoolProxiedConnection | DBAPIConnection | None) -> Outer | None:
        """Return the test's transaction on a connection, if it carries one."""
        raw = raw_connection(connection)
        outers = self.sqlnative_tests.outers
        return next((each for each in reversed(outers) if each.dbapi_connection is raw), None)

    def do_begin(self, dbapi_connection: PoolProxiedConnection) -> None:
        outer = self.outer_on(dbapi_connection)
        if outer is None:
            cast("Any", super()).do_begin(dbapi_connection)
        else:
            outer.begin(dbapi_connection)

    def do_rollback(self, dbapi_connection: PoolProxiedConnection) -> None:
        outer = self.outer_on(dbapi_connection)
        if outer is None:
            cast("Any", super()).do_rollback(dbapi_connection)
        else:
            outer.rollback(dbapi_connection)

    def do_commit(self, dbapi_connection: PoolProxiedConnection) -> None:
        outer, raw = self.outer_on(dbapi_connection), raw_connection(dbapi_connection)
        own: Callable[..., None] = super().do_commit
        commit = functools.partial(own if outer is None else outer.commit, dbapi_connection)
        faults = self.sqlnative_tests.commit_faults
        if not faults or raw is None or _autocommits(dbapi_connection):
            commit()
            return
        try:
            faults.pop(0).on_commit(self, raw, commit)
        except BaseException as error:
            # A failed COMMIT has ended the transaction, and SQLAlchemy counts on that.
            if not self.is_disconnect(error, raw, None):
                self.do_rollback(dbapi_connection)
            raise

    def do_begin_twophase(self, connection: Connection, xid: Any) -> None:
        outer = self.outer_on(connection.connection)
        if outer is not None:
            outer.refuse_two_phases()
        super().do_begin_twophase(connection, xid)

    def do_execute(
        self, cursor: DBAPICursor, statement: str, parameters: Any, context: Any = None
    ) -> None:
        send = functools.partial(super().do_execute, cursor, statement, parameters, context)
        self._send(send, statement, parameters, context)

    def do_executemany(
        self, cursor: DBAPICursor, statement: str, parameters: Any, context: Any = None
    ) -> None:
        send = functools.partial(super().do_executemany, cursor, statement, parameters, context)
        self._send(send, statement, parameters, context)

    def do_execute_no_params(
        self, cursor: DBAPICursor, statement: str, context: Any = None
    ) -> None:
        send = functools.partial(super().do_execute_no_params, cursor, statement, context)
        self._send(send, statement, None, context)

    def _send(
        self, send: Callable[[], None], statement: str, parameters: object, context: Any
    ) -> None:
        holder: PoolProxiedConnection = context.root_connection.connection
        raw = raw_connection(holder)
        # What SQLAlchemy asks for itself, at the first connect, is in no transaction.
        if raw is not None and context.root_connection.in_transaction():
            for fault in tuple(self.sqlnative_tests.statement_faults):
                fault.on_statement(self, raw, statement)
        outer = self.outer_on(holder)
        if outer is None:
            send()
        else:
            outer.execute(holder, send, statement, parameters)

    def set_isolation_level(self, dbapi_connection: DBAPIConnection, level: Any) -> None:
        outer = self.outer_on(dbapi_connection)
        if outer is None:
            super().set_isolation_level(dbapi_connection, level)
        else:
            outer.set_isolation_level(level)

    def detect_autocommit_setting(self, dbapi_conn: DBAPIConnection) -> bool:
        outer = self.outer_on(dbapi_conn)
        if outer is not None:
            return outer.autocommits()
        own: bool = cast("Any", super()).detect_autocommit_setting(dbapi_conn)
        return own

    def set_readonly(self, connection: DBAPIConnection, value: bool) -> None:
        """Do what PostgreSQL's dialects do for `postgresql_readonly`."""
        outer = self.outer_on(connection)
        if outer is None:
            cast("Any", super()).set_readonly(connection, value)
        else:
            outer.set_read_only(value)

    def set_deferrable(self, connection: DBAPIConnection, value: bool) -> None:
        """Do what PostgreSQL's dialects do for `postgresql_deferrable`."""
        # It means something to serializable transactions alone, which a test's is not.
        if self.outer_on(connection) is None:
            cast("Any", super()).set_deferrable(connection, value)

    def do_ping(self, dbapi_connection: DBAPIConnection) -> bool:
        # psycopg's ping would leave the transaction.
        return self.outer_on(dbapi_connection) is not None or super().do_ping(dbapi_connection)

    # A connection that SQLAlchemy discards is the test's: it is rolled back when it is asked for
    # again.

    def do_close(self, dbapi_connection: DBAPIConnection) -> None:
        if self.outer_on(dbapi_connection) is None:
            cast("Any", super()).do_close(dbapi_connection)

    def do_terminate(self, dbapi_connection: DBAPIConnection) -> None:
        if self.outer_on(dbapi_connection) is None:
            cast("Any", super()).do_terminate(dbapi_connection)

    def is_disconnect(self, e: Any, connection: Any, cursor: Any) -> bool:
        lost = any(e is loss for loss in self.sqlnative_tests.losses)
        return lost or super().is_disconnect(e, connection, cursor)


def raw_connection(
    connection: PoolProxiedConnection | DBAPIConnection | None,
) -> DBAPIConnection | None:
    """Return what the driver (or SQLAlchemy's adapter of an async one) calls a connection."""
    return cast("DBAPIConnection | None", getattr(connection, "dbapi_connection", connection))


def _autocommits(holder: PoolProxiedConnection) -> bool:
    # A method on some drivers (PyMySQL), which is not the setting.
    own = getattr(holder.dbapi_connection, "autocommit", False) is True
    return own or bool(holder.info.get(AUTOCOMMITS))


def tested(dialect: Dialect) -> TestedDialect:
    """Give a dialect its ears for tests; `leave` takes them away."""
    if not isinstance(dialect, TestedDialect):
        own = type(dialect)
        _ = dialect.dispatch  # SQLAlchemy makes it for the class that it finds at first
        cast("Any", dialect).sqlnative_tests = Tests(own)
        # Every engine that shares the dialect and its pool, such as one with execution options,
        # has to notice. It is this very object that they share.
        cached = "supports_statement_cache"  # every class has to say so itself
        attributes = {cached: own.__dict__.get(cached)}
        cast("Any", dialect).__class__ = type(own.__name__, (TestedDialect, own), attributes)
    return cast("TestedDialect", dialect)


def leave(dialect: Dialect) -> None:
    """Make a dialect what it was, when no test has anything to say any more."""
    if isinstance(dialect, TestedDialect) and not dialect.sqlnative_tests:
        cast("Any", dialect).__class__ = dialect.sqlnative_tests.dialect_class
        del cast("Any", dialect).sqlnative_tests


def run(connection: DBAPIConnection, statements: Sequence[str]) -> None:
    """Send statements of the test's own, which the application's listeners don't hear of."""
    cursor = connection.cursor()
    try:
        for statement in statements:
            cursor.execute(statement)
    finally:
        cursor.close()


def ask(connection: DBAPIConnection, query: str) -> Sequence[Any]:
    """Return the rows of a query of the test's own."""
    cursor = connection.cursor()
    try:
        cursor.execute(query)
        return cursor.fetchall()
    finally:
        cursor.close()
