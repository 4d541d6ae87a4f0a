"""The processes that serve the application, and PgBouncer, each with its own log."""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortal

from tests.balancer import Balancer
from tests.postgres_server import _free_port
from tests.serving import wait_until

ROOT = Path(__file__).parents[2]
LISTENS = re.compile(r"(?:running on|Listening at:) http://127\.0\.0\.1:(\d+)")
APPLICATION = "tests.faults.application:create_app"
UVICORN = ("uvicorn", APPLICATION, "--factory", "--port", "0", "--no-access-log")
SERVERS: Mapping[str, tuple[int, Sequence[str]]] = {
    "uvicorn": (1, (*UVICORN, "--timeout-graceful-shutdown", "5")),
    "uvicorn, 2 workers": (2, (*UVICORN, "--timeout-graceful-shutdown", "5", "--workers", "2")),
    "gunicorn, 2 workers": (
        2,
        (
            *("gunicorn", f"{APPLICATION}()", "--worker-class", "uvicorn_worker.UvicornWorker"),
            *("--workers", "2", "--bind", "127.0.0.1:0", "--graceful-timeout", "10"),
        ),
    ),
}


@dataclass
class Deployed:
    """An application served by one or more processes."""

    workers: int
    process: "subprocess.Popen[bytes]"
    log: Path
    port: int = 0

    @property
    def said(self) -> str:
        """Return the whole log."""
        return self.log.read_text(errors="replace")

    @property
    def logged(self) -> int:
        """Return the size of the log in bytes."""
        return self.log.stat().st_size

    def listens(self) -> bool:
        """Read the port from the log, and return whether all workers have started."""
        assert self.process.poll() is None, self.said
        found = LISTENS.search(self.said)
        self.port = int(found[1]) if found else 0
        return self.said.count("Application startup complete") >= self.workers and self.port > 0

    def pools(self) -> dict[int, dict[str, Any]]:
        """Return the pool of every worker, by process id.

        Any worker may answer a request, so requests are repeated until all workers have answered.
        """
        found: dict[int, dict[str, Any]] = {}
        give_up = time.monotonic() + 5
        while len(found) < self.workers and time.monotonic() < give_up:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/pool", timeout=5) as answer:
                pool = json.load(answer)
            found[pool["process"]] = pool
        return found

    def ends(self) -> int:
        """Wait for the process to end, and return its exit status."""
        return self.process.wait(30)


@contextlib.contextmanager
def deployed(server: str, log: Path, environment: Mapping[str, str]) -> Generator[Deployed]:
    """Serve the application, and kill all its processes at the end."""
    workers, command = SERVERS[server]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that its workers can be killed with it
        )
    try:
        found = Deployed(workers, process, log)
        wait_until(found.listens, 60)
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Fleet:
    """Processes behind a load balancer, each of which can be replaced."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], portal: BlockingPortal
    ) -> None:
        self.members: list[Deployed] = []
        self._folder = folder
        self._environment = environment
        self._portal = portal
        self._balancer = Balancer()
        self._running = contextlib.ExitStack()

    @property
    def port(self) -> int:
        """Return the balancer's port."""
        return self._balancer.port

    @property
    def logged(self) -> int:
        """Return the size of all logs in bytes, including those of ended processes."""
        return sum(log.stat().st_size for log in self._folder.glob("application-*.log"))

    @contextlib.contextmanager
    def serving(self, size: int) -> Generator["Fleet"]:
        """Start `size` processes and the balancer, and end all of them with the block."""
        listening = self._portal.wrap_async_context_manager(self._balancer.listening())
        with self._running, listening:
            for _ in range(size):
                self.add()
            yield self

    def add(self) -> None:
        """Start another process, and wait until the balancer sends it requests."""
        log = self._folder / f"application-{time.monotonic_ns()}.log"
        member = self._running.enter_context(deployed("uvicorn", log, self._environment))
        self.members.append(member)
        self._portal.call(self._balancer.add, member.port)

    def remove(self, member: Deployed) -> None:
        """Stop a process, which drains for longer than the balancer needs to notice."""
        member.process.send_signal(signal.SIGTERM)
        member.ends()
        self.members.remove(member)

    def pools(self) -> dict[int, dict[str, Any]]:
        """Return the pool of every process, by process id."""
        return {number: pool for each in self.members for number, pool in each.pools().items()}


class PgBouncer:
    """Debian's PgBouncer in transaction mode in front of one server, on its own port."""

    def __init__(self, folder: Path, server_port: int, user: str, certificate: Path | None) -> None:
        self.port = _free_port()
        self.log = folder / "pgbouncer.log"
        self._configuration = folder / "pgbouncer.ini"
        lines = [
            "[databases]",
            f"* = host=127.0.0.1 port={server_port} user={user}",
            "[pgbouncer]",
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =",
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 4",
            # The longest wait of a client while there is no server, and the time between retries.
            "query_wait_timeout = 3\nserver_login_retry = 1\nserver_connect_timeout = 2",
            "ignore_startup_parameters = extra_float_digits",
        ]
        if certificate:
            lines.append("client_tls_sslmode = require")
            lines.append(f"client_tls_cert_file = {certificate}")
            lines.append(f"client_tls_key_file = {certificate.with_suffix('.key')}")
        self._configuration.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start PgBouncer, and wait until it listens."""
        found = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        if found is None:
            raise RuntimeError("PgBouncer was not found: apt-get install pgbouncer")
        # PgBouncer refuses to run as root.
        user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [found, self._configuration], stdout=output, stderr=output, user=user
            )
        wait_until(self._listens)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    def kill(self) -> None:
        """Kill PgBouncer, without a graceful shutdown."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
