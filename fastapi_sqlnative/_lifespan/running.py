"""What is installed on an application, and the application at work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar, overload

from fastapi.requests import HTTPConnection
from starlette.applications import Starlette
from starlette.routing import Router

from .._sessions.engines import AnyEngine
from ..databases import AnyDatabase, database_class
from ..exceptions import DatabaseNotInstalledError, DatabaseNotStartedError
from .gate import Gate, key_of

EngineFactory: TypeAlias = Callable[[], AnyEngine | Awaitable[AnyEngine]]
Shutdown: TypeAlias = Callable[[], object]
Observer: TypeAlias = Callable[[AnyDatabase], None]
Examine: TypeAlias = "Callable[[Running, object], None]"
DatabaseT = TypeVar("DatabaseT", bound=AnyDatabase)

_STATE: Final = "fastapi_sqlnative"


@dataclass(eq=False, kw_only=True)
class Installation:
    """What the application gave to `install_database`, and the handle while it runs."""

    name: str
    # Engines, and bound methods of theirs, are printed with a URL that may have a password in it.
    engine: AnyEngine | EngineFactory = field(repr=False)
    shutdown: Shutdown | None = field(repr=False)
    session_options: Mapping[str, Any]
    startup_wait: float | None
    shutdown_timeout: float
    warn_held_after: float | None
    database: AnyDatabase | None = None

    def make_handle(self, engine: Any) -> AnyDatabase:
        """Make the handle on the engine that was given, or that its factory has built."""
        kind = database_class(engine)
        if kind is None:
            raise TypeError(
                f"The engine factory of database {self.name!r} must return an Engine or an "
                f"AsyncEngine; it returned {type(engine).__name__}."
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
    """The databases of one application, in the order of installation. Lives as long as it."""

    by_name: dict[str, Installation] = field(default_factory=dict[str, Installation])
    # Called with every database of the application and of those mounted in it, at each start.
    observers: list[Observer] = field(default_factory=list[Observer])
    draining: bool = False  # the application is not to be sent any more requests
    # The application at work, once for each outermost application that it is mounted in.
    runs: list[Running] = field(default_factory=list["Running"])
    loop: asyncio.AbstractEventLoop | None = None  # on which it is
    # Another outermost application that starts meanwhile finds the databases up.
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)


class Running:
    """One run of an application's lifespan, or its place in that of one it is mounted in.

    Built at start-up, dropped at the end. `examine` tells the gate what a route opens that start-up
    has not seen.
    """

    def __init__(
        self, app: Starlette, parent: Running | None = None, examine: Examine | None = None
    ) -> None:
        self.app = app
        self.installed = installations_of(app)
        # What the application is mounted in, from the inside out, and what is mounted in it.
        self.above: list[Running] = [] if parent is None else [parent, *parent.above]
        self.below: list[Running] = []
        for each in self.above:
            each.below.append(self)
        above = {} if parent is None else parent.by_name
        self.by_name: dict[str, Installation] = above | self.installed.by_name
        # The outermost application's: a request knows by the router whose run it belongs to, and
        # there is one gate for all that are mounted in it.
        self.router: Router = app.router if parent is None else parent.router
        self.gate: Gate = Gate() if parent is None else parent.gate
        self.examine: Examine | None = examine if parent is None else parent.examine

    def database(self, name: str) -> AnyDatabase:
        """Return the handle of a running database, or say why there is none."""
        installation = self.by_name.get(name)
        if installation is None:
            raise not_installed(name, [*self.by_name])
        if installation.database is None:
            raise DatabaseNotStartedError(
                f"Database {name!r} is installed but not started: this application's lifespan is "
                "not running. Serve the application with uvicorn; in tests use `with "
                "TestClient(app)`, or `async with app.router.lifespan_context(app)` around an "
                "ASGITransport. A mounted application starts with the one it is mounted in, when "
                "that one has a database installed."
            )
        return installation.database

    def databases(self) -> list[AnyDatabase]:
        """List the running databases in the order in which they commit: a parent's come first."""
        return databases_of([*reversed(self.above), self])

    def all_databases(self) -> list[AnyDatabase]:
        """List the running databases of this application, of those above and of those mounted."""
        return databases_of([*reversed(self.above), self, *self.below])

    def databases_from_here(self) -> list[AnyDatabase]:
        """List the running databases of this application and of those mounted in it."""
        return databases_of([self, *self.below])

    def is_draining(self) -> bool:
        """Return whether this application, or one that it is mounted in, drains."""
        return any(each.installed.draining for each in (self, *self.above))

    def admit(self, request: object, route: object, database: AnyDatabase) -> Awaitable[bool]:
        """Wait for a place where it has to be, and tell whether the request has one to leave."""
        if key_of(route) not in self.gate.opened and self.examine is not None:
            self.examine(self, route)
        return self.gate.enter(request, route, database)


