"""Making the sessions of one database, of the application's own class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final, cast

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from .classes import native_class
from .engines import AnyEngine, sync_engine
from .options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions
from .record import Record
from .session import TAKES_OPTIONS, AnySession, NativeSession, sync_session
from .shared import SharedState

_AUTOCOMMIT: Final = {"isolation_level": "AUTOCOMMIT"}


class SessionFactory:
    """A maker of sessions for one engine, as `sessionmaker` is. Lives as long as its handle.

    Attributes:
        state: what the sessions share.
        class_: the application's, of the sessions that are handed out.
        native: of those that do the work; a test may put a subclass in its place.

    Raises:
        TypeError: options that no session can be made with, or a class whose `commit`,
            `rollback` or `close` cannot be called as SQLAlchemy's.
    """

    def __init__(
        self,
        name: str,
        engine: AnyEngine,
        options: Mapping[str, Any],
        shutdown_timeout: float,
        warn_held_after: float | None,
    ) -> None:
        self.state = SharedState(name, sync_engine(engine), shutdown_timeout, warn_held_after)
        self.asynchronous: bool = isinstance(engine, AsyncEngine)
        self._engine = engine
        self._options = {"expire_on_commit": False, "close_resets_only": False} | dict(options)
        self.class_: type[Any] = self._pop_class()
        base: type[Session] = self.class_
        if self.asynchronous:
            own = self._options.pop("sync_session_class", None)
            base = own or cast("type[AsyncSession]", self.class_).sync_session_class
        self.native: Any = native_class(base)
        self._reader_options = self._options
        if TAKES_OPTIONS:
            reading = {**self._options.get("execution_options", {}), **_AUTOCOMMIT}
            self._reader_options = self._options | {"execution_options": reading}
        self._look_for_overrides()

    def _pop_class(self) -> type[Any]:
        wanted: type[Any] = AsyncSession if self.asynchronous else Session
        for keyword in ("bind",) if self.asynchronous else ("bind", "sync_session_class"):
            if keyword in self._options:
                raise self._mistake(
                    f"{keyword!r} cannot be given: the sessions use the engine that was "
                    "installed, and a class_ that fits it."
                )
        class_: Any = self._options.pop("class_", wanted)
        if not (isinstance(class_, type) and issubclass(class_, wanted)):
            raise self._mistake(
                f"class_ must be a subclass of {wanted.__name__}, because its engine is an "
                f"{type(self._engine).__name__}; it is {class_!r}."
            )
        return class_

    def _mistake(self, what: str) -> TypeError:
        return TypeError(f"session_options of database {self.state.name!r}: {what}")

    def _look_for_overrides(self) -> None:
        """Find what the application's classes have themselves of what ends a session."""
        classes: list[tuple[type[Any], type[Any]]] = [(self.native, NativeSession)]
        if self.asynchronous:
            classes.append((self.class_, AsyncSession))
        overridden = [
            (class_, method)
            for class_, ours in classes
            for method in ("commit", "rollback", "close")
            if getattr(class_, method) is not getattr(ours, method)
        ]
        for override in overridden:
            self._check_override(*override)
        self.state.overridden = frozenset(method for _, method in overridden)
        # Not one of a class that the application constructs: that may need a request.
        if all(class_.__init__ is ours.__init__ for class_, ours in classes):
            try:  # mistakes in the options show now, not in the first request
                NativeSession.close(sync_session(self.open()))
            except TypeError as error:
                raise self._mistake(str(error)) from error

    def _check_override(self, class_: type[Any], method: str) -> None:
        override = getattr(class_, method)
        try:
            inspect.signature(override).bind(None)
        except TypeError as error:
            raise self._mistake(
                f"{method}() of {class_.__name__} needs arguments, and is called without any at "
                "the end of a request. Give them defaults."
            ) from error
        asynchronous = inspect.iscoroutinefunction(inspect.unwrap(override))
        if issubclass(class_, AsyncSession) and not asynchronous:
            raise self._mistake(
                f"{method}() of {class_.__name__} is not an `async def`, as AsyncSession's is. "
                "Write it with `async def`."
            )

    def open(
        self,
        options: TransactionOptions = NO_OPTIONS,
        *,
        loop_thread: int | None = None,
        commits: bool = False,
    ) -> AnySession:
        """Open a session without a connection; the caller finishes it.

        Raises:
            DatabaseNotStartedError: the application has stopped, or is about to.
            TransactionOptionsError: the database does not have what the options ask for.
        """
        self.state.check_running(new_session=True)
        given = self._options
        if options is AUTOCOMMIT:
            given = self._reader_options
        elif options is not NO_OPTIONS:
            options.check_known_to(self.state.root.dialect, self.state.name)
        session: AnySession
        if self.asynchronous:
            session = self.class_(bind=self._engine, sync_session_class=self.native, **given)
        else:
            session = self.native(bind=self._engine, **given)
        record = sync_session(session).sqlnative = Record(self.state, options, loop_thread)
        record.commits = commits
        return session
