"""The parts of the comparison, each a function that fills its results.

The contestants take turns within each round, and each round has a different order. Therefore other
work on the machine and any drift affect all of them alike.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass

from fastapi import FastAPI
from sqlalchemy import make_url

from tests.cpu import Request, alternate, cpu, request
from tests.peers.contestants import BY_HAND, Contestant, installed
from tests.peers.load import capacity, open_loop
from tests.peers.processes import Process, running
from tests.peers.results import Results, Row
from tests.peers.wire import Wire
from tests.peers.workloads import WORKLOADS, Workload, workload


@dataclass(frozen=True)
class Engine:
    """A driver, the colour of its engine, and the client connections under load.

    The second to last of `connections` represents an ordinary load.
    """

    name: str
    driver: str
    asynchronous: bool
    connections: tuple[int, ...] = (8, 64, 512)

    @property
    def colour(self) -> str:
        """Return the colour's name in the arguments of `tests.peers.server`."""
        return "async" if self.asynchronous else "sync"

    def url(self, address: str, port: int | None = None) -> str:
        """Return the URL of the database for this driver."""
        url = make_url(address).set(drivername=f"postgresql+{self.driver}")
        url = url if port is None else url.set(host="127.0.0.1", port=port)
        return url.render_as_string(hide_password=False)

    def contestants(self, each: Workload) -> list[Contestant]:
        """List the contestants that can run a workload."""
        return [one for one in installed() if one.serves(each, asynchronous=self.asynchronous)]


PSYCOPG = Engine("psycopg", "psycopg", True)
ASYNCPG = Engine("asyncpg", "asyncpg", True)
# More connections than FastAPI has threads would measure the hand-written dependencies' deadlock:
# every thread waits for the pool until its timeout, and the requests that hold the connections wait
# for a thread.
SYNC = Engine("psycopg, sync `def`", "psycopg", False, (8, 24, 40))
ENGINES = (PSYCOPG, ASYNCPG, SYNC)

# Takes a label and the number of steps, and returns a function to call after each step.
Progress = Callable[[str, int], Callable[[], None]]


@contextlib.asynccontextmanager
async def started(engine: Engine, url: str) -> AsyncGenerator[dict[str, FastAPI]]:
    """Run the lifespan of every contestant's application."""
    async with contextlib.AsyncExitStack() as lifespans:
        apps: dict[str, FastAPI] = {}
        for each in engine.contestants(WORKLOADS[0]):
            app = apps[each.name] = each.application([url], asynchronous=engine.asynchronous)
            await lifespans.enter_async_context(app.router.lifespan_context(app))
        yield apps


def calls_of(engine: Engine, apps: dict[str, FastAPI]) -> dict[tuple[str, str], Request]:
    """Return a call for each workload and contestant."""
    return {
        (each.name, one.name): request(apps[one.name], each.path)
        for each in WORKLOADS
        for one in engine.contestants(each)
    }


# -- CPU of a request, in process -----------------------------------------------------------------


def measure_cpu(
    address: str, results: Results, progress: Progress, *, rounds: int, quick: bool
) -> None:
    """Measure the CPU time of a request in the application alone, without HTTP."""
    times = 5 if quick else 15
    for engine in ENGINES:
        asyncio.run(_cpu(engine, engine.url(address), results, progress, rounds, times))


async def _cpu(
    engine: Engine, url: str, results: Results, progress: Progress, rounds: int, times: int
) -> None:
    async with started(engine, url) as apps:
        calls = calls_of(engine, apps)
        step = progress(f"CPU, {engine.name}", rounds * len(calls))
        found = await alternate(calls, rounds=rounds, times=times, after_each=step)
        for (name, contestant), values in found.items():
            results.add(Row("cpu", engine.name, "", name), contestant, *values)


# -- round trips, on the wire ---------------------------------------------------------------------


def measure_wire(
    address: str, results: Results, progress: Progress, *, rounds: int, quick: bool
) -> None:
    """Count the round trips of a request between its application and the database."""
    del rounds, quick  # the count is the same every time
    for engine in ENGINES:
        asyncio.run(_wire(engine, address, results, progress))


async def _wire(engine: Engine, address: str, results: Results, progress: Progress) -> None:
    server = make_url(address)
    wire = Wire(server.host or "", server.port or 5432)
    async with wire.listening(), started(engine, engine.url(address, wire.own_port)) as apps:
        calls = calls_of(engine, apps)
        step = progress(f"round trips, {engine.name}", len(calls))
        for (name, contestant), call in calls.items():
            await cpu(call, 3)  # connects and prepares the statements
            before = wire.round_trips
            await call()
            results.add(Row("trips", engine.name, "", name), contestant, wire.round_trips - before)
            step()


# -- under uvicorn, in an open loop ---------------------------------------------------------------

# Twice the capacity of the hand-written dependency, so that every contestant falls behind, and half
# of it.
OVERLOAD, CALM = 2.0, 0.5
MILLISECONDS = (0, 1, 5)