def databases_of(runs: Iterable[Running]) -> list[AnyDatabase]:
    """List the running databases that are installed on these applications themselves."""
    found = (one.database for each in runs for one in each.installed.by_name.values())
    return [database for database in found if database is not None]


def installations_of(app: Starlette) -> Installations:
    """Return what is installed on an application."""
    found = getattr(app.state, _STATE, None)
    if not isinstance(found, Installations):
        found = Installations()
        setattr(app.state, _STATE, found)
    return found


def trimmed(name: object) -> str:
    """Return a database's name as it is kept, however it was spelt; blank is `default`."""
    if not isinstance(name, str):
        raise TypeError(f"The name of a database is a string, not {type(name).__name__}.")
    return name.strip() or "default"


def not_installed(name: str, names: list[str]) -> DatabaseNotInstalledError:
    """Build the error for an unknown name, with the names that exist."""
    known = f"Installed: {', '.join(map(repr, sorted(set(names))))}."
    if not names:
        known = (
            "None is installed. A mounted application sees the databases of the one it is mounted "
            "in once that one's lifespan runs."
        )
    return DatabaseNotInstalledError(
        f"No database named {name!r} is installed on this application. {known} Fix the name, or "
        f"call install_database(app, name={name!r}, engine=...) where the application is made."
    )


def running_for(connection: HTTPConnection) -> Running:
    """Return the run that a request belongs to."""
    return running_of(connection.scope["app"], connection.scope.get("router"))


def running_of(app: Starlette, router: Router | None = None) -> Running:
    """Return the run behind a router, else the application's own; an idle one if there is none."""
    runs = installations_of(app).runs
    for wanted in router, app.router:
        for running in runs:
            if running.router is wanted:
                return running
    return runs[0] if runs else Running(app)


class InstalledDatabases(Mapping[str, DatabaseT]):
    """The databases of an application by name, as they are now."""

    def __init__(self, app: Starlette, kind: type[DatabaseT] | None) -> None:
        self._app = app
        self._kind = kind

    def __getitem__(self, name: str) -> DatabaseT:
        try:
            database: Any = running_of(self._app).database(name)
        except DatabaseNotInstalledError as error:
            # A Mapping promises KeyError for get() and `in`; the message is the useful part.
            raise KeyError(str(error)) from None
        if self._kind is not None and not isinstance(database, self._kind):
            raise TypeError(
                f"Database {database.name!r} is no {self._kind.__name__}: its engine makes it a "
                f"{type(database).__name__}."
            )
        found: DatabaseT = database
        return found

    def __contains__(self, name: object) -> bool:
        return name in running_of(self._app).by_name  # also where no handle is there yet

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

    The view is live: names are there from `install_database` on, handles while the lifespan
    runs, and a mounted application sees those of the one it is mounted in as well. A handle
    belongs to one run of the lifespan; look it up where you use it.

    Args:
        app: the application.
        kind: `Database` or `AsyncDatabase`, so that the type checker knows what the handles are.

    Raises:
        DatabaseNotStartedError: when a handle is read and the lifespan is not running.
        TypeError: when a handle is read and is of the other kind.

    Example:
        async with installed_databases(app, AsyncDatabase)["default"].session() as session: ...
    """
    return InstalledDatabases[Any](app, kind)
