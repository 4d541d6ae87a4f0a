"""A load balancer on the loopback interface that forwards to ready backends and never retries."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

PROBE = b"GET /health/ready HTTP/1.1\r\nHost: balancer\r\nConnection: close\r\n\r\n"


@dataclass
class Balancer:
    """A balancer that forwards each connection to the next backend whose last probe found it ready.

    Each backend is probed every `interval` seconds. A connection that cannot be forwarded is closed
    and not tried on another backend, so the client's request fails.
    """

    interval: float = 0.05
    port: int = 0
    backends: dict[int, bool] = field(default_factory=dict)
    _turns: "itertools.count[int]" = field(default_factory=itertools.count)
    _asked: asyncio.Condition = field(default_factory=asyncio.Condition)
    _passing: set["asyncio.Task[None] | None"] = field(default_factory=set)

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator["Balancer"]:
        """Accept connections on a free port."""
        asking = asyncio.create_task(self._ask_for_ever())
        async with await asyncio.start_server(self._pass_on, "127.0.0.1", 0) as listener:
            self.port = listener.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                asking.cancel()
                await asyncio.wait([asking])
                await asyncio.gather(*filter(None, self._passing))

    async def add(self, port: int) -> None:
        """Add a backend, and wait until it is ready."""
        self.backends[port] = False
        await self.finds(port, ready=True)

    async def finds(self, port: int, *, ready: bool) -> None:
        """Wait until a probe has found a backend ready, or not ready."""
        async with self._asked:
            await self._asked.wait_for(lambda: self.backends[port] is ready)

    async def _ask_for_ever(self) -> None:
        while True:
            for port in tuple(self.backends):
                answer = await exchange(port, PROBE)
                self.backends[port] = answer.startswith(b"HTTP/1.1 200 ")
            async with self._asked:
                self._asked.notify_all()
            await asyncio.sleep(self.interval)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._passing.add(asyncio.current_task())
        ready = [port for port, is_ready in self.backends.items() if is_ready]
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, IndexError):
            port = ready[next(self._turns) % max(len(ready), 1)]
            there, back = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(back):
                both = {
                    asyncio.create_task(_copy(reader, back)),
                    asyncio.create_task(_copy(there, writer)),
                }
                # The exchange is over as soon as either side has closed its connection.
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                for each in both:
                    each.cancel()
                await asyncio.wait(both)
        self._passing.discard(asyncio.current_task())


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


async def exchange(port: int, request: bytes) -> bytes:
    """Send one request on its own connection, and return the response, or nothing on failure."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return b""
    with contextlib.closing(writer):
        try:
            writer.write(request)
            return await reader.read()
        except ConnectionError:
            return b""
