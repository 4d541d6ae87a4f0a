"""What the log says of a failure that was answered: enough, and no more than that."""

from __future__ import annotations

import asyncio
import logging
import time

from ._kinds import DatabaseErrorDescription, only_error

logger = logging.getLogger("fastapi_sqlnative")


class FailureLog:
    """The log of one application's failures, or of a block's, whose `window` is `None`.

    Args:
        window: seconds in which more of a failure that passes are counted, and told in one line
            at the end. Only for an event loop's thread.
    """

    def __init__(self, window: float | None = None) -> None:
        self._window = window
        self._counted: dict[str, tuple[float, int]] = {}  # until when, and how many

    def write(
        self,
        failure: DatabaseErrorDescription,
        status: int,
        error: Exception,
        route: str,
        *,
        is_fault: bool,
    ) -> None:
        """Log a fault as ERROR with its traceback; in one line what a client did, or passes."""
        what = f"{_what(failure, error)} is answered with {status}"
        if is_fault:
            logger.error("%s%s.", what, route, exc_info=error)
        elif status < 500:
            logger.info("%s%s.", what, route)
        elif not self._counts(what):
            logger.warning("%s%s.", what, route)

    def _counts(self, what: str) -> bool:
        if self._window is None:
            return False
        now = time.monotonic()
        ends, repeats = self._counted.get(what, (now, 0))
        if now < ends:
            self._counted[what] = ends, repeats + 1
            return True
        self._tell(what, ends)  # where the event loop has ended before it could
        ends = now + self._window
        self._counted[what] = ends, 0
        asyncio.get_running_loop().call_later(self._window, self._tell, what, ends)
        return False

    def _tell(self, what: str, ends: float) -> None:
        if self._counted.get(what, (0, 0))[0] == ends:
            _, repeats = self._counted.pop(what)
            if repeats:
                logger.warning("%s: %d times more in %gs.", what, repeats, self._window)


def _what(failure: DatabaseErrorDescription, error: Exception) -> str:
    database = getattr(only_error(error), "database_name", None)  # from the session that the error has left
    where = f" of database {database!r}" if isinstance(database, str) else ""
    code = f", code {failure.code}" if failure.code else ""
    constraint = f", constraint {failure.constraint!r}" if failure.constraint else ""
    return f"A failure{where} ({failure.kind.value}{code}{constraint})"
