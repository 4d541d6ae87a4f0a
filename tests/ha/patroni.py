"""Two Patroni nodes that agree on a leader through etcd, from Debian's packages."""

import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.ha.services import Home, ServiceError, end, home, program, running
from tests.postgres_server import _free_port, find_binaries
from tests.serving import wait_until

# Seconds for which a silent leader keeps its role. Patroni accepts no fewer.
TTL = 20


def answer(url: str) -> tuple[int, Any]:
    """Return the status and the JSON at a URL, with status 0 if there is no answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None
    except OSError:
        return 0, None


@dataclass
class Node:
    """A Patroni process with its PostgreSQL."""

    name: str
    port: int
    control: int
    home: Home
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        """Return the address of its database, without a driver."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def is_leader(self) -> bool:
        """Return whether the node is the primary."""
        return answer(f"http://127.0.0.1:{self.control}/primary")[0] == 200

    def streams(self, *, synchronous: bool) -> bool:
        """Return whether the node is a standby that can take over."""
        role = "synchronous" if synchronous else "replica"
        return answer(f"http://127.0.0.1:{self.control}/{role}")[0] == 200

    def kill(self) -> None:
        """Kill Patroni and the server with SIGKILL, as if the machine were lost."""
        server = int((self.home.path / "data" / "postmaster.pid").read_text().splitlines()[0])
        for pid in self.process.pid, server:
            subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(pid)], check=True)
        self.process.wait()


@dataclass
class Cluster:
    """All nodes of a cluster."""

    nodes: list[Node]

    @property
    def leader(self) -> Node:
        """Return the primary."""
        (found,) = (each for each in self.nodes if each.is_leader())
        return found

    @property
    def other(self) -> Node:
        """Return the standby."""
        (found,) = (each for each in self.nodes if not each.is_leader())
        return found


@contextmanager
def etcd() -> Generator[int]:
    """Run a single etcd, and yield its port.

    Production needs three of them, on separate machines.
    """
    client, peer = _free_port(), _free_port()
    urls = [f"http://127.0.0.1:{port}" for port in (client, peer)]
    with home("etcd") as place:
        command = [
            *(program("etcd", "etcd-server"), "--name=one", f"--data-dir={place.path / 'data'}"),
            *(f"--listen-client-urls={urls[0]}", f"--advertise-client-urls={urls[0]}"),
            *(f"--listen-peer-urls={urls[1]}", f"--initial-advertise-peer-urls={urls[1]}"),
            *(f"--initial-cluster=one={urls[1]}", "--log-level=warn"),
        ]
        with running(place, command, lambda: answer(f"{urls[0]}/health")[0] == 200):
            yield client


@contextmanager
def node(name: str, store: int, *, synchronous: bool) -> Generator[Node]:
    """Run a node, which creates the cluster if it is the first, and otherwise copies it."""
    port, control = _free_port(), _free_port()
    with home(f"patroni-{name}") as place:
        access = "host all all 127.0.0.1/32 trust"
        # JSON is YAML too.
        configuration = {
            "scope": "bookshop",
            "name": name,
            "restapi": _at(control),
            "etcd3": {"host": f"127.0.0.1:{store}"},
            "bootstrap": {
                "dcs": {
                    "ttl": TTL,
                    "loop_wait": 1,
                    "retry_timeout": 3,
                    "synchronous_mode": synchronous,
                    "postgresql": {"use_pg_rewind": True, "use_slots": True},
                },
                "initdb": [{"auth": "trust"}, {"encoding": "UTF8"}, {"locale": "C"}],
            },
            "postgresql": {
                **_at(port),
                "data_dir": str(place.path / "data"),
                "bin_dir": str(find_binaries("system")),
                "pgpass": str(place.path / "pgpass"),
                "pg_hba": [access, access.replace("all", "replication", 1)],
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "postgres"},
                },
                "parameters": {"unix_socket_directories": "", "fsync": "off"},
            },
        }
        path = place.write("patroni.yml", json.dumps(configuration))
        command: list[str | Path] = [program("patroni", "patroni"), path]
        found: list[Node] = []

        def ready() -> bool:
            return answer(f"http://127.0.0.1:{control}/health")[0] == 200

        with running(place, command, ready) as process:
            found.append(Node(name, port, control, place, process))
            try:
                yield found[0]
            finally:
                # Patroni ends its server first. A node that a test has killed is not running.
                if process.poll() is None:
                    end(process)


def _at(port: int) -> dict[str, str]:
    return {"listen": f"127.0.0.1:{port}", "connect_address": f"127.0.0.1:{port}"}


@contextmanager
def patroni(*, synchronous: bool, schema: str) -> Generator[Cluster]:
    """Run a cluster of two nodes with a table, and yield it when the second node streams."""
    with ExitStack() as closing:
        store = closing.enter_context(etcd())
        first = closing.enter_context(node("one", store, synchronous=synchronous))
        wait_until(first.is_leader, 60)
        with psycopg.connect(first.url, autocommit=True) as connection:
            connection.execute(schema.encode())
        second = closing.enter_context(node("two", store, synchronous=synchronous))
        try:
            wait_until(lambda: second.streams(synchronous=synchronous), 60)
        except AssertionError as error:
            said = (second.home.path / "patroni.log").read_text()[-3000:]
            raise ServiceError(f"The second node does not stream:\n{said}") from error
        yield Cluster([first, second])
