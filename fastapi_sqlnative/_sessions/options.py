"""What a transaction asks of the server, and how each database is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection

from ..exceptions import TransactionOptionsError

IsolationLevel: TypeAlias = Literal[
    "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"
]
# PostgreSQL takes an execution option instead, and resets it when the connection goes back.
_READ_ONLY: Final[Mapping[str, str | None]] = {
    "postgresql": None,
    "mysql": "SET TRANSACTION READ ONLY",
    "mariadb": "SET TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = ON",
}


@dataclass(frozen=True, slots=True)
class TransactionOptions:
    """What a transaction asks of the server, for any database."""

    isolation_level: str | None = None
    read_only: bool = False

    @classmethod
    def checked(cls, isolation_level: IsolationLevel | None, read_only: bool) -> TransactionOptions:
        """Build options from what a user wrote.

        Raises:
            ValueError: the isolation level is not one of the standard's four.
        """
        known = get_args(IsolationLevel)
        if isolation_level is not None and isolation_level not in known:
            raise ValueError(
                f"{isolation_level!r} is not an isolation level: write one of {', '.join(known)}. "
                "For reads in AUTOCOMMIT depend on reader(name)."
            )
        return cls(isolation_level, read_only)

    def __str__(self) -> str:
        return f"isolation_level={self.isolation_level!r}, read_only={self.read_only!r}"

    def check_known_to(self, dialect: Dialect, name: str) -> None:
        """Refuse what the database of this name does not have, before anything is sent to it."""
        # SQLAlchemy would look only when it has a connection, and an async one is lost to the pool
        # then. No dialect looks at the connection that it is asked to pass.
        levels = dialect.get_isolation_level_values(cast("DBAPIConnection", None))
        if self.read_only and dialect.name not in _READ_ONLY:
            lacking = "read-only transactions that fastapi-sqlnative knows of: leave read_only out"
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
    """Return an engine that shares the pool of this one, and sets the options."""
    given: dict[str, Any] = {}
    if options.isolation_level is not None:
        given["isolation_level"] = options.isolation_level
    if options.read_only and engine.dialect.name == "postgresql":
        given["postgresql_readonly"] = True
    optional = engine.execution_options(**given)
    if options.read_only and engine.dialect.name == "sqlite":
        event.listen(optional, "commit", _unset_read_only)
        event.listen(optional, "rollback", _unset_read_only)
    return optional


def begin_with(connection: Connection, options: TransactionOptions) -> None:
    """Tell the server, as the transaction begins, what the engine cannot set."""
    statement = _READ_ONLY[connection.dialect.name] if options.read_only else None
    if statement is not None:
        connection.exec_driver_sql(statement)


def _unset_read_only(connection: Connection) -> None:
    # SQLite's pragma belongs to the connection, not to the transaction.
    cursor = connection.connection.cursor()
    cursor.execute("PRAGMA query_only = OFF")
    cursor.close()
