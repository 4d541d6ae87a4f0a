"""A proxy in front of the database that counts round trips and adds a delay.

`python -m tests.peers.wire HOST PORT MILLISECONDS` prints the port that it listens on.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class Wire:
    """A proxy to one server, on the event loop that it was opened on.

    Attributes:
        host: the server's host.
        port: the server's port.
        delay: seconds by which a question, and therefore its answer, arrives later.
        round_trips: questions so far. Data that follows without an answer in between belongs to
            the same question.
        own_port: the port to connect to instead.
    """

    host: str
    port: int
    delay: float = 0
    round_trips: int = 0
    own_port: int = 0

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator["Wire"]:
        """Accept connections on the proxy's own port."""
        server = await asyncio.get_running_loop().create_server(
            lambda: _Client(self), "127.0.0.1", 0
        )
        self.own_port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()


class _End(asyncio.Protocol):
    """One end of a connection, which queues data until it is connected."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None
        self.waiting: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        for data in self.waiting:
            transport.write(data)

    def send(self, data: bytes) -> None:
        if self.transport is None:
            self.waiting.append(data)
        elif not self.transport.is_closing():
            self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Client(_End):
    asks = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        server = self.other = _Server(self.wire)
        server.other = self
        address = self.wire.host, self.wire.port
        self.connecting = loop.create_task(loop.create_connection(lambda: server, *address))

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        if not self.asks:
            self.asks = True
            self.wire.round_trips += 1
        if self.wire.delay:
            asyncio.get_running_loop().call_later(self.wire.delay, self.other.send, data)
        else:
            self.other.send(data)


class _Server(_End):
    def data_received(self, data: bytes) -> None:
        assert isinstance(self.other, _Client)
        self.other.asks = False
        self.other.send(data)


async def main(host: str, port: str, milliseconds: str) -> None:
    """Forward until the standard input ends."""
    async with Wire(host, int(port), float(milliseconds) / 1000).listening() as wire:
        print(wire.own_port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
