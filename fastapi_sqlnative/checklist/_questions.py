"""What the checklist asks of a database, and when it warns."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import Connection, Pool, QueuePool, text

from .._drivers import connections
from .._drivers.pools import pool_capacity, pre_pings
from .._probe import WRITES

# Requests wait as long for a connection of SQLAlchemy's pool, unless told otherwise; in seconds.
_LONGEST_CONNECT: Final = 30.0
_LOCAL: Final = ("/", "127.", "localhost", "::1")


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


# What was found, and whether it is well so; `None` is of no use for this engine.
Answer: TypeAlias = tuple[str, bool]
Ask: TypeAlias = Callable[[Asked], Answer | None]
Questions: TypeAlias = dict[str, Ask]


def _value(query: str, fine: Set[str]) -> Ask:
    def ask(asked: Asked) -> Answer:
        found = str(asked.value(query))
        return found, found in fine

    return ask


def _limit(query: str) -> Ask:
    """Ask for a time limit, of which 0 means that there is none."""

    def ask(asked: Asked) -> Answer:
        found = str(asked.value(query))
        return (found, True) if found.strip("0.") else ("none", False)

    return ask


def _version(asked: Asked) -> Answer:
    dialect = asked.connection.dialect
    version = dialect.server_version_info or ()
    detail = ".".join(map(str, version))
    if dialect.name == "postgresql" and version:
        # A major version gets fixes for five years from the autumn of 2007 + its number, since 10.
        end = datetime.date(2012 + int(version[0]), 11, 30)
        if end <= datetime.datetime.now(datetime.UTC).date():
            return f"{detail}, which gets no more fixes since {end:%B %Y}", False
    return detail, True


def _connect_timeout(asked: Asked) -> Answer:
    seconds = connections.connect_timeout(asked.connection, asked.parameters)
    if seconds is None:
        return "none", False
    return f"{seconds:g} s", seconds <= _LONGEST_CONNECT


def _pre_ping(asked: Asked) -> Answer | None:
    on = pre_pings(asked.pool) if isinstance(asked.pool, QueuePool) else None
    return None if on is None else ("on" if on else "off", on)


def _transactions(asked: Asked) -> Answer:
    return "AUTOCOMMIT" if asked.autocommits else "begun", not asked.autocommits


def _tls(asked: Asked) -> Answer:
    hosts = str(asked.parameters.get("host") or "/").split(",")
    if all(host.startswith(_LOCAL) for host in hosts):
        return "not needed, the server is on this machine", True
    if connections.verifies_server(asked.parameters):
        return "on", True
    encrypted = _is_encrypted(asked)
    if encrypted is False:
        return "off", False
    return "on, and any server is believed" if encrypted else "any server is believed", False


def _is_encrypted(asked: Asked) -> bool | None:
    if asked.connection.dialect.name != "postgresql":
        found = asked.connection.execute(text("SHOW SESSION STATUS LIKE 'Ssl_cipher'")).one()
        return bool(found[1])
    told = connections.encrypts(asked.connection)
    if told is None and not _is_pooled(asked):
        told = bool(asked.value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))
    return told


def _is_pooled(asked: Asked) -> bool:
    """Return whether something that keeps connections, such as PgBouncer, is in between.

    It tells its clients of a process of its own making, as it may not have one of the server's.
    """
    told = connections.server_process(asked.connection)  # of PostgreSQL alone
    return told is not None and told != asked.value("SELECT pg_backend_pid()")


def _pooler(asked: Asked) -> Answer:
    if not _is_pooled(asked):
        return "none in between", True
    if connections.prepares_statements(asked.connection, asked.parameters):
        return "in between, and statements are prepared", False
    return "in between, and no statements are prepared", True


def _mysql_role(asked: Asked) -> Answer:
    grants = " ".join(asked.connection.scalars(text("SHOW GRANTS")))
    every = "ALL PRIVILEGES ON *.*" in grants or "SUPER" in grants
    return "may do everything" if every else "ordinary", not every


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
OF_ANY_SERVER: Final[Questions] = {
    "server version": _version,
    "connect timeout": _connect_timeout,
    "pre-ping": _pre_ping,
    "transactions": _transactions,
}
_MYSQL: Final[Questions] = OF_ANY_SERVER | {
    "TLS": _tls,
    "role": _mysql_role,
    "writes": _value(WRITES["mysql"], {"writable"}),
}
# By the name of SQLAlchemy's dialect; what is not here has rows of any server only.
QUESTIONS: Final[Mapping[str, Questions]] = {
    "postgresql": OF_ANY_SERVER
    | {
        "statement timeout": _limit("SHOW statement_timeout"),
        "lock timeout": _limit("SHOW lock_timeout"),
        "idle in transaction": _limit("SHOW idle_in_transaction_session_timeout"),
        "TLS": _tls,
        "role": _value(_ROLE, {"ordinary"}),
        "writes": _value(WRITES["postgresql"], {"writable"}),
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


# -- connections, which the pools on one server share ----------------------------------------

# In one row: whose server it is, what it offers to this role, its limit, and who it is here. Then
# who uses how many.
_POSTGRESQL_ROOM: Final = (
    """
