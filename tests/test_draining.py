"""Draining with real processes: SIGTERM, and a rolling restart under load."""

import asyncio
import multiprocessing
import operator
import re
import signal
from collections import Counter
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import anyio.to_thread
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import create_engine

from conftest import WorkerPostgres
from fastapi_sqlnative import install_database
from fastapi_sqlnative.exceptions import ApplicationAlreadyStartedError
from fastapi_sqlnative.health import drain_on_sigterm
from fastapi_sqlnative.testing import async_client
from tests.balancer import Balancer, exchange
from tests.draining_app import run
from tests.in_process import start_and_stop
from tests.serving import ASYNCPG, NO_TLS, PSYCOPG, PSYCOPG_ASYNC, Kind, Rows, until

pytestmark = pytest.mark.anyio

WORKERS = 18  # more than a pool has connections, so that probes find it full


# Processes are forked from one that has already imported what they need, because importing takes
# longer than the rest.
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.draining_app", "psycopg", "asyncpg"])


@dataclass
class Process:
    """A uvicorn process and the port that it listens on."""

    forked: ForkServerProcess
    log: Path
    port: int = 0

    def signal(self) -> None:
        """Send SIGTERM to the process."""
        self.forked.terminate()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def listens(self) -> bool:
        """Return whether the process listens, and store its port."""
        assert self.forked.is_alive(), self.said
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.said)
        self.port = int(found[1]) if found else 0
        return found is not None

    async def ended(self) -> int | None:
        await anyio.to_thread.run_sync(self.forked.join, 60)
        return self.forked.exitcode


class Processes:
    """The uvicorn processes of a test."""

    def __init__(self, kind: Kind, postgres: WorkerPostgres, folder: Path) -> None:
        self.kind = kind
        self.url = postgres.url(kind.driver)
        self.folder = folder
        self.started: list[Process] = []

    async def start(self, drain_seconds: float) -> Process:
        """Start a process that drains for the given time, and wait until it listens."""
        log = self.folder / f"{len(self.started)}.log"
        log.touch()
        forked = FORKING.Process(target=run, args=(self.kind, self.url, drain_seconds, log))
        forked.start()
        process = Process(forked, log)
        self.started.append(process)
        await until(process.listens, 90)
        return process


@pytest.fixture
async def processes(
    kind: Kind, postgres: WorkerPostgres, tmp_path: Path
) -> AsyncGenerator[Processes]:
    processes = Processes(kind, postgres, tmp_path)
    yield processes
    for process in processes.started:
        process.forked.kill()
        process.forked.join()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", [PSYCOPG_ASYNC, PSYCOPG], indirect=True, ids=lambda kind: kind.id)
async def test_a_process_that_is_told_to_end_drains_first(processes: Processes, rows: Rows) -> None:
    """After SIGTERM a process is not ready but still serves, and a second SIGTERM makes it end.

    It finishes its work before it ends. The second signal stands for the end of the drain time,
    because the duration of the test on this machine is unknown.
    """
    process = await processes.start(600)
    url = f"http://127.0.0.1:{process.port}"
    async with httpx.AsyncClient(base_url=url, timeout=60, verify=NO_TLS) as client:
        with rows.locked(9):
            assert (await client.get("/health/ready")).status_code == 200
            slow = asyncio.create_task(client.post("/slow"))
            await until(rows.waits)
            process.signal()
            await until(lambda: "The application is draining" in process.said)
            draining = await client.get("/health/ready")
            assert (draining.status_code, draining.json()["status"]) == (503, "draining")
            assert (await client.get("/health/live")).status_code == 200
            assert (await client.post("/items/late")).status_code == 201
            process.signal()
            await until(lambda: "Shutting down" in process.said)
        assert (await slow).json() == "done"
    assert await process.ended() == -signal.SIGTERM
    assert rows.names == ["late"]
    assert "Application shutdown complete" in process.said
    assert "Traceback" not in process.said
    await until(lambda: rows.backends(application="draining") == 0)


