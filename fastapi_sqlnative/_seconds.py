"""What counts as a time."""

from __future__ import annotations

import math


def check_seconds(what: str, seconds: object, *, zero: bool = False) -> None:
    """Refuse what is no time that can be waited for; with `zero`, not to wait is one as well.

    Raises:
        TypeError: it is no number.
        ValueError: it is below zero, or has no end.
    """
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"{what} must be a number of seconds, not {type(seconds).__name__}.")
    if not 0 <= seconds < math.inf or not (seconds or zero):
        raise ValueError(
            f"{what} must be {'at least' if zero else 'above'} 0 seconds, and finite; it is "
            f"{seconds}."
        )
