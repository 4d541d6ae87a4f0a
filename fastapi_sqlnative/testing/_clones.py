"""A real database for a test, copied from one that was prepared once."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

from sqlalchemy import Connection, Engine, event
from starlette.applications import Starlette

from .._lifespan.startup import call_factory
from .._sessions.completion import in_thread
from .._sessions.engines import AnyEngine, dispose, run_on_engine, sync_engine
from ..databases import database_class
from ._targets import Block, IsolationError, Place, places

Prepare: TypeAlias = Callable[[Connection], object]


class Templates:
    """The databases that tests clone, each made when it is first needed.

    Make one for the whole run of the tests, as a block, at whose end they are dropped. Every
    process has its own.

    Args:
        prepare: fills an empty database over a connection, in one transaction:
            `Base.metadata.create_all`, a function that calls Alembic, one that seeds. With
            several databases a mapping from their names.
    """

    def __init__(self, prepare: Prepare | Mapping[str, Prepare]) -> None:
        self._prepare = prepare
        self._made: dict[tuple[str, str], str] = {}
        self._undo = AsyncExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        in_thread(lambda: asyncio.run(self._undo.aclose())).result()

    async def of(self, name: str, engine: AnyEngine) -> str:
        """Return the template for a database."""
        key = name, sync_engine(engine).url.render_as_string()
        if key not in self._made:
            prepare = self._prepare if callable(self._prepare) else self._prepare[name]
            template = await _create(name, engine, None, self._undo)
            await _use(engine, template, prepare)
            self._made[key] = template
        return self._made[key]


def cloned(app: Starlette, *names: str, templates: Templates) -> Block:
    """Give an application databases of its own within a block, copied from templates.

    Nothing is simulated: requests overtake each other, COMMIT is one, and so are locks, isolation
    levels, COPY, several sessions and Core on the engine itself. The application's own engine
    is led to the copy, with all its options and listeners; `engine.url` goes on to name the
    original, which nobody touches. On PostgreSQL the copy is `CREATE DATABASE ... TEMPLATE`, on
    SQLite a file.

    Enter it before the application starts, and leave it after that has ended.

    Args:
        app: the application, or the outermost of those mounted in each other.
        *names: of databases; without one all that are installed, on mounted applications too.
        templates: what to copy.

    Raises:
        DatabaseNotInstalledError: an unknown name.
        IsolationError: the application runs, or its database cannot be copied.

    Example:
        with cloned(app, templates=templates), TestClient(app) as client: ...
    """
    chosen = places(app, names)
    return Block(partial(_clone_all, chosen, templates), chosen[0][0])


async def _clone_all(chosen: list[Place], templates: Templates, undo: AsyncExitStack) -> None:
    copies: dict[str, str] = {}
    for installed, installation in chosen:
        if installed.runs:
            raise IsolationError(
                f"Database {installation.name!r} cannot be cloned while the application runs: "
                "enter cloned(app) first, and start the application inside of it."
            )
        given: Any = installation.engine
        builds = database_class(given) is None
        engine = await call_factory(given) if builds else given
        template = await templates.of(installation.name, engine)
        if template not in copies:
            copies[template] = await _create(installation.name, engine, template, undo)
        if builds:
            installation.engine = partial(_build, given, copies[template])
            undo.callback(setattr, installation, "engine", given)
        else:
            undo.push_async_callback(dispose, engine)
            undo.callback(*_lead(sync_engine(engine), copies[template], []))


async def _build(factory: Any, database: str) -> AnyEngine:
    engine: AnyEngine = await call_factory(factory)
    _lead(sync_engine(engine), database, [])  # for good: it ends with the application
    return engine


async def _create(name: str, engine: AnyEngine, template: str | None, undo: AsyncExitStack) -> str:
    """Create a database, empty or from a template, and drop it with the block."""
    url = sync_engine(engine).url
    backend, original = url.get_backend_name(), url.database or ":memory:"
    token = f"{os.getpid()}_{secrets.token_hex(4)}"
    if backend == "sqlite" and original != ":memory:":
        file = Path(tempfile.gettempdir()) / f"{Path(original).stem}_{token}.db"
        undo.callback(file.unlink, missing_ok=True)
        if template is not None:
            shutil.copyfile(template, file)
        return str(file)
    if backend != "postgresql":
        raise IsolationError(
            f"Database {name!r} ({url.drivername}) cannot be cloned: PostgreSQL and files of "
            "SQLite can. Have the test use a database of its own, with override_database()."
        )
    database = f"{original[:40]}_{token}"
    drop = f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)'
    undo.push_async_callback(_use, engine, "postgres", partial(_administer, drop))
    source = "" if template is None else f' TEMPLATE "{template}"'
    create = f'CREATE DATABASE "{database}"{source}'
    await _use(engine, "postgres", partial(_administer, create))
    return database


def _administer(statement: str, connection: Connection) -> None:
    connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement)


async def _use(engine: AnyEngine, database: str, work: Prepare) -> None:
    """Do something in another database of the engine's server."""
    led: list[str] = []

    def use(inner: Engine) -> None:
        with inner.connect() as connection:
            if not led:
                raise IsolationError(
                    "The engine has a way of its own to connect, by creator= or a do_connect "
                    "listener, and would have used the database that is installed. Have the test "
                    "use another engine, with override_database()."
                )
            work(connection)
            connection.commit()

    await dispose(engine)  # of what is idle, and leads to the original
    unlead = _lead(sync_engine(engine), database, led)
    try:
        await run_on_engine(engine, use)
        await dispose(engine)
    finally:
        event.remove(*unlead[1:])


def _lead(engine: Engine, database: str, led: list[str]) -> tuple[Any, ...]:
    """Have an engine connect to another database of its server; return what undoes it."""
    own, other = (
        engine.dialect.create_connect_args(url)
        for url in (engine.url, engine.url.set(database=database))
    )
    changed = {key: value for key, value in other[1].items() if own[1].get(key) != value}

    def lead(dialect: Any, _record: object, _arguments: object, options: dict[str, Any]) -> Any:
        led.append(database)
        return dialect.connect(*other[0], **options | changed)

    event.listen(engine, "do_connect", lead)
    return event.remove, engine, "do_connect", lead
