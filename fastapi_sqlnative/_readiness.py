"""What readiness asks: databases and checks, together, in time, and one question at a time each."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from starlette.applications import Starlette

from ._probes import DatabaseState, Probe
from ._sessions.completion import ended_within, in_thread
from ._sessions.engines import run_on_engine
from .databases import AnyDatabase, sessions_of

logger = logging.getLogger("fastapi_sqlnative")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Say what a check has found, in more than a yes or no.

    Attributes:
        ready: whether the application can do its work.
        state: a word for it, which everybody may read.
    """

    ready: bool
    state: str


UP = CheckResult(True, "up")
DOWN = CheckResult(False, "down")
Check: TypeAlias = Callable[..., bool | CheckResult | Awaitable[bool | CheckResult]]


class Question(Protocol):
    """Ask one thing. A question that hangs is not put again, so it costs one thread at most."""

    async def put(self) -> CheckResult:
        """Return the answer, or raise what has gone wrong."""
        ...


class DatabaseQuestion:
    """Ask a database whether it is there."""

    def __init__(self, database: AnyDatabase) -> None:
        self._database = database
        self._last = Probe()

    async def put(self) -> CheckResult:
        """Return its state.

        Raises:
            TimeoutError: it has not answered the last time yet.
        """
        database, probe = self._database, Probe()
        # While sessions hold every connection, the last question may wait for one of those, and
        # say nothing about the database.
        for_the_pool = self._last.waiting and sessions_of(database).state.holds_all()
        if self._last.asking and not for_the_pool:
            raise TimeoutError("It has not answered the last question yet.")
        self._last = probe
        state = await run_on_engine(
            database.engine,
            lambda engine: probe.ask(engine, lambda: len(sessions_of(database).state.at_work)),
        )
        return CheckResult(True, state.value)


class CheckQuestion:
    """Call a check of the application's."""

    def __init__(self, name: str, check: Check, app: Starlette) -> None:
        self._name = name
        self._check: Callable[..., Any] = check
        self._arguments = (app,)[: arguments_of(name, check)]
        self._calling = False

    async def put(self) -> CheckResult:
        """Return what the check has returned.

        Raises:
            TimeoutError: it has not returned from the last call yet.
            TypeError: it returned something else than it may.
        """
        if self._calling:
            raise TimeoutError("It has not returned from the last call yet.")
        if _is_async(self._check):
            result = await self._call_async()
        else:
            result = await asyncio.wrap_future(in_thread(self._call))
            result = await result if inspect.isawaitable(result) else result
        return self._understood(result)

    def _call(self) -> Any:
        self._calling = True
        try:
            return self._check(*self._arguments)
        finally:
            self._calling = False

    async def _call_async(self) -> Any:
        self._calling = True
        try:
            return await self._check(*self._arguments)
        finally:
            self._calling = False

    def _understood(self, result: object) -> CheckResult:
        if isinstance(result, bool):
            return UP if result else DOWN
        if isinstance(result, CheckResult) and _is_sensible(result.ready, result.state):
            return result
        raise TypeError(
            f"Check {self._name!r} returned {type(result).__name__}: return True, False or a "
            "CheckResult of a bool and a word."
        )


def _is_sensible(ready: object, state: object) -> bool:
    return isinstance(ready, bool) and isinstance(state, str)


def arguments_of(name: str, check: object) -> int:
    """Count the arguments that a check is called with: none, or the application.

    Raises:
        TypeError: it can be called with neither.
    """
    if not callable(check):
        raise TypeError(
            f"Check {name!r} must be a function of the application or of nothing, or a "
            f"ReadinessCheck of one, not {type(check).__name__}."
        )
    signature = inspect.signature(check)
    for arguments in ((), (None,)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments)
    raise TypeError(
        f"Check {name!r} must be a function of the application or of nothing; its parameters are "
        f"{signature}."
    )


def _is_async(function: object) -> bool:
    call = getattr(type(function), "__call__", None)  # noqa: B004 - its kind, not whether it is
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


@dataclass(frozen=True, slots=True)
class Finding:
    """Hold how a database or check was at one look.

    Attributes:
        name: the database's or the check's.
        database: `None` for a check.
        required: whether the application is to be ready only with it.
        result: how it was.
        seconds: how long that took to say.
    """

    name: str
    database: AnyDatabase | None
    required: bool
    result: CheckResult
    seconds: float


class Subject:
    """Look at one database or check, and log when it is found otherwise than before.

    Args:
        name: the database's or the check's.
        question: how to ask.
        required: as for a `Finding`.
        timeout: seconds of its own, `None` for all that there are.
        database: `None` for a check.
    """

    def __init__(
        self,
        name: str,
        question: Question,
        *,
        required: bool,
        timeout: float | None = None,
        database: AnyDatabase | None = None,
    ) -> None:
        self._name = name
        self._question = question
        self._required = required
        self._timeout = timeout
        self._database = database
        self._last = UP
        self._asking: asyncio.Task[CheckResult] | None = None

    async def look(self, timeout: float) -> Finding:
        """Ask, for so many seconds at most; whatever fails is down."""
        clock = asyncio.get_running_loop().time
        began = clock()
        cause: Exception | None = None
        try:
            result = await self._ask(min(timeout, self._timeout or timeout))
        except Exception as error:  # noqa: BLE001 - readiness fails closed, and the log has it
            result, cause = DOWN, error
        if result != self._last:
            self._log(result, cause)
        self._last = result
        return Finding(self._name, self._database, self._required, result, clock() - began)

    async def _ask(self, timeout: float) -> CheckResult:
        if self._asking is not None:
            # A driver may still talk to a server that hangs: a second time it lets go of it.
            self._asking.cancel()
        asking = self._asking = asyncio.create_task(self._question.put())
        if not await ended_within(timeout, asking):
            raise TimeoutError(f"No answer within {timeout:g} s.")
        if asking.cancelled():
            raise RuntimeError("It ended in a cancellation of its own making.")
        return asking.result()

    def _log(self, result: CheckResult, cause: Exception | None) -> None:
        passing = result.ready and result.state != DatabaseState.SATURATED
        logger.log(
            logging.INFO if passing else logging.WARNING,
            "%s %r is %s.",
            "Check" if self._database is None else "Database",
            self._name,
            result.state,
            exc_info=cause,
        )


class Watch:
    """Look at everything that one run of an application depends on, once for all who ask.

    Args:
        databases: what it was made for; others need another watch.
        subjects: what it looks at.
        timeout: seconds for all of them together.
        max_age: seconds for which a look stands.
    """

    def __init__(
        self,
        databases: Sequence[AnyDatabase],
        subjects: Sequence[Subject],
        timeout: float,
        max_age: float,
    ) -> None:
        self.databases = databases
        self._subjects = subjects
        self._timeout = timeout
        self._max_age = max_age
        self._looking: asyncio.Task[list[Finding]] | None = None
        self._until = 0.0

    async def look(self) -> list[Finding]:
        """Wait for the look that is under way, or for a new one if the last is too old."""
        now = asyncio.get_running_loop().time()
        if self._looking is None or (self._looking.done() and now >= self._until):
            self._looking = asyncio.create_task(self._look())
        # Whoever asks may go away; the others still want to know.
        return await asyncio.shield(self._looking)

    async def _look(self) -> list[Finding]:
        findings = await asyncio.gather(*(each.look(self._timeout) for each in self._subjects))
        self._until = asyncio.get_running_loop().time() + self._max_age
        return findings
