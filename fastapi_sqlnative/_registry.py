"""Names to databases, for one application and the applications mounted in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

from fastapi.requests import HTTPConnection
from starlette.applications import Starlette

from ._gates import Gate
from .databases import AnyDatabase, AnyEngine
from .exceptions import (
    DatabaseAlreadyInstalledError,
    DatabaseNotInstalledError,
    DatabaseNotStartedError,
)

EngineFactory: TypeAlias = Callable[[], AnyEngine | Awaitable[AnyEngine]]
Shutdown: TypeAlias = Callable[[], object]
Observer: TypeAlias = Callable[[AnyDatabase], None]

_STATE: Final = "fastapi_sqlnative"


class Isolation(Protocol):
    """Be a block of a test that holds connections of its own."""

    async def leave_loop(self) -> None:
        """Close what belongs to the event loop that is about to end."""


@dataclass(eq=False, kw_only=True)
class Installation:
    """Hold what the application gave to `install_database`, and the handle while it runs.

    Attributes:
        overridden: what a test has put this one in front of: started with it where that costs
            nothing, and closed with it.
        isolations: blocks of a test that it is isolated in, the innermost last.
    """

    name: str
    engine: AnyEngine | EngineFactory
    shutdown: Shutdown | None
    session_options: Mapping[str, Any]
    startup_wait: float | None
    shutdown_timeout: float
    database: AnyDatabase | None = None
    overridden: Installation | None = None
    isolations: list[Isolation] = field(default_factory=list["Isolation"])

    def chain(self) -> list[Installation]:
        """List this one and what it overrides, the nearest first."""
        return [self, *(self.overridden.chain() if self.overridden is not None else ())]


@dataclass(eq=False)
class Registry:
    """Hold the databases of one application, in the order of installation.

    Attributes:
        parents: the registry to ask for names that are not installed here, for each outermost
            application that this one is mounted in, by the id of its router (a router has no
            hash). Known while that application runs.
        children: the registries of the applications mounted in this one, for each outermost
            application, likewise.
        observers: called with every database of this application and of those mounted in it, at
            each start.
        draining: the application is not to be sent any more requests.
        gate: admits requests with synchronous sessions, those of mounted applications too.
        starts: how many lifespans, its own and its parents', keep the databases open.
        loop: the event loop on which they do.
        around_gate: puts a gate of a test's in front of this one.
    """

    installations: dict[str, Installation] = field(default_factory=dict[str, Installation])
    parents: dict[int, Registry] = field(default_factory=dict[int, "Registry"])
    children: dict[int, list[Registry]] = field(default_factory=dict[int, "list[Registry]"])
    observers: list[Observer] = field(default_factory=list[Observer])
    draining: bool = False
    gate: Gate | None = None
    starts: int = 0
    loop: asyncio.AbstractEventLoop | None = None
    around_gate: Callable[[Gate | None], Gate] | None = None

    def add(self, installation: Installation) -> None:
        """Keep an installation.

        Raises:
            DatabaseAlreadyInstalledError: the name is taken.
        """
        name = installation.name
        if name in self.installations:
            raise DatabaseAlreadyInstalledError(
                f"Database {name!r} is already installed on this application. Give the second one "
                "another name, or call install_database once per name and application."
            )
        self.installations[name] = installation

    def find(self, name: str, router: int = 0) -> Installation | None:
        """Look a name up here, then in the application that this one is mounted in."""
        found = self.installations.get(name)
        if found is None and (parent := self.parents.get(router)) is not None:
            return parent.find(name, router)
        return found

    def names(self, router: int = 0) -> list[str]:
        """List the names that `find` knows, the nearest first."""
        parent = self.parents.get(router)
        return [*self.installations, *(parent.names(router) if parent is not None else ())]

    def gate_for(self, router: int) -> Gate | None:
        """Return the gate of the outermost application."""
        parent = self.parents.get(router)
        gate = self.gate if parent is None else parent.gate_for(router)
        return gate if self.around_gate is None else self.around_gate(gate)

    def database(self, name: str, router: int = 0) -> AnyDatabase:
        """Return the handle of a running database.

        Raises:
            DatabaseNotInstalledError: the name is unknown.
            DatabaseNotStartedError: the lifespan has not run, or has ended.
        """
        installation = self.find(name, router)
        if installation is None:
            raise not_installed(name, self.names(router))
        if installation.database is None:
            raise DatabaseNotStartedError(
                f"Database {name!r} is installed but not started: this application's lifespan is "
                "not running. Serve the application with uvicorn; in tests use `with "
                "TestClient(app)`, or `async with app.router.lifespan_context(app)` around an "
                "ASGITransport. A mounted application starts with the one it is mounted in, when "
                "that one has a database installed."
            )
        return installation.database

    def databases(self, router: int = 0) -> list[AnyDatabase]:
        """List the running databases in the order in which they commit: a parent's come first."""
        parent = self.parents.get(router)
        own = [item.database for item in self.installations.values() if item.database is not None]
        return [*(parent.databases(router) if parent is not None else ()), *own]

    def all_databases(self, router: int) -> list[AnyDatabase]:
        """List the running databases of this application, of those above and of those mounted."""
        parent = self.parents.get(router)
        above = parent.databases(router) if parent is not None else ()
        return [*above, *self.databases_from_here(router)]

    def is_draining(self, router: int) -> bool:
        """Tell whether this application, or one that it is mounted in, drains."""
        parent = self.parents.get(router)
        return self.draining or (parent is not None and parent.is_draining(router))

    def databases_from_here(self, router: int) -> Iterator[AnyDatabase]:
        """Yield the running databases of this application and of those mounted in it."""
        for installation in self.installations.values():
            if installation.database is not None:
                yield installation.database
        for child in self.children.get(router, ()):
            yield from child.databases_from_here(router)


