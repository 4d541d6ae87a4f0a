"""Tests on a real server of what a socket holds, and of its messages."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from fastapi import FastAPI
from websockets.sync.client import ClientConnection, connect

from conftest import WorkerPostgres
from examples.websockets.app import create_app
from fastapi_sqlnative import installed_databases
from tests.serving import Served, serve, wait_until


class Board:
    """Sockets to a server, and what they store."""

    def __init__(self, served: Served, sockets: ExitStack, app: FastAPI) -> None:
        self.client = served.client
        self._url = f"{served.url.replace('http', 'ws')}/board"
        self._sockets = sockets
        self._app = app

    def socket(self) -> ClientConnection:
        opened = connect(self._url, open_timeout=10, close_timeout=1)
        return self._sockets.enter_context(opened)

    @property
    def posts(self) -> int:
        found: int = self.client.get("/posts").json()
        return found

    @property
    def checked_out(self) -> int | None:
        return installed_databases(self._app)["default"].pool_status().checked_out


@contextmanager
def board() -> Generator[Board]:
    """Serve the example with a pool of one."""
    app = create_app(pool_size=1)
    with serve(app) as served, ExitStack() as sockets:
        yield Board(served, sockets, app)


def say(socket: ClientConnection, text: str) -> str:
    """Send one message, and wait for the reply."""
    socket.send(text)
    return str(socket.recv(timeout=10))


def test_a_message_is_stored_when_it_is_answered(databases: WorkerPostgres) -> None:
    """A reply confirms a commit, which later messages cannot undo."""
    with board() as running:
        socket = running.socket()
        assert say(socket, "hello") == "1 stored"
        assert running.posts == 1
        socket.close()
        assert running.posts == 1


def test_a_message_that_is_refused_fails_alone(databases: WorkerPostgres) -> None:
    """If the database refuses a message, it alone is rolled back, and the socket stays open."""
    with board() as running:
        socket = running.socket()
        answers = [say(socket, text) for text in ("hello", "", "again")]
        assert answers == ["1 stored", "refused", "3 stored"]
        assert running.posts == 2


def test_sockets_share_one_connection(databases: WorkerPostgres) -> None:
    """Forty open sockets write through a pool of one, and idle ones hold no connection."""
    with board() as running, ThreadPoolExecutor(8) as threads:
        sockets = [running.socket() for _ in range(40)]
        for _ in range(2):
            answers = list(threads.map(lambda socket: say(socket, "hello"), sockets))
            assert all(answer.endswith("stored") for answer in answers)
            assert running.checked_out == 0
        assert running.posts == 80


def test_a_client_that_leaves_leaves_nothing(databases: WorkerPostgres) -> None:
    """A client that vanishes with messages in transit leaves no connection in use."""
    with board() as running:
        for _ in range(10):
            socket = running.socket()
            assert say(socket, "hello").endswith("stored")
            for _ in range(5):
                socket.send("unheard")
            socket.socket.close()
        wait_until(lambda: running.checked_out == 0 and running.posts >= 10)
        assert say(running.socket(), "hello").endswith("stored")
