"""Asking every database of an application at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from starlette.applications import Starlette

from .._drivers.connections import noting_arguments, parameters_of
from .._drivers.errors import driver_error
from .._drivers.pools import beside_pool
from .._drivers.transactions import autocommits
from .._lifespan.running import Installation, installations_of
from .._lifespan.startup import call_factory
from .._routes import applications_in
from .._seconds import check_seconds
from .._sessions.completion import ended_within
from .._sessions.engines import dispose, run_on_engine
from ._findings import Finding, FindingStatus, finding, summary
from ._questions import (
    OF_ANY_SERVER,
    QUESTIONS,
    Answer,
    Ask,
    Asked,
    Questions,
    Room,
    compare,
    read_room,
)

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
    installed = _installed(app)
    migrations = {name: _migrations(config) for name, config in (alembic or {}).items()}
    if unknown := migrations.keys() - installed.keys():
        known = ", ".join(map(repr, installed)) or "none"
        raise ValueError(f"alembic names {sorted(unknown)}, and installed are: {known}.")
    asking = [_Asking(*each, migrations.get(each[0], {})) for each in installed.items()]
    tell: Progress = progress or (lambda _line: None)
    answered = await asyncio.gather(*(each.within(timeout, tell) for each in asking))
    servers: dict[str, dict[str, Room]] = {}
    for each in asking:
        if each.room is not None:
            servers.setdefault(each.room.server, {})[each.label] = each.room
    together = (
        _judged(", ".join(rooms), "connections", compare(rooms.values(), processes))
        for rooms in servers.values()
    )
    return [*chain.from_iterable(answered), *together]


def _installed(app: Starlette) -> dict[str, Installation]:
    """List what is installed; a name that a mounted application has as well gets a number."""
    found: dict[str, Installation] = {}
    for each in applications_in(app):
        for name, installation in installations_of(each).by_name.items():
            label, number = name, 2
            while label in found:
                label, number = f"{name} ({number})", number + 1
            found[label] = installation
    return found


def _migrations(config: AlembicConfig) -> Questions:
    """Make the question for Alembic's heads; its script directory is read now."""
    from ..migrations import Revisions, current_revisions  # Alembic is an extra

    wanted = Revisions.read(config)

    def ask(asked: Asked) -> Answer:
        found = current_revisions(asked.connection)
        result = wanted.compare(found)
        return f"{result.state} ({', '.join(sorted(found)) or 'none'})", result.ready

    return {"migrations": ask}


def _judged(database: str, subject: str, answer: Answer) -> Finding:
    detail, fine = answer
    return finding(database, subject, detail, FindingStatus.OK if fine else FindingStatus.WARNING)


@dataclass(eq=False)
class _Asking:
    """One database while it is asked."""

    label: str
    installation: Installation
    extra: Questions
    room: Room | None = None
    doing: str = "connecting"

    async def within(self, timeout: float, tell: Progress) -> list[Finding]:
        """Return what was found, or the one row that says why nothing was."""
        tell(f"Asking database {self.label!r} ...")
        task = asyncio.create_task(self._ask())
        if not await ended_within(timeout, task, grace=_GRACE):
            found = [self._no_answer(f"nothing within {timeout:g} s ({self.doing})")]
        elif (error := task.exception()) is not None:
            found = [self._no_answer(_in_a_line(error))]
        else:
            found, self.room = task.result()
        tell(f"Database {self.label!r}: {summary(found)}.")
        return found

    def _no_answer(self, why: str) -> Finding:
        return finding(self.label, "answer", why, FindingStatus.NO_ANSWER)

    async def _ask(self) -> tuple[list[Finding], Room | None]:
        running = self.installation.database
        engine: Any = self.installation.engine if running is None else running.engine
        if not callable(engine):
            return await run_on_engine(engine, self._examine)
        engine = await call_factory(engine)
        self.installation.make_handle(engine)  # raises the same as start-up
        try:
            return await run_on_engine(engine, self._examine)
        finally:
            await dispose(engine)

    def _examine(self, engine: Engine) -> tuple[list[Finding], Room | None]:
        """Ask all questions over one connection, in plain code."""
        rooms: list[Room | None] = []
        with (
            beside_pool(engine, engine.get_execution_options()) as beside,
            noting_arguments(beside) as noted,
            beside.connect() as connection,
        ):
            stored_at_once = autocommits(connection)
            connection.execution_options(isolation_level="AUTOCOMMIT")
            parameters = parameters_of(connection, noted)
            asked = Asked(connection, engine.pool, parameters, stored_at_once)
            questions = QUESTIONS.get(connection.dialect.name, OF_ANY_SERVER) | self.extra
            questions["connections"] = lambda asked: rooms.append(read_room(asked))
            answers = (self._answer(*each, asked) for each in questions.items())
            return list(filter(None, answers)), next(iter(rooms), None)

    def _answer(self, subject: str, ask: Ask, asked: Asked) -> Finding | None:
        self.doing = f"asking for {subject}"
        try:
            answer = ask(asked)
        except SQLAlchemyError as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise
            return finding(self.label, subject, _in_a_line(error), FindingStatus.UNKNOWN)
        return None if answer is None else _judged(self.label, subject, answer)


def _in_a_line(error: BaseException) -> str:
    """Say what was raised: its kind, and the first line of the driver's own words."""
    found = driver_error(error)
    first, *_ = str(found).strip().splitlines() or [""]
    return f"{type(found).__name__}: {first}".removesuffix(": ")
