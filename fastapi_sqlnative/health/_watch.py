"""One database or check over time: one question at a time, and what was found last."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from ._checks import CheckResult

logger = logging.getLogger("fastapi_sqlnative")
UP, DOWN = CheckResult(True, "up"), CheckResult(False, "down")


@dataclass(eq=False)
class Watch:
    """What one database or check has answered, and the question that is under way.

    A question outlives whoever waits for it: an answer that takes longer than a probe waits is
    still an answer. There is never a second one: what hangs costs one thread, task or connection.

    Attributes:
        kind: "Database" or "Check".
        ask: puts the question, and raises what has gone wrong.
        patience: seconds that an answer may take. Until they are over the last one stands.
        cancellable: whether a cancellation ends the question, as it does not in a thread.
    """

    kind: str
    name: str
    ask: Callable[[], Coroutine[Any, Any, CheckResult]]
    required: bool
    patience: float
    cancellable: bool
    result: CheckResult = DOWN
    _logged: CheckResult = UP
    _asking: asyncio.Task[None] | None = None
    _answered: asyncio.Event = field(default_factory=asyncio.Event)
    _until: float = 0.0

    async def look(self, timeout: float, max_age: float) -> None:
        """Wait at most `timeout` seconds for an answer that is no older than `max_age`."""
        now = asyncio.get_running_loop().time()
        if self._asking is None or (self._asking.done() and now >= self._until):
            self._answered.clear()
            self._asking = asyncio.create_task(self._put(max_age))
        # Where patience ends first, the result is what its end says.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout if timeout < self.patience else None):
                await self._answered.wait()

    async def _put(self, max_age: float) -> None:
        asking = asyncio.create_task(self.ask())
        in_time, _ = await asyncio.wait({asking}, timeout=self.patience)
        if not in_time:
            self._find(DOWN, TimeoutError(f"No answer within {self.patience:g} s."))
            if self.cancellable:
                asking.cancel()
        (found,) = await asyncio.gather(asking, return_exceptions=True)
        if in_time:
            self._until = asyncio.get_running_loop().time() + max_age
            failed = isinstance(found, BaseException)
            self._find(*((DOWN, found) if failed else (found, None)))

    def _find(self, result: CheckResult, cause: BaseException | None) -> None:
        self.result = result
        self._answered.set()
        if result != self._logged:
            self._logged = result
            quiet = result.ready and result.state != "saturated"
            level = logging.INFO if quiet else logging.WARNING
            logger.log(level, "%s %r is %s.", self.kind, self.name, result.state, exc_info=cause)
