"""Isolated databases: what a test does is gone afterwards, commits included."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util.concurrency import in_greenlet
from starlette.applications import Starlette

from .._lifespan.running import Installation
from .._lifespan.shutdown import call_off_loop
from .._sessions.engines import run_in_greenlet, sync_engine
from .._sessions.session import NativeSession
from ..databases import AnyDatabase, sessions_of
from ._connections import IsolatedConnection
from ._sessions import IsolatedSession, OwnSession
from ._targets import (
    IsolationError,
    Place,
    all_installations,
    is_one_database,
    marking_requests,
    places,
    ready_engine,
    running_loop,
)
from ._turns import Turn, joins_flow

# The blocks that the test is in, so that a second application joins the first one's connection.
_BLOCKS: Final = ContextVar[tuple["Isolated", ...]]("fastapi_sqlnative_isolated", default=())


def isolated(app: Starlette, *names: str) -> Isolated:
    """Undo at the end of a block everything that was done to an application's databases in it.

    Each database gets one transaction on one connection of the application's own engine, opened
    at the first use and rolled back at the end. The application's transactions are savepoints in
    it, one at a time: a commit releases one, and on PostgreSQL checks what is deferred; a
    rollback takes back what the request did, and nothing of the test's.

    `with` gives the test a `Session` of its own, also for an `AsyncEngine`, whose event loop does
    the work; `async with` gives an `AsyncSession`. It is for the first database named, and may
    stay open: what it has added is committed as soon as a request begins, and what it reads it
    reads anew. Blocks may be nested, for several sessions or a module's rows.

    Enter it before the application starts or while it runs. docs/testing.md has the table of what
    one connection cannot show; `cloned` shows it.

    Args:
        app: the application, or the outermost of those mounted in each other.
        *names: of databases; without one all that are installed, on mounted applications too.

    Raises:
        DatabaseNotInstalledError: an unknown name.
        IsolationError: by the block or by a session, where one connection does not do.

    Example:
        with TestClient(app) as client, isolated(app) as session:
            session.add(Author(name="Jane"))
            assert client.get("/authors").json() == ["Jane"]
    """
    return Isolated(app, places(app, names))


def is_isolated(installation: Installation) -> bool:
    """Tell whether a block that the test is in takes back what is done to a database."""
    return any(installation is each for block in _BLOCKS.get() for _, each in block.chosen)


class Isolated:
    """The block of `isolated`."""

    def __init__(self, app: Starlette, chosen: list[Place]) -> None:
        self._app = app
        self.chosen = chosen
        self._first = chosen[0][1]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._own_class: type[Session] = OwnSession
        self._around = _BLOCKS.get()
        self.turn: Turn = self._around[0].turn if self._around else Turn()
        self._restore = ExitStack()
        self.connections: dict[Any, IsolatedConnection] = {}  # by the engine's dialect

    # -- as a block ------------------------------------------------------------------------

    def __enter__(self) -> Session:
        if running_loop() is not None and not self._all_sync():
            raise RuntimeError(
                "isolated(app) has to await an AsyncEngine: on an event loop write "
                "`async with isolated(app)`."
            )
        return self._enter(Session)  # type: ignore[no-any-return] # it is

    def __exit__(self, kind: object, *_: object) -> None:
        for ending in self._leave():
            ending.result()
        self._raise_refusal(kind)

    async def __aenter__(self) -> AsyncSession:
        if self._all_sync():
            raise TypeError(
                "`async with isolated(app)` gives an AsyncSession, and the database has an Engine: "
                "write `with isolated(app)`, on an event loop too."
            )
        self._loop = asyncio.get_running_loop()
        return self._enter(AsyncSession)  # type: ignore[no-any-return] # it is

    async def __aexit__(self, kind: object, *_: object) -> None:
        for ending in self._leave():
            await asyncio.wrap_future(ending)
        self._raise_refusal(kind)

    def _all_sync(self) -> bool:
        return all(isinstance(ready_engine(each), Engine) for _, each in self.chosen)

    def _enter(self, kind: type[Any]) -> Any:
        _BLOCKS.set((*self._around, self))
        with ExitStack() as undo:
            undo.callback(self._leave)
            for hook in "after_transaction_create", "before_flush":
                event.listen(Session, hook, self._welcome)
                self._restore.callback(event.remove, Session, hook, self._welcome)
            self._restore.enter_context(marking_requests(self._app, self.turn.refusals))
            for installed in all_installations(self._app):
                installed.observers.append(self._isolate)
                self._restore.callback(installed.observers.remove, self._isolate)
            for _, installation in self.chosen:
                self._close_before_shutdown(installation)
                if (engine := ready_engine(installation)) is not None:
                    self.connection_of(installation.name, sync_engine(engine))
                if installation.database is not None:
                    self._isolate(installation.database)
            undo.pop_all()
        return self._own_session(kind)

    def _leave(self) -> list[Future[None]]:
        self._restore.close()
        _BLOCKS.set(tuple(each for each in _BLOCKS.get() if each is not self))
        return [each.leave(self) for each in dict.fromkeys(self.connections.values())]

    def _raise_refusal(self, kind: object) -> None:
        """Raise again what the application has been refused, and has swallowed."""
        refusals = [*self.turn.refusals]
        self.turn.refusals.clear()
        if refusals and kind is None:
            raise IsolationError(refusals[0])

    # -- the databases ---------------------------------------------------------------------

    def _isolate(self, database: AnyDatabase) -> None:
        """Put our class in front of a handle's sessions; called at the application's start too."""
        if all(installation.database is not database for _, installation in self.chosen):
            return
        self.connection_of(database.name, sync_engine(database.engine))
        factory = sessions_of(database)
        native = factory.native
        if not issubclass(native, IsolatedSession):  # as by the block around this one
            found = {"connection_of": staticmethod(self.connection_of)}
            factory.native = type(native.__name__, (IsolatedSession, native), found)
            self._restore.callback(setattr, factory, "native", native)

    def connection_of(self, name: str, engine: Engine) -> IsolatedConnection:
        """Return the connection that stands for all of an engine's."""
        found = self.connections.get(engine.dialect)
        if found is None:
            found = self._joined(name, engine) or IsolatedConnection(
                name, engine, self.turn, self._application_loop
            )
            found.guard(engine)
            if found not in self.connections.values():
                found.enter(self)
            self.connections[engine.dialect] = found
        return found

    def _joined(self, name: str, engine: Engine) -> IsolatedConnection | None:
        for block in (self, *self._around):
            for other in block.connections.values():
                if other.blocks and is_one_database(other.engine, engine):
                    if other.asynchronous is engine.dialect.is_async:
                        return other
                    raise IsolationError(
                        f"Databases {other.name!r} and {name!r} are one, with an Engine and an "
                        "AsyncEngine, which cannot share a connection. Isolate one by name and "
                        "override_database() the other, or test with cloned(app)."
                    )
        return None

    def _application_loop(self) -> asyncio.AbstractEventLoop | None:
        running = (installed.loop for installed, _ in self.chosen if installed.runs)
        return next(running, self._loop)

    def _close_before_shutdown(self, installation: Installation) -> None:
        """Close the connection while its event loop runs and its engine is not disposed of."""
        shutdown = installation.shutdown

        async def close_and_shut_down() -> None:
            for each in dict.fromkeys(self.connections.values()):
                if each.loop in (None, asyncio.get_running_loop()):
                    await run_in_greenlet(each.close)
            if shutdown is not None:
                await call_off_loop(shutdown)

        installation.shutdown = close_and_shut_down
        self._restore.callback(setattr, installation, "shutdown", shutdown)

    # -- sessions of the test's ------------------------------------------------------------

    def _own_session(self, kind: type[Any]) -> Any:
        if kind is AsyncSession:
            candidates = [each for _, each in self.chosen]
            self._first = next(e for e in candidates if not isinstance(ready_engine(e), Engine))
        options: dict[str, Any] = dict(self._first.session_options)
        # What is expired has to be awaited again.
        options |= {
            "join_transaction_mode": "create_savepoint",
            "expire_on_commit": kind is Session,
        }
        class_ = options.pop("class_", kind)
        base = options.pop("sync_session_class", getattr(class_, "sync_session_class", class_))
        own_connection = staticmethod(self.connection_of_own)
        attributes = {"own_connection": own_connection, "crosses": kind is Session}
        own = self._own_class = type(base.__name__, (OwnSession, base), attributes)
        return own(**options) if kind is Session else class_(sync_session_class=own, **options)

    def connection_of_own(self) -> IsolatedConnection:
        """Return the connection of the test's own session."""
        engine = ready_engine(self._first)
        if engine is None:
            raise IsolationError(
                f"Database {self._first.name!r} has no engine before the application starts: use "
                "the session inside of `with TestClient(app)`."
            )
        return self.connection_of(self._first.name, sync_engine(engine))

    def _welcome(self, guest: Session, *_: object) -> None:
        """Note that a session of the test's begins, and with it what has been made by others.

        Bind one that was made without a handle, by a factory say, to the connection.
        """
        if isinstance(guest, NativeSession):
            return
        if isinstance(guest, OwnSession):
            if isinstance(guest, self._own_class) and ready_engine(self._first) is not None:
                joins_flow(guest)
                self.connection_of_own().own_sessions[guest] = self
            return
        engine = guest.bind
        found = self.connections.get(engine.dialect) if isinstance(engine, Engine) else None
        if found is not None and (not found.asynchronous or in_greenlet()):
            guest.bind, guest.join_transaction_mode = found.opened(), "create_savepoint"
            joins_flow(guest)
            found.own_sessions[guest] = self
            self._restore.callback(setattr, guest, "bind", engine)
