"""What is done with an engine itself, of either kind, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from .._drivers.failures import recognize
from .completion import in_thread

AnyEngine: TypeAlias = Engine | AsyncEngine
T = TypeVar("T")


def sync_engine(engine: AnyEngine) -> Engine:
    """Return the engine that has the pool: an `AsyncEngine` is a proxy for one."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


async def run_in_greenlet(work: Callable[[], T]) -> T:
    """Call plain code where it may use asynchronous connections; a cancellation reaches it."""
    # A session that is there for nothing else has the only public way into a greenlet.
    return await AsyncSession().run_sync(lambda _: work())


async def run_on_engine(engine: AnyEngine, work: Callable[[Engine], T]) -> T:
    """Give the engine to plain code.

    In a greenlet for an `AsyncEngine`, which a cancellation reaches; in a daemon thread of its own
    for an `Engine`, which a cancellation leaves behind: only the driver's timeouts bound that one.
    """
    if isinstance(engine, AsyncEngine):
        return await run_in_greenlet(lambda: work(engine.sync_engine))
    return await asyncio.wrap_future(in_thread(lambda: work(engine)))


async def dispose(engine: AnyEngine) -> None:
    """Close the engine's idle connections."""
    await run_on_engine(engine, lambda each: each.dispose())


def ask_for_one_row(engine: Engine) -> None:
    """Make the server answer; what a driver raises by itself becomes SQLAlchemy's error."""
    try:
        with engine.connect() as connection:
            connection.scalar(select(1))
    except Exception as error:
        if (recognized := recognize(error)) is not None:
            raise recognized from error
        raise
