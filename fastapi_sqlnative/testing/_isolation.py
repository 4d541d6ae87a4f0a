"""Isolated databases: everything that a test does is rolled back, including its commits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction
from sqlalchemy.util.concurrency import in_greenlet
from starlette.applications import Starlette

from .._lifespan.lifespan import call_off_loop
from .._lifespan.running import Installation, Shutdown
from .._sessions.engines import run_in_greenlet, sync_engine
from .._sessions.session import NativeSession
from ..databases import AnyDatabase, sessions_of
from ._connections import IsolatedConnection
from ._sessions import IsolatedSession, OwnSession, without_level
from ._targets import IsolationError, connect_alike, observing, places, ready_engine, running_loop
from ._turns import ENDED, Turn, joins_flow, marking_requests

T = TypeVar("T")
# The outer block, with which other blocks of the same test share connections, for any application.
_OUTER: Final = ContextVar["Isolated | None"]("fastapi_sqlnative_isolated", default=None)


def isolated(app: Starlette, *names: str) -> Isolated:
    """Roll back everything that is done to an application's databases in a block.

    Each database gets one connection of the application's own engine, with one transaction that is
    rolled back at the end. The application's transactions are savepoints in it, one at a time. A
    commit releases the savepoint and, on PostgreSQL, checks deferred constraints.

    `with` returns a `Session` for the test itself, even for an `AsyncEngine`; `async with` returns
    an `AsyncSession`. It belongs to the first database and may stay open: its pending changes are
    committed when a request begins, and its queries load fresh values. Blocks may be nested.

    Enter it before the application starts or while it runs. docs/testing.md lists what a single
    connection cannot show. For that, use `cloned`.

    Args:
        app: the application, or the outermost one if it is mounted.
        *names: names of databases; by default all, including those of mounted applications.

    Raises:
        DatabaseNotInstalledError: a name is unknown.
        IsolationError: in the block or from a session, if a single connection cannot do something.

    Example:
        with TestClient(app) as client, isolated(app) as session:
            session.add(Author(name="Jane"))
            assert client.get("/authors").json() == ["Jane"]
    """
    return Isolated(app, names)


class Isolated:
    """The block of `isolated`."""

    def __init__(self, app: Starlette, names: tuple[str, ...]) -> None:
        self._app = app
        self._chosen = places(app, names)
        self._own = self._chosen[0][1]  # the database of the test's own session
        self._own_found: IsolatedConnection | None = None  # may outlive the application's engine
        self.loop: asyncio.AbstractEventLoop | None = None  # of the block, if entered on one
        self._restore = ExitStack()
        self.ended: bool = False
        # Shared with outer and inner blocks.
        self.turn: Turn = Turn()
        self.connections: list[IsolatedConnection] = []

    def __enter__(self) -> Session:
        if self._asynchronous() and running_loop() is not None:
            raise RuntimeError("Use `async with isolated(app)` on an event loop.")
        self._share_connections()
        return self._enter(Session)

    def __exit__(self, *_: object) -> None:
        mine = [each for each in self.connections if self in each.blocks]
        inner = None  # a block that is still open, whose savepoint would end with this one's
        for each in mine:
            while (last := next(reversed(each.blocks))) is not self:
                inner = last
                inner.__exit__()
        with ExitStack() as turn:  # of all of them, so that a worker ends what it has begun
            for each in [each for each in mine if each.blocks[self] is not None][:1]:
                with suppress(IsolationError):  # what it has open for so long is undone as well
                    each.run(partial(turn.enter_context, self.turn.during(self, each)))
            self.ended = True
            self._restore.close()
            for each in mine:
                each.leave(self)
        if inner is not None:
            raise IsolationError("A block inside this one was still open: leave that one first.")

    async def __aenter__(self) -> AsyncSession:
        if not self._asynchronous():
            raise TypeError("Use `with isolated(app)`: the database is installed with an Engine.")
        self._own, *_ = self._asynchronous()
        self.loop = asyncio.get_running_loop()
        self._share_connections()
        session: AsyncSession = await call_off_loop(partial(self._enter, AsyncSession))
        return session

    async def __aexit__(self, *_: object) -> None:
        await call_off_loop(self.__exit__)  # because it waits for this event loop

    def _asynchronous(self) -> list[Installation]:
        return [each for _, each in self._chosen if not isinstance(ready_engine(each), Engine)]

    def _share_connections(self) -> None:
        """Share the connections of the outer block, if there is one in this test."""
        observing_it = (each for installed, _ in self._chosen for each in installed.observers)
        known = (each for each in observing_it if isinstance(each, Isolated))
        outer = next(known, _OUTER.get())  # a fixture may have been entered in another context
        if outer is None or outer.ended:
            _OUTER.set(self)
        else:
            self.turn, self.connections = outer.turn, outer.connections

    def _enter(self, kind: type[T]) -> T:
        with ExitStack() as undo:
            undo.push(self)
            hooks: dict[str, Callable[..., None]] = {
                "after_transaction_create": self._track_session,
                "do_orm_execute": self._track_session,  # before a first query has its connection
                "after_begin": self._order_session,
                "before_commit": self._check_deferred,
            }
            for hook, listener in hooks.items():
                event.listen(Session, hook, listener)
                self._restore.callback(event.remove, Session, hook, listener)
            for _, installation in self._chosen:
                shutdown = installation.shutdown
                installation.shutdown = partial(self._close_and_shut_down, shutdown)
                self._restore.callback(setattr, installation, "shutdown", shutdown)
                if (engine := ready_engine(installation)) is not None:
                    self._connection_of(installation.name, sync_engine(engine)).enter(self)
            self._restore.enter_context(marking_requests(self._app))
            self._restore.enter_context(observing(self._app, self))
            session: T = self._own_session(kind)
            undo.pop_all()
        return session

    # -- the databases ---------------------------------------------------------------------

    def __call__(self, database: AnyDatabase) -> None:
        """Make a handle's sessions use the isolated connection."""
        if all(installation.database is not database for _, installation in self._chosen):
            return
        self._connection_of(database.name, sync_engine(database.engine))
        factory = sessions_of(database)
        native = factory.native
        if not issubclass(native, IsolatedSession):  # an outer block may have done it
            found = {"connection_of": staticmethod(self._connection_of)}
            factory.native = type(native.__name__, (IsolatedSession, native), found)
            self._restore.callback(setattr, factory, "native", native)

    def _connection_of(self, name: str, engine: Engine) -> IsolatedConnection:
        """Return the isolated connection of a database, making it if necessary."""
        known = (each for each in self.connections if each.blocks)
        found = next((each for each in known if connect_alike(each.engine, engine)), None)
        if found is None:
            found = IsolatedConnection(name, engine, self.turn, self._home)
            if not self.ended:
                self.connections.append(found)
        if self.ended:
            raise found.refused(ENDED)
        if found.engine.dialect.is_async is not engine.dialect.is_async:
            raise IsolationError(
                f"{found.name!r} and {name!r} are the same database, but an Engine and an "
                "AsyncEngine cannot share a connection: test with cloned(app)."
            )
        found.blocks.setdefault(self)
        watching = engine, "before_cursor_execute", found.watch
        if not event.contains(*watching):
            event.listen(*watching)
            self._restore.callback(event.remove, *watching)
        return found

    def _home(self) -> asyncio.AbstractEventLoop | None:
        """Return the application's event loop."""
        return next((each.runs[0].loop for each, _ in self._chosen if each.runs), self.loop)

    async def _close_and_shut_down(self, shutdown: Shutdown | None) -> None:
        """Close a connection that cannot outlive the application, before its event loop ends."""
        for each in self.connections:
            if self in each.blocks and each.ends_with(asyncio.get_running_loop()):
                await run_in_greenlet(each.close)
        if shutdown is not None:
            await call_off_loop(shutdown)

    # -- the test's sessions ---------------------------------------------------------------

    def _own_session(self, kind: type[Any]) -> Any:
        engine = ready_engine(self._own)
        options: dict[str, Any] = dict(self._own.session_options) | {
            # For inspection only: statements use the isolated connection.
            "bind": sync_engine(engine) if engine and kind is Session else engine,
            "join_transaction_mode": "create_savepoint",
            "twophase": False,
            "expire_on_commit": kind is Session,  # an async refresh would need an await
        }
        if "execution_options" in options:  # SQLAlchemy 2.1
            options["execution_options"] = without_level(options["execution_options"])
        class_ = options.pop("class_", kind)
        base = options.pop("sync_session_class", getattr(class_, "sync_session_class", class_))
        attributes: dict[str, Any] = {
            "turn": self.turn,
            "own_connection": staticmethod(self._own_connection),
            "crosses": kind is Session,
            "get_bind": OwnSession.get_bind,  # first, even if the application's class has its own
        }
        bases = (OwnSession,) if base is Session else (base, OwnSession)
        own = type(base.__name__, bases, attributes)
        return own(**options) if kind is Session else class_(sync_session_class=own, **options)

    def _own_connection(self) -> IsolatedConnection:
        engine = ready_engine(self._own)
        if engine is not None:
            self._own_found = self._connection_of(self._own.name, sync_engine(engine))
        if self._own_found is None:
            raise IsolationError(
                f"Database {self._own.name!r} has no engine before the application starts: use "
                "the session while it runs."
            )
        return self._own_found

    def _check_deferred(self, own: Session) -> None:
        """Check deferred constraints at the COMMIT of one of the block's own sessions."""
        for each in self.connections:
            if each.own_sessions.get(own) is self and not own.in_nested_transaction():
                own.flush()
                each.check_deferred()

    def _order_session(self, own: Session, transaction: SessionTransaction, _: Connection) -> None:
        """Note that a session's savepoint is the innermost."""
        for each in self.connections:
            if each.own_sessions.get(own) is self and not transaction.nested:
                each.own_sessions[own] = each.own_sessions.pop(own)

    def _track_session(self, using: Session | ORMExecuteState, *_: object) -> None:
        """Track a session of the test when it begins, and bind one that a factory has made."""
        guest = using if isinstance(using, Session) else using.session
        if isinstance(guest, OwnSession):
            if guest.own_connection == self._own_connection:
                joins_flow(guest)
                self._own_connection().own_sessions[guest] = self
        elif isinstance(engine := guest.bind, Engine) and not isinstance(guest, NativeSession):
            joined = (each for each in self.connections if each.engine.dialect is engine.dialect)
            found = next((each for each in joined if each.blocks), None)
            if found is not None and (not found.engine.dialect.is_async or in_greenlet()):
                guest.bind, guest.join_transaction_mode = found.opened(), "create_savepoint"
                joins_flow(guest)
                found.own_sessions[guest] = self
                self._restore.callback(setattr, guest, "bind", engine)
