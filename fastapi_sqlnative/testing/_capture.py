"""The statements of a block."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from .._drivers.transactions import autocommits
from .._sessions.engines import AnyEngine, sync_engine
from ._connections import isolated_on
from ._targets import Target, observing, places, ready_engine

_ENDS = ("BEGIN", "COMMIT", "ROLLBACK")
_SAVEPOINTS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")


@dataclass(frozen=True, slots=True)
class CapturedStatement:
    """One statement.

    Attributes:
        database: the database's name.
        sql: the text that was sent, or `BEGIN`, `COMMIT`, `ROLLBACK`.
        parameters: as they were handed to the driver.
    """

    database: str
    sql: str
    parameters: Any = None

    def __str__(self) -> str:
        return self.sql


class CapturedStatements(list[CapturedStatement]):
    """What was sent within the block, in order, BEGIN, COMMIT and ROLLBACK included."""

    def __repr__(self) -> str:
        lines = "".join(f"\n  {each.database}: {each.sql}" for each in self)
        return f"<{len(self.queries)} queries>{lines}"

    @property
    def queries(self) -> list[CapturedStatement]:
        """What was sent besides BEGIN, COMMIT, ROLLBACK and savepoints; count these."""
        return [e for e in self if e.sql not in _ENDS and not e.sql.startswith(_SAVEPOINTS)]

    @property
    def texts(self) -> list[str]:
        """The SQL alone."""
        return [each.sql for each in self]


@contextmanager
def capture_statements(target: Target | AnyEngine) -> Generator[CapturedStatements]:
    """Note what is sent to the databases of an application, or to one, within a block.

    This is everything that SQLAlchemy sends: for sessions, handles, Core and background work. In
    an `isolated` block, the savepoints that stand for the application's transactions are noted as
    `BEGIN`, `COMMIT` and `ROLLBACK`.

    Enter it before the application starts or while it runs.

    Args:
        target: an application, a handle or an engine.

    Example:
        with capture_statements(app) as statements:
            client.get("/authors")
        assert len(statements.queries) == 2
    """
    captured = CapturedStatements()
    heard: set[Engine] = set()  # one may have two names

    def hear(name: str, engine: AnyEngine) -> None:
        inner = sync_engine(engine)
        if inner not in heard:
            heard.add(inner)
            for each, listener in _listeners(name, captured).items():
                event.listen(inner, each, listener)
                listening.callback(event.remove, inner, each, listener)

    with ExitStack() as listening:
        if isinstance(target, Engine | AsyncEngine):
            hear("default", target)
        elif not isinstance(target, Starlette):
            hear(target.name, target.engine)
        else:
            for _, installation in places(target, ()):
                if (engine := ready_engine(installation)) is not None:
                    hear(installation.name, engine)
            listening.enter_context(observing(target, lambda each: hear(each.name, each.engine)))
        yield captured


def _listeners(name: str, captured: CapturedStatements) -> dict[str, Callable[..., None]]:
    def statement(connection: Connection, *call: Any) -> None:
        _, sql, parameters, context, _ = call
        if (isolated := isolated_on(connection)) is not None:
            sql = isolated.in_production(sql, context)
        if sql is not None:
            captured.append(CapturedStatement(name, sql, parameters))

    def end(sql: str, connection: Connection) -> None:
        if not (connection.closed or autocommits(connection) or isolated_on(connection)):
            captured.append(CapturedStatement(name, sql))

    ends = {sql.lower(): partial(end, sql) for sql in _ENDS}
    return {"before_cursor_execute": statement, **ends}
