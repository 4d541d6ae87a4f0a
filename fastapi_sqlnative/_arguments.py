"""Checks of what the application passes: times in seconds, and functions."""

import functools
import inspect
import math
import sys
from typing import Any, Final

# From Python 3.14 on, annotations are evaluated when somebody reads them, which fails for a name
# imported under TYPE_CHECKING.
if sys.version_info >= (3, 14):
    from annotationlib import Format

    signature_of: Final = functools.partial(inspect.signature, annotation_format=Format.STRING)
else:
    signature_of: Final = inspect.signature


def accepts(function: Any, *arguments: object) -> bool:
    """Return whether a function can be called with these arguments."""
    try:
        signature_of(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True  # written in C, without a signature
    return True


def check_seconds(what: str, seconds: object, *, zero: bool = False) -> None:
    """Reject a value that is not a positive, finite number of seconds; `zero` allows 0 as well."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"{what} must be a number of seconds, not {type(seconds).__name__}.")
    if not 0 <= seconds < math.inf or not (seconds or zero):
        raise ValueError(
            f"{what} must be {'at least' if zero else 'above'} 0 seconds, and finite; it is "
            f"{seconds}."
        )
