"""Installing a database on an application."""

from collections.abc import Mapping
from typing import Any, cast

from starlette.applications import Starlette

from .._functions import accepts, check_seconds, described, name_of
from .._sessions.engines import AnyEngine, hint_for_engine
from ..databases import database_class
from ..exceptions import ApplicationAlreadyStartedError, DatabaseAlreadyInstalledError
from .lifespan import with_databases
from .running import EngineFactory, Installation, Shutdown, installations_of, trimmed


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
    """Install a database on an application.

    The database is available before the application's own lifespan starts and until after it has
    ended. A ready engine is closed only by your `shutdown`; an engine that your factory built is
    disposed of for you. Start-up opens no connections, unless you set `startup_wait`.

    Args:
        app: the application, which must not have started.
        name: the name that is passed to `get_db(name)` and the others; spaces around it are
            removed.
        engine: an `Engine`, an `AsyncEngine`, or a function without parameters, sync or async,
            that builds one; it is called once at each start-up.
        shutdown: a function without parameters, sync or async, called at the end of the lifespan;
            a sync one runs in a thread.
        session_options: keyword arguments for the sessions, as for `sessionmaker`.
            `expire_on_commit` defaults to `False`.
        startup_wait: seconds to wait for the database to answer before start-up fails. If the
            database refuses, for example a wrong password, start-up fails at once.
        shutdown_timeout: seconds for connections in use to come back and for `shutdown` to end.
            Also how long a cancelled request may take to finish its COMMIT.
        warn_held_after: seconds. If a session has held a connection for longer, that is logged,
            with its route, when the connection is returned.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a time is not above zero.
        DatabaseAlreadyInstalledError: the application already has a database of that name.
        ApplicationAlreadyStartedError: the application has started.

    Example:
        engine = create_async_engine("postgresql+psycopg://...")
        install_database(app, name="analytics", engine=engine, shutdown=engine.dispose)
    """
    if not isinstance(cast("object", app), Starlette):
        raise TypeError(f"install_database takes a FastAPI application, not {type(app).__name__}.")
    installed = installations_of(app)
    if app.middleware_stack is not None or installed.runs:
        raise ApplicationAlreadyStartedError(
            "A database cannot be installed: the application has started. Call install_database "
            "where the application is created, before it is served. To build the engine at "
            "start-up, pass install_database a function that makes it."
        )
    installation = Installation(
        name=trimmed(name),
        engine=engine,
        shutdown=shutdown,
        session_options=dict(session_options or {}),
        startup_wait=startup_wait,
        shutdown_timeout=shutdown_timeout,
        warn_held_after=warn_held_after,
    )
    _check(installation)
    if installation.name in installed.by_name:
        raise DatabaseAlreadyInstalledError(
            f"Database {installation.name!r} is already installed on this application. Give the "
            "second one another name, or call install_database once per name and application."
        )
    if not installed.by_name:
        app.router.lifespan_context = with_databases(app, app.router.lifespan_context)
    installed.by_name[installation.name] = installation


def _check(given: Installation) -> None:
    shutdown, engine = given.shutdown, given.engine
    if shutdown is not None and not accepts(shutdown):
        raise TypeError(
            f"shutdown of database {given.name!r} must be a function without parameters, such as "
            f"engine.dispose (no parentheses), not {described(shutdown)}."
        )
    if given.startup_wait is not None:
        check_seconds(f"startup_wait of database {given.name!r}", given.startup_wait)
    check_seconds(f"shutdown_timeout of database {given.name!r}", given.shutdown_timeout)
    if given.warn_held_after is not None:
        what = f"warn_held_after of database {given.name!r}"
        check_seconds(what, given.warn_held_after, zero=True)
    check_engine(given.name, engine)
    if database_class(engine) is not None:
        given.make_handle(engine)  # so that wrong options fail now, not at start-up


def check_engine(name: str, engine: object) -> None:
    """Refuse what is neither an engine nor a function that makes one."""
    hint = hint_for_engine(engine)
    if database_class(engine) is None and (hint or not accepts(engine)):
        raise TypeError(
            f"engine of database {name!r} must be an Engine, an AsyncEngine or a function "
            "without parameters that makes one, not "
            f"{name_of(engine) if hint else described(engine)}.{hint}"
        )
