"""Validation of times in seconds."""

import math


def check_seconds(what: str, seconds: object, *, zero: bool = False) -> None:
    """Reject a value that is not a positive, finite number of seconds; `zero` allows 0 as well."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"{what} must be a number of seconds, not {type(seconds).__name__}.")
    if not 0 <= seconds < math.inf or not (seconds or zero):
        raise ValueError(
            f"{what} must be {'at least' if zero else 'above'} 0 seconds, and finite; it is "
            f"{seconds}."
        )
