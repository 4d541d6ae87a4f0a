"""Which databases a test means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from .._registry import Installation, Registry, not_installed, registry_of, trimmed
from .._routes import mounted_applications
from ..databases import AnyDatabase, AnyEngine

Target: TypeAlias = Starlette | AnyDatabase | AnyEngine


def registries(app: Starlette) -> list[Registry]:
    """List the registries of an application and of those mounted in it, at any depth."""
    applications = [app]
    for above in applications:
        applications += [each for each in mounted_applications(above) if each not in applications]
    return [registry_of(each) for each in applications]


def place(app: Starlette, name: str) -> tuple[Registry, str]:
    """Find where a name is installed, on the application or on a mounted one.

    Raises:
        DatabaseNotInstalledError: it is not.
    """
    name, found = trimmed(name), registries(app)
    for registry in found:
        if name in registry.installations:
            return registry, name
    raise not_installed(name, [each for registry in found for each in registry.installations])


def is_running(registry: Registry) -> bool:
    """Tell whether a lifespan keeps the databases open."""
    return registry.starts > 0


def known_engine(installation: Installation) -> AnyEngine | None:
    """Return the engine; `None` where a factory will make it."""
    if installation.database is not None:
        return installation.database.engine
    engine = installation.engine
    return engine if isinstance(engine, Engine | AsyncEngine) else None


def inner(engine: AnyEngine) -> Engine:
    """Return the engine that does the work."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def engines(target: Target) -> Iterator[tuple[str, Engine]]:
    """Yield the engines that a test means now, by name; a factory's only while it runs."""
    if isinstance(target, Starlette):
        for registry in registries(target):
            for name, installation in registry.installations.items():
                engine = known_engine(installation)
                if engine is not None:
                    yield name, inner(engine)
    elif isinstance(target, Engine | AsyncEngine):
        yield "default", inner(target)
    else:
        yield target.name, inner(target.engine)


_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}


def is_one_database(one: Engine, other: Engine) -> bool:
    """Tell whether two engines mean the same database, whoever logs in with whatever driver."""
    address = _address(one.url)
    return one is other or (address is not None and address == _address(other.url))


def _address(url: URL) -> tuple[object, ...] | None:
    backend = url.get_backend_name()
    if backend == "sqlite":
        memory = not url.database or url.database == ":memory:"
        return None if memory else (backend, url.database)
    host = url.host or url.query.get("host")
    port = url.port or url.query.get("port") or _PORTS.get(backend)
    # Nothing at all: the address is in a `creator`, or in the environment.
    return (backend, host, str(port), url.database) if host or url.database else None


def engine_named(target: Target, name: str) -> Engine:
    """Return the engine of one of an application's databases, or the one that is given.

    Raises:
        DatabaseNotInstalledError: an unknown name.
        DatabaseNotStartedError: its factory has not been called yet.
    """
    if not isinstance(target, Starlette):
        return next(engine for _, engine in engines(target))
    registry, name = place(target, name)
    engine = known_engine(registry.installations[name])
    return inner(registry.database(name).engine if engine is None else engine)
