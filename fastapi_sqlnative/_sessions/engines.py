"""Operations on an engine, sync or async, that don't block the event loop."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from traceback import clear_frames
from typing import Any, Final, TypeAlias, TypeVar

from sqlalchemy import URL, Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from .._drivers.failures import recognize
from .completion import in_thread

AnyEngine: TypeAlias = Engine | AsyncEngine
T = TypeVar("T")
_ONE: Final = select(1)


def sync_engine(engine: AnyEngine) -> Engine:
    """Return the synchronous engine behind an `AsyncEngine`, or the engine itself."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def hint_for_engine(given: object) -> str:
    """Return a hint for the error message if it is known what was given instead of an engine."""
    if isinstance(given, str | URL):
        return " Create an engine from the URL: create_async_engine(url), or create_engine(url)."
    if isinstance(given, Coroutine):
        return " It is a coroutine: pass the function itself, without calling it."
    if isinstance(given, Generator | AsyncGenerator):
        return " Return the engine instead of yielding it: the package disposes of it at the end."
    kind = given if isinstance(given, type) else type(given)
    # Connections, sessions, their makers and their subclasses.
    is_made = any(each.__module__.startswith("sqlalchemy.") for each in kind.__mro__)
    if is_made and not issubclass(kind, Engine | AsyncEngine):
        return " Pass the engine itself, and a sessionmaker's other options as session_options."
    return ""


def run_in_greenlet(
    work: Callable[[], T], session: AsyncSession | None = None
) -> Coroutine[Any, Any, T]:
    """Run plain code in a greenlet, where it may use async connections and can be cancelled."""
    # A session's `run_sync` is the only public way into a greenlet. Any session will do.
    any_session = AsyncSession() if session is None else session
    return AsyncSession.run_sync(any_session, lambda _: work())  # not an override


async def run_on_engine(engine: AnyEngine, work: Callable[[Engine], T]) -> T:
    """Call plain code with the synchronous engine.

    For an `AsyncEngine` it runs in a greenlet, which can be cancelled. For an `Engine` it runs in
    a daemon thread of its own, which outlives a cancellation: only the driver's timeouts bound it.
    """
    if isinstance(engine, AsyncEngine):
        return await run_in_greenlet(lambda: work(engine.sync_engine))
    return await asyncio.wrap_future(in_thread(lambda: work(engine)))


async def dispose(engine: AnyEngine) -> None:
    """Close the engine's idle connections."""
    await run_on_engine(engine, lambda each: each.dispose())


def ask(engine: Engine, query: Any = _ONE) -> Any:
    """Query one value, translating a driver's connect error into SQLAlchemy's."""
    pool = engine.pool
    try:
        with engine.connect() as connection:
            return connection.scalar(query)
    except asyncio.CancelledError as error:
        clear_frames(error.__traceback__)  # else a half-open connection lives until the next GC
        raise
    except Exception as error:
        if (recognized := recognize(error)) is not None:
            raise recognized from error
        raise
    finally:
        if engine.pool is not pool:  # disposed of meanwhile: nobody would close what came back
            pool.dispose()
