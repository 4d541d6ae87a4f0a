"""Transaction options, and how each database sets them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Self, TypeAlias, cast, get_args

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection

from .._drivers.transactions import fetch_row
from ..exceptions import TransactionOptionsError

IsolationLevel: TypeAlias = Literal[
    "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"
]
_READ_ONLY: Final = {
    "postgresql": "SET TRANSACTION READ ONLY",
    "mysql": "SET TRANSACTION READ ONLY",
    "mariadb": "SET TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = ON",
}


@dataclass(frozen=True, slots=True)
class TransactionOptions:
    """The options of a transaction, for any database."""

    isolation_level: str | None = None
    read_only: bool = False

    @classmethod
    def checked(cls, isolation_level: IsolationLevel | None, read_only: bool) -> Self:
        known = get_args(IsolationLevel)
        if isolation_level is not None and isolation_level not in known:
            raise ValueError(
                f"{isolation_level!r} is not an isolation level: use one of {', '.join(known)}. "
                "For reads in AUTOCOMMIT depend on reader(name)."
            )
        return cls(isolation_level, read_only)

    def __str__(self) -> str:
        return f"isolation_level={self.isolation_level!r}, read_only={self.read_only!r}"

    def given_to(self, dialect: Dialect) -> dict[str, Any]:
        """Return them as SQLAlchemy's execution options, as far as it has them."""
        given: dict[str, Any] = {}
        if self.isolation_level is not None:
            given["isolation_level"] = self.isolation_level
        if self.read_only and dialect.name == "postgresql":
            given["postgresql_readonly"] = True
        return given

    def check_known_to(self, dialect: Dialect, name: str) -> None:
        """Refuse options that the dialect doesn't support, before anything is sent."""
        # SQLAlchemy checks only after checkout, and the pool then loses an async connection.
        # All dialects ignore the connection argument, so None will do.
        levels = dialect.get_isolation_level_values(cast("DBAPIConnection", None))
        if self.read_only and dialect.name not in _READ_ONLY:
            lacking = "read-only transactions that fastapi-sqlnative can use: leave read_only out"
        elif self.isolation_level not in (None, *levels):
            known = ", ".join(level for level in get_args(IsolationLevel) if level in levels)
            lacking = f"isolation level {self.isolation_level!r}: choose one of {known}"
        else:
            return
        raise TransactionOptionsError(
            f"Database {name!r} ({dialect.name}+{dialect.driver}) has no {lacking}."
        )


NO_OPTIONS: Final = TransactionOptions()
AUTOCOMMIT: Final = TransactionOptions(isolation_level="AUTOCOMMIT")


def engine_with(engine: Engine, options: TransactionOptions) -> Engine:
    """Return an engine that shares this one's pool and sets the options."""
    optional = engine.execution_options()
    if given := options.given_to(engine.dialect):
        # Not as the engine's own options: where setting one fails, as on a connection that was
        # lost, SQLAlchemy keeps the connection in use until Python collects it.
        event.listen(optional, "engine_connect", partial(_set_options, given))
    if options.read_only and engine.dialect.name == "sqlite":
        event.listen(optional, "commit", _unset_read_only)
        event.listen(optional, "rollback", _unset_read_only)
    return optional


def _set_options(given: Mapping[str, Any], connection: Connection) -> None:
    try:
        connection.execution_options(**given)
    except BaseException:
        connection.invalidate()
        connection.close()
        raise


def begin_with(connection: Connection, options: TransactionOptions) -> None:
    """Set options that the engine has not set, at the beginning of a transaction."""
    # PostgreSQL's takes an execution option, but not for a savepoint in another's transaction.
    by_engine = connection.dialect.name == "postgresql" and not connection.in_nested_transaction()
    if options.read_only and not by_engine:
        connection.exec_driver_sql(_READ_ONLY[connection.dialect.name])


def _unset_read_only(connection: Connection) -> None:
    # SQLite's pragma is set for the connection, not for the transaction.
    fetch_row(connection, "PRAGMA query_only = OFF")