def test_a_signal_that_it_cannot_handle_is_left_alone() -> None:
    """SIGTERM's handler stays in place if it is the default one, and outside the main thread."""
    app = FastAPI()
    drain_on_sigterm(app)

    async def handler() -> object:
        async with app.router.lifespan_context(app):
            return signal.getsignal(signal.SIGTERM)

    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert asyncio.run(handler()) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, own)
        with ThreadPoolExecutor() as thread:
            assert thread.submit(asyncio.run, handler()).result() is own
        assert asyncio.run(handler()) is not own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_application_that_has_ended_gives_the_signal_back() -> None:
    """The server's handler is restored when the application ends, and the next run calls it."""
    app, received = FastAPI(), asyncio.Event()
    drain_on_sigterm(app, seconds=0)

    async def end() -> None:
        async with app.router.lifespan_context(app):
            signal.raise_signal(signal.SIGTERM)
            await asyncio.wait_for(received.wait(), 10)

    def own(*_: object) -> None:
        received.set()

    before = signal.signal(signal.SIGTERM, own)
    try:
        asyncio.run(start_and_stop(app))
        assert signal.getsignal(signal.SIGTERM) is own
        asyncio.run(end())
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_negative_time_is_refused() -> None:
    """A negative drain time raises ValueError."""
    with pytest.raises(ValueError, match="seconds must be at least 0 seconds, and finite"):
        drain_on_sigterm(FastAPI(), seconds=-1)


async def test_it_comes_too_late_once_the_application_runs() -> None:
    """`drain_on_sigterm` raises an error once the application runs, when it would be too late."""
    app = FastAPI()
    install_database(app, engine=create_engine("sqlite://"))
    async with async_client(app):
        with pytest.raises(ApplicationAlreadyStartedError, match="Call drain_on_sigterm where"):
            drain_on_sigterm(app)


@dataclass
class Load:
    """Workers that send one request after another through the balancer and record the answers."""

    port: int
    answers: list[bytes]
    ending: bool = False
    done: list[int] = field(default_factory=lambda: [0] * WORKERS)
    answered: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def send(self, worker: int) -> None:
        while not self.ending:
            name = f"{worker}-{self.done[worker]}"
            request = (
                f"POST /items/{name} HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\n"
                "Connection: close\r\n\r\n"
            )
            self.answers.append(await exchange(self.port, request.encode()))
            self.done[worker] += 1
            async with self.answered:
                self.answered.notify_all()
            await asyncio.sleep(0.02)  # leaves time for other work on this machine

    async def goes_on(self, count: int) -> None:
        """Wait for this many more answers."""
        wanted = len(self.answers) + count
        async with self.answered:
            await self.answered.wait_for(lambda: len(self.answers) >= wanted)

    async def has_been_answered(self) -> None:
        """Wait until every request that is in progress now has its answer."""
        now = self.done.copy()
        async with self.answered:
            await self.answered.wait_for(lambda: not any(map(operator.eq, now, self.done)))

    @property
    def served_by(self) -> Counter[int]:
        """Count the answers of each process, whose ID is their body."""
        return Counter(int(each.rpartition(b"\r\n")[2]) for each in self.answers)


@asynccontextmanager
async def load(port: int) -> AsyncGenerator[Load]:
    sending = Load(port, [])
    tasks = [asyncio.create_task(sending.send(number)) for number in range(WORKERS)]
    try:
        yield sending
    finally:
        sending.ending = True
        await asyncio.gather(*tasks)


@pytest.mark.timeout(180)  # three processes start, and the machine may be busy
@pytest.mark.parametrize(
    "kind",
    [PSYCOPG_ASYNC, pytest.param(ASYNCPG, marks=pytest.mark.other_driver)],
    indirect=True,
    ids=lambda kind: kind.id,
)
async def test_a_rolling_restart_fails_no_request(processes: Processes, rows: Rows) -> None:
    """Every request is answered and stored while two processes are stopped one by one under load.

    The process that replaces them drains for a tenth of a second and then ends by itself.
    """
    async with Balancer().listening() as balancer:
        # Started before the load, because they would compete with it for two processors.
        first, second, new = await asyncio.gather(*map(processes.start, (600, 600, 0.1)))
        await balancer.add(first.port)
        await balancer.add(second.port)
        async with load(balancer.port) as sending:
            await sending.goes_on(50)
            await balancer.add(new.port)
            for old in first, second:
                await sending.goes_on(20)
                old.signal()
                await balancer.finds(old.port, ready=False)
                await sending.has_been_answered()  # the old process drains until then
                old.signal()
                assert await old.ended() == -signal.SIGTERM
                await sending.goes_on(20)
        new.signal()
        assert await new.ended() == -signal.SIGTERM
        assert "The application is draining" in new.said
    answers = sending.answers
    assert [each for each in answers if not each.startswith(b"HTTP/1.1 201 ")] == []
    assert set(sending.served_by) == {each.forked.pid for each in processes.started}
    assert len(rows.names) == len(answers)
    for each in processes.started:
        assert "Traceback" not in each.said
