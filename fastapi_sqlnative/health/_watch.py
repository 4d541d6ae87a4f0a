"""Readiness checks, and the results of each database and check."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, TypeAlias

from starlette.applications import Starlette

from .._functions import accepts, described, is_awaitable
from .._lifespan.lifespan import call_off_loop

logger = logging.getLogger("fastapi_sqlnative")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check.

    Attributes:
        ready: whether the application should get requests, according to this check.
        state: a word that the readiness response shows to anyone.
    """

    ready: bool
    state: str


Check: TypeAlias = Callable[..., bool | CheckResult | Awaitable[bool | CheckResult]]


@dataclass(frozen=True, slots=True)
class ReadinessCheck:
    """A check with its own timeout, or one that is only reported.

    Attributes:
        check: a function, sync or async, that takes the application or nothing; a sync one runs
            in a thread.
        timeout: seconds; the router's timeout is the default and the maximum.
        required: if false, a failure is only reported and the application is still ready.
    """

    check: Check
    timeout: float | None = None
    required: bool = True


def arguments_for(name: str, check: Check, app: object) -> tuple[object, ...]:
    """Return the arguments that a check takes: none, or the application."""
    for arguments in ((), (app,)):
        if accepts(check, *arguments):
            return arguments
    what = f"Check {name!r} must be a function that takes the application or nothing"
    raise TypeError(f"{what}, not {described(check)}.")


UP, DOWN = CheckResult(True, "up"), CheckResult(False, "down")


@dataclass(eq=False)
class Watch:
    """The last result of one database or check, and the check in progress.

    A check outlives the probe that started it, and a late result still counts. There is never a
    second check at a time, so a hanging one costs a single thread, task or connection.
    """

    kind: Literal["Database", "Check"]
    name: str
    check: ReadinessCheck  # until its timeout has passed, the last result holds
    app: Starlette
    result: CheckResult = DOWN
    _logged: CheckResult = UP
    _running: asyncio.Task[None] | None = None
    _answered: asyncio.Event = field(default_factory=asyncio.Event)
    _until: float = 0.0

    async def refresh(self, timeout: float, max_age: float) -> None:
        """Wait at most `timeout` seconds for a result that is no older than `max_age`."""
        check_timeout = self.check.timeout or timeout
        if self._running is None or (self._running.done() and monotonic() >= self._until):
            self._answered.clear()
            self._running = asyncio.create_task(self._run(check_timeout, max_age))
        # After the check's own timeout `_run` sets the event.
        limit = timeout if timeout < check_timeout else None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._answered.wait(), limit)

    async def _run(self, timeout: float, max_age: float) -> None:
        calling = asyncio.create_task(self._call())
        in_time, _ = await asyncio.wait({calling}, timeout=timeout)
        if not in_time:
            self._settle(DOWN, TimeoutError(f"No answer within {timeout:g} s."))
            if is_awaitable(self.check.check):  # a thread can't be cancelled
                calling.cancel()
        (found,) = await asyncio.gather(calling, return_exceptions=True)
        if in_time:
            self._until = monotonic() + max_age
            self._settle(*((DOWN, found) if isinstance(found, BaseException) else (found, None)))

    async def _call(self) -> CheckResult:
        """Call the check, a sync one in a thread; raise a TypeError for an invalid result."""
        arguments = arguments_for(self.name, self.check.check, self.app)
        match await call_off_loop(functools.partial(self.check.check, *arguments)):
            case bool(ready):
                return UP if ready else DOWN
            case CheckResult(ready=bool(), state=str()) as result:
                return result
            case other:
                kind = type(other).__name__
        raise TypeError(f"Check {self.name!r} returned {kind}: return a bool or a CheckResult.")

    def _settle(self, result: CheckResult, cause: BaseException | None) -> None:
        self.result = result
        self._answered.set()
        if result != self._logged:
            self._logged = result
            level = logging.INFO if result.ready else logging.WARNING
            logger.log(level, "%s %r is %s.", self.kind, self.name, result.state, exc_info=cause)
