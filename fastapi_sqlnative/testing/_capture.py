"""The statements of a block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, overload

from sqlalchemy import Connection, Engine, event

from .._registry import not_installed
from .._statements import autocommits
from ._targets import Target, engines

_ENDS = frozenset({"BEGIN", "COMMIT", "ROLLBACK"})
_SAVEPOINTS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")


@dataclass(frozen=True, slots=True)
class CapturedStatement:
    """Be one statement, as the driver got it.

    Attributes:
        database: the name of the database; `default` for an engine that was given itself.
        sql: the text, or `BEGIN`, `COMMIT`, `ROLLBACK`.
        parameters: as the driver got them.
    """

    database: str
    sql: str
    parameters: Any = None

    def __str__(self) -> str:
        return self.sql


class CapturedStatements(Sequence[CapturedStatement]):
    """Hold what was sent within the block, in order, those of transactions included."""

    def __init__(self) -> None:
        self._statements: list[CapturedStatement] = []

    @overload
    def __getitem__(self, index: int) -> CapturedStatement: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CapturedStatement]: ...
    def __getitem__(self, index: int | slice) -> CapturedStatement | Sequence[CapturedStatement]:
        """Return one, or some."""
        return self._statements[index]

    def __len__(self) -> int:
        return len(self._statements)

    def __repr__(self) -> str:
        lines = "".join(f"\n  {each.database}: {each.sql}" for each in self)
        return f"<{len(self.queries)} queries>{lines}"

    @property
    def queries(self) -> Sequence[CapturedStatement]:
        """What was sent besides BEGIN, COMMIT, ROLLBACK and savepoints; count these."""
        return [each for each in self if not _is_of_a_transaction(each.sql)]

    @property
    def texts(self) -> list[str]:
        """The SQL alone."""
        return [each.sql for each in self]

    def append(self, statement: CapturedStatement) -> None:
        """Note one more."""
        self._statements.append(statement)

    def clear(self) -> None:
        """Forget what was sent so far."""
        self._statements.clear()


@contextmanager
def capture_statements(target: Target) -> Generator[CapturedStatements]:
    """Note what is sent to the databases of an application, or to one, within a block.

    What counts is what SQLAlchemy sends, whoever asks: sessions, handles, Core, background work.
    `BEGIN`, `COMMIT` and `ROLLBACK` stand where they take effect, also where a driver or
    `isolated` has its own way to send them. AUTOCOMMIT has none of them.

    Enter it while the application runs, after `isolated` and `override_database`. A session that
    has its connection by then is not heard.

    Args:
        target: an application, a handle or an engine.

    Raises:
        DatabaseNotInstalledError: the application has no database, or none with an engine yet.

    Example:
        with capture_statements(app) as statements:
            client.get("/authors")
        assert len(statements.queries) == 2
    """
    captured = CapturedStatements()
    # One engine may have two names.
    found = {engine: name for name, engine in reversed([*engines(target)])}
    if not found:
        raise not_installed("default", [])
    with ExitStack() as listening:
        for engine, name in found.items():
            _Listener(name, engine, captured).listen(listening)
        yield captured


class _Listener:
    """Note what one engine sends."""

    def __init__(self, name: str, engine: Engine, captured: CapturedStatements) -> None:
        self._name = name
        self._engine = engine
        self._captured = captured

    def listen(self, listening: ExitStack) -> None:
        listeners: dict[str, Callable[..., None]] = {
            "before_cursor_execute": self._on_statement,
            "begin": functools.partial(self._on_end, "BEGIN"),
            "commit": functools.partial(self._on_end, "COMMIT"),
            "rollback": functools.partial(self._on_end, "ROLLBACK"),
        }
        for name, listener in listeners.items():
            event.listen(self._engine, name, listener)
            listening.callback(event.remove, self._engine, name, listener)

    def _on_statement(
        self,
        _connection: Connection,
        _cursor: object,
        statement: str,
        parameters: object,
        _context: object,
        _many: bool,
    ) -> None:
        self._captured.append(CapturedStatement(self._name, statement, parameters))

    def _on_end(self, sql: str, connection: Connection) -> None:
        if not connection.closed and not _autocommits(connection):
            self._captured.append(CapturedStatement(self._name, sql))


def _autocommits(connection: Connection) -> bool:
    options = connection.get_execution_options()
    return options.get("isolation_level") == "AUTOCOMMIT" or autocommits(connection)


def _is_of_a_transaction(sql: str) -> bool:
    return sql in _ENDS or sql.startswith(_SAVEPOINTS)
