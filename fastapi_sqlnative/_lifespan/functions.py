"""What a dependency's function is and does, as far as it can be seen without calling it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any, Final

from fastapi.dependencies.models import Dependant
from sqlalchemy.ext.asyncio import AsyncSession

_AWAITED: Final = frozenset(
    name for name, each in vars(AsyncSession).items() if inspect.iscoroutinefunction(each)
)


def name_of(call: object) -> str:
    """Name a dependency for a message."""
    return getattr(call, "__qualname__", None) or type(call).__qualname__


def described(value: object) -> str:
    """Name a function and its parameters, without defaults: an address may be one."""
    if not callable(value):
        return type(value).__name__
    signature = inspect.signature(value)
    bare = [each.replace(default=each.empty) for each in signature.parameters.values()]
    return f"{name_of(value)}{signature.replace(parameters=bare)}"


def is_request_scoped_generator(dependant: Dependant) -> bool:
    """Tell what FastAPI enters before the endpoint and leaves after the response."""
    return dependant.scope != "function" and is_generator(dependant.call)


def is_generator(call: object) -> bool:
    """Tell whether FastAPI enters a dependency, and leaves it later."""
    return any(
        inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each)
        for each in _functions(call)
    )


def is_awaitable(call: object) -> bool:
    """Tell whether a function can await what it is given; FastAPI builds a class in a thread."""
    return any(
        inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each)
        for each in _functions(call)
    )


def drops_a_coroutine(call: object, parameter: str) -> bool:
    """Tell whether a function calls what must be awaited of a parameter, and does not await it.

    It may return the coroutine, or hand the method on: only what can never work counts.
    """
    if is_awaitable(call) or inspect.isclass(call):
        return False
    return any(_is_dropped(tree, parameter) for tree in map(_tree_of, _functions(call)) if tree)


def _tree_of(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None  # no source, or one that cannot be read by itself


def _is_dropped(tree: ast.AST, parameter: str) -> bool:
    """Find a call whose coroutine is thrown away, or asked for what its result would have."""
    for node in ast.walk(tree):
        used = getattr(node, "value", None) if isinstance(node, ast.Expr | ast.Attribute) else None
        used = node.iter if isinstance(node, ast.For) else used
        if isinstance(used, ast.Call) and isinstance(used.func, ast.Attribute):
            owner = used.func.value
            if isinstance(owner, ast.Name) and owner.id == parameter and used.func.attr in _AWAITED:
                return True
    return False


def _functions(call: object) -> list[object]:
    """List what runs when a dependency is called, behind partials and decorators."""
    while isinstance(call, functools.partial):
        call = call.func
    if call is None:
        return []
    looked_at: list[Any] = [call, inspect.unwrap(call)]  # type: ignore[arg-type] # any object may
    if not inspect.isclass(looked_at[1]):
        methods = [each.__call__ for each in looked_at]
        looked_at += [*methods, *map(inspect.unwrap, methods)]
    return looked_at
