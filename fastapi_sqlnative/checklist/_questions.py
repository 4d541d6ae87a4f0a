"""The questions of the checklist, and when they warn."""

import datetime
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import Connection, Pool, QueuePool, text

from .._drivers import connections
from .._drivers.pools import pool_capacity, pre_pings
from .._probe import WRITES

# In seconds; the default for which requests wait for a connection of SQLAlchemy's pool.
_LONGEST_CONNECT: Final = 30.0
_LOCAL: Final = ("/", "127.", "localhost", "::1")


@dataclass(frozen=True)
class Asked:
    """A connection made as the application makes its own."""

    connection: Connection
    pool: Pool
    parameters: Mapping[str, Any]
    autocommits: bool

    def value(self, query: str) -> Any:
        """Return the first column of the only row."""
        return self.connection.scalar(text(query))


# The detail, and whether it is fine. An `Ask` returns `None` if it doesn't apply to the engine.
Answer: TypeAlias = tuple[str, bool]
Ask: TypeAlias = Callable[[Asked], Answer | None]
Questions: TypeAlias = dict[str, Ask]


def _value(query: str, fine: Set[str]) -> Ask:
    def ask(asked: Asked) -> Answer:
        found = str(asked.value(query))
        return found, found in fine

    return ask


def _limit(query: str) -> Ask:
    """Ask for a time limit, where 0 means none."""

    def ask(asked: Asked) -> Answer:
        found = str(asked.value(query))
        return (found, True) if found.strip("0.") else ("none", False)

    return ask


def _version(asked: Asked) -> Answer:
    dialect = asked.connection.dialect
    version = dialect.server_version_info or ()
    detail = ".".join(map(str, version))
    if dialect.name == "postgresql" and version:
        # From 10 on, version N is released in the autumn of 2007 + N and supported for five years.
        end = datetime.date(2012 + int(version[0]), 11, 30)
        if end <= datetime.datetime.now(datetime.UTC).date():
            return f"{detail}, which has had no fixes since {end:%B %Y}", False
    return detail, True


def _connect_timeout(asked: Asked) -> Answer:
    seconds = connections.connect_timeout(asked.connection, asked.parameters)
    if seconds is None:
        return "none given", False
    return f"{seconds:g} s", seconds <= _LONGEST_CONNECT


def _pre_ping(asked: Asked) -> Answer | None:
    on = pre_pings(asked.pool) if isinstance(asked.pool, QueuePool) else None
    return None if on is None else ("on" if on else "off", on)


def _transactions(asked: Asked) -> Answer:
    return "AUTOCOMMIT" if asked.autocommits else "begun", not asked.autocommits


def _tls(asked: Asked) -> Answer:
    if _is_local(asked):
        return "not needed, the server is on this machine", True
    if connections.verifies_server(asked.parameters):
        return "on", True
    encrypted = _is_encrypted(asked)
    if encrypted is False:
        return "off", False
    return "on, but server not verified" if encrypted else "server not verified", False


def _is_local(asked: Asked) -> bool:
    hosts = connections.hosts_of(asked.connection, asked.parameters)
    if hosts is not None:
        return all(host.startswith(_LOCAL) for host in hosts)
    if asked.connection.dialect.name != "postgresql" or _is_pooled(asked):
        return False
    return bool(asked.value("SELECT inet_client_addr() IS NOT DISTINCT FROM inet_server_addr()"))


def _is_encrypted(asked: Asked) -> bool | None:
    if asked.connection.dialect.name != "postgresql":
        found = asked.connection.execute(text("SHOW SESSION STATUS LIKE 'Ssl_cipher'")).one()
        return bool(found[1])
    told = connections.encrypts(asked.connection)
    if told is None and not _is_pooled(asked):
        told = bool(asked.value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))
    return told


def _is_pooled(asked: Asked) -> bool:
    """Return whether there is a pooler, such as PgBouncer, between us and the server.

    A pooler gives its clients a made-up backend PID, because it may not have a server connection.
    """
    told = connections.server_process(asked.connection)  # None except on PostgreSQL
    return told is not None and told != asked.value("SELECT pg_backend_pid()")


def _pooler(asked: Asked) -> Answer:
    if not _is_pooled(asked):
        return "none", True
    if connections.prepares_statements(asked.connection, asked.parameters):
        return "present, but the driver prepares statements", False
    return "present, and the driver prepares no statements", True


def _mysql_role(asked: Asked) -> Answer:
    grants = " ".join(asked.connection.scalars(text("SHOW GRANTS")))
    every = "ALL PRIVILEGES ON *.*" in grants or "SUPER" in grants
    return "has all privileges" if every else "ordinary", not every


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
# By SQLAlchemy's dialect name. Other dialects only get the questions for any server.
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


# -- the connections of a server, which several pools may share ------------------------------

# The first query's row: an identity of the server, the connections available to this role, and our
# role and database, each with its limit. The second query: the connections in use, by role and
# database.
_POSTGRESQL_ROOM: Final = (
    """
SELECT pg_postmaster_start_time()::text || ' ' || current_setting('port'),
    current_setting('max_connections')::int - CASE WHEN rolsuper THEN 0 ELSE
        current_setting('superuser_reserved_connections')::int
        + coalesce(current_setting('reserved_connections', true), '0')::int END,
    rolname, least(nullif(rolconnlimit, -1), current_setting('max_connections')::int),
    datname, least(nullif(datconnlimit, -1), current_setting('max_connections')::int)
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
    substring_index(current_user(), '@', 1),
    coalesce(nullif(@@max_user_connections, 0), @@max_connections),
    coalesce(database(), ''), @@max_connections
""",
    """
SELECT concat(user, '@', coalesce(db, '')), count(*) FROM information_schema.processlist
WHERE user NOT IN ('system user', 'event_scheduler') GROUP BY 1
""",
)
_ROOMS: Final = {"postgresql": _POSTGRESQL_ROOM, "mysql": _MYSQL_ROOM, "mariadb": _MYSQL_ROOM}


class Room(NamedTuple):
    """The connections that a server has for one of the application's pools."""

    pool: Pool
    in_use: Mapping[str, int]
    server: str
    offered: int
    role: str
    role_limit: int
    database: str
    database_limit: int


def read_room(asked: Asked) -> Room | None:
    """Ask a server for its connection limits; `None` if they can't be known."""
    queries = _ROOMS.get(asked.connection.dialect.name)
    if queries is None or _is_pooled(asked):
        return None
    answers: Any = (asked.connection.execute(text(query)).all() for query in queries)
    (here,), in_use = answers
    return Room(asked.pool, dict(in_use), *here)


def compare(rooms: Sequence[Room], processes: int) -> Answer:
    """Compare the needs of all processes' pools with the server that they share."""
    capacities = [pool_capacity(pool) for pool in {room.pool for room in rooms}]
    known = [each + 1 for each in capacities if each is not None]  # one more for readiness
    if len(known) < len(capacities):
        return "a pool has no limit", False
    needed, first = processes * sum(known), rooms[0]
    # Leave out our own roles and databases: those are our processes, which are already counted.
    ours = {f"{each.role}@{each.database}" for each in rooms}
    others = sum(count for who, count in first.in_use.items() if who not in ours)
    of_roles = {each.role: each.role_limit for each in rooms}
    of_databases = {each.database: each.database_limit for each in rooms}
    limits = sum(of_roles.values()), sum(of_databases.values())
    offered = min(first.offered - others, *limits)
    return f"{needed} needed by {processes} process(es), {offered} available", needed <= offered
