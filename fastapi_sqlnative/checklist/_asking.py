"""Asking every database of an application at once."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from starlette.applications import Starlette

from .._drivers.connections import noting_arguments, parameters_of
from .._drivers.failures import driver_error
from .._drivers.pools import beside_pool
from .._drivers.transactions import autocommits
from .._lifespan.running import Installation, installations_of
from .._lifespan.startup import call_factory
from .._routes import applications_in
from .._seconds import check_seconds
from .._sessions.completion import ended_within
from .._sessions.engines import dispose, run_on_engine
from ._connections import Room, compare_rooms, read_room
from ._findings import Finding, FindingStatus, finding
from ._questions import Answer, Ask, Asked, Questions, pooler_in_between, questions_for

if TYPE_CHECKING:
    from alembic.config import Config

AlembicConfig: TypeAlias = "Config | str | os.PathLike[str]"
Progress: TypeAlias = Callable[[str], object]
# What a question that has run out of time gets, in seconds, to close its connection.
_GRACE: Final = 1.0


async def check_databases(
    app: Starlette,
    *,
    processes: int = 1,
    timeout: float = 10.0,
    alembic: Mapping[str, AlembicConfig] | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Ask every database of an application, and of those mounted in it, how it is set up.

    The lifespan does not run. Engines are used as they are; a factory is called as at start-up,
    and what it has built is disposed of. Each database gets one connection beside its pool, made
    with the engine's arguments and events, in AUTOCOMMIT; nothing is written. A database that
    does not answer is one row, whatever it raises. In a lifespan, where the databases are up,
    their own engines are asked.

    Args:
        app: the application.
        processes: how many serve it, all replicas together, each with pools of its own.
        timeout: seconds that each database has for all its answers.
        alembic: by name of the database, the configuration whose heads it is to have.
        progress: called with a line for each database that is asked or has answered.

    Raises:
        ValueError: no process, a time that is not above zero, or an unknown name in `alembic`.

    Example:
        findings = await check_databases(app, processes=8)
    """
    check_seconds("timeout", timeout)
    if processes < 1:
        raise ValueError(f"processes must be at least 1; it is {processes}.")
    installations = _by_label(app)
    extra = {name: _revisions(config) for name, config in (alembic or {}).items()}
    if unknown := extra.keys() - installations.keys():
        known = ", ".join(map(repr, installations)) or "none"
        raise ValueError(f"alembic names {sorted(unknown)}, and installed are: {known}.")
    asking = [
        _Asking(label, installation, extra.get(label, {}), progress or _silent)
        for label, installation in installations.items()
    ]
    answered = await asyncio.gather(*(each.within(timeout) for each in asking))
    rooms = {each.label: each.room for each in asking if each.room is not None}
    return [*(each for found in answered for each in found), *compare_rooms(rooms, processes)]


def _by_label(app: Starlette) -> dict[str, Installation]:
    """Name every installed database; one of a mounted application may need a number."""
    found: dict[str, Installation] = {}
    for each in applications_in(app):
        for name, installation in installations_of(each).by_name.items():
            label, number = name, 2
            while label in found:
                label, number = f"{name} ({number})", number + 1
            found[label] = installation
    return found


def _revisions(config: AlembicConfig) -> Questions:
    """Make the question for Alembic's heads; its script directory is read now."""
    from ..migrations import Revisions, current_revisions  # Alembic is an extra

    wanted = Revisions.read(config)

    def ask(asked: Asked) -> Answer:
        found = current_revisions(asked.connection)
        result = wanted.compare(found)
        return Answer(f"{result.state} ({', '.join(sorted(found)) or 'none'})", result.ready)

    return {"migrations": ask}


def _silent(_line: str) -> None:
    """Tell nobody."""


class _Asking:
    """One database while it is asked."""

    def __init__(
        self, label: str, installation: Installation, extra: Questions, progress: Progress
    ) -> None:
        self.label = label
        self.room: Room | None = None
        self._installation = installation
        self._extra = extra
        self._progress = progress
        self._doing = "connecting"

    async def within(self, timeout: float) -> list[Finding]:
        """Return what was found, or the one row that says why nothing was."""
        self._progress(f"Asking database {self.label!r} ...")
        task = asyncio.create_task(self._ask())
        if not await ended_within(timeout, task, grace=_GRACE):
            found = [self._no_answer(f"nothing within {timeout:g} s ({self._doing})")]
        elif (error := task.exception()) is not None:
            found = [self._no_answer(_in_a_line(error))]
        else:
            found = task.result()
        self._progress(f"Database {self.label!r}: {_summary(found)}.")
        return found

    def _no_answer(self, why: str) -> Finding:
        self.room = None
        return finding(self.label, "answer", why, answered=False)

    async def _ask(self) -> list[Finding]:
        given, running = self._installation.engine, self._installation.database
        if running is not None:
            return await run_on_engine(running.engine, self._examine)
        if not callable(given):
            return await run_on_engine(given, self._examine)
        engine: Any = await call_factory(given)
        self._installation.make_handle(engine)  # raises the same as start-up
        try:
            return await run_on_engine(engine, self._examine)
        finally:
            await dispose(engine)

    def _examine(self, engine: Engine) -> list[Finding]:
        """Ask all questions over one connection, in plain code."""
        with (
            beside_pool(engine, engine.get_execution_options()) as beside,
            noting_arguments(beside) as noted,
            beside.connect() as connection,
        ):
            stored_at_once = autocommits(connection)
            connection.execution_options(isolation_level="AUTOCOMMIT")
            parameters = parameters_of(connection, noted)
            asked = Asked(connection, engine.pool, parameters, stored_at_once)
            return [each for each in self._answers(asked) if each is not None]

    def _answers(self, asked: Asked) -> Iterator[Finding | None]:
        questions = questions_for(asked.connection.dialect.name)
        for subject, ask in (questions | {"connections": self._note_room} | self._extra).items():
            self._doing = f"asking for {subject}"
            yield self._answer(subject, ask, asked)

    def _note_room(self, asked: Asked) -> None:
        self.room = None if pooler_in_between(asked) else read_room(asked)

    def _answer(self, subject: str, ask: Ask, asked: Asked) -> Finding | None:
        try:
            answer = ask(asked)
        except SQLAlchemyError as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise
            return Finding(self.label, subject, FindingStatus.UNKNOWN, _in_a_line(error))
        if answer is None:
            return None
        return finding(self.label, subject, answer.detail, fine=answer.fine)


def _in_a_line(error: BaseException) -> str:
    """Say what was raised: its kind, and the first line of the driver's own words."""
    found = driver_error(error)
    first, *_ = str(found).strip().splitlines() or [""]
    return f"{type(found).__name__}: {first}".removesuffix(": ")


def _summary(found: list[Finding]) -> str:
    counts = Counter(each.status for each in found)
    return ", ".join(f"{count} {status}" for status, count in counts.items())
