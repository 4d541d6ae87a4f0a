"""Starting an application's databases, and what is known once they are up."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from .._routes import mounted_applications
from .._sessions.completion import to_completion
from .._sessions.engines import answers, dispose
from ..databases import AnyDatabase, database_class
from ..errors import DatabaseErrorKind, describe_database_error
from ..exceptions import ApplicationAlreadyStartedError, DatabaseNotStartedError
from .gate import Gate
from .routes import check_application, examine_all, examine_late
from .running import Installation, Running, installations_of
from .shutdown import stop

logger = logging.getLogger("fastapi_sqlnative")

# What one attempt of `startup_wait` gets: a port may accept and not answer, until it does.
_ATTEMPT: Final = 5.0
# What a cancelled attempt gets, in seconds, to close its connection.
_GRACE: Final = 1.0
# asyncpg and asyncmy bind a connection to the event loop that made it; these do not.
_LOOP_FREE: Final = frozenset({"psycopg", "psycopg_async", "aiosqlite"})
# The execution option under which a ready engine knows the event loop it was last used on.
_LOOP: Final = "fastapi_sqlnative_loop"


@asynccontextmanager
async def started(app: Starlette) -> AsyncGenerator[Callable[[], Awaitable[None]]]:
    """Run an application's databases, and those of the applications mounted in it.

    Yields:
        what starts and checks the routes and applications that were added since.
    """
    outermost = Running(app, installations_of(app), app.router)
    outermost.outermost_gate, outermost.examine = Gate(), examine_late
    runs: list[Running] = []
    try:
        await _start(outermost, runs)
        await _start_mounted(runs)
        yield lambda: _start_mounted(runs, late=True)
    finally:
        await to_completion(stop(runs))


async def _start_mounted(runs: list[Running], *, late: bool = False) -> None:
    """Start the applications mounted in these, at any depth, and check every route."""
    for above in runs:
        for app in mounted_applications(above.app):
            if all(app is not each.app for each in runs):
                child = Running(
                    app, installations_of(app), above.router, above, examine=above.examine
                )
                above.children.append(child)
                await _start(child, runs)
    for running in runs:
        check_application(running)
        examine_all(running, late=late)


async def _start(running: Running, runs: list[Running]) -> None:
    installed, loop = running.installed, asyncio.get_running_loop()
    if installed.runs and installed.by_name and installed.loop is not loop:
        raise ApplicationAlreadyStartedError(
            "This application, or one it is mounted in, is running on another event loop. Make "
            "one application per event loop: call the application factory again."
        )
    installed.runs.append(running)
    runs.append(running)
    if len(installed.runs) == 1:
        installed.loop = loop
        installed.draining = False
        for installation in installed.by_name.values():
            await start_installation(installation)
    _show(running)


def _show(running: Running) -> None:
    """Show the databases to those who observe this application or one above it."""
    observed: Running | None = running
    while observed is not None:
        for observer in observed.installed.observers:
            for installation in running.installed.by_name.values():
                if installation.database is not None:
                    observer(installation.database)
        observed = observed.parent


async def start_installation(installation: Installation, *, waits: bool = True) -> None:
    """Make the handle of one database, on the event loop that is to use it.

    Args:
        installation: what was installed.
        waits: for the database to answer, where `startup_wait` was asked for.
    """
    if database_class(installation.engine) is None:
        installation.database = await _build(installation)
    else:
        start_with_engine(installation, asyncio.get_running_loop())
    if installation.database is not None and installation.startup_wait is not None and waits:
        await _wait_for(installation.database, installation.startup_wait)


def start_with_engine(installation: Installation, loop: asyncio.AbstractEventLoop) -> None:
    """Make the handle of a database whose engine is ready, for an event loop."""
    _check_loop(installation, loop)
    installation.database = make_handle(installation, installation.engine)


async def call_factory(factory: Any) -> Any:
    """Call a factory of an engine, sync or async."""
    engine = factory()
    return await engine if inspect.isawaitable(engine) else engine


async def _build(installation: Installation) -> AnyDatabase:
    engine: Any = await call_factory(installation.engine)
    try:
        return make_handle(installation, engine)
    except Exception:
        kind = database_class(engine)
        if kind is not None:
            await dispose(engine)  # nobody else knows of it
        raise


def make_handle(installation: Installation, engine: Any) -> AnyDatabase:
    """Make the handle of an installed database."""
    kind = database_class(engine)
    if kind is None:
        raise TypeError(
            f"The engine factory of database {installation.name!r} must return an Engine or an "
            f"AsyncEngine; it returned {type(engine).__name__}."
        )
    return kind(
        engine,
        name=installation.name,
        session_options=installation.session_options,
        shutdown_timeout=installation.shutdown_timeout,
        warn_held_after=installation.warn_held_after,
    )


def _check_loop(installation: Installation, loop: asyncio.AbstractEventLoop) -> None:
    """Refuse an engine whose idle connections belong to another event loop."""
    engine = installation.engine
    if not isinstance(engine, AsyncEngine) or engine.driver in _LOOP_FREE:
        return
    # Noted on the engine, which may have been installed on another application before.
    last = engine.get_execution_options().get(_LOOP, loop)
    if last is not loop and getattr(engine.pool, "checkedin", int)():
        raise DatabaseNotStartedError(
            f"Database {installation.name!r} cannot start: its engine ({engine.driver}) holds "
            "connections that belong to another event loop, where it was used before. Install it "
            "with shutdown=engine.dispose, or give install_database a function that makes the "
            "engine."
        )
    engine.update_execution_options(**{_LOOP: loop})


async def _wait_for(database: AnyDatabase, seconds: float) -> None:
    """Ask until the database answers, or the time is up."""
    deadline = anyio.current_time() + seconds
    pause = 0.1
    while True:
        try:
            left = max(min(deadline - anyio.current_time(), _ATTEMPT), 0.1)
            if await answers(database.engine, left, grace=_GRACE):
                return
            raise TimeoutError(f"Database {database.name!r} did not answer within {left:.1f} s.")
        except Exception as error:
            left = deadline - anyio.current_time()
            if left <= 0:
                error.add_note(f"Database {database.name!r} did not answer in {seconds:g} s.")
                raise
            if not _may_pass(error):
                error.add_note(f"Database {database.name!r} answered, and waiting will not help.")
                raise
            delay = min(pause * random.uniform(0.5, 1.0), left)  # noqa: S311 - jitter
            logger.warning(
                "Database %r does not answer yet (%s); next try in %.1f s.",
                database.name,
                type(error).__name__,
                delay,
            )
            await anyio.sleep(delay)
            pause = min(pause * 2, 2.0)


def _may_pass(error: Exception) -> bool:
    """Tell a database that is away, or full, from one that says no."""
    if isinstance(error, OSError):
        return True  # asyncpg's, and the end of an attempt
    failure = describe_database_error(error)
    passing = (DatabaseErrorKind.UNAVAILABLE, DatabaseErrorKind.TOO_MANY_CONNECTIONS)
    return failure is not None and failure.kind in passing
