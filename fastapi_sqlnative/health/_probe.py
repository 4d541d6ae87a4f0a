"""Asking one database or one check."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from traceback import clear_frames
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from .._completion import in_thread
from .._failures import DatabaseErrorKind, describe_database_error
from .._movement import OUTSIDE, is_full
from .._pools import ask_pool

_REFUSES_WRITES: Final = {
    "postgresql": "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'",
    "mysql": "SELECT @@global.read_only",
    "mariadb": "SELECT @@global.read_only",
}


class DatabaseState(StrEnum):
    """What readiness knows of a database, the worst last."""

    UP = "up"
    SATURATED = "saturated"  # it answers, and every connection of the pool is in use
    READ_ONLY = "read_only"  # it answers, and takes no writes, which it should
    WEDGED = "wedged"  # every connection is in use, and none has come back for too long
    DOWN = "down"


def ask_database(engine: Engine, *, in_use: int, writable: bool) -> DatabaseState:
    """Return the state of a database that answers; raise the error of one that does not.

    Plain code, for a greenlet or a thread. It never joins the queue for the pool: where no
    connection is idle, it makes one as the pool would, and closes it. `in_use` counts those that
    sessions hold, which not every kind of pool knows.
    """
    pool = engine.pool
    if isinstance(pool, sa.StaticPool) and in_use:
        # One connection for everybody: giving it back would roll back what a session has begun.
        return DatabaseState.UP
    if isinstance(pool, sa.QueuePool) and pool.checkedin():
        with suppress(Exception):  # asked again below: it was lost with a server that may be back
            return _ask(engine, writable)
    elif not (_is_exclusive(pool) or ask_pool(pool, "checkedout")):
        # Nobody waits for an empty pool, and its first connection readies the dialect.
        return _ask(engine, writable)
    full, outside = is_full(engine), pool.recreate()
    event.listen(outside, "connect", _mark, insert=True)
    try:
        state = _ask(Engine(outside, engine.dialect, engine.url), writable)
    except Exception as error:
        failure = describe_database_error(error)
        if not (failure and failure.kind is DatabaseErrorKind.TOO_MANY_CONNECTIONS):
            raise
        if not ask_pool(pool, "checkedout"):
            raise
        return DatabaseState.SATURATED
    finally:
        outside.dispose()
    return DatabaseState.SATURATED if full and state is DatabaseState.UP else state


def _mark(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[OUTSIDE] = True


def _is_exclusive(pool: sa.Pool) -> bool:
    # They would give us the only connection, or the thread's own, before a request wants it.
    return isinstance(pool, sa.AssertionPool | sa.SingletonThreadPool)


def _ask(engine: Engine, writable: bool) -> DatabaseState:
    query: Any = sa.text(_REFUSES_WRITES[engine.dialect.name]) if writable else sa.select(1)
    try:
        with engine.connect() as connection:
            answer = connection.scalar(query)
    except asyncio.CancelledError as error:
        clear_frames(error.__traceback__)  # half open, it would stay until the garbage collection
        raise
    refuses = writable and answer not in (False, "OFF")
    return DatabaseState.READ_ONLY if refuses else DatabaseState.UP


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check has found: whether it is ready, and a word that everybody may read."""

    ready: bool
    state: str


Check: TypeAlias = Callable[..., bool | CheckResult | Awaitable[bool | CheckResult]]


@dataclass(frozen=True, slots=True)
class ReadinessCheck:
    """A check with a time of its own, or one that is only reported.

    Attributes:
        check: a function, sync or async, of the application or of nothing, which returns `True`,
            `False` or a `CheckResult`. A sync one runs in a thread.
        timeout: seconds, within those of the router; `None` for all of them.
        required: with `False` its failure is reported, and the application still ready.
    """

    check: Check
    timeout: float | None = None
    required: bool = True


def arguments_for(name: str, check: Check, app: object) -> tuple[object, ...]:
    """Return what a check is called with: nothing, or the application."""
    for arguments in ((), (app,)):
        with suppress(TypeError):
            inspect.signature(check).bind(*arguments)
            return arguments
    raise TypeError(
        f"Check {name!r} must be a function of the application or of nothing, or a ReadinessCheck "
        f"of one, not {check!r}."
    )


def is_async(check: Check) -> bool:
    """Tell whether calling it gives a coroutine, be it a function, an object or a partial."""
    call = getattr(type(check), "__call__", None)  # noqa: B004 - its kind, not whether it is
    return inspect.iscoroutinefunction(check) or inspect.iscoroutinefunction(call)


async def run_check(name: str, check: Check, app: object) -> CheckResult:
    """Call a check, a sync one in a thread; raise TypeError for what it may not return."""
    arguments = arguments_for(name, check, app)
    found: Any
    if is_async(check):
        found = check(*arguments)
    else:
        found = await asyncio.wrap_future(in_thread(lambda: check(*arguments)))
    match await found if inspect.isawaitable(found) else found:
        case bool(ready):
            return CheckResult(ready, "up" if ready else "down")
        case CheckResult(ready=bool(), state=str()) as result:
            return result
        case other:
            raise TypeError(
                f"Check {name!r} returned {type(other).__name__}: return True, False or a "
                "CheckResult of a bool and a word."
            )
