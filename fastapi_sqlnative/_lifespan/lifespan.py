"""The lifespan of an application's databases: start-up, shutdown, and draining before it."""

import asyncio
import functools
import inspect
import logging
import random
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import FrameType
from typing import Any, Final

import anyio
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.types import Lifespan

from .._drivers.connections import LOOP_FREE
from .._functions import check_seconds, is_awaitable
from .._routes import mounted_applications
from .._sessions.completion import in_thread, to_completion, within
from .._sessions.engines import ask, dispose, run_on_engine
from .._sessions.shared import SharedState
from ..databases import AnyDatabase, database_class, sessions_of
from ..errors import describe_database_error
from ..exceptions import ApplicationAlreadyStartedError, DatabaseNotStartedError
from .routes import check_application
from .running import Installation, Running, installations_of

logger = logging.getLogger("fastapi_sqlnative")

# Seconds for one attempt of `startup_wait`: a port may accept connections before it answers.
_ATTEMPT: Final = 5.0
# Seconds that a hook gets even if others have used up the time for all.
_LEAST: Final = 1.0
# The execution option that holds the event loop on which a ready engine was last started.
_LOOP: Final = "fastapi_sqlnative_loop"


def with_databases(app: Starlette, inner: Lifespan[Any]) -> Lifespan[Any]:
    """Wrap the application's lifespan in that of its databases, passing its state through."""

    @asynccontextmanager
    async def lifespan(served: Any) -> AsyncGenerator[Any]:
        runs: list[Running] = []  # of this application, and of those mounted in it
        try:
            await _start(Running(app, examine=check_application), runs)
            await _start_mounted(runs)
            async with inner(served) as state:
                await _start_mounted(runs, late=True)  # what the application's lifespan added
                yield state
        finally:
            await to_completion(lambda: stop(runs))

    return lifespan


async def _start_mounted(runs: list[Running], *, late: bool = False) -> None:
    """Start all applications mounted in these, at any depth, and check every route."""
    for above in runs:
        for app in mounted_applications(above.app):
            if all(app is not each.app for each in runs):
                await _start(Running(app, above), runs)
    for running in runs:
        check_application(running, late=late)


async def _start(running: Running, runs: list[Running]) -> None:
    installed, running.loop = running.installed, asyncio.get_running_loop()
    if not installed.runs:
        installed.starting, installed.draining = asyncio.Lock(), False  # of this event loop
    installed.runs.append(running)
    runs.append(running)
    # The first has it, even if two threads start at once.
    if installed.runs[0].loop is not running.loop:
        if not installed.by_name:
            return  # nothing to start, and nothing to wait for on that event loop
        raise ApplicationAlreadyStartedError(
            "This application, or one it is mounted in, is running on another event loop. Make "
            "one application per event loop: call the application factory again."
        )
    async with installed.starting:
        # Another start may have done all of this, or failed halfway.
        for installation in installed.by_name.values():
            database = installation.database or await _make_handle(installation)
            if installation.startup_wait is not None:
                await _wait_for(database, installation.startup_wait)
            for observer in running.observers:
                observer(database)


async def _make_handle(installation: Installation) -> AnyDatabase:
    engine: Any = installation.engine
    builds = database_class(engine) is None
    if builds:
        engine = await call_factory(engine)
    else:
        _check_loop(installation.name, engine)
    try:
        database = installation.database = installation.make_handle(engine)
    except Exception:
        if builds and database_class(engine) is not None:
            await dispose(engine)  # no one else has a reference to it
        raise
    return database


async def call_factory(factory: Any) -> Any:
    engine = factory()
    return await engine if inspect.isawaitable(engine) else engine


def _check_loop(name: str, engine: Any) -> None:
    """Refuse an engine whose idle connections belong to another event loop."""
    if not isinstance(engine, AsyncEngine) or engine.driver in LOOP_FREE:
        return
    # Kept on the engine, which may have been installed on another application before.
    loop = asyncio.get_running_loop()
    last = engine.get_execution_options().get(_LOOP, loop)
    if last is not loop and getattr(engine.pool, "checkedin", int)():
        raise DatabaseNotStartedError(
            f"Database {name!r} cannot start: its engine ({engine.driver}) holds "
            "connections that belong to another event loop, where it was used before. Install it "
            "with shutdown=engine.dispose, or pass install_database a function that makes the "
            "engine."
        )
    engine.update_execution_options(**{_LOOP: loop})


async def _wait_for(database: AnyDatabase, seconds: float) -> None:
    """Retry until the database answers or the time is up."""
    deadline, pause = anyio.current_time() + seconds, 0.1
    while True:
        try:
            limit = max(min(deadline - anyio.current_time(), _ATTEMPT), 0.1)
            late = TimeoutError(f"Database {database.name!r} did not answer within {limit:.1f} s.")
            return await within(limit, run_on_engine(database.engine, ask), late=late)
        except Exception as error:
            left = deadline - anyio.current_time()
            if left <= 0 or not _may_pass(error):
                refused = "answered with an error that waiting will not fix"
                outcome = f"did not answer in {seconds:g} s" if left <= 0 else refused
                error.add_note(f"Database {database.name!r} {outcome}.")
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
    """Return whether an error may be temporary: the database is unavailable or busy."""
    failure = describe_database_error(error)
    # An attempt's own TimeoutError is an OSError too.
    return isinstance(error, OSError) or (failure is not None and failure.transient)


