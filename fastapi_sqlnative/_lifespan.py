"""Installing databases, opening them when the application starts, closing them when it stops."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import random
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from ._checks import check_routes
from ._completion import to_completion
from ._gates import Gate
from ._registry import EngineFactory, Installation, Registry, Shutdown, registry_of, trimmed
from ._routes import mounted_applications
from ._shutdown import stop
from .databases import AnyDatabase, AnyEngine, database_class
from .errors import DatabaseErrorKind, describe_database_error
from .exceptions import ApplicationAlreadyStartedError, DatabaseNotStartedError

logger = logging.getLogger("fastapi_sqlnative")

# What one attempt of `startup_wait` gets: a port may accept and not answer, until it does.
_ATTEMPT: Final = 5.0
# asyncpg and asyncmy bind a connection to the event loop that made it; these do not.
_LOOP_FREE: Final = frozenset({"psycopg", "psycopg_async", "aiosqlite"})
# The execution option under which a ready engine knows the event loop it was last used on.
_LOOP: Final = "fastapi_sqlnative_loop"


def install_database(
    app: Starlette,
    *,
    name: str = "default",
    engine: AnyEngine | EngineFactory,
    shutdown: Shutdown | None = None,
    session_options: Mapping[str, Any] | None = None,
    startup_wait: float | None = None,
    shutdown_timeout: float = 10.0,
) -> None:
    """Install a database on an application, for as long as its lifespan runs.

    It is there before the application's own lifespan starts and until that has ended, however
    that one was declared. Who builds the engine closes it: a ready engine is yours, and is closed
    by your `shutdown` only; one that your factory built is disposed of here. Nothing connects at
    the start, unless you ask for `startup_wait`.

    Args:
        app: the application; call this before it starts.
        name: what `get_db(name)` and the others ask for, trimmed.
        engine: an `Engine`, an `AsyncEngine`, or a function without parameters, sync or async,
            that makes one; it is called once at each start.
        shutdown: a function without parameters, sync or async, called at the end of the lifespan;
            a sync one runs in a thread.
        session_options: keyword arguments for the sessions, as for `sessionmaker`.
            `expire_on_commit` is `False` unless you say otherwise.
        startup_wait: seconds to wait for the database to answer before the start fails. One that
            answers and refuses, a wrong password say, fails it at once.
        shutdown_timeout: seconds for connections in use to come back and for `shutdown` to end.
            Also how long a cancelled request may go on with its COMMIT.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a time that is not above zero.
        DatabaseAlreadyInstalledError: the application has a database of that name.
        ApplicationAlreadyStartedError: the application has started.

    Example:
        engine = create_async_engine("postgresql+psycopg://...")
        install_database(app, name="analytics", engine=engine, shutdown=engine.dispose)
    """
    _check_application(app)
    installation = _installation(
        name, engine, shutdown, session_options, startup_wait, shutdown_timeout
    )
    registry = registry_of(app)
    registry.add(installation)
    if len(registry.installations) == 1:
        _wrap_lifespan(app)


def _check_application(app: object) -> None:
    if not isinstance(app, Starlette):
        raise TypeError(f"install_database takes a FastAPI application, not {type(app).__name__}.")
    if app.middleware_stack is not None or registry_of(app).starts:
        raise ApplicationAlreadyStartedError(
            "A database cannot be installed: the application has started. Call install_database "
            "where the application is made, before it is served; to build the engine late, give "
            "install_database a function that makes it."
        )


def _installation(
    name: object,
    engine: AnyEngine | EngineFactory,
    shutdown: Shutdown | None,
    session_options: Mapping[str, Any] | None,
    startup_wait: float | None,
    shutdown_timeout: float,
) -> Installation:
    name = trimmed(name)
    if shutdown is not None and not _takes_nothing(shutdown):
        raise TypeError(
            f"shutdown of database {name!r} must be a function without parameters, such as "
            f"engine.dispose (no parentheses), not {_shown(shutdown)}."
        )
    if startup_wait is not None:
        _check_seconds("startup_wait", name, startup_wait)
    _check_seconds("shutdown_timeout", name, shutdown_timeout)
    installation = Installation(
        name=name,
        engine=engine,
        shutdown=shutdown,
        session_options=dict(session_options or {}),
        startup_wait=startup_wait,
        shutdown_timeout=shutdown_timeout,
    )
    if database_class(engine) is not None:
        _handle(installation, engine)  # mistakes in the options show now, not at the start
    elif not _takes_nothing(engine):
        raise TypeError(
            f"engine of database {name!r} must be an Engine, an AsyncEngine or a function without "
            f"parameters that makes one, not {_shown(engine)}."
        )
    return installation


def _takes_nothing(function: object) -> bool:
    """Tell whether this can be called without arguments, before the day that it is."""
    try:
        inspect.signature(function).bind()  # type: ignore[arg-type] # a TypeError tells
    except TypeError:
        return False
    except ValueError:
        return True  # written in C, without a signature
    return True


def _shown(value: object) -> str:
    if not callable(value):
        return type(value).__name__
    return f"{getattr(value, '__qualname__', type(value).__name__)}{inspect.signature(value)}"


def _check_seconds(argument: str, name: str, seconds: object) -> None:
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(
            f"{argument} of database {name!r} must be a number of seconds, not "
            f"{type(seconds).__name__}."
        )
    if not 0 < seconds < math.inf:
        raise ValueError(f"{argument} of database {name!r} must be above 0 seconds, and finite.")


def _wrap_lifespan(app: Starlette) -> None:
    """Put the databases around the application's lifespan, whose state passes through."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: Any) -> AsyncGenerator[Any]:
        async with _running(app), inner(served) as state:
            yield state

    app.router.lifespan_context = lifespan


