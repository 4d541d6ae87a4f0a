"""The retries of a transaction, with backoff."""

import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator
from contextlib import contextmanager
from typing import Final, TypeVar, cast

from ._sessions.session import AnySession, record_of
from .errors import describe_database_error

T = TypeVar("T")
logger = logging.getLogger("fastapi_sqlnative")

_LONGEST_PAUSE: Final = 2.0  # seconds


class Retries:
    """The attempts at one transaction, within the limits given to `run_in_transaction`.

    Each attempt is a `with` block, and the caller sets `session` in it. The block swallows a
    failure that is to be retried, after `pause` seconds.
    """

    def __init__(self, name: str, attempts: int, timeout: float, backoff: float) -> None:
        if not isinstance(cast("object", attempts), int):
            raise TypeError(f"attempts={attempts!r} is not a whole number.")
        if attempts < 1:
            raise ValueError(f"attempts={attempts} would never run the work: pass 1 or more.")
        for option, seconds in (("timeout", timeout), ("backoff", backoff)):
            if not seconds >= 0:
                raise ValueError(f"{option}={seconds} must be 0 seconds or more.")
        self.session: AnySession | None = None
        self.pause = 0.0
        self._name = name
        self._attempts = attempts
        self._deadline = time.monotonic() + timeout
        self._longest = backoff
        self._made = 0

    @contextmanager
    def attempt(self) -> Generator[None]:
        self._made += 1
        try:
            yield
        except Exception as error:
            failure = describe_database_error(error)
            # If the work stored something, or may have, a retry could store it twice.
            stored = self.session is not None and record_of(self.session).stored
            if stored or failure is None or not failure.retryable or self._made >= self._attempts:
                raise
            # Full jitter, so that conflicting transactions don't retry at the same moment.
            self.pause = random.uniform(0, min(self._longest, _LONGEST_PAUSE))  # noqa: S311
            self._longest *= 2
            if time.monotonic() + self.pause > self._deadline:
                raise
            logger.info(
                "Attempt %d of %d at a transaction on database %r failed (%s), retrying.",
                self._made,
                self._attempts,
                self._name,
                failure.kind.value,
            )

    def checked(self, result: T, *, to_await: bool = False) -> T:
        """Refuse a result that has not run, or one `to_await` that cannot be awaited."""
        lazy = isinstance(result, Coroutine | Generator | AsyncGenerator)
        fits = isinstance(result, Awaitable) if to_await else not lazy
        if fits:
            return result
        kind = type(result).__name__
        if isinstance(result, Coroutine | Generator):
            result.close()
        raise TypeError(
            f"The work on database {self._name!r} returned a {kind}, so it was "
            "rolled back. Write a function without `yield` that returns when the work is done: a "
            "Database needs a `def`, an AsyncDatabase needs an `async def`."
        )