SELECT pg_postmaster_start_time()::text || ' ' || current_setting('port'),
    current_setting('max_connections')::int - CASE WHEN rolsuper THEN 0 ELSE
        current_setting('superuser_reserved_connections')::int
        + coalesce(current_setting('reserved_connections', true), '0')::int END,
    least(nullif(rolconnlimit, -1), nullif(datconnlimit, -1),
        current_setting('max_connections')::int),
    rolname || '@' || datname
FROM pg_roles, pg_database WHERE rolname = current_user AND datname = current_database()
""",
    """
SELECT usename || '@' || datname, count(*) FROM pg_stat_activity
WHERE usename IS NOT NULL AND datname IS NOT NULL
    AND coalesce(backend_type, 'client backend') = 'client backend' GROUP BY 1
""",
)
_MYSQL_ROOM: Final = (
    """
SELECT concat(@@hostname, ':', @@port), @@max_connections,
    coalesce(nullif(@@max_user_connections, 0), @@max_connections),
    concat(substring_index(current_user(), '@', 1), '@', coalesce(database(), ''))
""",
    """
SELECT concat(user, '@', coalesce(db, '')), count(*) FROM information_schema.processlist
WHERE user NOT IN ('system user', 'event_scheduler') GROUP BY 1
""",
)
_ROOMS: Final = {"postgresql": _POSTGRESQL_ROOM, "mysql": _MYSQL_ROOM, "mariadb": _MYSQL_ROOM}


class Room(NamedTuple):
    """What a server offers to one of the application's pools."""

    server: str
    offered: int
    limit: int
    owner: str
    in_use: Mapping[str, int]
    pool: Pool


def read_room(asked: Asked) -> Room | None:
    """Ask a server for how many connections it has; `None` where nobody counts them."""
    queries = _ROOMS.get(asked.connection.dialect.name)
    if queries is None or _is_pooled(asked):
        return None
    answers: Any = (asked.connection.execute(text(query)).all() for query in queries)
    ((server, offered, limit, owner),), in_use = answers
    return Room(server, offered, limit, owner, dict(in_use), asked.pool)


def compare(rooms: Iterable[Room], processes: int) -> Answer:
    """Compare the pools of all processes with the server that they share."""
    rooms = list(rooms)
    capacities = [pool_capacity(pool) for pool in {room.pool for room in rooms}]
    known = [each + 1 for each in capacities if each is not None]  # readiness asks beside a pool
    if len(known) < len(capacities):
        return "a pool has no limit", False
    needed, first = processes * sum(known), rooms[0]
    # Whoever logs in as this application is one of its processes, which are counted already.
    limits = {each.owner: each.limit for each in rooms}
    others = sum(count for who, count in first.in_use.items() if who not in limits)
    offered = min(first.offered - others, sum(limits.values()))
    return f"{needed} wanted by {processes} process(es), {offered} to be had", needed <= offered
