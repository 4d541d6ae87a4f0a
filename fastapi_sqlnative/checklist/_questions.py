"""What the checklist asks of a database, and when it warns."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import Connection, Pool, QueuePool, text

from .._drivers import connections
from .._drivers.pools import pre_pings

# Requests wait as long for a connection of SQLAlchemy's pool, unless told otherwise; in seconds.
_LONGEST_CONNECT: Final = 30.0
_LOCAL: Final = ("/", "127.", "localhost", "::1")


class Answer(NamedTuple):
    """What a database has said, and whether it is well so."""

    detail: str
    fine: bool


@dataclass(frozen=True)
class Asked:
    """One connection of an application's, made as the application makes them."""

    connection: Connection
    pool: Pool
    parameters: Mapping[str, Any]
    autocommits: bool

    def value(self, query: str) -> Any:
        """Return the first column of the only row."""
        return self.connection.scalar(text(query))


# What is of no use for this engine is `None`.
Ask: TypeAlias = Callable[[Asked], Answer | None]
Questions: TypeAlias = dict[str, Ask]


def _value(query: str, fine: Set[str]) -> Ask:
    def ask(asked: Asked) -> Answer:
        detail = str(asked.value(query))
        return Answer(detail, detail in fine)

    return ask


def _limit(query: str) -> Ask:
    """Ask for a time limit, of which 0 means that there is none."""

    def ask(asked: Asked) -> Answer:
        found = str(asked.value(query))
        missing = found.strip("0.") == ""
        return Answer("none" if missing else found, not missing)

    return ask


def _version(asked: Asked) -> Answer:
    dialect = asked.connection.dialect
    version = dialect.server_version_info or ()
    detail = ".".join(map(str, version))
    if dialect.name != "postgresql" or not version:
        return Answer(detail, fine=True)
    # A major version gets fixes for five years from the autumn of 2007 + its number, since 10.
    end = datetime.date(2012 + int(version[0]), 11, 30)
    if end > datetime.datetime.now(datetime.UTC).date():
        return Answer(detail, fine=True)
    return Answer(f"{detail}, which gets no more fixes since {end:%B %Y}", fine=False)


def _connect_timeout(asked: Asked) -> Answer:
    seconds = connections.connect_timeout(asked.connection, asked.parameters)
    detail = "none" if seconds is None else f"{seconds:g} s"
    return Answer(detail, seconds is not None and seconds <= _LONGEST_CONNECT)


def _pre_ping(asked: Asked) -> Answer | None:
    on = pre_pings(asked.pool) if isinstance(asked.pool, QueuePool) else None
    return None if on is None else Answer("on" if on else "off", on)


def _transactions(asked: Asked) -> Answer:
    return Answer("AUTOCOMMIT" if asked.autocommits else "begun", not asked.autocommits)


def _tls(asked: Asked) -> Answer:
    encrypted = connections.encrypts(asked.connection)
    if encrypted is None and not pooler_in_between(asked):
        encrypted = bool(asked.value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))
    return _judge_tls(asked, encrypted)


def _mysql_tls(asked: Asked) -> Answer:
    row = asked.connection.execute(text("SHOW SESSION STATUS LIKE 'Ssl_cipher'")).one()
    return _judge_tls(asked, bool(row[1]))


def _judge_tls(asked: Asked, encrypted: bool | None) -> Answer:
    hosts = str(asked.parameters.get("host") or "/").split(",")
    if all(host.startswith(_LOCAL) for host in hosts):
        return Answer("not needed, the server is on this machine", fine=True)
    if connections.verifies_server(asked.parameters):
        return Answer("on", fine=True)
    believing = "on, and any server is believed" if encrypted else "any server is believed"
    return Answer("off" if encrypted is False else believing, fine=False)


def pooler_in_between(asked: Asked) -> bool:
    """Tell whether something that keeps connections, such as PgBouncer, is in between.

    It tells its clients of a process of its own making, as it may not have one of the server's.
    """
    told = connections.server_process(asked.connection)  # of PostgreSQL alone
    return told is not None and told != asked.value("SELECT pg_backend_pid()")


def _pooler(asked: Asked) -> Answer:
    if not pooler_in_between(asked):
        return Answer("none in between", fine=True)
    if connections.prepares_statements(asked.connection, asked.parameters):
        return Answer("in between, and statements are prepared", fine=False)
    return Answer("in between, and no statements are prepared", fine=True)


def _mysql_role(asked: Asked) -> Answer:
    grants = " ".join(asked.connection.scalars(text("SHOW GRANTS")))
    every = "ALL PRIVILEGES ON *.*" in grants or "SUPER" in grants
    return Answer("may do everything" if every else "ordinary", not every)


_ROLE: Final = """
SELECT CASE
    WHEN rolsuper THEN 'superuser'
    WHEN rolbypassrls THEN 'bypasses row-level security'
    WHEN EXISTS (
        SELECT FROM pg_class WHERE relrowsecurity AND NOT relforcerowsecurity
        AND pg_has_role(relowner, 'USAGE')
    ) THEN 'owns tables whose row-level security is not forced on their owner'
    ELSE 'ordinary'
END FROM pg_roles WHERE rolname = current_user
"""
_WRITES: Final = """
SELECT CASE
    WHEN pg_is_in_recovery() THEN 'standby'
    WHEN current_setting('default_transaction_read_only') = 'on' THEN 'read only'
    ELSE 'writable'
END
"""
_OF_ANY_SERVER: Final[Questions] = {
    "server version": _version,
    "connect timeout": _connect_timeout,
    "pre-ping": _pre_ping,
    "transactions": _transactions,
}
_MYSQL: Final[Questions] = _OF_ANY_SERVER | {
    "TLS": _mysql_tls,
    "role": _mysql_role,
    "writes": _value("SELECT IF(@@global.read_only, 'read only', 'writable')", {"writable"}),
}
# By the name of SQLAlchemy's dialect; what is not here has rows of any server only.
QUESTIONS: Final[Mapping[str, Questions]] = {
    "postgresql": _OF_ANY_SERVER
    | {
        "statement timeout": _limit("SHOW statement_timeout"),
        "lock timeout": _limit("SHOW lock_timeout"),
        "idle in transaction": _limit("SHOW idle_in_transaction_session_timeout"),
        "TLS": _tls,
        "role": _value(_ROLE, {"ordinary"}),
        "writes": _value(_WRITES, {"writable"}),
        "pooler": _pooler,
    },
    "mysql": _MYSQL | {"statement timeout": _limit("SELECT @@max_execution_time")},
    "mariadb": _MYSQL
    | {
        "statement timeout": _limit("SELECT @@max_statement_time"),
        "idle in transaction": _limit("SELECT @@idle_transaction_timeout"),
    },
    "sqlite": {
        "server version": _version,
        "journal mode": _value("PRAGMA journal_mode", {"wal", "memory"}),
        "foreign keys": _value("PRAGMA foreign_keys", {"1"}),
        "busy timeout": _limit("PRAGMA busy_timeout"),
    },
}


def questions_for(dialect: str) -> Questions:
    """Return what is to be asked of a database, by subject."""
    return QUESTIONS.get(dialect, _OF_ANY_SERVER)
