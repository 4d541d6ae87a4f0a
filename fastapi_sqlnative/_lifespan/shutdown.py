"""Closing databases: in reverse order, each within its deadline, all even if some fail."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio

from .._sessions.completion import ended_within, in_thread
from .._sessions.engines import dispose
from .._sessions.shared import SharedState
from ..databases import AnyDatabase, database_class, sessions_of
from .running import Installation, Running

logger = logging.getLogger("fastapi_sqlnative")

# Seconds that a hook gets even if others have used up the time for all.
_LEAST: Final = 1.0


async def stop(runs: Sequence[Running]) -> None:
    """End one lifespan's runs, and close the databases that no other lifespan uses.

    Raises:
        ExceptionGroup: with the errors of all hooks and disposals, after all have run.
    """
    ending: list[tuple[Installation, AnyDatabase]] = []
    for installed in (each.installed for each in reversed(runs)):
        if all(each in runs for each in installed.runs):  # else another lifespan still uses it
            installed.draining = True
            last_first = reversed(installed.by_name.values())
            ending += [(each, each.database) for each in last_first if each.database is not None]
    for _, database in ending:
        sessions_of(database).state.stopping = "shutting down"
    longest = max((each.shutdown_timeout for each, _ in ending), default=0)
    deadline = anyio.current_time() + longest
    errors: list[Exception] = []
    for installation, database in ending:
        await _close(installation, database, deadline, errors)
    for each in runs:
        each.installed.runs.remove(each)  # only now: until here requests get the right error
    if errors:
        raise ExceptionGroup("Databases failed to shut down", errors)


async def _close(
    installation: Installation, database: AnyDatabase, total: float, errors: list[Exception]
) -> None:
    deadline = min(anyio.current_time() + installation.shutdown_timeout, total)
    state = sessions_of(database).state
    await _drain(state, deadline)
    state.stopping = "stopped"
    installation.database = None
    steps: dict[str, Callable[[], Any]] = {}
    if installation.shutdown is not None:
        steps["shutdown hook"] = installation.shutdown
    if database_class(installation.engine) is None:
        steps["dispose"] = functools.partial(dispose, database.engine)
    least = min(_LEAST, installation.shutdown_timeout)
    for step, function in steps.items():
        try:
            await _call_within(max(deadline - anyio.current_time(), least), function)
        except Exception as error:  # noqa: BLE001 - raised with the others at the end
            error.add_note(f"In the {step} of database {database.name!r}.")
            errors.append(error)


async def _drain(state: SharedState, deadline: float) -> None:
    """Wait until our sessions have released their connections, but not for other code's."""
    # Sessions may end in threads, so there is no event to await.
    while state.holders and anyio.current_time() < deadline:  # noqa: ASYNC110
        await anyio.sleep(0.01)
    if left := len(state.holders):
        logger.warning(
            "Database %r is closed with %d connection(s) still in use; the sessions that hold "
            "them can run no more statements.",
            state.name,
            left,
        )


async def _call_within(seconds: float, function: Callable[[], Any]) -> None:
    """Call a hook in a task of its own, which is abandoned if it ignores its cancellation."""
    task = asyncio.create_task(call_off_loop(function))
    if not await ended_within(seconds, task, grace=_LEAST):
        raise TimeoutError(f"It did not end within {seconds:.1f} s.")
    if task.cancelled():
        # An ordinary error, because a CancelledError would end the shutdown of the rest.
        raise RuntimeError("It raised CancelledError, although nobody had cancelled it.")
    task.result()


async def call_off_loop(function: Callable[[], Any]) -> None:
    """Call a hook, in a thread if it is synchronous."""
    if inspect.iscoroutinefunction(function):
        await function()
        return
    result = await asyncio.wrap_future(in_thread(function))
    if inspect.isawaitable(result):
        await result
