"""Checks of what the application passes: functions, without calling them, and seconds."""

import ast
import contextlib
import functools
import inspect
import math
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Final, Literal, TypeGuard, Union, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

# From Python 3.14 on, annotations are evaluated when somebody reads them, which fails for a name
# imported under TYPE_CHECKING.
if sys.version_info >= (3, 14):
    from annotationlib import Format

    signature_of: Final = functools.partial(inspect.signature, annotation_format=Format.STRING)
else:
    signature_of: Final = inspect.signature

# Classes of values, which hold no session.
_VALUES: Final = (BaseModel, date, time, timedelta, Decimal, Enum, UUID, dict)  # dict: TypedDict
# What makes objects of its argument, and holds none.
_MAKES: Final = (type, sessionmaker, async_sessionmaker)
_AWAITED: Final = frozenset(
    name for name, each in vars(AsyncSession).items() if inspect.iscoroutinefunction(each)
)


def name_of(call: object) -> str:
    """Return a dependency's name for a message."""
    return getattr(call, "__qualname__", None) or type(call).__qualname__


def described(value: object) -> str:
    """Describe a function with its parameters, without defaults: one may be a database URL."""
    if not callable(value):
        return type(value).__name__
    signature = signature_of(value)
    bare = [each.replace(default=each.empty) for each in signature.parameters.values()]
    return f"{name_of(value)}{signature.replace(parameters=bare)}"


