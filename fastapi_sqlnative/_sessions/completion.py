"""Running work that a cancellation must not interrupt (rule 13), and work that may hang."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import anyio
import greenlet  # type: ignore[import-untyped] # it comes with sqlalchemy[asyncio]

logger = logging.getLogger("fastapi_sqlnative")
T = TypeVar("T")


async def to_completion(
    running: Coroutine[Any, Any, None],
    *,
    databases: Sequence[str] = (),
    timeout: float = math.inf,
    cancelled: bool = False,
    abandon: Callable[[asyncio.Task[None]], object] = lambda task: task.cancel(),
) -> None:
    """Await work in a task of its own, shielded from cancellation until `timeout` has passed.

    Two shields are needed: the task protects from asyncio's one-time cancellation, the shielded
    scope from anyio's, which is raised again at every await and would make the loop spin.

    Args:
        running: the work.
        databases: their names, for the log.
        timeout: seconds from the cancellation; `math.inf` waits for ever.
        cancelled: the caller is already being cancelled.
        abandon: called with the task when the timeout has passed. SQLAlchemy invalidates a
            connection whose operation is cancelled.
    """

    def give_up(task: asyncio.Task[None]) -> None:
        logger.error(
            "Database %s did not finish within %s s of a cancellation: the connection is "
            "discarded%s.",
            ", ".join(map(repr, databases)),
            timeout,
            "" if cancelled else ", and whether a COMMIT took effect is unknown",
        )
        abandon(task)

    # In the caller's own context, not a copy: a session listener may reset a context variable with
    # the token of one that ran before. An eager task could not enter it, so not with a factory.
    factory = asyncio.get_running_loop().get_task_factory()
    context = greenlet.getcurrent().gr_context if factory is None else None
    task = asyncio.create_task(running, context=context)
    cancellation: asyncio.CancelledError | None = None
    try:
        if not cancelled:
            await asyncio.shield(task)
            return
    except asyncio.CancelledError as error:
        cancellation = error
    await _outlast_cancellation(task, timeout, give_up)
    if cancellation is None:
        if not task.cancelled():
            task.result()
        return
    if not task.cancelled() and (failure := task.exception()) is not None:
        logger.error("The work of a cancelled caller failed.", exc_info=failure)
    raise cancellation


async def _outlast_cancellation(
    task: asyncio.Task[None], timeout: float, abandon: Callable[[asyncio.Task[None]], None]
) -> None:
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    with anyio.CancelScope(shield=True):
        while not task.done():
            remaining = None if timeout == math.inf else max(deadline - clock(), 0)
            with contextlib.suppress(asyncio.CancelledError):  # raised again by the caller
                await asyncio.wait({task}, timeout=remaining)
            if not task.done() and clock() >= deadline:
                abandon(task)
                deadline = clock() + timeout  # its cleanup may hang as well


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function that may hang in a daemon thread, which doesn't keep the process alive."""
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
    """Wait for a task for `seconds` and return whether it ended; if not, cancel and abandon it.

    A cancellation of the caller cancels the task too. It then has `grace` seconds to end, because
    a driver may be slow to give up on a server that hangs.
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
    # Otherwise asyncio would log the late exception as never retrieved.
    if not late.cancelled():
        late.exception()
