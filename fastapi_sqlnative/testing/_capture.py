"""Capturing the statements sent in a block."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from .._drivers.statements import without_literals
from .._drivers.transactions import autocommits
from .._sessions.engines import AnyEngine, sync_engine
from ._connections import OURS, isolated_on
from ._targets import Target, observing, places, ready_engine

_ENDS = ("BEGIN", "COMMIT", "ROLLBACK")
# The statements of an isolated block that stand for these.
_SAVEPOINTS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")
_IN_PRODUCTION: dict[str, str] = dict(zip(_SAVEPOINTS, _ENDS, strict=True))


@dataclass(frozen=True, slots=True)
class CapturedStatement:
    """A statement that was sent.

    Attributes:
        database: the database's name.
        sql: the SQL text, or `BEGIN`, `COMMIT` or `ROLLBACK`.
        parameters: the parameters as passed to the driver.
    """

    database: str
    sql: str
    parameters: Any = None

    def __str__(self) -> str:
        return self.sql


class CapturedStatements(list[CapturedStatement]):
    """The statements sent in a block, in order, including BEGIN, COMMIT and ROLLBACK."""

    def __repr__(self) -> str:
        lines = "".join(f"\n  {each.database}: {each.sql}" for each in self)
        return f"<{len(self.queries)} queries>{lines}"

    @property
    def queries(self) -> list[CapturedStatement]:
        """The statements other than BEGIN, COMMIT, ROLLBACK and savepoints; count these."""
        plain = ((each, without_literals(each.sql)) for each in self)  # it may have a comment
        return [e for e, sql in plain if sql not in _ENDS and not sql.startswith(_SAVEPOINTS)]

    @property
    def texts(self) -> list[str]:
        """The SQL texts alone."""
        return [each.sql for each in self]


@contextmanager
def capture_statements(target: Target | AnyEngine) -> Generator[CapturedStatements]:
    """Capture the statements that are sent to an application's databases, or to one, in a block.

    This includes everything that SQLAlchemy sends, for sessions, handles, Core and background
    work. In an `isolated` block, the savepoints that stand for the application's transactions are
    captured as `BEGIN`, `COMMIT` and `ROLLBACK`.

    Enter it before the application starts or while it runs.

    Args:
        target: an application, a handle or an engine.

    Example:
        with capture_statements(app) as statements:
            client.get("/authors")
        assert len(statements.queries) == 2
    """
    captured = CapturedStatements()
    captured_engines: set[Engine] = set()  # an engine may have two names

    def capture(name: str, engine: AnyEngine) -> None:
        inner = sync_engine(engine)
        if inner not in captured_engines:
            captured_engines.add(inner)
            for each, listener in _listeners(name, captured).items():
                event.listen(inner, each, listener)
                listening.callback(event.remove, inner, each, listener)

    with ExitStack() as listening:
        if isinstance(target, Engine | AsyncEngine):
            capture("default", target)
        elif not isinstance(target, Starlette):
            capture(target.name, target.engine)
        else:
            for _, installation in places(target, ()):
                if (engine := ready_engine(installation)) is not None:
                    capture(installation.name, engine)
            listening.enter_context(observing(target, lambda it: capture(it.name, it.engine)))
        yield captured


def _listeners(name: str, captured: CapturedStatements) -> dict[str, Callable[..., None]]:
    def statement(connection: Connection, *call: Any) -> None:
        _, sql, parameters, context, _ = call
        if (isolated := isolated_on(connection)) is not None:
            if OURS in context.execution_options:
                return
            command, _, savepoint = without_literals(sql).rpartition(" ")
            if isolated.root in ("", savepoint):  # empty if its name is not known yet
                sql = _IN_PRODUCTION.get(f"{command} ") or sql
        captured.append(CapturedStatement(name, sql, parameters))

    def end(sql: str, connection: Connection) -> None:
        if not (autocommits(connection) or isolated_on(connection)):
            captured.append(CapturedStatement(name, sql))

    ends = {sql.lower(): partial(end, sql) for sql in _ENDS}
    return {"before_cursor_execute": statement, **ends}
