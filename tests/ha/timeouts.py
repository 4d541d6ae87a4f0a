"""The longest wait of a request, measured limit by limit: `python -m tests.ha.timeouts`.

It prints the rows of docs/timeouts.md. Each case sets one limit, and causes the one fault that the
limit is meant for.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx
import psycopg
from fastapi import Depends, FastAPI
from sqlalchemy import URL, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from fastapi_sqlnative import install_database, install_error_handlers, transactional
from fastapi_sqlnative.cancellation import deadline
from tests.ha.services import program
from tests.postgres_server import PostgresServer
from tests.serving import KINDS, Kind, Served, route, serve, wait_until

# Seconds without an answer after which a request counts as not ended.
WATCHED = 12.0
ADVISORY = 5

Fault: TypeAlias = Callable[[PostgresServer, Served], AbstractContextManager[Any]]


# -- what a request does ----


def lock_the_row(session: Session) -> None:
    """Lock a row for the transaction."""
    session.execute(text("SELECT FROM item WHERE id = 1 FOR UPDATE"))


def compute(session: Session) -> None:
    """Run a slow statement."""
    session.execute(text("SELECT pg_sleep(30)"))


def pause(session: Session) -> None:
    """Pause in the middle of a transaction, as if for a call to another service."""
    lock_the_row(session)
    # Blocks the event loop of an asynchronous application, which has nothing else to do here.
    time.sleep(2)
    lock_the_row(session)


def wait_for_the_advisory_lock(session: Session) -> None:
    """Keep the connection for as long as another session holds the lock."""
    session.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY})"))


# -- what happens to it ----


def nothing(_server: PostgresServer, _served: Served) -> AbstractContextManager[None]:
    """Cause no fault apart from the request itself."""
    return nullcontext()


@contextmanager
def locked(server: PostgresServer, _served: Served) -> Generator[None]:
    """Lock the row that the request needs."""
    with psycopg.connect(server.url) as connection:
        connection.execute("SELECT FROM item WHERE id = 1 FOR UPDATE")
        yield


@contextmanager
def pool_in_use(server: PostgresServer, served: Served) -> Generator[None]:
    """Have another request occupy the only connection."""
    with psycopg.connect(server.url, autocommit=True) as holder, ThreadPoolExecutor(1) as thread:
        holder.execute(f"SELECT pg_advisory_lock({ADVISORY})".encode())
        thread.submit(httpx.post, f"{served.url}/hold", timeout=60)
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_until(lambda: holder.execute(waiting).fetchone() == (1,))
        yield
        holder.execute(f"SELECT pg_advisory_unlock({ADVISORY})".encode())


@contextmanager
def packets_lost(server: PostgresServer, _served: Served) -> Generator[None]:
    """Have the kernel silently drop all packets to and from the server."""
    tables = program("iptables", "iptables")
    with ExitStack() as closing:
        for end in "--dport", "--sport":
            rule = ["INPUT", "-i", "lo", "-p", "tcp", end, str(server.port), "-j", "DROP"]
            subprocess.run([tables, "-w", "-I", *rule], check=True)
            closing.callback(subprocess.run, [tables, "-w", "-D", *rule], check=True)
        yield


@contextmanager
def frozen(server: PostgresServer, _served: Served) -> Generator[None]:
    """Freeze the application's backends, while the kernel still acknowledges packets."""
    query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
    with psycopg.connect(server.url) as connection:
        found = connection.execute(query.encode()).fetchall()
        pids = [pid for (pid,) in found if pid != connection.info.backend_pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


# -- the cases ----


@dataclass(frozen=True)
class Case:
    """A limit, the fault that it is meant for, and the expected status for each driver.

    The status is None where the limit does not end the request.
    """

    limit: str
    against: str
    answers: Mapping[str, int | None]
    fault: Fault = nothing
    body: Callable[[Session], None] = lock_the_row
    silent_hosts: int = 0
    seconds: float | None = None
    pool: Mapping[str, Any] = field(default_factory=dict[str, Any])
    psycopg: Mapping[str, Any] = field(default_factory=dict[str, Any])
    asyncpg: Mapping[str, Any] = field(default_factory=dict[str, Any])


def of_the_server(name: str, value: str) -> dict[str, Any]:
    """Return each driver's arguments that set a server setting for the connection."""
    return {
        "psycopg": {"options": f"-c {name}={value}"},
        "asyncpg": {"server_settings": {name: value}},
    }


def all_alike(status: int) -> dict[str, int | None]:
    """Return the same status for every driver."""
    return {kind.id: status for kind in KINDS}


CONNECTING: dict[str, Any] = {"psycopg": {"connect_timeout": 2}, "asyncpg": {"timeout": 2}}
NETWORK: dict[str, Any] = {
    "psycopg": {"tcp_user_timeout": 2000},
    "asyncpg": {"command_timeout": 2},
}
CASES = (
    Case(
        "`connect_timeout=2`, asyncpg: `timeout=2`",
        "a host that accepts and does not respond",
        all_alike(503),
        silent_hosts=1,
        **CONNECTING,
    ),
    Case(
        "the same, two hosts in the URL",
        "both accept and do not respond",
        all_alike(503),
        silent_hosts=2,
        **CONNECTING,
    ),
    Case(
        "`pool_timeout=1`",
        "every connection is in use",
        all_alike(503),
        fault=pool_in_use,
        pool={"pool_timeout": 1},
    ),
    Case(
        "`statement_timeout=1s`",
        "a slow statement",
        all_alike(504),
        body=compute,
        **of_the_server("statement_timeout", "1s"),
    ),
    Case(
        "`lock_timeout=500ms`",
        "a row that another session has locked",
        all_alike(503),
        fault=locked,
        **of_the_server("lock_timeout", "500ms"),
    ),
    Case(
        "`idle_in_transaction_session_timeout=1s`",
        "two seconds without a statement",
        all_alike(503),
        body=pause,
        **of_the_server("idle_in_transaction_session_timeout", "1s"),
    ),
    Case(
        "`tcp_user_timeout=2000`, asyncpg: `command_timeout=2`",
        "a network that drops every packet",
        {"psycopg-async": 503, "asyncpg": 504, "psycopg-sync": 503},
        fault=packets_lost,
        **NETWORK,
    ),
    Case(
        "the same",
        "a server that acknowledges and does not respond",
        {"psycopg-async": None, "asyncpg": 504, "psycopg-sync": None},
        fault=frozen,
        **NETWORK,
    ),
    Case(
        "`deadline(1)`",
        "a slow statement",
        all_alike(504),
        body=compute,
        seconds=1,
    ),
    Case(
        "`deadline(1)`",
        "a lost network",
        {"psycopg-async": 504, "asyncpg": 504, "psycopg-sync": None},
        fault=packets_lost,
        seconds=1,
    ),
    Case(
        "`deadline(1)`",
        "an unresponsive server",
        {"psycopg-async": 504, "asyncpg": 504, "psycopg-sync": None},
        fault=frozen,
        seconds=1,
    ),
)


@dataclass(frozen=True)
class Measured:
    """The seconds that a request took, and its status, or None without an answer in `WATCHED`."""

    seconds: float
    status: int | None

    def __str__(self) -> str:
        if self.status is None:
            return f"not ended (watched for {WATCHED:.0f} s)"
        return f"{self.seconds:.1f} s, {self.status}"


def measure(case: Case, kind: Kind, server: PostgresServer) -> Measured:
    """Serve an application with this limit, cause the fault, and time one request."""
    with ExitStack() as closing:
        ports = [server.port]
        if case.silent_hosts:
            listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(case.silent_hosts)]
            ports = [closing.enter_context(each).getsockname()[1] for each in listeners]
        served = closing.enter_context(serve(application(case, kind, ports)))
        if not case.silent_hosts:
            assert served.client.post("/warm").status_code == 201
        with case.fault(server, served):
            began = time.monotonic()
            try:
                status = served.client.post("/work", timeout=WATCHED).status_code
            except httpx.ReadTimeout:
                status = None
            return Measured(time.monotonic() - began, status)


