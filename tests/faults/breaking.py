"""The faults: each is a context manager that breaks something and repairs it at the end.

A fault receives the stage, which holds everything that it can break.
"""

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import psycopg
from anyio.from_thread import BlockingPortal

from tests.faults.audit import vanish
from tests.faults.cluster import OF_THE_APPLICATION, ROLE, Cluster
from tests.faults.processes import Deployed, Fleet, PgBouncer
from tests.proxy import Fault, Proxy

EVERY = 0.3  # seconds between the strikes of a repeating fault
# Seconds. Repeating faults spare younger connections, such as the one that readiness opens and
# closes.
YOUNGEST = 1.0


@dataclass
class Stage:
    """Everything that a fault can break."""

    cluster: Cluster
    proxy: Proxy
    bouncer: PgBouncer | None
    deployed: Deployed | Fleet
    portal: BlockingPortal


Break = Callable[[Stage], AbstractContextManager[None]]


@contextlib.contextmanager
def repeating(strike: Callable[[], Any]) -> Generator[None]:
    """Call `strike` repeatedly in a thread until the block ends."""
    ended = threading.Event()

    def strike_until_it_ends() -> None:
        while True:
            strike()
            if ended.wait(EVERY):
                return

    with ThreadPoolExecutor(1) as thread:
        striking = thread.submit(strike_until_it_ends)
        try:
            yield
        finally:
            ended.set()
        striking.result()


# -- the server ------------------------------------------------------------------------------


@contextlib.contextmanager
def kill_server(stage: Stage) -> Generator[None]:
    stage.cluster.server.kill()
    yield
    stage.cluster.server.start()


@contextlib.contextmanager
def stop_server(stage: Stage) -> Generator[None]:
    stage.cluster.server.stop()
    yield
    stage.cluster.server.start()


@contextlib.contextmanager
def freeze_server(stage: Stage) -> Generator[None]:
    stage.cluster.server.freeze()
    try:
        yield
    finally:  # a frozen server would outlive this process
        stage.cluster.server.thaw()


@contextlib.contextmanager
def fill_server(stage: Stage) -> Generator[None]:
    """Take every connection that an ordinary role may have, including the application's."""
    address = stage.cluster.admin.replace("postgres@", f"{ROLE}@")
    address += "?application_name=crowd"
    with contextlib.ExitStack() as crowd, psycopg.connect(stage.cluster.admin) as admin:
        admin.autocommit = True
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    crowd.enter_context(contextlib.closing(psycopg.connect(address)))
            if not admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                f" WHERE {OF_THE_APPLICATION} AND application_name <> 'crowd'"
            ).fetchall():
                break
        yield


@contextlib.contextmanager
def refuse_writes(stage: Stage) -> Generator[None]:
    stage.cluster.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    stage.cluster.execute("SELECT pg_reload_conf()")
    yield
    stage.cluster.execute("ALTER SYSTEM RESET default_transaction_read_only")
    stage.cluster.execute("SELECT pg_reload_conf()")


@contextlib.contextmanager
def terminate_backends(stage: Stage) -> Generator[None]:
    with repeating(lambda: _terminate(stage)):
        yield


def _terminate(stage: Stage) -> None:
    stage.cluster.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OF_THE_APPLICATION}"
        f" AND backend_start < now() - interval '{YOUNGEST} s'"
    )


@contextlib.contextmanager
def fill_disk(stage: Stage) -> Generator[None]:
    """Fill the disk that holds the table."""
    assert stage.cluster.disk is not None
    ballast = stage.cluster.disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    yield
    ballast.unlink()


# -- the network -----------------------------------------------------------------------------


@contextlib.contextmanager
def _faulty(stage: Stage, fault: Fault) -> Generator[None]:
    stage.proxy.go_on.clear()
    stage.proxy.fault = fault
    yield
    stage.proxy.fault = Fault.NONE
    stage.proxy.go_on.set()


@contextlib.contextmanager
def reset_connections(stage: Stage) -> Generator[None]:
    with repeating(lambda: stage.proxy.reset(YOUNGEST)):
        yield


@contextlib.contextmanager
def refuse_connections(stage: Stage) -> Generator[None]:
    with _faulty(stage, Fault.REFUSED):
        stage.proxy.reset()
        yield


def stall_network(stage: Stage) -> AbstractContextManager[None]:
    return _faulty(stage, Fault.FROZEN)


def slow_network(stage: Stage) -> AbstractContextManager[None]:
    return _faulty(stage, Fault.SLOW)


@contextlib.contextmanager
def swallow_packets(stage: Stage) -> Generator[None]:
    """Drop all data, like a firewall that has forgotten its connections, and then reset them."""
    with _faulty(stage, Fault.SWALLOWED):
        yield
        stage.proxy.reset()


def drop_commits(stage: Stage) -> AbstractContextManager[None]:
    return _faulty(stage, Fault.DROPPED)


def lose_answers_to_commits(stage: Stage) -> AbstractContextManager[None]:
    return _faulty(stage, Fault.ANSWER_LOST)


@contextlib.contextmanager
def lose_some(stage: Stage) -> Generator[None]:
    """Terminate backends repeatedly, and lose the answers to COMMIT a third of the time."""
    kinds = itertools.cycle((Fault.ANSWER_LOST, Fault.NONE, Fault.NONE))

    def strike() -> None:
        stage.proxy.fault = next(kinds)
        _terminate(stage)

    with repeating(strike):
        yield
    stage.proxy.fault = Fault.NONE


@contextlib.contextmanager
def kill_pgbouncer(stage: Stage) -> Generator[None]:
    assert stage.bouncer is not None
    stage.bouncer.kill()
    yield
    stage.bouncer.start()


# -- clients and workers ---------------------------------------------------------------------


@contextlib.contextmanager
def clients_vanish(stage: Stage) -> Generator[None]:
    """Have twenty clients at a time abort their connections at random moments of a slow write."""
    chance = random.Random(13)

    def strike() -> None:
        now = time.monotonic_ns()
        for number in range(20):
            stage.portal.start_task_soon(
                vanish, stage.deployed.port, f"vanishing-{now}-{number}", chance.random() * 0.3
            )

    with repeating(strike):
        yield


@contextlib.contextmanager
def kill_worker(stage: Stage) -> Generator[None]:
    """Kill one of the workers, which its parent process then replaces."""
    os.kill(min(stage.deployed.pools()), signal.SIGKILL)
    yield


@contextlib.contextmanager
def stop_application(stage: Stage) -> Generator[None]:
    """Send SIGTERM to the application, and wait for its end."""
    assert isinstance(stage.deployed, Deployed)
    stage.deployed.process.send_signal(signal.SIGTERM)
    stage.deployed.ends()
    yield


@contextlib.contextmanager
def restart_one_by_one(stage: Stage) -> Generator[None]:
    """Replace the processes behind the balancer with new ones, one after another."""
    assert isinstance(stage.deployed, Fleet)
    for each in tuple(stage.deployed.members):
        stage.deployed.add()
        stage.deployed.remove(each)
    yield
