"""Running work that a cancellation must not interrupt (rule 13), and work that may hang."""

import asyncio
import contextlib
import contextvars
import functools
import logging
import math
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import anyio
import greenlet  # type: ignore[import-untyped] # it comes with sqlalchemy[asyncio]

from .shared import SharedState

logger = logging.getLogger("fastapi_sqlnative")
T = TypeVar("T")
# Seconds that a cancelled task may take: a driver may be slow to give up on a server that hangs.
_GRACE: Final = 1.0


async def to_completion(
    start: Callable[[], Coroutine[Any, Any, T]],
    *,
    joins: bool = False,
    databases: Sequence[SharedState] = (),
    limit: float = math.inf,
    cancelled: bool = False,
) -> T | None:
    """Await the work that `start` begins, shielded from cancellation until its deadline.

    It runs in a task of its own. If `start` can be called again and then `joins` the work that has
    begun (see `once`), there is a task only after a cancellation. Two shields are needed: the task
    protects from asyncio's one-time cancellation, the shielded scope from anyio's, which is raised
    again at every await and would make the loop spin.

    The deadline is `limit` seconds after the cancellation, which has begun if the caller is
    `cancelled`, or the longest `shutdown_timeout` of the `databases` if that is less.
    """
    # In the caller's own context, not a copy: a session listener may reset a context variable with
    # the token of one that ran before. Not by the event loop's task factory, whose tasks may be
    # eager: such a task would have to enter a context that is in use.
    context = greenlet.getcurrent().gr_context
    task = None if joins else asyncio.Task(start(), context=context)
    cancellation: asyncio.CancelledError | None = None
    try:
        if not cancelled:
            return await (asyncio.shield(task) if task else start())
    except asyncio.CancelledError as error:
        cancellation = error
    task = task or asyncio.Task(start(), context=context)
    timeout = min(limit, max((each.shutdown_timeout for each in databases), default=math.inf))
    names = ", ".join(repr(each.name) for each in databases)
    unknown = "" if cancelled else ", and whether a COMMIT took effect is unknown"
    await _outlast_cancellation(task, timeout, names, unknown)
    if cancellation is None:
        return None if task.cancelled() else task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        logger.error("The work of a cancelled caller failed.", exc_info=failure)
    raise cancellation


async def _outlast_cancellation(
    task: asyncio.Task[Any], timeout: float, names: str, unknown: str
) -> None:
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    with anyio.CancelScope(shield=True):
        while not task.done():
            remaining = None if timeout == math.inf else max(deadline - clock(), 0)
            with contextlib.suppress(asyncio.CancelledError):  # raised again by the caller
                await asyncio.wait({task}, timeout=remaining)
            if not task.done() and clock() >= deadline:
                logger.error(
                    "Database %s did not finish within %s s of a cancellation: the connection is "
                    "discarded%s.",
                    names,
                    timeout,
                    unknown,
                )
                task.cancel()  # SQLAlchemy invalidates a connection whose operation is cancelled
                deadline = clock() + timeout  # its cleanup may hang as well


@types.coroutine
def without_yielding(work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Run a coroutine, but don't let the event loop run when it only offers to: `sleep(0)`.

    So no cancellation comes there. What it waits for can be cancelled as usual.
    """
    step: Callable[[], Any] = functools.partial(work.send, None)
    while True:
        try:
            awaited = step()
        except StopIteration as end:
            result: T = end.value
            return result
        step = functools.partial(work.send, None)
        if awaited is not None:
            try:
                yield awaited
            except BaseException as error:  # noqa: BLE001 - for the coroutine to handle
                step = functools.partial(work.throw, error)


def once(work: Callable[[], T]) -> Callable[[], T]:
    """Make a function that works at its first call; others wait for that and have its outcome."""
    lock, outcome = threading.Lock(), Future[T]()

    def call() -> T:
        with lock:
            if not outcome.done():
                _settle(outcome, work)
        return outcome.result()

    return call


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function that may hang in a daemon thread, which doesn't keep the process alive."""
    future = Future[T]()
    future.set_running_or_notify_cancel()
    work = functools.partial(contextvars.copy_context().run, function)
    arguments = future, work
    threading.Thread(target=_settle, args=arguments, name="fastapi_sqlnative", daemon=True).start()
    return future


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - raised where the future is waited for
        future.set_exception(error)
    else:
        future.set_result(result)


async def within(seconds: float, work: Coroutine[Any, Any, T], *, late: TimeoutError) -> T:
    """Await work in a task of its own; after `seconds`, cancel and abandon it, and raise `late`.

    A cancellation of the caller cancels the task too.
    """
    task = asyncio.create_task(work)
    # The caller may be cancelled as it fails: asyncio would log its error as never retrieved.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        in_time, _ = await asyncio.wait({task}, timeout=seconds)
        if not in_time:
            raise late
    finally:
        task.cancel()  # does nothing if it has ended
        with anyio.CancelScope(shield=True):
            await asyncio.wait({task}, timeout=_GRACE)
    if task.cancelled():
        # An ordinary error, because a CancelledError would pass for the caller's cancellation.
        raise RuntimeError("It raised CancelledError, although nobody had cancelled it.")
    return task.result()
