"""The auditing client: it writes all the time, and keeps a ledger of what it was told."""

import asyncio
import contextlib
import itertools
import json
import re
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from anyio.from_thread import BlockingPortal

from tests.balancer import exchange

PATIENCE = 20.0  # seconds that a client waits for an answer
PAUSE = 0.01


class State(Enum):
    """What a client knows of its write."""

    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"  # it was told that nothing is stored
    UNKNOWN = "unknown"  # it was told that nobody knows, or was told nothing


@dataclass
class Entry:
    """A request in the ledger. Times are seconds of `time.monotonic`."""

    name: str
    method: str
    path: str
    sent: float = 0.0
    answered: float = 0.0
    status: int = 0  # 0 is no answer
    answer: Any = None

    @property
    def state(self) -> State:
        """Return what the status promises: only a 500 leaves open what is stored."""
        if 200 <= self.status < 300:
            return State.ACKNOWLEDGED
        return State.REFUSED if self.status not in (0, 500) else State.UNKNOWN

    @property
    def seconds(self) -> float:
        """Return how long the client has waited."""
        return self.answered - self.sent

    @property
    def said(self) -> str:
        """Return the status and, of an error, its words."""
        if self.state is State.ACKNOWLEDGED:
            return str(self.status)
        detail = self.answer.get("detail") if isinstance(self.answer, dict) else self.answer
        return f"{self.status} {detail}" if self.status else "no answer"


async def ask(port: int, method: str, path: str) -> tuple[int, Any]:
    """Send one request on a connection of its own; without a whole answer the status is 0."""
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    answer = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            answer = await exchange(port, request.encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    if length is None or len(body) < int(length[1]):
        return 0, None  # a worker that is killed may have said half of it
    is_json = b"content-type: application/json" in head.lower()
    said = json.loads(body) if is_json else body.decode(errors="replace")
    return int(head.split(b" ", 2)[1]), said


class Load:
    """Clients that write one entry after the other, each in the ways given, by turns."""

    def __init__(self, port: int, ways: Sequence[str], clients: int) -> None:
        self.port = port
        self.ledger: list[Entry] = []
        self._ways = itertools.cycle(ways)
        self._clients = clients
        self._numbers = itertools.count()
        self._ending = False

    @contextlib.contextmanager
    def writing(self, portal: BlockingPortal) -> Generator["Load"]:
        """Write until the block ends; then wait for the last answers."""
        clients = [portal.start_task_soon(self._write_for_ever) for _ in range(self._clients)]
        try:
            yield self
        finally:
            self._ending = True
            for client in clients:
                client.result()

    def next_entry(self, number: int) -> Entry:
        """Choose what is written next."""
        name = f"entry-{number}"
        return Entry(name, "POST", f"/{next(self._ways)}/{name}")

    async def _write_for_ever(self) -> None:
        while not self._ending:
            entry = self.next_entry(next(self._numbers))
            self.ledger.append(entry)
            entry.sent = time.monotonic()
            entry.status, entry.answer = await ask(self.port, entry.method, entry.path)
            entry.answered = time.monotonic()
            await asyncio.sleep(PAUSE)

    def failures(self, since: float) -> list[Entry]:
        """List what was not acknowledged, of the writes that were answered since then."""
        return [
            each
            for each in tuple(self.ledger)
            if each.answered >= since and each.state is not State.ACKNOWLEDGED
        ]

    def acknowledged(self, since: float) -> int:
        """Count the writes that were sent and acknowledged since then."""
        return sum(
            each.sent >= since and each.state is State.ACKNOWLEDGED for each in tuple(self.ledger)
        )


async def vanish(port: int, name: str, after: float) -> None:
    """Ask for a slow write, and hang up before it is answered."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /slow/{name} HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\n\r\n".encode())
    await asyncio.sleep(after)
    writer.transport.abort()


@dataclass(frozen=True)
class Probe:
    """What readiness has answered, and when it was asked."""

    sent: float
    answered: float
    status: int
    report: Any


@dataclass
class Prober:
    """A client that asks for readiness ten times a second."""

    port: int
    probes: list[Probe] = field(default_factory=list)
    _ending: bool = False

    @contextlib.contextmanager
    def asking(self, portal: BlockingPortal) -> Generator["Prober"]:
        """Ask until the block ends."""
        task = portal.start_task_soon(self._ask_for_ever)
        try:
            yield self
        finally:
            self._ending = True
            task.result()

    async def _ask_for_ever(self) -> None:
        while not self._ending:
            sent = time.monotonic()
            status, report = await ask(self.port, "GET", "/health/ready")
            self.probes.append(Probe(sent, time.monotonic(), status, report))
            await asyncio.sleep(0.1)

    def between(self, start: float, end: float) -> list[Probe]:
        """List the probes that were sent and answered in this time."""
        return [each for each in self.probes if start <= each.sent and each.answered <= end]
