"""What a request costs in CPU time: calls of an application in this process, without a server."""

import gc
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from fastapi import FastAPI

Request = Callable[[], Awaitable[None]]
Name = TypeVar("Name")
# The first call of a turn costs a third more than the last one; after so many, the cost is steady.
WARM_UP = 15


def request(app: FastAPI, path: str = "/") -> Request:
    """Make a call of the application as a server would make it."""
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
        # A state of its own: some packages keep the request's session there.
        await app(scope | {"state": {}}, receive, send)

    return call


async def cpu(call: Request, times: int) -> float:
    """Return the CPU seconds of one call, among many."""
    before = time.process_time()
    for _ in range(times):
        await call()
    return (time.process_time() - before) / times


async def alternate(
    calls: Mapping[Name, Request],
    *,
    rounds: int,
    times: int,
    after_each: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Measure the calls in rounds, each in an order of its own.

    A turn begins with calls that do not count: the processor has forgotten the code since the last
    one, and whoever has more of it would pay for what no server does. Nobody always follows the
    same one, who may have left more or less of the code that both use.

    Returns:
        The CPU seconds of one call, by name and round.
    """
    found: dict[Name, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        await cpu(call, times)
    order = list(calls)
    shuffled = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                await cpu(calls[name], WARM_UP)
                found[name].append(await cpu(calls[name], times))
                after_each()
            gc.collect()
    finally:
        gc.enable()
    return found
