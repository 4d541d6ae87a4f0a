"""When a transaction is run again, and after what pause."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import contextmanager
from typing import Final, TypeVar, cast

from ._sessions.session import AnySession, record_of
from .errors import describe_database_error

T = TypeVar("T")
logger = logging.getLogger("fastapi_sqlnative")

# Seconds, the most that a pause takes.
_LONGEST_PAUSE: Final = 2.0


class Retries:
    """The attempts at one transaction, as the arguments of `run_in_transaction` bound them.

    Each is a `with` block, which sets `session`, and swallows a failure that another attempt
    follows after `pause` seconds.
    """

    def __init__(self, name: str, attempts: int, timeout: float, backoff: float) -> None:
        if not isinstance(cast("object", attempts), int):
            raise TypeError(f"attempts={attempts!r} is not a whole number.")
        if attempts < 1:
            raise ValueError(f"attempts={attempts} would never run the work: write 1 or more.")
        for option, seconds in (("timeout", timeout), ("backoff", backoff)):
            if not seconds >= 0:
                raise ValueError(f"{option}={seconds} is not a number of seconds from 0.")
        self.session: AnySession | None = None
        self.pause = 0.0
        self._name = name
        self._attempts = attempts
        self._deadline = time.monotonic() + timeout
        self._longest = backoff
        self._made = 0

    @contextmanager
    def attempt(self) -> Generator[None]:
        """Try once."""
        self._made += 1
        try:
            yield
        except Exception as error:
            failure = describe_database_error(error)
            # Work that has stored something, or may have, would do so again.
            stored = self.session is not None and record_of(self.session).stored
            if stored or failure is None or not failure.retryable or self._made >= self._attempts:
                raise
            # Full jitter: those that ran into each other are not to meet again.
            self.pause = random.uniform(0, min(self._longest, _LONGEST_PAUSE))  # noqa: S311
            self._longest *= 2
            if time.monotonic() + self.pause > self._deadline:
                raise
            logger.info(
                "Attempt %d of %d at a transaction on database %r has failed (%s): it is repeated.",
                self._made,
                self._attempts,
                self._name,
                failure.kind.value,
            )

    def checked(self, result: T) -> T:
        """Refuse work that has not run yet: committed, it would be a lie."""
        if not isinstance(result, Coroutine | Generator | AsyncGenerator):
            return result
        kind = type(cast("object", result)).__name__
        if isinstance(result, Coroutine | Generator):
            result.close()
        raise TypeError(
            f"The work on database {self._name!r} returned a {kind}, which has "
            "done nothing yet. Write it as a function that returns when it is done: with `def` "
            "for a Database, with `async def` for an AsyncDatabase, and without `yield`."
        )
