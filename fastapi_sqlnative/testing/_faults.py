"""Failures of a database, made by the database where it can be asked to, and by its driver.

Nothing of SQLAlchemy's is replaced by a fake: a statement or COMMIT really fails, on its
connection, with what the driver in use raises, and SQLAlchemy wraps it and discards the
connection as in production.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from sqlalchemy import Engine, Pool, exc
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import PoolProxiedConnection

from .._pools import ask_pool, max_overflow, pool_timeout
from .._registry import trimmed
from ._dialect import TestedDialect, leave, run, tested
from ._targets import Target, engine_named

StatementFailure: TypeAlias = Literal["serialization", "deadlock", "connection_lost"]
CommitFailure: TypeAlias = Literal[
    "serialization", "deadlock", "connection_lost_before", "connection_lost_after"
]

_POSTGRES: Final = (
    "DO $$BEGIN RAISE EXCEPTION 'made to fail by a test' USING ERRCODE = '{code}'; END$$"
)
_MYSQL: Final = (
    "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = 'made to fail by a test'"
)
# How each server is asked to fail, with the codes that it has for it.
_FAILING: Final = {
    "postgresql": (_POSTGRES, {"serialization": "40001", "deadlock": "40P01"}),
    "mysql": (_MYSQL, {"serialization": "1020", "deadlock": "1213"}),
    "mariadb": (_MYSQL, {"serialization": "1020", "deadlock": "1213"}),
}
# How each server is asked to hang up.
_HANGING_UP: Final = {
    "postgresql": "SELECT pg_terminate_backend(pg_backend_pid())",
    "mysql": "KILL CONNECTION_ID()",
    "mariadb": "KILL CONNECTION_ID()",
}


@contextmanager
def fail_next_statement(
    target: Target, failure: StatementFailure, *, name: str = "default", containing: str = ""
) -> Generator[None]:
    """Have one statement of a database fail, once, within a block.

    It is the next one that the application sends, whatever sends it. Serialization failures and
    deadlocks abort the transaction, as the server's own do; a lost connection is really lost,
    unless it carries an `isolated` transaction: that one outlasts it, as the database would.

    Args:
        target: an application while it runs (before, if its engine is ready), a handle or an
            engine.
        failure: SQLite knows no deadlock, and its serialization failure is SQLITE_BUSY_SNAPSHOT.
        name: of the application's database.
        containing: what stands in the statement's SQL, for one that is not the next.

    Raises:
        ValueError: a failure that the database does not have.
        AssertionError: at the end, if no such statement was sent.

    Example:
        with fail_next_statement(app, "deadlock", containing="UPDATE account"):
            assert client.post("/transfers", json=transfer).status_code == 201
    """
    engine = engine_named(target, trimmed(name))
    _check(engine, failure, get_args(StatementFailure))
    fault = _Statement(failure, containing)
    faults = tested(engine.dialect).sqlnative_tests.statement_faults
    with _pending(engine, faults, fault):
        yield
    if not fault.hit:
        wanted = f" containing {containing!r}" if containing else ""
        raise AssertionError(
            f"No statement{wanted} was sent to database {_shown(target, name)} within the block: "
            f"the {failure} failure was never hit."
        )


@contextmanager
def fail_next_commit(
    target: Target, failure: CommitFailure, *, name: str = "default"
) -> Generator[None]:
    """Have one COMMIT of a database fail, once, within a block.

    After `serialization`, `deadlock` and `connection_lost_before` nothing of the transaction is
    stored. After `connection_lost_after` all of it is, and the application cannot know: in both
    cases of a lost connection the package raises `CommitOutcomeUnknownError`.

    Args:
        target: as for `fail_next_statement`.
        failure: as for `fail_next_statement`.
        name: of the application's database.

    Raises:
        ValueError: a failure that the database does not have.
        AssertionError: at the end, if nothing was committed.

    Example:
        with fail_next_commit(app, "connection_lost_after"), pytest.raises(
            CommitOutcomeUnknownError
        ):
            client.post("/books", json={"title": "Emma"})
    """
    engine = engine_named(target, trimmed(name))
    _check(engine, failure, get_args(CommitFailure))
    fault = _Commit(failure)
    with _pending(engine, tested(engine.dialect).sqlnative_tests.commit_faults, fault):
        yield
    if not fault.hit:
        raise AssertionError(
            f"Nothing was committed on database {_shown(target, name)} within the block: the "
            f"{failure} failure was never hit."
        )


@contextmanager
def fail_next_checkout(target: Target, *, name: str = "default") -> Generator[None]:
    """Have one checkout find the pool exhausted, once, within a block, without the wait.

    It is SQLAlchemy's own `sqlalchemy.exc.TimeoutError`.

    Args:
        target: as for `fail_next_statement`.
        name: of the application's database.

    Raises:
        AssertionError: at the end, if nobody has asked for a connection.

    Example:
        with fail_next_checkout(app):
            assert client.get("/books").status_code == 503
    """
    engine = engine_named(target, trimmed(name))
    pool: Any = engine.pool
    own = type(engine.pool)
    pool.__class__ = type(own.__name__, (ExhaustedPool, own), {})
    pool.sqlnative_own = own
    try:
        yield
    finally:
        hit = pool.__class__ is own
        pool.__class__ = own
    if not hit:
        raise AssertionError(
            f"Nobody asked database {_shown(target, name)} for a connection within the block: the "
            "exhausted pool was never hit."
        )


class ExhaustedPool(Pool):
    """Stand in front of an engine's own pool class until somebody asks it for a connection."""

    sqlnative_own: type[Pool]

    def connect(self) -> PoolProxiedConnection:
        """Fail as the pool does when its time is up, and be the pool again."""
        cast("Any", self).__class__ = self.sqlnative_own
        raise exc.TimeoutError(
            f"{type(self).__name__} limit of size {ask_pool(self, 'size')} overflow "
            f"{max_overflow(self)} reached, connection timed out, timeout "
            f"{pool_timeout(self):.2f}",
            code="3o7r",
        )


