"""What one database or check has answered, and the checks that an application may have."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from starlette.applications import Starlette

from .._lifespan.functions import described
from .._sessions.completion import in_thread

logger = logging.getLogger("fastapi_sqlnative")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check.

    Attributes:
        ready: whether the application should get requests, as far as this check knows.
        state: a word for the answer of readiness, which anyone may read.
    """

    ready: bool
    state: str


Check: TypeAlias = Callable[..., bool | CheckResult | Awaitable[bool | CheckResult]]


@dataclass(frozen=True, slots=True)
class ReadinessCheck:
    """A check with a timeout of its own, or one that is only reported.

    Attributes:
        check: a function, sync or async, that takes the application or nothing; a sync one runs
            in a thread.
        timeout: seconds, at most those of the router, which are the default.
        required: if not, a failure is reported and the application is still ready.
    """

    check: Check
    timeout: float | None = None
    required: bool = True


def arguments_for(name: str, check: Check, app: object) -> tuple[object, ...]:
    """Return what a check is called with: nothing, or the application."""
    for arguments in ((), (app,)):
        with contextlib.suppress(TypeError):
            inspect.signature(check).bind(*arguments)
            return arguments
    raise TypeError(
        f"Check {name!r} must be a function of the application or of nothing, not "
        f"{described(check)}."
    )


UP, DOWN = CheckResult(True, "up"), CheckResult(False, "down")


@dataclass(eq=False)
class Watch:
    """What one database or check has answered, and the question that is under way.

    A question outlives whoever waits for it: an answer that takes longer than a probe waits is
    still an answer. There is never a second one: what hangs costs one thread, task or connection.
    """

    kind: Literal["Database", "Check"]
    name: str
    check: ReadinessCheck  # until its timeout is over the last answer stands
    app: Starlette
    result: CheckResult = DOWN
    _logged: CheckResult = UP
    _asking: asyncio.Task[None] | None = None
    _answered: asyncio.Event = field(default_factory=asyncio.Event)
    _until: float = 0.0

    async def look(self, timeout: float, max_age: float) -> None:
        """Wait at most `timeout` seconds for an answer that is no older than `max_age`."""
        now = asyncio.get_running_loop().time()
        patience = self.check.timeout or timeout
        if self._asking is None or (self._asking.done() and now >= self._until):
            self._answered.clear()
            self._asking = asyncio.create_task(self._put(patience, max_age))
        limit = timeout if timeout < patience else None  # then the end of patience tells
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._answered.wait(), limit)

    async def _put(self, patience: float, max_age: float) -> None:
        check = self.check.check
        # A function, an object or a partial: calling it gives a coroutine.
        call = getattr(type(check), "__call__", None)  # noqa: B004 - its kind, not whether it is
        is_async = inspect.iscoroutinefunction(check) or inspect.iscoroutinefunction(call)
        asking = asyncio.create_task(self._ask(is_async))
        in_time, _ = await asyncio.wait({asking}, timeout=patience)
        if not in_time:
            self._find(DOWN, TimeoutError(f"No answer within {patience:g} s."))
            if is_async:  # a cancellation does not end a thread
                asking.cancel()
        (found,) = await asyncio.gather(asking, return_exceptions=True)
        if in_time:
            self._until = asyncio.get_running_loop().time() + max_age
            self._find(*((DOWN, found) if isinstance(found, BaseException) else (found, None)))

    async def _ask(self, is_async: bool) -> CheckResult:
        """Call the check, a sync one in a thread; raise TypeError for what it may not return."""
        arguments = arguments_for(self.name, self.check.check, self.app)
        call = functools.partial(self.check.check, *arguments)
        found: Any = call() if is_async else await asyncio.wrap_future(in_thread(call))
        match await found if inspect.isawaitable(found) else found:
            case bool(ready):
                return CheckResult(ready, "up" if ready else "down")
            case CheckResult(ready=bool(), state=str()) as result:
                return result
            case other:
                kind = type(other).__name__
                raise TypeError(
                    f"Check {self.name!r} returned {kind}: return a bool or a CheckResult."
                )

    def _find(self, result: CheckResult, cause: BaseException | None) -> None:
        self.result = result
        self._answered.set()
        if result != self._logged:
            self._logged = result
            level = logging.INFO if result.ready else logging.WARNING
            logger.log(level, "%s %r is %s.", self.kind, self.name, result.state, exc_info=cause)