@dataclass(frozen=True)
class Cell:
    """One row under load: the workload, the connections, and the rate relative to the capacity."""

    workload: Workload
    connections: int
    of_capacity: float

    def row(self, engine: Engine, milliseconds: int, measure: str) -> Row:
        """Return the row for a measure of this cell."""
        calm = self.of_capacity == CALM
        name = f"{milliseconds} ms" if calm else f"{self.connections} at {milliseconds} ms"
        measure = f"{measure}, calm" if calm else measure
        return Row(measure, engine.name, self.workload.name, name)


def cells(engine: Engine, *, quick: bool) -> Iterator[Cell]:
    """Yield the cells that are measured for an engine at each delay."""
    usual = engine.connections[-2]
    for path in ("/read", "/write"):
        yield Cell(workload(path), usual, CALM)
        for connections in (usual,) if quick else engine.connections:
            yield Cell(workload(path), connections, OVERLOAD)


def measure_load(
    address: str, results: Results, progress: Progress, *, rounds: int, quick: bool
) -> None:
    """Measure throughput and latency of asynchronous servers, each in its own process."""
    _measure_load(ASYNCPG, address, results, progress, rounds=rounds, quick=quick)


def measure_load_sync(
    address: str, results: Results, progress: Progress, *, rounds: int, quick: bool
) -> None:
    """Measure throughput and latency of synchronous servers, each in its own process."""
    _measure_load(SYNC, address, results, progress, rounds=rounds, quick=quick)


def _measure_load(
    engine: Engine,
    address: str,
    results: Results,
    progress: Progress,
    *,
    rounds: int,
    quick: bool,
) -> None:
    server = make_url(address)
    for milliseconds in (0, 1) if quick else MILLISECONDS:
        with contextlib.ExitStack() as processes:
            port = None
            if milliseconds:
                wire = running("wire", server.host, server.port, milliseconds)
                port = processes.enter_context(wire).port
            url = engine.url(address, port)
            servers = {
                each.name: processes.enter_context(
                    running("server", each.name, engine.colour, url, 1)
                )
                for each in engine.contestants(WORKLOADS[0])
            }
            for cell in cells(engine, quick=quick):
                asyncio.run(_load(cell, engine, milliseconds, servers, results, progress, rounds))


async def _load(
    cell: Cell,
    engine: Engine,
    milliseconds: int,
    servers: dict[str, Process],
    results: Results,
    progress: Progress,
    rounds: int,
) -> None:
    path = cell.workload.path
    order = [each.name for each in engine.contestants(cell.workload)]
    for name in order:  # opens every connection of the pool before anything counts
        await open_loop(servers[name].port, path, connections=32, rate=400, seconds=0.2)
    by_hand, usual = servers[BY_HAND[0]], engine.connections[-2]
    most = await capacity(by_hand.port, path, connections=usual, seconds=0.3)
    label = f"{engine.name}, {cell.workload.name}, {cell.connections} at {milliseconds} ms"
    step = progress(label, rounds * len(order))
    for _ in range(rounds):
        for name in order:
            before = servers[name].used()
            load = await open_loop(
                servers[name].port,
                path,
                connections=cell.connections,
                rate=most * cell.of_capacity,
                # A server that falls behind needs twice that time or more to answer.
                seconds=1.0 if cell.of_capacity == CALM else 0.5,
            )
            cpu = servers[name].used()["cpu"] - before["cpu"]
            results.add(cell.row(engine, milliseconds, "failed"), name, load.failed)
            results.add(cell.row(engine, milliseconds, "p50"), name, load.percentile(50))
            results.add(cell.row(engine, milliseconds, "p99"), name, load.percentile(99))
            results.add(
                cell.row(engine, milliseconds, "server CPU"), name, cpu / len(load.latencies)
            )
            if cell.of_capacity != CALM:
                results.add(cell.row(engine, milliseconds, "throughput"), name, load.throughput)
            step()
        order.append(order.pop(0))


# -- one, ten and a hundred databases -------------------------------------------------------------

DATABASES = (1, 10, 100)


def measure_databases(
    address: str, results: Results, progress: Progress, *, rounds: int, quick: bool
) -> None:
    """Measure memory, start-up and the CPU time of a read for each number of databases."""
    times = 50 if quick else 300
    names = [each.name for each in ASYNCPG.contestants(workload("/read"))]
    step = progress("databases", rounds * len(names) * len(DATABASES))
    url = ASYNCPG.url(address)
    for databases in DATABASES:
        for _ in range(rounds):
            for name in names:
                asyncio.run(_databases(name, databases, url, times, results))
                step()
            names.append(names.pop(0))


async def _databases(name: str, databases: int, url: str, times: int, results: Results) -> None:
    row = "1 database" if databases == 1 else f"{databases} databases"
    with running("server", name, "async", url, databases) as server:
        ready = server.used()
        await open_loop(server.port, "/read", connections=8, rate=500, seconds=0.1)
        before = server.used()
        load = await open_loop(server.port, "/read", connections=1, rate=times, seconds=1)
        after = server.used()
    cpu = (after["cpu"] - before["cpu"]) / len(load.latencies)
    results.add(Row("server CPU", ASYNCPG.name, "one read", row), name, cpu)
    results.add(Row("memory", ASYNCPG.name, "one read", row), name, after["memory"])
    results.add(Row("start-up", ASYNCPG.name, "one read", row), name, ready["cpu"])
