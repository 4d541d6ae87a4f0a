"""What a parameter's annotation says that it takes."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Union, get_args, get_origin


def annotation_of(call: Callable[..., Any] | None, parameter: str | None) -> object:
    """Return the annotation of a parameter; `None` where there is none that can be read."""
    if call is None or parameter is None:
        return None
    try:
        parameters = inspect.signature(call, eval_str=True).parameters
    except Exception:  # noqa: BLE001 - often a name that only the type checker knows
        return None  # nothing visible contradicts
    found = parameters.get(parameter)
    return None if found is None else found.annotation


def classes_in(annotation: object) -> list[type]:
    """List the classes that an annotation names, through aliases, `Annotated` and unions."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation]
    # PEP 695 aliases, bare and subscribed, are known by this attribute on every Python.
    value = getattr(annotation, "__value__", None)
    if value is not None:
        return classes_in(value)
    origin = get_origin(annotation)
    if origin is Annotated:
        return classes_in(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [each for part in get_args(annotation) for each in classes_in(part)]
    return classes_in(origin) if origin is not None else []
