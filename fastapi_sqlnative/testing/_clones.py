"""A real database for a test, copied from one that was prepared once."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from .._lifespan.running import Installation
from .._lifespan.startup import call_factory
from .._sessions.completion import in_thread
from .._sessions.engines import AnyEngine, run_on_engine, sync_engine
from ..databases import database_class
from ._targets import IsolationError, Place, places

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
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        """Begin without any."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop them."""
        self._undo.close()

    def of(self, name: str, engine: AnyEngine) -> str:
        """Return the template for a database."""
        key = name, sync_engine(engine).url.render_as_string()
        if key not in self._made:
            prepare = self._prepare if callable(self._prepare) else self._prepare[name]
            template = _create(name, engine, None, self._undo)
            _use(engine, template, prepare)
            self._made[key] = template
        return self._made[key]


def cloned(app: Starlette, *names: str, templates: Templates) -> Clones:
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
    return Clones(places(app, names), templates)


class Clones:
    """The block of `cloned`."""

    def __init__(self, chosen: list[Place], templates: Templates) -> None:
        self._chosen = chosen
        self._templates = templates
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        """Make the copies, and lead the engines to them."""
        with ExitStack() as undo:
            copies: dict[str, str] = {}
            for installed, installation in self._chosen:
                if installed.runs:
                    raise IsolationError(
                        f"Database {installation.name!r} cannot be cloned while the application "
                        "runs: enter cloned(app) first, and start the application inside of it."
                    )
                self._clone(installation, copies, undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the copies."""
        self._undo.close()

    async def __aenter__(self) -> Self:
        """Make the copies, beside the event loop."""
        return await asyncio.wrap_future(in_thread(self.__enter__))

    async def __aexit__(self, *_: object) -> None:
        """Drop the copies, beside the event loop."""
        await asyncio.wrap_future(in_thread(self._undo.close))

    def _clone(self, installation: Installation, copies: dict[str, str], undo: ExitStack) -> None:
        given: Any = installation.engine
        engine = _built(given) if database_class(given) is None else given
        template = self._templates.of(installation.name, engine)
        if template not in copies:
            copies[template] = _create(installation.name, engine, template, undo)
        copy = copies[template]
        if engine is given:
            undo.enter_context(_led_to(sync_engine(engine), copy))
            undo.callback(_run, engine, Engine.dispose)
            return

        async def build() -> AnyEngine:
            built: AnyEngine = await call_factory(given)
            self._undo.enter_context(_led_to(sync_engine(built), copy))
            return built

        installation.engine = build
        undo.callback(setattr, installation, "engine", given)


def _create(name: str, engine: AnyEngine, template: str | None, undo: ExitStack) -> str:
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
    undo.callback(_administer, engine, f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
    source = "" if template is None else f' TEMPLATE "{template}"'
    _administer(engine, f'CREATE DATABASE "{database}"{source}')
    return database


def _administer(engine: AnyEngine, statement: str) -> None:
    autocommit = {"isolation_level": "AUTOCOMMIT"}
    _use(
        engine,
        "postgres",
        lambda connection: connection.execution_options(**autocommit).exec_driver_sql(statement),
    )


def _use(engine: AnyEngine, database: str, work: Callable[[Connection], object]) -> None:
    """Do something in another database of the engine's server."""

    def use(inner: Engine) -> None:
        with _led_to(inner, database), inner.connect() as connection:
            work(connection)
            connection.commit()

    _run(engine, use)


def _run(engine: AnyEngine, work: Callable[[Engine], None]) -> None:
    if isinstance(engine, AsyncEngine):
        # On an event loop for this alone: there may be none, or one that must not be blocked.
        in_thread(lambda: asyncio.run(run_on_engine(engine, work))).result()
    else:
        work(engine)


def _built(factory: Callable[[], Any]) -> AnyEngine:
    engine: AnyEngine = in_thread(lambda: asyncio.run(call_factory(factory))).result()
    return engine


@contextmanager
def _led_to(engine: Engine, database: str) -> Generator[None]:
    """Have an engine connect to another database of its server, for a block."""
    own, other = (
        engine.dialect.create_connect_args(url)
        for url in (engine.url, engine.url.set(database=database))
    )
    changed = {key: value for key, value in other[1].items() if own[1].get(key) != value}
    led: list[object] = []

    def lead(dialect: Any, _record: object, _arguments: object, options: dict[str, Any]) -> Any:
        led.append(dialect.connect(*other[0], **options | changed))
        return led[-1]

    def check(connection: object, _record: object) -> None:
        if connection not in led:
            raise IsolationError(
                "The engine has a way of its own to connect, by creator= or a do_connect "
                "listener, and would have used the database that is installed. Have the test use "
                "another engine, with override_database()."
            )
        led.remove(connection)

    engine.dispose()  # what is idle leads to the original
    listeners = ("do_connect", lead), ("connect", check)
    for listener in listeners:
        event.listen(engine, *listener)
    try:
        yield
    finally:
        for listener in listeners:
            event.remove(engine, *listener)
        engine.dispose()