def accepts(function: Any, *arguments: object) -> bool:
    """Return whether a function can be called with these arguments."""
    try:
        signature_of(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True  # written in C, without a signature
    return True


def is_generator(call: object) -> bool:
    """Return whether a dependency is a generator, which FastAPI exits later."""
    return _is_any(call, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def is_awaitable(call: object) -> bool:
    """Return whether a function can await; a class can't, because FastAPI calls it in a thread."""
    return _is_any(call, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


def _is_any(call: object, *kinds: Callable[[object], bool]) -> bool:
    return any(is_kind(each) for each in _functions(call) for is_kind in kinds)


def _functions(call: Any) -> list[Any]:
    """List the functions that a dependency may call, behind partials and decorators."""
    while isinstance(call, functools.partial):
        call = call.func
    if call is None:
        return []
    looked_at = [call, inspect.unwrap(call)]
    if not inspect.isclass(looked_at[1]):
        methods = [each.__call__ for each in looked_at]
        looked_at += [*methods, *map(inspect.unwrap, methods)]
    return looked_at


def annotation_of(call: Any, parameter: Any) -> object:
    """Return the annotation of a parameter; `None` if it can't be resolved."""
    found = _signature(call).parameters.get(parameter)
    return found and found.annotation


def _signature(call: Any) -> inspect.Signature:
    """Return a signature with its annotations; an empty one if they can't be resolved."""
    try:
        return inspect.signature(call, eval_str=True)
    except Exception:  # noqa: BLE001 - often a name imported under TYPE_CHECKING
        return inspect.Signature()


def may_return_session(call: Any, receiver: Any, parameter: Any) -> bool:
    """Return whether a dependency may return the session it gets, or an object that holds it.

    If it has no return annotation, as in FastAPI's tutorial, the parameter that receives its
    result may show that it returns plain data.
    """
    given = _signature(call).return_annotation
    if inspect.isclass(call):
        return True
    received = classes_in(annotation_of(receiver, parameter), inside=True)
    if given is inspect.Signature.empty:
        return not received or not all(map(_is_data, received))
    # A type variable, as of a generic function that makes repositories, names no class.
    kinds: list[type[Any]] = classes_in(given, inside=True) or received
    for kind in kinds:  # which grows by what an object of the class is made with
        if issubclass(kind, Session | AsyncSession):
            return True
        for each in () if _is_data(kind) else _signature(kind).parameters.values():
            taken = classes_in(each.annotation, inside=True)
            kinds += [other for other in taken if other not in kinds]
    return False


def _is_data(kind: type) -> bool:
    builtin = kind.__module__ == "builtins" and kind is not object
    # A class with deferred reflection gets its mapper later, and inspect() would raise until then.
    mapped = hasattr(kind, "__mapper__") or hasattr(kind, "__tablename__")
    return builtin or mapped or issubclass(kind, _VALUES)


def classes_in(annotation: object, *, inside: bool = False) -> list[type]:
    """List the classes that an annotation names, through aliases, `Annotated` and unions.

    With `inside`, also those that a generic class holds: both of `dict[str, Session]`.
    """
    classes: list[type] = []
    parts: list[Any] = [annotation]
    for part in parts:  # which grows
        origin, value = get_origin(part), None
        # A PEP 695 alias, bare or subscribed, has this attribute on every Python. It is evaluated
        # only now, and may name what is imported under TYPE_CHECKING.
        with contextlib.suppress(NameError):
            value = getattr(part, "__value__", None)
        if value is not None:
            parts += [] if value in parts else [value]  # one that names itself has no end
        elif origin is Literal:
            classes += map(type, get_args(part))
        elif origin is Annotated:
            parts.append(get_args(part)[0])
        else:
            union = origin in (Union, types.UnionType)
            found = None if union else origin or part
            classes += [found] if isinstance(found, type) else []
            parts += get_args(part) if union or (inside and origin not in _MAKES) else ()
    return classes


def drops_a_coroutine(call: object, parameter: str) -> bool:
    """Return whether a function calls a coroutine method of a parameter and never awaits it.

    Returning the coroutine or passing the method on is fine: only what can never work counts.
    """
    if is_awaitable(call) or inspect.isclass(call):
        return False
    for function in _functions(call):
        # Some functions have no source, or source that can't be parsed on its own.
        with contextlib.suppress(OSError, TypeError, SyntaxError, ValueError):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
            rebound = [node.lineno for node in ast.walk(tree) if _rebinds(node, parameter)]
            drops = [node.lineno for node in _within(tree, parameter) if _drops(node, parameter)]
            if min(drops, default=math.inf) < min(rebound, default=math.inf):
                return True
    return False


def _rebinds(node: ast.AST, parameter: str) -> TypeGuard[ast.Name]:
    """Return whether a node gives the name another value, by an assignment, `with` or `for`."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == parameter


def _within(node: ast.AST, parameter: str) -> Iterator[ast.AST]:
    """Yield all nodes inside, except where the name is rebound or tested with `isinstance`."""
    for child in ast.iter_child_nodes(node):
        arguments = getattr(child, "args", None)  # a function or lambda
        rebinds = isinstance(arguments, ast.arguments) and any(
            each.arg == parameter for each in ast.walk(arguments) if isinstance(each, ast.arg)
        )
        tested = isinstance(child, ast.If) and f"isinstance({parameter}," in ast.unparse(child.test)
        if not (rebinds or tested):
            yield child
            yield from _within(child, parameter)


def _drops(node: ast.AST, parameter: str) -> TypeGuard[ast.expr | ast.stmt]:
    """Return whether a node discards a coroutine, or uses it as if it were its result."""
    if not isinstance(node, ast.Expr | ast.Attribute | ast.For):
        return False
    used = node.iter if isinstance(node, ast.For) else node.value
    if not isinstance(used, ast.Call):
        return False
    owner, _, method = ast.unparse(used.func).rpartition(".")
    return owner == parameter and method in _AWAITED


def check_seconds(what: str, seconds: object, *, zero: bool = False) -> None:
    """Reject a value that is not a positive, finite number of seconds; `zero` allows 0 as well."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"{what} must be a number of seconds, not {type(seconds).__name__}.")
    if not 0 <= seconds < math.inf or not (seconds or zero):
        least = "at least" if zero else "above"
        raise ValueError(f"{what} must be {least} 0 seconds, and finite; it is {seconds}.")
