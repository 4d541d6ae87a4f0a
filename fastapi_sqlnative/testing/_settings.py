"""Settings of PostgreSQL's that a transaction has for itself, and that a savepoint would keep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, cast

from sqlalchemy.engine.interfaces import DBAPIConnection

from ._dialect import ask, run

_SET_LOCAL: Final = re.compile(r"\bSET\s+LOCAL\s+\"?([\w.]+)", re.IGNORECASE)
_SET_CONFIG: Final = re.compile(r"\bset_config\s*\(\s*(?:'([\w.]+)')?", re.IGNORECASE)
_IS_LOCAL: Final = re.compile(r"\bset_config\b.*,\s*(true|'t|'on|'y|'1)", re.IGNORECASE | re.DOTALL)
_NAME: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
# Two words where the setting is called by one.
_CALLED: Final = {"time": "timezone", "session": "session_authorization"}


class LocalSettings:
    """Remember what `SET LOCAL` and `set_config(..., true)` are about to change."""

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def remember(self, connection: DBAPIConnection, statement: str, parameters: object) -> None:
        """Look up what a statement will change, before it is sent."""
        for name in _named(statement, parameters):
            if name not in self._before:
                ((value,),) = ask(connection, f"SELECT current_setting('{name}', true)")
                # One with a dot may be the application's own, and is made by setting it.
                if value is not None or "." in name:
                    self._before[name] = value or ""

    def restore(self, connection: DBAPIConnection) -> None:
        """Do what the end of a transaction does to them."""
        for name, value in self._before.items():
            quoted = value.replace("'", "''")
            run(connection, [f"SELECT set_config('{name}', '{quoted}', true)"])
        self.forget()

    def forget(self) -> None:
        """Begin anew: a rollback has restored them."""
        self._before.clear()


def _named(statement: str, parameters: object) -> Iterator[str]:
    local: list[str] = _SET_LOCAL.findall(statement)
    for name in local:
        yield _CALLED.get(name.lower(), name)
    if _SET_CONFIG.search(statement) is None:
        return
    values = list(_flat(parameters))
    if True in values or _IS_LOCAL.search(statement):
        written: list[str] = _SET_CONFIG.findall(statement)
        yield from (each for each in written if each)
        yield from (each for each in values if isinstance(each, str) and _NAME.fullmatch(each))


def _flat(parameters: object) -> Iterator[object]:
    """Yield all values, whichever style the driver has for them."""
    if isinstance(parameters, Mapping):
        inside = list(cast("Mapping[str, object]", parameters).values())
    elif isinstance(parameters, list | tuple):
        inside = list(cast("Sequence[object]", parameters))
    else:
        yield parameters
        return
    for each in inside:
        yield from _flat(each)
