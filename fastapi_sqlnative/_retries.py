"""When a transaction is run again, and after what pause."""

from __future__ import annotations

import inspect
import logging
import random
import time
from typing import cast

from .errors import describe_database_error

logger = logging.getLogger("fastapi_sqlnative")


class Retries:
    """Count the attempts at one transaction, up to a number and a deadline.

    Args:
        name: of the database, for the log.
        attempts: how many in all.
        timeout: seconds from now after which none is begun.
        backoff: seconds, the most that the first pause takes; every further one may take twice
            as long, up to `MAX_PAUSE`.

    Raises:
        TypeError: a number is none.
        ValueError: a number is too small.
    """

    MAX_PAUSE = 2.0

    def __init__(self, name: str, attempts: int, timeout: float, backoff: float) -> None:
        if not isinstance(cast("object", attempts), int):
            raise TypeError(f"attempts={attempts!r} is not a whole number.")
        if attempts < 1:
            raise ValueError(f"attempts={attempts} would never run the work: write 1 or more.")
        for option, seconds in (("timeout", timeout), ("backoff", backoff)):
            if not seconds >= 0:
                raise ValueError(f"{option}={seconds} is not a number of seconds from 0.")
        self._name = name
        self._attempts = attempts
        self._deadline = time.monotonic() + timeout
        self._longest = backoff
        self._made = 0

    def pause_after(self, error: Exception) -> float | None:
        """Return the seconds to wait before the next attempt; `None` if there is to be none."""
        self._made += 1
        failure = describe_database_error(error)
        if failure is None or not failure.retryable or self._made >= self._attempts:
            return None
        # Full jitter: those that ran into each other are not to meet again.
        pause = random.uniform(0, min(self._longest, self.MAX_PAUSE))  # noqa: S311 - no secret
        self._longest *= 2
        if time.monotonic() + pause > self._deadline:
            return None
        logger.info(
            "Attempt %d of %d at a transaction on database %r has failed (%s): it is repeated.",
            self._made,
            self._attempts,
            self._name,
            failure.kind.value,
        )
        return pause


def refuse_coroutine(database: str, result: object) -> None:
    """Refuse what an `async def` returns: it has done nothing yet, and would be committed.

    Raises:
        TypeError: the result is a coroutine.
    """
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError(
            f"Database {database!r} is synchronous and runs plain functions: write the work with "
            "`def`, or use an AsyncDatabase."
        )
