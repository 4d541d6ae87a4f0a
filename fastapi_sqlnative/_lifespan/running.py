"""An application at work: names to databases, here and in the applications around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fastapi.requests import HTTPConnection
from starlette.applications import Starlette
from starlette.routing import Router

from ..databases import AnyDatabase
from ..exceptions import DatabaseNotStartedError
from .gate import Gate
from .installations import Installation, Installations, installations_of, not_installed


@dataclass(eq=False)
class Running:
    """One run of an application's lifespan, or its place in that of one it is mounted in.

    Built at start-up, dropped at the end.

    Attributes:
        app: the application.
        installed: what is installed on it.
        router: the outermost application's, by which a request knows whose run it belongs to.
        parent: the application that this one is mounted in.
        children: the applications mounted in this one.
        outermost_gate: of the outermost application only.
    """

    app: Starlette
    installed: Installations
    router: Router | None = None
    parent: Running | None = None
    children: list[Running] = field(default_factory=list["Running"])
    outermost_gate: Gate | None = None

    def find(self, name: str) -> Installation | None:
        """Look a name up here, then in the application that this one is mounted in."""
        found = self.installed.by_name.get(name)
        if found is None and self.parent is not None:
            return self.parent.find(name)
        return found

    def names(self) -> list[str]:
        """List the names that `find` knows, the nearest first."""
        above = self.parent.names() if self.parent is not None else []
        return [*self.installed.by_name, *above]

    def database(self, name: str) -> AnyDatabase:
        """Return the handle of a running database.

        Raises:
            DatabaseNotInstalledError: the name is unknown.
            DatabaseNotStartedError: the lifespan has not run, or has ended.
        """
        installation = self.find(name)
        if installation is None:
            raise not_installed(name, self.names())
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
        above = self.parent.databases() if self.parent is not None else []
        return [*above, *self._own()]

    def all_databases(self) -> list[AnyDatabase]:
        """List the running databases of this application, of those above and of those mounted."""
        above = self.parent.databases() if self.parent is not None else []
        return [*above, *self.databases_from_here()]

    def databases_from_here(self) -> Iterator[AnyDatabase]:
        """Yield the running databases of this application and of those mounted in it."""
        yield from self._own()
        for child in self.children:
            yield from child.databases_from_here()

    def _own(self) -> list[AnyDatabase]:
        found = (each.database for each in self.installed.by_name.values())
        return [database for database in found if database is not None]

    def is_draining(self) -> bool:
        """Tell whether this application, or one that it is mounted in, drains."""
        above = self.parent is not None and self.parent.is_draining()
        return self.installed.draining or above

    @property
    def gate(self) -> Gate:
        """The outermost application's gate: one for all that are mounted in it."""
        found = self.outermost_gate if self.parent is None else self.parent.gate
        assert found is not None, "an application at work has one"
        return found


def running_for(connection: HTTPConnection) -> Running:
    """Return the run that a request belongs to."""
    scope = connection.scope
    app: Starlette = scope["app"]
    installed = installations_of(app)
    router = scope.get("router")
    for running in installed.runs:
        if running.router is router:
            return running
    return running_of(app)


def running_of(app: Starlette) -> Running:
    """Return the application's own run, or one that it is mounted in; idle if there is none."""
    installed = installations_of(app)
    own = [running for running in installed.runs if running.parent is None]
    return next(iter([*own, *installed.runs]), None) or Running(app, installed)


class InstalledDatabases(Mapping[str, AnyDatabase]):
    """The databases of an application by name, as they are now."""

    def __init__(self, app: Starlette) -> None:
        self._app = app

    def __getitem__(self, name: str) -> AnyDatabase:
        running = running_of(self._app)
        if running.find(name) is None:
            # A Mapping promises KeyError for get() and `in`; the message is the useful part.
            raise KeyError(str(not_installed(name, running.names())))
        return running.database(name)

    def __contains__(self, name: object) -> bool:
        return name in running_of(self._app).names()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(running_of(self._app).names()))

    def __len__(self) -> int:
        return len(set(running_of(self._app).names()))

    def __repr__(self) -> str:
        return f"<installed databases: {', '.join(self) or 'none'}>"


def installed_databases(app: Starlette) -> Mapping[str, AnyDatabase]:
    """Return the handles of an application by name, for code outside a request.

    The view is live: names are there from `install_database` on, handles while the lifespan
    runs, and a mounted application sees those of the one it is mounted in as well. A handle
    belongs to one run of the lifespan; look it up where you use it.

    Raises:
        DatabaseNotStartedError: when a handle is read and the lifespan is not running.
    """
    return InstalledDatabases(app)
