"""A TCP proxy on loopback that loses, delays or holds back what a driver and its server send."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from enum import Enum

CHUNK = 65536
DELAY = 0.02  # seconds, each way


class Fault(Enum):
    """What the proxy does to a COMMIT, to what `Proxy.at` contains instead, or to all traffic."""

    NONE = "pass it on"
    DROPPED = "cut the connection before the server sees it"
    ANSWER_LOST = "let the server do it, and cut the connection before its answer"
    STALLED = "hold it back"
    REFUSED = "reset whoever connects"
    FROZEN = "hold everything back"
    SWALLOWED = "lose everything without a word"
    SLOW = "pass everything on late"


@dataclass
class Proxy:
    """A proxy that forwards connections to one server and applies `fault` to them.

    Data that is held back is passed on when `go_on` is set.
    """

    host: str
    port: int
    fault: Fault = Fault.NONE
    at: bytes = b"COMMIT"  # drivers send it as text, and nothing else in these tests contains it
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)  # a client has disconnected
    own_port: int = 0
    _pairs: list["_Pair"] = field(default_factory=list)

    @contextlib.contextmanager
    def listening(self) -> Generator["Proxy"]:
        """Accept connections on a free port, with two threads for each."""
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
                self.reset()

    def reset(self, age: float = 0.0) -> None:
        """Cut every connection that is at least this many seconds old."""
        for each in tuple(self._pairs):
            if time.monotonic() - each.since >= age:
                self._pairs.remove(each)
                each.cut()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._join(client)

    def _join(self, client: socket.socket) -> None:
        try:
            if self.fault is Fault.REFUSED:
                raise ConnectionRefusedError
            server = socket.create_connection((self.host, self.port))
        except ConnectionRefusedError:
            _cut(client)
            return
        pair = _Pair(self, client, server)
        self._pairs.append(pair)
        threading.Thread(target=pair.forward, daemon=True).start()
        threading.Thread(target=pair.answer, daemon=True).start()


@dataclass(eq=False)
class _Pair:
    """A client's connection and the connection to the server that belongs to it."""

    proxy: Proxy
    client: socket.socket
    server: socket.socket
    muted: bool = False
    since: float = field(default_factory=time.monotonic)

    def forward(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.client.recv(CHUNK):
                if self.proxy.at in data:
                    self.fail()
                if self.passes():
                    self.server.sendall(data)
        self.proxy.left.set()
        _hang_up(self.server)

    def answer(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.server.recv(CHUNK):
                if self.muted:
                    self.cut()
                if self.passes():
                    self.client.sendall(data)
        _hang_up(self.client)

    def passes(self) -> bool:
        if self.proxy.fault is Fault.SLOW:
            time.sleep(DELAY)
        elif self.proxy.fault is Fault.FROZEN:
            self.proxy.reached.set()
            self.proxy.go_on.wait()
        return self.proxy.fault is not Fault.SWALLOWED

    def fail(self) -> None:
        self.proxy.reached.set()
        if self.proxy.fault is Fault.STALLED:
            self.proxy.go_on.wait()
        elif self.proxy.fault is Fault.ANSWER_LOST:
            self.muted = True
        elif self.proxy.fault is Fault.DROPPED:
            self.cut()

    def cut(self) -> None:
        """Close both ends with a reset, so that the threads that forward find them closed."""
        _cut(self.client)
        _cut(self.server)


def _cut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    _hang_up(end)
    end.close()


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
