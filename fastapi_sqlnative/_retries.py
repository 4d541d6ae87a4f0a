"""When a transaction is run again, and after what pause."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncGenerator, Coroutine, Generator
from types import TracebackType
from typing import TypeVar, cast

from ._sessions.record import Record
from ._sessions.session import AnySession, record_of
from .errors import describe_database_error

T = TypeVar("T")
SessionT = TypeVar("SessionT", bound=AnySession)
logger = logging.getLogger("fastapi_sqlnative")


class Retries:
    """The attempts at one transaction, up to a number and a deadline.

    Each is a `with` block, which swallows a failure that another attempt follows after `pause`
    seconds.

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
        self._record: Record | None = None
        self.pause = 0.0

    def __enter__(self) -> None:
        self._record = None

    def watched(self, session: SessionT) -> SessionT:
        """Return the attempt's session, of which is known what it has stored."""
        self._record = record_of(session)
        return session

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        """Swallow a failure that another attempt follows."""
        return isinstance(error, Exception) and self._may_repeat(error)

    def _may_repeat(self, error: Exception) -> bool:
        self._made += 1
        failure = describe_database_error(error)
        # Work that has stored something, or may have, would do so again.
        stored = self._record is not None and self._record.stored
        if stored or failure is None or not failure.retryable or self._made >= self._attempts:
            return False
        # Full jitter: those that ran into each other are not to meet again.
        self.pause = random.uniform(0, min(self._longest, self.MAX_PAUSE))  # noqa: S311 - no secret
        self._longest *= 2
        if time.monotonic() + self.pause > self._deadline:
            return False
        logger.info(
            "Attempt %d of %d at a transaction on database %r has failed (%s): it is repeated.",
            self._made,
            self._attempts,
            self._name,
            failure.kind.value,
        )
        return True

    def checked(self, result: T) -> T:
        """Refuse work that has not run yet: committed, it would be a lie.

        Raises:
            TypeError: the result is a coroutine or a generator.
        """
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
