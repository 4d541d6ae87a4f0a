"""Installing a database on an application."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette

from .._seconds import check_seconds
from .._sessions.engines import AnyEngine
from ..databases import database_class, remedy_for_address
from ..exceptions import ApplicationAlreadyStartedError
from .functions import described
from .running import EngineFactory, Installation, Shutdown, installations_of, trimmed
from .startup import make_handle, started


def install_database(
    app: Starlette,
    *,
    name: str = "default",
    engine: AnyEngine | EngineFactory,
    shutdown: Shutdown | None = None,
    session_options: Mapping[str, Any] | None = None,
    startup_wait: float | None = None,
    shutdown_timeout: float = 10.0,
    warn_held_after: float | None = None,
) -> None:
    """Install a database on an application, for as long as its lifespan runs.

    The database is up before the application's own lifespan starts and until it has ended, however
    it was declared. Whoever builds the engine closes it: only your `shutdown` closes a ready
    engine, and one that your factory built is disposed of for you. Nothing connects at start-up,
    unless you ask for `startup_wait`.

    Args:
        app: the application; call this before it starts.
        name: the name that `get_db(name)` and the others ask for; spaces around it are removed.
        engine: an `Engine`, an `AsyncEngine`, or a function without parameters, sync or async,
            that builds one; it is called once at each start-up.
        shutdown: a function without parameters, sync or async, called at the end of the lifespan;
            a sync one runs in a thread.
        session_options: keyword arguments for the sessions, as for `sessionmaker`.
            `expire_on_commit` is `False` unless you say otherwise.
        startup_wait: seconds to wait for the database to answer before start-up fails. If it
            answers and refuses, for example a wrong password, start-up fails at once.
        shutdown_timeout: seconds for connections in use to come back and for `shutdown` to end.
            Also how long a cancelled request may go on with its COMMIT.
        warn_held_after: seconds. A connection that a session has held for longer is logged, with
            its route, when it comes back.

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
        name, engine, shutdown, session_options, startup_wait, shutdown_timeout, warn_held_after
    )
    installed = installations_of(app)
    installed.add(installation)
    if len(installed.by_name) == 1:
        _wrap_lifespan(app)


def _check_application(app: object) -> None:
    if not isinstance(app, Starlette):
        raise TypeError(f"install_database takes a FastAPI application, not {type(app).__name__}.")
    if app.middleware_stack is not None or installations_of(app).runs:
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
    warn_held_after: float | None,
) -> Installation:
    name = trimmed(name)
    if shutdown is not None and not _takes_nothing(shutdown):
        raise TypeError(
            f"shutdown of database {name!r} must be a function without parameters, such as "
            f"engine.dispose (no parentheses), not {described(shutdown)}."
        )
    if startup_wait is not None:
        check_seconds(f"startup_wait of database {name!r}", startup_wait)
    check_seconds(f"shutdown_timeout of database {name!r}", shutdown_timeout)
    if warn_held_after is not None:
        check_seconds(f"warn_held_after of database {name!r}", warn_held_after, zero=True)
    installation = Installation(
        name=name,
        engine=engine,
        shutdown=shutdown,
        session_options=dict(session_options or {}),
        startup_wait=startup_wait,
        shutdown_timeout=shutdown_timeout,
        warn_held_after=warn_held_after,
    )
    if database_class(engine) is not None:
        make_handle(installation, engine)  # mistakes in the options show now, not at start-up
    elif not _takes_nothing(engine):
        raise TypeError(
            f"engine of database {name!r} must be an Engine, an AsyncEngine or a function without "
            f"parameters that makes one, not {described(engine)}.{remedy_for_address(engine)}"
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


def _wrap_lifespan(app: Starlette) -> None:
    """Put the databases around the application's lifespan, whose state passes through."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: Any) -> AsyncGenerator[Any]:
        async with started(app) as look_again, inner(served) as state:
            await look_again()  # at what the application's own lifespan has added
            yield state

    app.router.lifespan_context = lifespan
