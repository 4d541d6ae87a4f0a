"""Readiness checks of the application's own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from .._completion import in_thread


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check has found: whether it is ready, and a word that everybody may read."""

    ready: bool
    state: str


Check: TypeAlias = Callable[..., bool | CheckResult | Awaitable[bool | CheckResult]]


@dataclass(frozen=True, slots=True)
class ReadinessCheck:
    """A check with a time of its own, or one that is only reported.

    Attributes:
        check: a function, sync or async, of the application or of nothing, which returns `True`,
            `False` or a `CheckResult`. A sync one runs in a thread.
        timeout: seconds, within those of the router; `None` for all of them.
        required: with `False` its failure is reported, and the application still ready.
    """

    check: Check
    timeout: float | None = None
    required: bool = True


def arguments_for(name: str, check: Check, app: object) -> tuple[object, ...]:
    """Return what a check is called with: nothing, or the application."""
    for arguments in ((), (app,)):
        with suppress(TypeError):
            inspect.signature(check).bind(*arguments)
            return arguments
    raise TypeError(
        f"Check {name!r} must be a function of the application or of nothing, or a ReadinessCheck "
        f"of one, not {check!r}."
    )


def is_async(check: Check) -> bool:
    """Tell whether calling it gives a coroutine, be it a function, an object or a partial."""
    call = getattr(type(check), "__call__", None)  # noqa: B004 - its kind, not whether it is
    return inspect.iscoroutinefunction(check) or inspect.iscoroutinefunction(call)


async def run_check(name: str, check: Check, app: object) -> CheckResult:
    """Call a check, a sync one in a thread; raise TypeError for what it may not return."""
    arguments = arguments_for(name, check, app)
    found: Any
    if is_async(check):
        found = check(*arguments)
    else:
        found = await asyncio.wrap_future(in_thread(lambda: check(*arguments)))
    match await found if inspect.isawaitable(found) else found:
        case bool(ready):
            return CheckResult(ready, "up" if ready else "down")
        case CheckResult(ready=bool(), state=str()) as result:
            return result
        case other:
            raise TypeError(
                f"Check {name!r} returned {type(other).__name__}: return True, False or a "
                "CheckResult of a bool and a word."
            )
