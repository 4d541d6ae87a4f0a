"""The databases installed on an application, and the running application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar, overload

import anyio
from fastapi.requests import HTTPConnection
from starlette.applications import Starlette
from starlette.routing import Router

from .._sessions.engines import AnyEngine, hint_for_engine
from ..databases import AnyDatabase, database_class
from ..exceptions import DatabaseNotInstalledError, DatabaseNotStartedError
from .gate import Gate, key_of

EngineFactory: TypeAlias = Callable[[], AnyEngine | Awaitable[AnyEngine]]
Shutdown: TypeAlias = Callable[[], object]
Observer: TypeAlias = Callable[[AnyDatabase], None]
Examine: TypeAlias = Callable[..., None]
DatabaseT = TypeVar("DatabaseT", bound=AnyDatabase)

_STATE: Final = "fastapi_sqlnative"


@dataclass(eq=False, repr=False, kw_only=True)
class Installation:
    """The arguments of `install_database`, and the handle while the application runs."""

    name: str
    engine: AnyEngine | EngineFactory
    shutdown: Shutdown | None
    session_options: Mapping[str, Any]
    startup_wait: float | None
    shutdown_timeout: float
    warn_held_after: float | None
    database: AnyDatabase | None = None

    def make_handle(self, engine: Any) -> AnyDatabase:
        kind = database_class(engine)
        if kind is None:
            raise TypeError(
                f"The engine factory of database {self.name!r} must return an Engine or an "
                f"AsyncEngine; it returned {type(engine).__name__}.{hint_for_engine(engine)}"
            )
        return kind(
            engine,
            name=self.name,
            session_options=self.session_options,
            shutdown_timeout=self.shutdown_timeout,
            warn_held_after=self.warn_held_after,
        )


@dataclass(eq=False)
class Installations:
    """The databases of one application, in order of installation. Lives as long as the app."""

    by_name: dict[str, Installation] = field(default_factory=dict[str, Installation])
    # Called at each start, with every database of the application and of those mounted in it.
    observers: list[Observer] = field(default_factory=list[Observer])
    draining: bool = False  # readiness fails, so that no more requests are sent here
    # One for each running outermost application that this one is mounted in.
    runs: list[Running] = field(default_factory=list["Running"])
    # Held during start-up and shutdown: another start waits until the databases are up or down.
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)


class Running:
    """One run of an application's lifespan, its own or that of an application above it.

    Built at start-up, dropped at the end. `examine` checks a route that was added after start-up
    and tells the gate what it opens.
    """

    def __init__(
        self, app: Starlette, parent: Running | None = None, examine: Examine | None = None
    ) -> None:
        self.app = app
        self.installed: Installations = installations_of(app)
        self.loop: asyncio.AbstractEventLoop | None = None
        # The applications that this one is mounted in, innermost first, and those mounted in it.
        self.above: list[Running] = [] if parent is None else [parent, *parent.above]
        self.below: list[Running] = []
        for each in self.above:
            each.below.append(self)
        above = {} if parent is None else parent.by_name
        self.by_name: dict[str, Installation] = above | self.installed.by_name
        # These belong to the outermost application. The router tells which run a request belongs
        # to, and all mounted applications share one gate.
        self.router: Router = app.router if parent is None else parent.router
        self.gate: Gate = Gate() if parent is None else parent.gate
        self.examine: Examine | None = examine if parent is None else parent.examine
        # For which databases each health router has made its watches, and these.
        self.watched: dict[object, tuple[Sequence[AnyDatabase], Any]] = {}

    @property
    def overrides(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """The dependencies that the application's tests replace; Starlette has none."""
        return getattr(self.app, "dependency_overrides", {})

    def database(self, name: str) -> AnyDatabase:
        """Return the handle of a running database, or raise the error that says why not."""
        installation = self.by_name.get(name)
        if installation is None:
            raise not_installed(name, [*self.by_name])
        if installation.database is None:
            raise DatabaseNotStartedError(
                f"Database {name!r} is installed but not started: this application's lifespan is "
                "not running. Serve the application with uvicorn; in tests use `with "
                "TestClient(app) as client`, or, instead of an ASGITransport, `async with "
                "async_client(app) as client` from fastapi_sqlnative.testing. A mounted "
                "application starts with the application around it, if that has a database "
                "installed. If a server runs it, something has replaced "
                "app.router.lifespan_context: call install_database after that."
            )
        return installation.database

    def databases(self) -> list[AnyDatabase]:
        """List the running databases in commit order: the parents' come first, the mounts' last."""
        runs = [*reversed(self.above), self, *self.below]
        found = (one.database for each in runs for one in each.installed.by_name.values())
        return [database for database in found if database is not None]

    @property
    def observers(self) -> list[Observer]:
        """The observers of this application's databases: also those of the applications above."""
        return [observer for each in (self, *self.above) for observer in each.installed.observers]

    def is_draining(self) -> bool:
        """Return whether this application, or one that it is mounted in, is draining."""
        return any(each.installed.draining for each in (self, *self.above))

    def limiters(self, route: object, database: AnyDatabase) -> list[anyio.CapacityLimiter]:
        """Return the limiters in which a request of the route needs a place for a session."""
        if self.examine and (self.overrides or key_of(route) not in self.gate.opened):
            self.examine(self, only=route)
        return self.gate.limiters(route, database)


