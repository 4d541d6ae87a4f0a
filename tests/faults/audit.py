"""The auditing client, which writes continuously and records every answer in a ledger."""

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
    """What a client knows about its write."""

    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"  # the answer says that nothing is stored
    UNKNOWN = "unknown"  # the answer leaves the outcome open, or there is no answer


@dataclass
class Entry:
    """A request in the ledger. Times are seconds of `time.monotonic`."""

    name: str
    method: str
    path: str
    sent: float = 0.0
    answered: float = 0.0
    status: int = 0  # 0 if there was no answer
    answer: Any = None

    @property
    def state(self) -> State:
        """Return what the status promises: only a 500 or no answer leaves the outcome open."""
        if 200 <= self.status < 300:
            return State.ACKNOWLEDGED
        return State.REFUSED if self.status not in (0, 500) else State.UNKNOWN

    @property
    def seconds(self) -> float:
        """Return how long the client has waited."""
        return self.answered - self.sent

    @property
    def said(self) -> str:
        """Return the status and, for an error, its detail."""
        if self.state is State.ACKNOWLEDGED:
            return str(self.status)
        detail = self.answer.get("detail") if isinstance(self.answer, dict) else self.answer
        return f"{self.status} {detail}" if self.status else "no answer"


async def ask(port: int, method: str, path: str) -> tuple[int, Any]:
    """Send a request on its own connection, and return status 0 if the answer is incomplete."""
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
        return 0, None  # a killed worker may have sent only part of the answer
    is_json = b"content-type: application/json" in head.lower()
    said = json.loads(body) if is_json else body.decode(errors="replace")
    return int(head.split(b" ", 2)[1]), said


class Load:
    """Clients that write one entry after another and cycle through the given ways to write."""

    def __init__(self, port: int, ways: Sequence[str], clients: int) -> None:
        self.port = port
        self.ledger: list[Entry] = []
        self._ways = itertools.cycle(ways)
        self._clients = clients
        self._numbers = itertools.count()
        self._ending = False

    @contextlib.contextmanager
    def writing(self, portal: BlockingPortal) -> Generator["Load"]:
        """Write until the block ends, and then wait for the last answers."""
        clients = [portal.start_task_soon(self._write_for_ever) for _ in range(self._clients)]
        try:
            yield self
        finally:
            self._ending = True
            for client in clients:
                client.result()

    def next_entry(self, number: int) -> Entry:
        """Return the entry to write next."""
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
        """List the unacknowledged writes that were answered at or after `since`."""
        return [
            each
            for each in tuple(self.ledger)
            if each.answered >= since and each.state is not State.ACKNOWLEDGED
        ]

    def acknowledged(self, since: float) -> int:
        """Count the acknowledged writes that were sent at or after `since`."""
        return sum(
            each.sent >= since and each.state is State.ACKNOWLEDGED for each in tuple(self.ledger)
        )


async def vanish(port: int, name: str, after: float) -> None:
    """Request a slow write, and abort the connection after `after` seconds."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /slow/{name} HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\n\r\n".encode())
    await asyncio.sleep(after)
    writer.transport.abort()


@dataclass(frozen=True)
class Probe:
    """A readiness answer, with the times of the request and of the answer."""

    sent: float
    answered: float
    status: int
    report: Any


@dataclass
class Prober:
    """A client that polls readiness ten times a second."""

    port: int
    probes: list[Probe] = field(default_factory=list)
    _ending: bool = False

    @contextlib.contextmanager
    def asking(self, portal: BlockingPortal) -> Generator["Prober"]:
        """Poll until the block ends."""
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
        """List the probes that were sent and answered between `start` and `end`."""
        return [each for each in self.probes if start <= each.sent and each.answered <= end]