# -- shutdown: in reverse order, each within its deadline, all even if some fail ----------------


async def stop(runs: Sequence[Running]) -> None:
    """End one lifespan's runs, and close the databases that no other one uses or waits for."""
    errors: list[Exception] = []
    ours = [each for each in reversed(runs) if set(runs).issuperset(each.installed.runs)]
    for each in set(runs).difference(ours):
        each.installed.runs.remove(each)  # now: two that end at once both see the other's
    async with AsyncExitStack() as stopping:
        for each in ours:
            await stopping.enter_async_context(each.installed.starting)  # a new start waits
            each.installed.draining = True
        last_first = [each for run in ours for each in reversed(run.installed.by_name.values())]
        ending = [(each, each.database) for each in last_first if each.database is not None]
        for _, database in ending:
            sessions_of(database).state.stopping = "shutting down"
        deadline = anyio.current_time() + max([0, *(each.shutdown_timeout for each, _ in ending)])
        for installation, database in ending:
            await _close(installation, database, deadline, errors)
        for each in ours:
            each.installed.runs.remove(each)  # only now: until here requests get the right error
            each.installed.draining = False
    if errors:
        raise ExceptionGroup("Databases failed to shut down", errors)


async def _close(
    installation: Installation, database: AnyDatabase, total: float, errors: list[Exception]
) -> None:
    deadline = min(anyio.current_time() + installation.shutdown_timeout, total)
    state = sessions_of(database).state
    await _drain(state, deadline)
    state.stopping, installation.database = "stopped", None
    steps: dict[str, Callable[[], Any]] = {}
    if installation.shutdown is not None:
        steps["shutdown hook"] = installation.shutdown
    if database_class(installation.engine) is None:
        steps["dispose"] = functools.partial(dispose, database.engine)
    for step, function in steps.items():
        try:
            left = max(deadline - anyio.current_time(), min(_LEAST, installation.shutdown_timeout))
            late = TimeoutError(f"It did not end within {left:.1f} s.")
            await within(left, call_off_loop(function), late=late)
        except Exception as error:  # noqa: BLE001 - raised with the others at the end
            error.add_note(f"In the {step} of database {database.name!r}.")
            errors.append(error)


async def _drain(state: SharedState, deadline: float) -> None:
    """Wait until our sessions have released their connections, but not for other code's."""
    # Sessions may end in threads, so there is no event to await.
    while state.holders and anyio.current_time() < deadline:  # noqa: ASYNC110
        await anyio.sleep(0.01)
    if left := len(state.holders):
        logger.warning(
            "Database %r is closed with %d connection(s) still in use; the sessions that hold "
            "them can run no more statements.",
            state.name,
            left,
        )


async def call_off_loop(function: Callable[[], Any]) -> Any:
    """Call a function, in a thread if it is synchronous, and return its result."""
    is_async = is_awaitable(function)
    result = function() if is_async else await asyncio.wrap_future(in_thread(function))
    return await result if inspect.isawaitable(result) else result


# -- out of service, before the server stops --------------------------------------------------


def start_draining(app: Starlette) -> None:
    """Make an application's readiness fail from now on; all other requests are still served.

    It can be called from a signal handler, and more than once. The next start-up resets it.

    Args:
        app: the application; applications mounted in it become not ready as well.
    """
    installed = installations_of(app)
    if not installed.draining:
        installed.draining = True
        logger.info("The application is draining: it is no longer ready, but still serves.")


def drain_on_sigterm(app: Starlette, *, seconds: float = 5.0) -> None:
    """Start draining on SIGTERM, and call the server's own handler some seconds later.

    Call this before the application starts. A second SIGTERM stops the server at once.

    Args:
        app: the application that is served.
        seconds: how long to drain; longer than a load balancer needs to notice.

    Raises:
        ValueError: the time is below zero.
        ApplicationAlreadyStartedError: the application has started.
    """
    check_seconds("seconds", seconds, zero=True)
    if installations_of(app).runs:
        raise ApplicationAlreadyStartedError(
            "SIGTERM cannot be handled: the application has started. Call drain_on_sigterm where "
            "the application is created, before it is served."
        )
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: Any) -> AsyncGenerator[Any]:
        async with inner(served) as state:
            loop = asyncio.get_running_loop()
            stop: Any = signal.getsignal(signal.SIGTERM)  # the server's handler, if it has one

            def drain(signum: int, frame: FrameType | None) -> None:
                signal.signal(signal.SIGTERM, stop)
                start_draining(app)
                loop.call_soon_threadsafe(loop.call_later, seconds, stop, signum, frame)

            if callable(stop) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, drain)
            try:
                yield state
            finally:
                if signal.getsignal(signal.SIGTERM) is drain:
                    signal.signal(signal.SIGTERM, stop)

    app.router.lifespan_context = lifespan
