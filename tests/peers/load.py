"""An open loop: requests are sent when they are due, whether or not earlier ones were answered.

Latency counts from when a request was due, so that it rises when a server falls behind.
"""

import asyncio
import statistics
import time
from collections import deque
from dataclasses import dataclass, field


@dataclass
class Load:
    """The results of the requests sent to one path.

    Attributes:
        latencies: seconds from when a request was due to its answer.
        failed: answers other than 200, and connections that were lost.
        seconds: from the first request that was due to the last answer.
    """

    latencies: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0

    @property
    def throughput(self) -> float:
        """Return the number of answers per second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: int) -> float:
        """Return a percentile of the latencies, in seconds."""
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


class _Client(asyncio.Protocol):
    """A keep-alive connection with at most one request under way."""

    def __init__(self, generator: "_Generator") -> None:
        self.generator = generator
        self.due = 0.0
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.generator.free.append(self)

    def send(self, due: float) -> None:
        self.due = due
        self.transport.write(self.generator.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(body) < int(length):
            return
        self.buffer = b""
        self.generator.answered(self, ok=head.startswith(b"HTTP/1.1 200 "))

    def connection_lost(self, exc: Exception | None) -> None:
        self.generator.lost(self)


class _Generator:
    """A scheduler that assigns due requests to free connections."""

    def __init__(self, path: str) -> None:
        self.request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        self.free: deque[_Client] = deque()
        self.waiting: deque[float] = deque()
        self.under_way: set[_Client] = set()
        self.load = Load()
        self.idle = asyncio.Event()
        self.all_due = False

    async def send(self, rate: float, seconds: float) -> None:
        start = time.perf_counter()
        sent, total = 0, max(2, round(rate * seconds))
        while sent < total:
            now = time.perf_counter()
            while sent < total and start + sent / rate <= now:
                self.due(start + sent / rate)
                sent += 1
            if sent < total:
                await asyncio.sleep(max(0, start + sent / rate - time.perf_counter()))
        self.all_due = True
        if self.under_way:
            await self.idle.wait()
        self.load.seconds = time.perf_counter() - start
        self.load.failed += len(self.waiting)  # every connection was lost

    def due(self, when: float) -> None:
        if self.free:
            client = self.free.popleft()
            self.under_way.add(client)
            client.send(when)
        else:
            self.waiting.append(when)

    def answered(self, client: _Client, *, ok: bool) -> None:
        if ok:
            self.load.latencies.append(time.perf_counter() - client.due)
        else:
            self.load.failed += 1
        if self.waiting:
            client.send(self.waiting.popleft())
            return
        self.under_way.discard(client)
        self.free.append(client)
        if self.all_due and not self.under_way:
            self.idle.set()

    def lost(self, client: _Client) -> None:
        if client in self.free:
            self.free.remove(client)
        if client in self.under_way:
            self.under_way.discard(client)
            self.load.failed += 1
            if self.all_due and not self.under_way:
                self.idle.set()


async def open_loop(port: int, path: str, *, connections: int, rate: float, seconds: float) -> Load:
    """Send requests at a fixed rate per second over a number of connections, for some seconds.

    Return when the last request is answered.
    """
    loop = asyncio.get_running_loop()
    generator = _Generator(path)
    clients = [
        await loop.create_connection(lambda: _Client(generator), "127.0.0.1", port)
        for _ in range(connections)
    ]
    try:
        await generator.send(rate, seconds)
    finally:
        for transport, _ in clients:
            transport.close()
    await asyncio.sleep(0)
    return generator.load


async def capacity(port: int, path: str, *, connections: int, seconds: float) -> float:
    """Return how many requests per second are answered when more are always due."""
    rate, found = 100.0, 100.0
    while found > 0.8 * rate:
        rate *= 2
        load = await open_loop(port, path, connections=connections, rate=rate, seconds=seconds)
        found = load.throughput
    return found