@asynccontextmanager
async def _running(app: Starlette) -> AsyncGenerator[None]:
    applications = _share(app)
    registries = [registry_of(each) for each in applications]
    shared: list[Registry] = []
    try:
        for registry in registries:
            shared.append(registry)
            await _start(registry)
        _show_observers(registries, id(app.router))
        await _check(applications, registries, id(app.router))
        yield
    finally:
        await to_completion(stop(shared, id(app.router)))


def _share(app: Starlette) -> list[Starlette]:
    """Let mounted applications, at any depth, find the databases of the ones above them."""
    applications = [app]
    for above in applications:
        children = registry_of(above).children[id(app.router)] = []
        for mounted in mounted_applications(above):
            if mounted not in applications:
                registry_of(mounted).parents[id(app.router)] = registry_of(above)
                children.append(registry_of(mounted))
                applications.append(mounted)
    return applications


async def _start(registry: Registry) -> None:
    loop = asyncio.get_running_loop()
    registry.starts += 1
    if registry.starts > 1:
        if registry.installations and registry.loop is not loop:
            raise ApplicationAlreadyStartedError(
                "This application, or one it is mounted in, is running on another event loop. Make "
                "one application per event loop: call the application factory again."
            )
        return
    registry.loop = loop
    registry.draining = False
    for installation in registry.installations.values():
        await start_installation(installation)


async def start_installation(installation: Installation) -> None:
    """Make the handle of one database, on the event loop that is to use it."""
    if database_class(installation.engine) is None:
        installation.database = await _build(installation)
    else:
        start_with_engine(installation, asyncio.get_running_loop())
    for overridden in installation.chain()[1:]:
        if overridden.database is None and database_class(overridden.engine) is not None:
            overridden.database = _handle(overridden, overridden.engine)


def start_with_engine(installation: Installation, loop: asyncio.AbstractEventLoop) -> None:
    """Make the handle of a database whose engine is ready, for an event loop."""
    _check_loop(installation, loop)
    installation.database = _handle(installation, installation.engine)


def _show_observers(registries: Sequence[Registry], router: int) -> None:
    for registry in registries:
        for observer in registry.observers:
            for database in registry.databases_from_here(router):
                observer(database)


async def _build(installation: Installation) -> AnyDatabase:
    engine = await _call(installation.engine)
    try:
        return _handle(installation, engine)
    except Exception:
        kind = database_class(engine)
        if kind is not None:
            await kind(engine).dispose()  # nobody else knows of it
        raise


def _handle(installation: Installation, engine: Any) -> AnyDatabase:
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


async def _check(
    applications: Sequence[Starlette], registries: Sequence[Registry], router: int
) -> None:
    several: dict[object, Counter[AnyDatabase]] = {}
    for app, registry in zip(applications, registries, strict=True):
        several |= check_routes(app, registry, router)
    installations = [each for one in registries for each in one.installations.values()]
    databases = [each.database for each in installations if each.database is not None]
    outermost = registries[0]
    if outermost.gate is None and (several or any(each.blocking for each in databases)):
        outermost.gate = Gate(several)
    for installation in installations:
        if installation.database is not None and installation.startup_wait is not None:
            await _wait_for(installation.database, installation.startup_wait)


async def _wait_for(database: AnyDatabase, seconds: float) -> None:
    """Ask until the database answers, or the time is up."""
    deadline = anyio.current_time() + seconds
    pause = 0.1
    while True:
        try:
            left = deadline - anyio.current_time()
            return await database.answer(max(min(left, _ATTEMPT), 0.1))
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


async def _call(function: Any) -> Any:
    result = function()
    return await result if inspect.isawaitable(result) else result
