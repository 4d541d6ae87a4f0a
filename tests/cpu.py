"""The CPU time of a request, measured by calling an application in process, without a server."""

import gc
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from fastapi import FastAPI

Request = Callable[[], Awaitable[None]]
Name = TypeVar("Name")
# The first call of a turn costs a third more than the last. After this many, the cost is steady.
WARM_UP = 15


def request(app: FastAPI, path: str = "/") -> Request:
    """Return a function that calls the application as a server would."""
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
        # A new state for each call, because some packages keep the request's session there.
        await app(scope | {"state": {}}, receive, send)

    return call


async def cpu(call: Request, times: int) -> float:
    """Return the CPU seconds of one call, averaged over many."""
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
    """Measure the calls in rounds, each round in a random order.

    Each turn begins with calls that are not counted. The processor no longer has the code of the
    last turn in its caches, so a call with more code would be charged for a cost that does not
    occur on a server. The order changes so that no call always follows the same other call, which
    may have left more or less of their common code in the caches.

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
