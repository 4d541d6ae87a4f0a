"""Checking all databases of an application concurrently."""

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from starlette.applications import Starlette

from .._drivers.connections import parameters_of, recording_arguments
from .._drivers.errors import driver_error
from .._drivers.pools import beside_pool, knows_server
from .._drivers.transactions import autocommits
from .._functions import check_seconds
from .._lifespan.lifespan import call_factory
from .._lifespan.running import Installation, installations_of
from .._routes import applications_in
from .._sessions.completion import within
from .._sessions.engines import dispose, run_on_engine
from . import _questions as questions
from ._findings import Finding, FindingStatus, finding

if TYPE_CHECKING:
    from alembic.config import Config

AlembicConfig: TypeAlias = "Config | str | os.PathLike[str]"
Progress: TypeAlias = Callable[[str], object]


async def check_databases(
    app: Starlette,
    *,
    processes: int = 1,
    timeout: float = 10.0,
    alembic: Mapping[str, AlembicConfig] | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Check the setup of every database of an application and of those mounted in it.

    The lifespan does not run. Ready engines are used as they are; a factory is called as at
    start-up, and its engine is disposed of. Each database gets one connection outside its pool,
    made with the engine's arguments and events, in AUTOCOMMIT; nothing is written. A database that
    does not answer becomes one row, whatever it raises. Within a running lifespan, the engines of
    the running databases are used.

    Args:
        app: the application.
        processes: the number of processes that serve it, across all replicas; each has its pools.
        timeout: seconds for all answers of each database.
        alembic: Alembic configurations whose heads a database should be at, by database name, as
            for `alembic_check`.
        progress: called with a line when a database is asked and when that is done.

    Raises:
        ValueError: a number is not above zero, or `alembic` has an unknown name.

    Example:
        findings = await check_databases(app, processes=8)
    """
    check_seconds("timeout", timeout)
    if processes < 1:
        raise ValueError(f"processes must be at least 1; it is {processes}.")
    installed = _installed(app)
    migrations = {name: _migrations(name, config) for name, config in (alembic or {}).items()}
    if unknown := migrations.keys() - installed.keys():
        known = ", ".join(map(repr, installed)) or "none"
        raise ValueError(f"alembic names {sorted(unknown)}; the installed databases are: {known}.")
    asking = [_Asking(*each, migrations.get(each[0], {})) for each in installed.items()]
    report: Progress = progress or (lambda _line: None)
    answered = await asyncio.gather(*(each.within(timeout, report) for each in asking))
    servers: dict[str, dict[str, questions.Room]] = {}
    for each in asking:
        if each.room is not None:
            servers.setdefault(each.room.server, {})[each.label] = each.room
    together = (
        _judged(", ".join(rooms), "connections", questions.compare([*rooms.values()], processes))
        for rooms in servers.values()
    )
    return [*chain.from_iterable(answered), *together]


def _installed(app: Starlette) -> dict[str, Installation]:
    """List the installations; repeated names, in mounted applications, get a number."""
    found: dict[str, Installation] = {}
    for each in applications_in(app):
        for name, installation in installations_of(each).by_name.items():
            label, number = name, 2
            while label in found:
                label, number = f"{name} ({number})", number + 1
            found[label] = installation
    return found


def _migrations(name: str, config: AlembicConfig) -> questions.Questions:
    """Make the question about Alembic's heads, reading the script directory now."""
    from ..migrations import Revisions, current_revisions  # Alembic is an extra

    wanted = Revisions.read(config, name)

    def ask(asked: questions.Asked) -> questions.Answer:
        found = current_revisions(asked.connection)
        result = wanted.compare(found)
        return f"{result.state} ({', '.join(sorted(found)) or 'none'})", result.ready

    return {"migrations": ask}


def _judged(database: str, subject: str, answer: questions.Answer) -> Finding:
    detail, fine = answer
    return finding(database, subject, detail, FindingStatus.OK if fine else FindingStatus.WARNING)


@dataclass(eq=False)
class _Asking:
    label: str
    installation: Installation
    extra: questions.Questions
    room: questions.Room | None = None
    doing: str = "connecting"

    async def within(self, timeout: float, report: Progress) -> list[Finding]:
        """Return the findings, or a single one that says why there are none."""
        report(f"Asking database {self.label!r} ...")
        late = TimeoutError()
        try:
            found = await within(timeout, self._ask(), late=late)
        except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a row
            hangs = f"no answer within {timeout:g} s ({self.doing})"
            why = hangs if error is late else _in_a_line(error)
            found = [finding(self.label, "answer", why, FindingStatus.NO_ANSWER)]
        report(f"Database {self.label!r}: done.")
        return found

    async def _ask(self) -> list[Finding]:
        running = self.installation.database
        engine: Any = self.installation.engine if running is None else running.engine
        if not callable(engine):
            return await run_on_engine(engine, self._examine)
        engine = await call_factory(engine)
        self.installation.make_handle(engine)  # raises the same errors as start-up
        try:
            return await run_on_engine(engine, self._examine)
        finally:
            await dispose(engine)

    def _examine(self, engine: Engine) -> list[Finding]:
        """Ask all questions over one connection. Plain code."""
        with (
            beside_pool(engine) as beside,
            recording_arguments(beside) as noted,
            beside.connect() as connection,
        ):
            autocommit = autocommits(connection)
            if not knows_server(engine):  # the check of another name is initializing the dialect
                engine.dialect.initialize(connection)
                connection.rollback()
            connection.execution_options(isolation_level="AUTOCOMMIT")
            parameters = parameters_of(connection, noted)
            asked = questions.Asked(connection, engine.pool, parameters, autocommit)
            of_server = questions.QUESTIONS.get(connection.dialect.name, questions.OF_ANY_SERVER)
            wanted = of_server | self.extra | {"connections": self._read_room}
            answers = (self._answer(*each, asked) for each in wanted.items())
            return list(filter(None, answers))

    def _read_room(self, asked: questions.Asked) -> None:
        """Keep the answer, which `compare` needs from all pools of a server."""
        self.room = questions.read_room(asked)

    def _answer(self, subject: str, ask: questions.Ask, asked: questions.Asked) -> Finding | None:
        self.doing = f"asking for {subject}"
        try:
            answer = ask(asked)
        except SQLAlchemyError as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise
            return finding(self.label, subject, _in_a_line(error), FindingStatus.UNKNOWN)
        return None if answer is None else _judged(self.label, subject, answer)


def _in_a_line(error: BaseException) -> str:
    """Return an error's class and the first line of the driver's message."""
    found = driver_error(error)
    first, *_ = str(found).strip().splitlines() or [""]
    return f"{type(found).__name__}: {first}".removesuffix(": ")
