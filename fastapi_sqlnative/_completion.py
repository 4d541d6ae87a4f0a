"""Work that a cancellation does not interrupt (rule 12)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

logger = logging.getLogger("fastapi_sqlnative")


async def to_completion(
    running: Coroutine[Any, Any, None],
    *,
    timeout: float = math.inf,
    cancelled: bool = False,
    abandon: Callable[[asyncio.Task[None]], None] | None = None,
) -> None:
    """Await work in a task of its own, which a cancellation reaches only after its deadline.

    Both shields are needed: a task of its own against asyncio's one-time cancellation, a
    shielded scope against anyio's, which comes back at every await and would spin.
    """
    task = asyncio.create_task(running)
    cancellation: asyncio.CancelledError | None = None
    try:
        if not cancelled:
            await asyncio.shield(task)
            return
    except asyncio.CancelledError as error:
        cancellation = error
    await _outlast_cancellation(task, timeout, abandon)
    if cancellation is None:
        if not task.cancelled():
            task.result()
        return
    if not task.cancelled() and (failure := task.exception()) is not None:
        logger.error("What a cancelled caller was to wait for has failed.", exc_info=failure)
    raise cancellation


async def _outlast_cancellation(
    task: asyncio.Task[None], timeout: float, abandon: Callable[[asyncio.Task[None]], None] | None
) -> None:
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    with anyio.CancelScope(shield=True):
        while not task.done():
            remaining = None if abandon is None else max(deadline - clock(), 0)
            with contextlib.suppress(asyncio.CancelledError):  # raised again by the caller
                await asyncio.wait({task}, timeout=remaining)
            if abandon is not None and not task.done() and clock() >= deadline:
                abandon(task)
                deadline = clock() + timeout  # what it does then may hang as well
