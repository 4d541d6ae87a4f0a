"""Making the sessions of one database, of the application's own class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final, cast

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..exceptions import TransactionOptionsError
from .classes import native_class
from .engines import AnyEngine, sync_engine
from .options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions
from .record import Record
from .session import TAKES_OPTIONS, AnySession, NativeSession, sync_session
from .shared import SharedState

_AUTOCOMMIT: Final = {"isolation_level": "AUTOCOMMIT"}
_FINISHING: Final = ("commit", "rollback", "close")


class SessionFactory:
    """A maker of sessions for one engine, as `sessionmaker` is.

    Lives as long as the database's handle.

    Args:
        name: the database's.
        engine: the sessions' engine; a session class of the application's may choose others.
        options: keyword arguments for the sessions, as for `sessionmaker`.
        shutdown_timeout: seconds that a cancelled request may go on with its COMMIT.
        warn_held_after: seconds that a session may hold a connection without a line in the log.

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
        warn_held_after: float | None = None,
    ) -> None:
        self.state: SharedState = SharedState(
            name, sync_engine(engine), shutdown_timeout, warn_held_after
        )
        self.asynchronous: bool = isinstance(engine, AsyncEngine)
        self._engine = engine
        self._class, self._options = self._prepare(dict(options))
        self._autocommit_options = self._options | (
            {"execution_options": dict(self._options.get("execution_options", {})) | _AUTOCOMMIT}
            if TAKES_OPTIONS
            else {}
        )
        self.state.overridden = self._overridden()
        self._try_options()

    # -- their class -----------------------------------------------------------------------

    def _prepare(self, options: dict[str, Any]) -> tuple[type[Any], dict[str, Any]]:
        wanted: type[AnySession] = AsyncSession if self.asynchronous else Session
        for keyword in ("bind",) if self.asynchronous else ("bind", "sync_session_class"):
            if keyword in options:
                raise self._mistake(
                    f"{keyword!r} cannot be given: the sessions use the engine that was "
                    "installed, and a class_ that fits it."
                )
        class_: Any = options.pop("class_", wanted)
        if not (isinstance(class_, type) and issubclass(class_, cast("type[Any]", wanted))):
            raise self._mistake(
                f"class_ must be a subclass of {wanted.__name__}, because its engine is an "
                f"{type(self._engine).__name__}; it is {class_!r}."
            )
        options = {"expire_on_commit": False, "close_resets_only": False} | options
        if not self.asynchronous:
            return native_class(class_), options
        base = options.get("sync_session_class") or cast("Any", class_).sync_session_class
        return class_, options | {"sync_session_class": native_class(base)}

    def _mistake(self, what: str) -> TypeError:
        return TypeError(f"session_options of database {self.state.name!r}: {what}")

    def _classes(self) -> list[tuple[type[Any], type[Any]]]:
        """List the classes of a session, each with what it would be without the application."""
        if self.asynchronous:
            return [
                (self._class, AsyncSession),
                (self._options["sync_session_class"], NativeSession),
            ]
        return [(self._class, NativeSession)]

    def _overridden(self) -> frozenset[str]:
        """Find what the application's classes have themselves of what ends a session."""
        found: set[str] = set()
        for class_, ours in self._classes():
            for method in _FINISHING:
                if getattr(class_, method) is not getattr(ours, method):
                    self._check_override(class_, method)
                    found.add(method)
        return frozenset(found)

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

    def _try_options(self) -> None:
        """Open a session: mistakes in its options show now, not in the first request."""
        # Not one of a class that the application constructs: that may need a request.
        if all(each.__init__ is ours.__init__ for each, ours in self._classes()):
            try:
                NativeSession.close(sync_session(self.open()))
            except TypeError as error:
                raise self._mistake(str(error)) from error

    @property
    def native(self) -> Any:
        """The class of the sessions that do the work; a test may put a subclass in its place."""
        return self._options["sync_session_class"] if self.asynchronous else self._class

    @native.setter
    def native(self, class_: Any) -> None:
        if not self.asynchronous:
            self._class = class_
            return
        for options in self._options, self._autocommit_options:
            options["sync_session_class"] = class_

    # -- opening ---------------------------------------------------------------------------

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
        self.state.check_open()
        if options is not NO_OPTIONS and options is not AUTOCOMMIT:
            self.support(options)
        given = self._autocommit_options if options is AUTOCOMMIT else self._options
        session: AnySession = self._class(bind=self._engine, **given)
        record = sync_session(session).sqlnative = Record(self.state, options, loop_thread)
        record.commits = commits
        return session

    def support(self, options: TransactionOptions) -> None:
        """Refuse what the database cannot do, before anything is sent to it.

        Raises:
            TransactionOptionsError: an isolation level, or `read_only`, that there is not.
        """
        dialect = self.state.root.dialect
        lacking = options.lacking_in(dialect)
        if lacking is not None:
            raise TransactionOptionsError(
                f"Database {self.state.name!r} ({dialect.name}+{dialect.driver}) has {lacking}."
            )
