"""What the log says of a failure that was answered: enough, and no more than that."""

from __future__ import annotations

import asyncio
import logging
import time

from ._kinds import DatabaseErrorDescription, only_error

logger = logging.getLogger("fastapi_sqlnative")


class FailureLog:
    """The log of an application's failures, or of a block's, which has no `window`.

    More of a WARNING within so many seconds are counted on the event loop, and told at their end.
    """

    def __init__(self, window: float | None = None) -> None:
        self._window = window
        self._counted: dict[str, tuple[float, int]] = {}  # until when, and how many

    def write(self, level: int, what: str, route: str, error: Exception) -> None:
        """Log a line, with a traceback for an ERROR; a WARNING that repeats itself is counted."""
        if level != logging.WARNING or self._window is None or not self._counts(what, self._window):
            fault = error if level == logging.ERROR else None
            logger.log(level, "%s%s.", what, route, exc_info=fault)

    def _counts(self, what: str, window: float) -> bool:
        now = time.monotonic()
        ends, repeats = self._counted.get(what, (now, 0))
        if now < ends:
            self._counted[what] = ends, repeats + 1
            return True
        self._tell(what, ends)  # where the event loop has ended before it could
        ends = now + window
        self._counted[what] = ends, 0
        asyncio.get_running_loop().call_later(window, self._tell, what, ends)
        return False

    def _tell(self, what: str, ends: float) -> None:
        if self._counted.get(what, (0, 0))[0] == ends:
            _, repeats = self._counted.pop(what)
            if repeats:
                logger.warning("%s: %d times more in %gs.", what, repeats, self._window)


def what_failed(failure: DatabaseErrorDescription, error: Exception, status: int) -> str:
    """Say it with what is known of it, and nothing that a user has written."""
    database = getattr(only_error(error), "database_name", None)  # set by the session it has left
    where = f" of database {database!r}" if isinstance(database, str) else ""
    code = f", code {failure.code}" if failure.code else ""
    constraint = f", constraint {failure.constraint!r}" if failure.constraint else ""
    said = f"{failure.kind.value}{code}{constraint}"
    return f"A failure{where} ({said}) is answered with {status}"