def trimmed(name: object) -> str:
    """Return a database's name as it is kept, however it was spelt; blank is `default`."""
    if not isinstance(name, str):
        raise TypeError(f"The name of a database is a string, not {type(name).__name__}.")
    return name.strip() or "default"


def registry_of(app: Starlette) -> Registry:
    """Return an application's registry, made at the first call."""
    registry = getattr(app.state, _STATE, None)
    if not isinstance(registry, Registry):
        registry = Registry()
        setattr(app.state, _STATE, registry)
    return registry


def registry_for(connection: HTTPConnection) -> tuple[Registry, int]:
    """Return the registry of the application that serves a connection, and the outer router."""
    return registry_of(connection.app), id(connection.scope.get("router"))


def not_installed(name: str, names: list[str]) -> DatabaseNotInstalledError:
    """Build the error for an unknown name, with the names that exist."""
    known = f"Installed: {', '.join(map(repr, sorted(set(names))))}."
    if not names:
        known = (
            "None is installed. A mounted application sees the databases of the one it is mounted "
            "in once that one's lifespan runs."
        )
    return DatabaseNotInstalledError(
        f"No database named {name!r} is installed on this application. {known} Mend the name, or "
        f"call install_database(app, name={name!r}, engine=...) where the application is made."
    )


class InstalledDatabases(Mapping[str, AnyDatabase]):
    """Show the databases of an application by name, as they are now."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> AnyDatabase:
        if name not in self._registry.installations:
            # A Mapping promises KeyError for get() and `in`; the message is the useful part.
            raise KeyError(str(not_installed(name, self._registry.names())))
        return self._registry.database(name)

    def __contains__(self, name: object) -> bool:
        return name in self._registry.installations

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.installations)

    def __len__(self) -> int:
        return len(self._registry.installations)

    def __repr__(self) -> str:
        return f"<installed databases: {', '.join(self) or 'none'}>"


def installed_databases(app: Starlette) -> Mapping[str, AnyDatabase]:
    """Return the handles of an application by name, for code outside a request.

    The view is live: names are there from `install_database` on, handles while the lifespan
    runs. A handle belongs to one run of the lifespan; look it up where you use it.

    Raises:
        DatabaseNotStartedError: when a handle is read and the lifespan is not running.
    """
    return InstalledDatabases(registry_of(app))
