"""Work that a cancellation does not interrupt (rule 13), and work that may hang."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import anyio

logger = logging.getLogger("fastapi_sqlnative")
T = TypeVar("T")


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


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call what may hang in a daemon thread of its own: the process can end all the same."""
    future = Future[T]()
    future.set_running_or_notify_cancel()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(function)
        except BaseException as error:  # noqa: BLE001 - raised where the future is waited for
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="fastapi_sqlnative", daemon=True).start()
    return future


async def ended_within(seconds: float, task: asyncio.Task[Any], *, grace: float = 0) -> bool:
    """Wait so long for a task, and tell whether it has ended; else cancel it and leave it behind.

    A cancellation of the caller cancels it too. It gets so many seconds of grace to end: a driver
    may take its own time to let go of a server that hangs.
    """
    try:
        await asyncio.wait({task}, timeout=seconds)
        return task.done()
    finally:
        if not task.done():
            task.add_done_callback(_mark_retrieved)
            task.cancel()
            if grace:
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({task}, timeout=grace)


def _mark_retrieved(late: asyncio.Future[Any]) -> None:
    # Else asyncio would report a failure that came too late as one that was forgotten.
    if not late.cancelled():
        late.exception()