def application(case: Case, kind: Kind, ports: list[int]) -> FastAPI:
    """Build an application with one connection and the limit of this case."""
    hosts = [f"127.0.0.1:{port}" for port in ports]
    driver = f"postgresql+{kind.driver}"
    url = URL.create(driver, "postgres", database="postgres", query={"host": hosts})
    plain, limits = {"sslmode": "disable"}, case.psycopg
    if kind.driver == "asyncpg":
        plain, limits = {"ssl": "disable"}, case.asyncpg
    create = create_async_engine if kind.asynchronous else create_engine
    engine = create(
        url,
        connect_args={**plain, **limits},
        **{"pool_size": 1, "max_overflow": 0, **case.pool},
    )
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose, shutdown_timeout=2)
    install_error_handlers(app)
    route(app, kind, "/warm", transactional(), lock_the_row)
    route(app, kind, "/hold", transactional(), wait_for_the_advisory_lock)
    limits_of_the_request = [Depends(deadline(case.seconds))] if case.seconds else []
    route(app, kind, "/work", transactional(), case.body, dependencies=limits_of_the_request)
    return app


@contextmanager
def measured_server() -> Generator[PostgresServer]:
    """Start a server with the row that the requests lock."""
    with PostgresServer() as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE item (id int PRIMARY KEY)")
            connection.execute("INSERT INTO item VALUES (1)")
        yield server


def main() -> None:
    """Print a row for each case."""
    print(f"| limit | against | {' | '.join(kind.id for kind in KINDS)} |")
    print("|---|---|---|---|---|")
    with measured_server() as server:
        for case in CASES:
            figures = [str(measure(case, kind, server)) for kind in KINDS]
            print(f"| {case.limit} | {case.against} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
