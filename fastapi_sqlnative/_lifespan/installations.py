"""What is installed on one application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from starlette.applications import Starlette

from .._sessions.engines import AnyEngine
from ..databases import AnyDatabase
from ..exceptions import DatabaseAlreadyInstalledError, DatabaseNotInstalledError

if TYPE_CHECKING:
    from .running import Running

EngineFactory: TypeAlias = Callable[[], AnyEngine | Awaitable[AnyEngine]]
Shutdown: TypeAlias = Callable[[], object]
Observer: TypeAlias = Callable[[AnyDatabase], None]

_STATE: Final = "fastapi_sqlnative"


@dataclass(eq=False, kw_only=True)
class Installation:
    """What the application gave to `install_database`, and the handle while it runs."""

    name: str
    engine: AnyEngine | EngineFactory
    shutdown: Shutdown | None
    session_options: Mapping[str, Any]
    startup_wait: float | None
    shutdown_timeout: float
    database: AnyDatabase | None = None


@dataclass(eq=False)
class Installations:
    """The databases of one application, in the order of installation. Lives as long as it.

    Attributes:
        by_name: what is installed.
        observers: called with every database of this application and of those mounted in it, at
            each start.
        draining: the application is not to be sent any more requests.
        runs: the application at work, once for each outermost application that it is mounted in.
        loop: the event loop on which it is.
    """

    by_name: dict[str, Installation] = field(default_factory=dict[str, Installation])
    observers: list[Observer] = field(default_factory=list[Observer])
    draining: bool = False
    runs: list[Running] = field(default_factory=list["Running"])
    loop: asyncio.AbstractEventLoop | None = None

    def add(self, installation: Installation) -> None:
        """Keep an installation.

        Raises:
            DatabaseAlreadyInstalledError: the name is taken.
        """
        name = installation.name
        if name in self.by_name:
            raise DatabaseAlreadyInstalledError(
                f"Database {name!r} is already installed on this application. Give the second one "
                "another name, or call install_database once per name and application."
            )
        self.by_name[name] = installation


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