class _Statement:
    """Make one statement fail."""

    def __init__(self, failure: str, containing: str) -> None:
        self.hit = False
        self._failure = failure
        self._containing = containing

    def on_statement(
        self, dialect: TestedDialect, connection: DBAPIConnection, statement: str
    ) -> None:
        if self._containing in statement:
            self.hit = True
            dialect.sqlnative_tests.statement_faults.remove(self)
            raise _failure(dialect, connection, self._failure)


class _Commit:
    """Make one COMMIT fail."""

    def __init__(self, failure: str) -> None:
        self.hit = False
        self._failure = failure

    def on_commit(
        self, dialect: TestedDialect, connection: DBAPIConnection, commit: Callable[[], None]
    ) -> None:
        self.hit = True
        if self._failure == "connection_lost_after":
            commit()
        raise _failure(dialect, connection, self._failure)


@contextmanager
def _pending(engine: Engine, faults: list[Any], fault: object) -> Generator[None]:
    faults.append(fault)
    try:
        yield
    finally:
        if fault in faults:
            faults.remove(fault)
        leave(engine.dialect)


def _check(engine: Engine, failure: str, known: tuple[str, ...]) -> None:
    if failure not in known:
        raise ValueError(f"{failure!r} is no such failure: write one of {', '.join(known)}.")
    if engine.dialect.name not in (*_FAILING, "sqlite"):
        raise ValueError(
            f"How {engine.dialect.name} is made to fail is not known: PostgreSQL, MySQL, MariaDB "
            "and SQLite are."
        )
    if engine.dialect.name == "sqlite" and failure == "deadlock":
        raise ValueError("SQLite knows no deadlock: 'serialization' is what it reports.")


def _shown(target: Target, name: str) -> str:
    return repr(getattr(target, "name", trimmed(name)))


# -- failing -----------------------------------------------------------------------------------


def _failure(dialect: TestedDialect, connection: DBAPIConnection, failure: str) -> Exception:
    """Have the server fail on a connection, and return what the driver raises."""
    if failure.startswith("connection_lost"):
        error = _loss(dialect, connection)
        dialect.sqlnative_tests.losses.append(error)
        return error
    if dialect.name == "sqlite":
        # There is no server to ask. This is what its driver raises for SQLITE_BUSY_SNAPSHOT.
        busy = cast("Any", dialect.loaded_dbapi.OperationalError("database is locked"))
        busy.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
        busy.sqlite_errorname = "SQLITE_BUSY_SNAPSHOT"
        return cast("Exception", busy)
    statement, codes = _FAILING[dialect.name]
    return _provoked(dialect, connection, statement.format(code=codes[failure]))


def _loss(dialect: TestedDialect, connection: DBAPIConnection) -> Exception:
    if dialect.name == "sqlite":
        # What both drivers raise once a connection is closed under them.
        return cast(
            "Exception",
            dialect.loaded_dbapi.ProgrammingError("Cannot operate on a closed database."),
        )
    outer = dialect.outer_on(connection)
    if outer is None:
        return _provoked(dialect, connection, *_hanging_up(dialect))
    # The error of another connection: this one is to outlast the loss.
    pool = outer.root_pool.recreate()
    spare = pool.connect()
    try:
        raw = spare.dbapi_connection
        assert raw is not None
        return _provoked(dialect, raw, *_hanging_up(dialect))
    finally:
        spare.invalidate()
        pool.dispose()


def _hanging_up(dialect: TestedDialect) -> tuple[str, ...]:
    # MySQL answers once more before it hangs up.
    return _HANGING_UP[dialect.name], "SELECT 1", "SELECT 1"


def _provoked(dialect: TestedDialect, connection: DBAPIConnection, *statements: str) -> Exception:
    found: Exception | None = None
    for statement in statements:
        try:
            run(connection, [statement])
        except Exception as error:  # noqa: BLE001 - whatever the driver has for it
            found = error
            if dialect.is_disconnect(error, connection, None):
                break
    assert found is not None, f"the database did not fail: {statements[0]}"
    return found
