"""Compare the cost of a request with the hand-written dependency's, side by side in one run.

Everything runs in one process, without HTTP parsing, and is measured in CPU time: rounds of the
variants alternate, and the median of the per-round ratios counts. Only ratios are promised.
"""

import asyncio
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, MutableMapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Response
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker

from fastapi_sqlnative import get_db, install_database, transactional
from fastapi_sqlnative.telemetry import instrument_pools
from tests.postgres_choice import start_postgres

Request = Callable[[], Awaitable[None]]
ROUNDS, CALLS = 25, 100
# What the project promises: at most this ratio to the hand-written dependency.
UNTOUCHED, READ = 0.75, 1.10
# And what a read may cost with the pools' metrics, to the same without.
METRICS = 1.10


def asynchronous(engine: AsyncEngine) -> FastAPI:
    """Build an application with the same endpoints over both dependencies."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    maker = async_sessionmaker(engine, expire_on_commit=False)

    async def hand() -> AsyncGenerator[AsyncSession]:
        async with maker() as session:
            yield session

    @app.get("/bare/untouched")
    async def bare() -> Response:
        return Response()

    def routes(prefix: str, dependency: Callable[..., Any]) -> None:
        @app.get(f"/{prefix}/untouched")
        async def untouched(session: Annotated[AsyncSession, Depends(dependency)]) -> Response:
            return Response()

        @app.get(f"/{prefix}/read")
        async def read(session: Annotated[AsyncSession, Depends(dependency)]) -> Response:
            await session.scalar(select(1))
            return Response()

    for prefix, dependency in ("hand", hand), ("get_db", get_db()), ("tx", transactional()):
        routes(prefix, dependency)
    return app


def synchronous(engine: Engine) -> FastAPI:
    """Build the same for a sync engine."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    maker = sessionmaker(engine, expire_on_commit=False)

    def hand() -> Generator[Session]:
        with maker() as session:
            yield session

    @app.get("/bare/untouched")
    def bare() -> Response:
        return Response()

    def routes(prefix: str, dependency: Callable[..., Any]) -> None:
        @app.get(f"/{prefix}/untouched")
        def untouched(session: Annotated[Session, Depends(dependency)]) -> Response:
            return Response()

        @app.get(f"/{prefix}/read")
        def read(session: Annotated[Session, Depends(dependency)]) -> Response:
            session.scalar(select(1))
            return Response()

    for prefix, dependency in ("hand", hand), ("get_db", get_db()), ("tx", transactional()):
        routes(prefix, dependency)
    return app


def request(app: FastAPI, path: str) -> Request:
    """Make a call of the application as a server would make it, for one path."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "state": {},
    }

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        assert message.get("status", 200) == 200

    async def call() -> None:
        await app(dict(scope), receive, send)

    return call


async def cpu(call: Request, times: int) -> float:
    """Return the CPU seconds of one call, among many."""
    before = time.process_time()
    for _ in range(times):
        await call()
    return (time.process_time() - before) / times


async def compare(app: FastAPI, times: int) -> dict[str, list[float]]:
    """Measure every path in alternating rounds."""
    prefixes = ("hand", "get_db", "tx")
    paths = [
        "/bare/untouched",
        *(f"/{one}/{two}" for two in ("untouched", "read") for one in prefixes),
    ]
    found: dict[str, list[float]] = {path: [] for path in paths}
    async with app.router.lifespan_context(app):
        calls = {path: request(app, path) for path in paths}
        for call in calls.values():
            await cpu(call, times // 4)
        gc.collect()
        gc.disable()
        for _ in range(ROUNDS):
            for path, call in calls.items():
                found[path].append(await cpu(call, times))
        gc.enable()
    return found


def ratios(found: dict[str, list[float]], prefix: str) -> tuple[float, float]:
    """Return the overhead of an untouched session and the cost of a read, to hand-written."""
    bare, hand, ours = (found[f"/{one}/untouched"] for one in ("bare", "hand", prefix))
    untouched = statistics.median(
        (c - a) / (b - a) for a, b, c in zip(bare, hand, ours, strict=True)
    )
    reads = zip(found["/hand/read"], found[f"/{prefix}/read"], strict=True)
    return untouched, statistics.median(c / b for b, c in reads)


def measure(app: FastAPI, name: str) -> bool:
    """Print the ratios of one application; return whether the promised ones are kept."""
    kept = True
    found = asyncio.run(compare(app, CALLS))
    for prefix in ("get_db", "tx"):
        untouched, read = ratios(found, prefix)
        print(f"{name:16}{prefix:10}{untouched:12.2f}{read:12.2f}", flush=True)
        if prefix == "get_db":
            kept = untouched <= UNTOUCHED and read <= READ
    return kept


async def compare_metrics(plain: FastAPI, metered: FastAPI) -> float:
    """Return the cost of a read with metrics, to the same read without."""
    both = [request(app, "/get_db/read") for app in (plain, metered)]
    async with plain.router.lifespan_context(plain), metered.router.lifespan_context(metered):
        for call in both:
            await cpu(call, CALLS // 4)
        gc.collect()
        gc.disable()
        rounds = [[await cpu(call, CALLS) for call in both] for _ in range(ROUNDS)]
        gc.enable()
    return statistics.median(there / before for before, there in rounds)


def measure_metrics(build: Callable[[], FastAPI], name: str) -> bool:
    """Print the cost of the pools' metrics; return whether it is what was promised."""
    plain, metered = build(), build()
    instrument_pools(metered, meter_provider=MeterProvider([InMemoryMetricReader()]))
    ratio = asyncio.run(compare_metrics(plain, metered))
    print(f"{name:16}{'metrics':10}{'':12}{ratio:12.2f}   (without = 1.00)", flush=True)
    return ratio <= METRICS


def main() -> int:
    """Print a table; return 1 when a promised ratio is missed."""
    kept = True
    with contextlib.ExitStack() as closing:
        url = start_postgres(None, closing).url.removeprefix("postgresql://")
        print(f"{'':16}{'':10}{'untouched':>12}{'one read':>12}   (hand-written = 1.00)")
        psycopg, asyncpg = f"postgresql+psycopg://{url}", f"postgresql+asyncpg://{url}"
        builds: dict[str, Callable[[], FastAPI]] = {
            "psycopg async": lambda: asynchronous(create_async_engine(psycopg)),
            "asyncpg": lambda: asynchronous(create_async_engine(asyncpg)),
            "psycopg sync": lambda: synchronous(create_engine(psycopg)),
        }
        for name, build in builds.items():
            app = build()
            # Whatever else the machine does only ever adds to a ratio: the best of three counts.
            kept &= any(measure(app, name) for _ in range(3))
            kept &= any(measure_metrics(build, name) for _ in range(3))
    print(f"promised{'':8}{'get_db':10}{UNTOUCHED:12.2f}{READ:12.2f}")
    print(f"promised{'':8}{'metrics':10}{'':12}{METRICS:12.2f}")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