def installations_of(app: Starlette) -> Installations:
    found = getattr(app.state, _STATE, None)
    if not isinstance(found, Installations):
        found = Installations()
        setattr(app.state, _STATE, found)
    return found


def trimmed(name: object) -> str:
    """Normalize a database's name; a blank name is `default`."""
    if not isinstance(name, str):
        raise TypeError(f"The name of a database must be a string, not {type(name).__name__}.")
    return name.strip() or "default"


def not_installed(name: str, names: list[str]) -> DatabaseNotInstalledError:
    """Build the error for an unknown name, with the names that exist."""
    known = f"Installed: {', '.join(map(repr, sorted(set(names))))}."
    if not names:
        known = (
            "None is installed. A mounted application sees the databases of the application around "
            "it while that one's lifespan runs: mount it before that starts, or in the lifespan. "
            "Middleware around the mounted one must keep it as its attribute `app`."
        )
    return DatabaseNotInstalledError(
        f"No database named {name!r} is installed on this application. {known} Fix the name, or "
        f"call install_database(app, name={name!r}, engine=...) where the application is created."
    )


def running_for(connection: HTTPConnection) -> Running:
    """Return the run that a request belongs to."""
    return running_of(connection.scope["app"], connection.scope.get("router"))


def running_of(app: Starlette, router: Router | None = None) -> Running:
    """Return the run for a router, else any run of the application, else an idle one."""
    runs = installations_of(app).runs
    for wanted in router, app.router:
        for running in runs:
            if running.router is wanted:
                return running
    return runs[0] if runs else Running(app)


class InstalledDatabases(Mapping[str, DatabaseT]):
    """A live view of an application's databases by name."""

    def __init__(self, app: Starlette, kind: type[DatabaseT] | None) -> None:
        self._app = app
        self._kind = kind

    def __getitem__(self, name: str) -> DatabaseT:
        try:
            database: Any = running_of(self._app).database(name)
        except DatabaseNotInstalledError as error:
            # Mapping.get() expects a KeyError; the message is the useful part.
            raise KeyError(str(error)) from None
        if self._kind is not None and not isinstance(database, self._kind):
            raise TypeError(
                f"The handle of database {database.name!r} is {type(database).__name__}, not "
                f"{self._kind.__name__}: its engine decides that. Ask for the other kind."
            )
        found: DatabaseT = database
        return found

    def __contains__(self, name: object) -> bool:
        return name in running_of(self._app).by_name  # even before there is a handle

    def __iter__(self) -> Iterator[str]:
        return iter(running_of(self._app).by_name)

    def __len__(self) -> int:
        return len(running_of(self._app).by_name)

    def __repr__(self) -> str:
        return f"<installed databases: {', '.join(self) or 'none'}>"


@overload
def installed_databases(app: Starlette) -> Mapping[str, AnyDatabase]: ...
@overload
def installed_databases(app: Starlette, kind: type[DatabaseT]) -> Mapping[str, DatabaseT]: ...
def installed_databases(app: Starlette, kind: Any = None) -> Mapping[str, Any]:
    """Return the handles of an application by name, for code outside a request.

    The view is live: it has names once `install_database` is called, and handles while the
    lifespan runs. A mounted application also sees the databases of the application around it. A
    handle belongs to one run of the lifespan; look it up where you use it.

    Args:
        app: the application.
        kind: `Database` or `AsyncDatabase`, for the type checker.

    Raises:
        DatabaseNotStartedError: at the lookup of a handle, if the lifespan is not running.
        TypeError: at the lookup of a handle, if it is of the other kind.

    Example:
        async with installed_databases(app, AsyncDatabase)["default"].session() as session: ...
    """
    return InstalledDatabases[Any](app, kind)
