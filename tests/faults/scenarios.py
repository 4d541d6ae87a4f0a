"""The scenarios: what breaks, for how long, and what has to hold meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tests.faults import application, breaking
from tests.faults.breaking import Break

# Seconds. A busy machine takes one more (docs/health.md).
BUSY = 1.0
REFUSED = application.MAX_AGE + application.PROBE_TIMEOUT + BUSY
SILENT = application.DOWN_AFTER + REFUSED
DRIVERS = ("psycopg-async", "asyncpg", "psycopg-sync")
SERVERS = ("uvicorn", "uvicorn, 2 workers", "gunicorn, 2 workers")

Path = Literal["direct", "proxy", "pgbouncer", "pgbouncer over TLS"]


@dataclass(frozen=True)
class Scenario:
    """One fault, and the setup that it affects.

    Attributes:
        seconds: how long the fault lasts.
        path: what lies between the application and the server.
        ready: what readiness has to report meanwhile: `False` from `notice` seconds on, `True` all
            the time, `None` if nothing is promised.
        notice: seconds within which readiness has to notice the fault, and later the repair.
        unbroken: whether every request has to succeed.
        ends: whether the fault ends the application.
        level: the isolation level under which clients use registers, instead of adding entries.
        drivers, servers: all that the long form uses. The short form uses the first of each.
    """

    name: str
    fault: Break
    seconds: float = 3.0
    path: Path = "direct"
    ready: bool | None = True
    notice: float = REFUSED
    unbroken: bool = False
    ends: bool = False
    level: Literal["", "read-committed", "serializable"] = ""
    drivers: Sequence[str] = DRIVERS
    servers: Sequence[str] = SERVERS


def beginning(first: str, names: Sequence[str]) -> Sequence[str]:
    """Return the names with one of them moved to the front."""
    return (first, *(each for each in names if each != first))


PSYCOPG, ASYNCPG, SYNC = (beginning(each, DRIVERS) for each in DRIVERS)
ONE, TWO, GUNICORN = (beginning(each, SERVERS) for each in SERVERS)

SCENARIOS = (
    Scenario("server killed", breaking.kill_server, ready=False),
    Scenario("server stopped", breaking.stop_server, ready=False, drivers=ASYNCPG, servers=TWO),
    Scenario(
        *("server frozen", breaking.freeze_server),
        seconds=5.5,
        ready=False,
        notice=SILENT,
        drivers=SYNC,
    ),
    # While requests try to connect, their places in the pool count as connections, and readiness
    # may report `saturated`.
    Scenario("server full", breaking.fill_server, ready=None, servers=GUNICORN),
    Scenario("server read-only", breaking.refuse_writes, ready=False, drivers=ASYNCPG),
    Scenario("backends terminated", breaking.terminate_backends, servers=TWO),
    Scenario("disk full", breaking.fill_disk, drivers=SYNC),
    Scenario("connections reset", breaking.reset_connections, path="proxy", drivers=ASYNCPG),
    Scenario("connections refused", breaking.refuse_connections, path="proxy", ready=False),
    Scenario(
        *("network stalled", breaking.stall_network),
        seconds=5.5,
        path="proxy",
        ready=False,
        notice=SILENT,
    ),
    Scenario("network slow", breaking.slow_network, path="proxy", drivers=SYNC),
    Scenario(
        *("packets swallowed", breaking.swallow_packets),
        seconds=5.5,
        path="proxy",
        ready=False,
        notice=SILENT,
        drivers=ASYNCPG,
    ),
    Scenario("COMMIT dropped", breaking.drop_commits, path="proxy", drivers=SYNC),
    Scenario("COMMIT's answer lost", breaking.lose_answers_to_commits, path="proxy"),
    Scenario("clients vanish", breaking.clients_vanish, drivers=ASYNCPG),
    Scenario(
        *("worker killed", breaking.kill_worker),
        servers=("uvicorn, 2 workers", "gunicorn, 2 workers"),
    ),
    Scenario(
        *("told to end", breaking.stop_application),
        seconds=0.0,
        ready=None,
        ends=True,
        drivers=SYNC,
        servers=GUNICORN,
    ),
    Scenario(
        *("rolling restart", breaking.restart_one_by_one),
        seconds=0.0,
        ready=None,  # the balancer may still probe the process that drains
        unbroken=True,
        servers=("uvicorn, behind a balancer",),
    ),
    Scenario("PgBouncer killed", breaking.kill_pgbouncer, path="pgbouncer", ready=False),
    Scenario(
        *("server killed behind PgBouncer and TLS", breaking.kill_server),
        path="pgbouncer over TLS",
        ready=False,
        notice=SILENT,
        seconds=5.0,
        drivers=ASYNCPG,
    ),
    Scenario(
        *("registers, READ COMMITTED", breaking.lose_some),
        path="proxy",
        level="read-committed",
        seconds=4.0,
        ready=None,
    ),
    Scenario(
        *("registers, SERIALIZABLE", breaking.lose_some),
        path="proxy",
        level="serializable",
        seconds=4.0,
        ready=None,
        drivers=ASYNCPG,
        servers=TWO,
    ),
)
