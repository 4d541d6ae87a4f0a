"""A TCP proxy on loopback, to lose or hold back what a driver and its server say."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

CHUNK = 65536


class Fault(Enum):
    """Name what happens to a COMMIT on its way."""

    NONE = "pass it on"
    DROPPED = "cut the connection before the server sees it"
    ANSWER_LOST = "let the server do it, and cut the connection before its answer"
    STALLED = "hold it back"
    SWALLOWED = "hold back everything else as well"


@dataclass
class Proxy:
    """Forward connections to one server, and do to a COMMIT what `fault` says."""

    host: str
    port: int
    fault: Fault = Fault.NONE
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    own_port: int = 0
    _pairs: list["_Pair"] = field(default_factory=list)

    @contextlib.contextmanager
    def listening(self) -> Iterator["Proxy"]:
        """Accept connections on a port of its own, each with two threads."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.own_port = listener.getsockname()[1]
            thread = threading.Thread(target=self._accept, args=(listener,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self.go_on.set()
                # close() alone would leave the thread in accept().
                listener.shutdown(socket.SHUT_RDWR)
                thread.join(10)
                for pair in self._pairs:
                    pair.cut()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                pair = _Pair(self, client, socket.create_connection((self.host, self.port)))
                self._pairs.append(pair)
                threading.Thread(target=pair.forward, daemon=True).start()
                threading.Thread(target=pair.answer, daemon=True).start()


@dataclass
class _Pair:
    """Join a client's connection to one of the server's."""

    proxy: Proxy
    client: socket.socket
    server: socket.socket
    muted: bool = False

    def forward(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.client.recv(CHUNK):
                # Drivers send COMMIT as text, and nothing else in these tests says it.
                if b"COMMIT" in data or self.proxy.fault is Fault.SWALLOWED:
                    self.fail()
                self.server.sendall(data)
            self.server.shutdown(socket.SHUT_RDWR)

    def answer(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.server.recv(CHUNK):
                if self.muted:
                    self.cut()
                self.client.sendall(data)
            self.client.shutdown(socket.SHUT_RDWR)

    def fail(self) -> None:
        self.proxy.reached.set()
        if self.proxy.fault in (Fault.STALLED, Fault.SWALLOWED):
            self.proxy.go_on.wait()
        elif self.proxy.fault is Fault.ANSWER_LOST:
            self.muted = True
        elif self.proxy.fault is Fault.DROPPED:
            self.cut()

    def cut(self) -> None:
        """Close both ends with a reset; whoever forwards next finds them closed."""
        for each in self.client, self.server:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
            each.close()
