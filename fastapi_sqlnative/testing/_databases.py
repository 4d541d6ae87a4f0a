"""Replacing an application's databases: with another engine, or with a copy for one test."""

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine, event
from starlette.applications import Starlette

from .._lifespan.install import check_engine
from .._lifespan.lifespan import call_factory
from .._lifespan.running import EngineFactory, Installation
from .._sessions.completion import in_thread
from .._sessions.engines import AnyEngine, dispose, run_on_engine, sync_engine
from ..databases import database_class
from ._targets import CLONE, IsolationError, address_of, is_one_database, places, ready_engine

T = TypeVar("T")
Prepare: TypeAlias = Callable[[Connection], object]


def _wait_for(work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
    return in_thread(lambda: asyncio.run(work(*args))).result()


def _running(installation: Installation, remedy: str) -> IsolationError:
    return IsolationError(
        f"Database {installation.name!r} cannot be replaced while the application runs: {remedy}."
    )


# -- another engine -------------------------------------------------------------------------------


@contextmanager
def override_database(
    app: Starlette, name: str, engine: AnyEngine | EngineFactory
) -> Generator[None]:
    """Make an application use another engine for one of its databases within a block.

    The engine is replaced for routes, new handles, background work, websockets, mounted
    applications and health checks. Session options and timeouts stay the same.

    Enter it before the application starts, so that its own factory is not called, and leave it
    after the application has ended. With a ready engine it also works while the application runs.

    Args:
        app: the application, or the outermost one if it is mounted.
        name: the name of the database.
        engine: an engine of the installed kind, sync or async: a ready one, which the test
            disposes of, or a factory, whose engine is disposed of with the application.

    Raises:
        DatabaseNotInstalledError: the name is unknown.
        TypeError: the engine is of the other kind, or no engine.
        ValueError: it leads to the database of the installed ready engine.
        IsolationError: it is a factory and the application is running.

    Example:
        with override_database(app, "default", build_test_engine), TestClient(app) as client: ...
    """
    ((installed, installation),) = places(app, [name])
    given, own = installation.engine, installation.database
    check = partial(_checked, name, ready_engine(installation))
    builds = database_class(engine) is None
    check_engine(name, engine)
    if builds and installed.runs:
        raise _running(installation, "pass override_database() an engine, or enter it first")

    async def build() -> Any:
        return check(await call_factory(engine))

    installation.engine = build if builds else check(engine)
    try:
        if own is not None:
            installation.database = installation.make_handle(engine)
            observers = (observer for run in installed.runs for observer in run.observers)
            for observer in dict.fromkeys(observers):  # telemetry, capture_statements, isolated
                observer(installation.database)
        yield
    finally:
        installation.engine = given
        if own is not None:
            installation.database = own if installed.runs else None


def _checked(name: str, own: AnyEngine | None, engine: Any) -> Any:
    kind = database_class(engine)
    if own is None or kind is None:
        return engine  # start-up refuses anything that is not an engine
    if database_class(own) is not kind:
        raise TypeError(
            f"Database {name!r} is installed with an {type(own).__name__}, and an "
            f"{type(engine).__name__} cannot stand in for it: the routes expect other sessions."
        )
    if is_one_database(own, engine):
        raise ValueError(
            f"The engine given for database {name!r} leads to the very database that is "
            "installed: the tests would write to it. Pass an engine for another database."
        )
    return engine


# -- a copy ---------------------------------------------------------------------------------------


class Templates:
    """The template databases that tests clone, each made when it is first needed.

    Use one object for the whole test run, as a context manager: it drops the databases at the end.
    Every process makes its own.

    Args:
        prepare: a function that fills an empty database over a connection, in one transaction,
            such as `Base.metadata.create_all`. For several databases, a mapping by name. Names of
            one database with the same function share a template, and in a block a clone.
    """

    def __init__(self, prepare: Prepare | Mapping[str, Prepare]) -> None:
        self._prepare = prepare
        self._made: dict[tuple[Prepare, object], str] | None = None  # outside the block
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self._made = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._made = None
        self._undo.close()

    def of(self, name: str, engine: AnyEngine) -> str:
        """Return the template for a database."""
        if self._made is None:
            raise RuntimeError("Clone inside `with Templates(...) as templates`, which drops them.")
        prepare = self._prepare_for(name)
        key = prepare, address_of(sync_engine(engine).url)
        if key not in self._made:
            template = _create(name, engine, None, self._undo)
            _wait_for(_use, engine, template, prepare)
            self._made[key] = template
        return self._made[key]

    def _prepare_for(self, name: str) -> Prepare:
        known = {name: self._prepare} if callable(self._prepare) else self._prepare
        if (prepare := known.get(name)) is None:
            raise ValueError(
                f"Templates() has no function for database {name!r}, only for "
                f"{sorted(known)}: add one, or name the databases in cloned()."
            )
        if iscoroutinefunction(prepare):
            raise TypeError(
                f"The function that prepares database {name!r} is an `async def`: write a plain "
                "one. Its connection is synchronous, even for an AsyncEngine."
            )
        return prepare


@contextmanager
def cloned(app: Starlette, *names: str, templates: Templates) -> Generator[None]:
    """Give an application real databases for a block, copied from templates.

    Nothing is simulated: concurrent requests, COMMIT, locks, isolation levels and Core on the
    engine itself are real. The application's own engine connects to the copy, with all its options
    and listeners; only `engine.url` still names the original, which stays untouched. PostgreSQL
    copies with `CREATE DATABASE ... TEMPLATE`. For SQLite, a file is copied.

    Enter it before the application starts, and leave it after the application has ended.

    Args:
        app: the application, or the outermost one if it is mounted.
        *names: names of databases; by default all, including those of mounted applications.
        templates: the databases to copy.

    Raises:
        DatabaseNotInstalledError: a name is unknown.
        IsolationError: the application is running, or the database cannot be copied.

    Example:
        with cloned(app, templates=templates), TestClient(app) as client: ...
    """
    copies: dict[str, str] = {}
    with ExitStack() as undo:
        for installed, installation in places(app, names):
            if installed.runs:
                raise _running(installation, "enter cloned() first")
            given: Any = installation.engine
            builds = database_class(given) is None
            engine = _wait_for(call_factory, given) if builds else given
            template = templates.of(installation.name, engine)
            if template not in copies:  # two names may refer to one database
                copies[template] = _create(installation.name, engine, template, undo)
            if builds:
                installation.engine = partial(_build, given, copies[template])
                undo.callback(setattr, installation, "engine", given)
            else:
                _wait_for(dispose, engine)  # idle connections lead to the installed database
                undo.callback(_wait_for, dispose, engine)
                _redirect(engine, copies[template], undo)
        yield


async def _build(factory: Any, database: str) -> AnyEngine:
    engine: AnyEngine = await call_factory(factory)
    _redirect(engine, database, ExitStack())  # never undone: the app disposes of the engine
    return engine


def _create(name: str, engine: AnyEngine, template: str | None, undo: ExitStack) -> str:
    """Create a database, empty or from a template, which is dropped when the block ends."""
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
            f"Database {name!r} ({url.drivername}) cannot be cloned: only PostgreSQL and SQLite "
            "files can. Use another database, with override_database()."
        )
    database = f"{original[:40]}_{token}"

    def administer(statement: str) -> None:
        def send(connection: Connection) -> None:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement)

        _wait_for(_use, engine, "postgres", send)

    undo.callback(administer, f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
    source = "" if template is None else f' TEMPLATE "{template}"'
    administer(f'CREATE DATABASE "{database}"{source}')
    return database


async def _use(engine: AnyEngine, database: str, work: Prepare) -> None:
    """Call `work` with a connection to another database on the engine's server."""

    def use(inner: Engine) -> None:
        with inner.connect() as connection:
            if connection.info.get(CLONE) != database:
                raise IsolationError(
                    "The engine connects through creator= or a do_connect listener, and would have "
                    "used the installed database. Use another engine, with override_database()."
                )
            work(connection)
            connection.commit()

    await dispose(engine)  # idle connections, which lead to the original database
    try:
        with ExitStack() as undo:
            _redirect(engine, database, undo)
            await run_on_engine(engine, use)
    finally:
        await dispose(engine)


def _redirect(engine: AnyEngine, database: str, undo: ExitStack) -> None:
    """Make an engine connect to another database on its server."""
    inner = sync_engine(engine)
    urls = inner.url, inner.url.set(database=database)
    own, other = map(inner.dialect.create_connect_args, urls)
    changed = {key: value for key, value in other[1].items() if own[1].get(key) != value}

    # It connects nothing itself, so that a block inside another one has the last word.
    def connect(_dialect: object, record: Any, arguments: Any, options: Any) -> None:
        record.info[CLONE] = database
        arguments[:] = other[0]
        options.update(changed)

    event.listen(inner, "do_connect", connect)
    undo.callback(event.remove, inner, "do_connect", connect)
    outer = inner.get_execution_options().get(CLONE)
    inner.update_execution_options(**{CLONE: database})
    undo.callback(inner.update_execution_options, **{CLONE: outer})
