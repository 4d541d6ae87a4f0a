"""Signatures of functions, whatever their annotations name."""

import functools
import inspect
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
