"""How many connections the pools may ask for, and how many their server has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Pool, text

from .._drivers.pools import pool_capacity
from ._findings import Finding, finding
from ._questions import Asked

# Asked in one row: whose server it is, what it offers to this role, who this role is here.
_POSTGRESQL: Final = """
SELECT pg_postmaster_start_time()::text || ' ' || current_setting('port'),
    current_setting('max_connections')::int - CASE WHEN rolsuper THEN 0 ELSE
        current_setting('superuser_reserved_connections')::int
        + coalesce(current_setting('reserved_connections', true), '0')::int END,
    ARRAY[rolconnlimit, datconnlimit], rolname::text, datname::text
FROM pg_roles, pg_database WHERE rolname = current_user AND datname = current_database()
"""
_POSTGRESQL_IN_USE: Final = """
SELECT usename::text, datname::text, count(*) FROM pg_stat_activity
WHERE usename IS NOT NULL AND datname IS NOT NULL
    AND coalesce(backend_type, 'client backend') = 'client backend'
GROUP BY 1, 2
"""
_MYSQL: Final = """
SELECT concat(@@hostname, ':', @@port), @@max_connections, @@max_user_connections,
    substring_index(current_user(), '@', 1), database()
"""
_MYSQL_IN_USE: Final = """
SELECT user, coalesce(db, ''), count(*) FROM information_schema.processlist
WHERE user NOT IN ('system user', 'event_scheduler') GROUP BY 1, 2
"""


@dataclass(frozen=True)
class Room:
    """What a server offers to one of the application's pools."""

    server: str
    offered: int
    limits: tuple[int, ...]
    owner: tuple[str, str]
    in_use: Mapping[tuple[str, str], int]
    pool: Pool


def read_room(asked: Asked) -> Room | None:
    """Ask a server for how many connections it has; `None` where nobody counts them."""
    postgresql = asked.connection.dialect.name == "postgresql"
    if not postgresql and asked.connection.dialect.name not in {"mysql", "mariadb"}:
        return None
    row: Any = asked.connection.execute(text(_POSTGRESQL if postgresql else _MYSQL)).one()
    server, offered, limits, role, database = row
    in_use = asked.connection.execute(text(_POSTGRESQL_IN_USE if postgresql else _MYSQL_IN_USE))
    limits = [each for each in limits if each >= 0] if postgresql else [limits] * (limits > 0)
    return Room(
        server=server,
        offered=offered,
        limits=tuple(limits),
        owner=(role, database or ""),
        in_use={(user, name): count for user, name, count in in_use},
        pool=asked.pool,
    )


def compare_rooms(rooms: Mapping[str, Room], processes: int) -> Iterator[Finding]:
    """Compare the pools with their servers: those that share one together."""
    servers: dict[str, dict[str, Room]] = {}
    for name, room in rooms.items():
        servers.setdefault(room.server, {})[name] = room
    for sharing in servers.values():
        yield _compare(sharing, processes)


def _compare(sharing: Mapping[str, Room], processes: int) -> Finding:
    names = ", ".join(sharing)
    capacities = [pool_capacity(pool) for pool in {room.pool for room in sharing.values()}]
    known = [each for each in capacities if each is not None]
    if len(known) < len(capacities):
        return finding(names, "connections", "a pool has no limit")
    needed = processes * sum(each + 1 for each in known)  # readiness asks beside a busy pool
    offered = _offered(list(sharing.values()))
    detail = f"{needed} wanted by {processes} process(es), {offered} to be had"
    return finding(names, "connections", detail, fine=needed <= offered)


def _offered(sharing: list[Room]) -> int:
    # Whoever logs in as this application is one of its processes, which are counted already.
    owners = {room.owner for room in sharing}
    first = sharing[0]
    others = sum(count for who, count in first.in_use.items() if who not in owners)
    limits = {room.owner: min(room.limits, default=room.offered) for room in sharing}
    return min(first.offered - others, sum(limits.values()))
