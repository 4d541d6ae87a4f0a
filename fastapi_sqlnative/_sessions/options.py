"""What a transaction asks of the server, and how each database is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection

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
    """Hold what a transaction asks of the server, for any database."""

    isolation_level: str | None = None
    read_only: bool = False

    @classmethod
    def checked(cls, isolation_level: IsolationLevel | None, read_only: bool) -> TransactionOptions:
        """Build options from what a user wrote.

        Raises:
            ValueError: the isolation level is not one of the standard's four.
        """
        if isolation_level is None:
            return cls(None, read_only)
        if isolation_level not in get_args(IsolationLevel):
            raise ValueError(
                f"{isolation_level!r} is not an isolation level: write one of "
                f"{', '.join(get_args(IsolationLevel))}. For reads in AUTOCOMMIT depend on "
                "reader(name)."
            )
        return cls(isolation_level, read_only)

    def __str__(self) -> str:
        return f"isolation_level={self.isolation_level!r}, read_only={self.read_only!r}"

    def lacking_in(self, dialect: Dialect) -> str | None:
        """Say what is asked for and the database does not have."""
        if self.read_only and dialect.name not in _READ_ONLY:
            return "no read-only transactions that fastapi-sqlnative knows of: leave read_only out"
        levels = _isolation_levels(dialect)
        if self.isolation_level is None or self.isolation_level in levels:
            return None
        known = ", ".join(level for level in get_args(IsolationLevel) if level in levels)
        return f"no isolation level {self.isolation_level!r}: choose one of {known}"

    def execution_options(self, dialect: Dialect) -> dict[str, Any]:
        """Translate to what the engine sets on a connection and resets when it goes back."""
        options: dict[str, Any] = {}
        if self.isolation_level is not None:
            options["isolation_level"] = self.isolation_level
        if self.read_only and dialect.name == "postgresql":
            options["postgresql_readonly"] = True
        return options


def _isolation_levels(dialect: Dialect) -> Sequence[str]:
    # SQLAlchemy would look only when it has a connection, and an async one is lost to the pool
    # then. No dialect looks at the connection that it is asked to pass.
    return dialect.get_isolation_level_values(cast("DBAPIConnection", None))


NO_OPTIONS: Final = TransactionOptions()
AUTOCOMMIT: Final = TransactionOptions(isolation_level="AUTOCOMMIT")


def engine_with(engine: Engine, options: TransactionOptions) -> Engine:
    """Return an engine that shares the pool of this one, and sets the options."""
    optional = engine.execution_options(**options.execution_options(engine.dialect))
    if options.read_only and engine.dialect.name == "sqlite":
        event.listen(optional, "commit", _unset_read_only)
        event.listen(optional, "rollback", _unset_read_only)
    return optional


def begin_with(connection: Connection, options: TransactionOptions) -> None:
    """Tell the server, as the transaction begins, what the engine cannot set."""
    if not options.read_only:
        return
    statement = _READ_ONLY[connection.dialect.name]
    if statement is not None:
        connection.exec_driver_sql(statement)


def _unset_read_only(connection: Connection) -> None:
    # SQLite's pragma belongs to the connection, not to the transaction.
    cursor = connection.connection.cursor()
    cursor.execute("PRAGMA query_only = OFF")
    cursor.close()
