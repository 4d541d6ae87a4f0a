"""Where each driver's errors keep what the server has stated."""

from types import SimpleNamespace
from typing import Any, Final, cast

# The fields of pg8000's errors, a dictionary, go by their letters in PostgreSQL's protocol.
_LETTERS: Final = {
    "severity": "S",
    "sqlstate": "C",
    "message": "M",
    "detail": "D",
    "context": "W",
    "table_name": "t",
    "column_name": "c",
    "constraint_name": "n",
    "server_source_function": "R",
}


def details_of(error: BaseException | None) -> Any:
    """Return what holds the server's details: psycopg's `diag`, or asyncpg's error itself."""
    first = error.args[0] if error is not None and error.args else None
    if isinstance(first, dict):
        fields = cast("dict[object, object]", first)
        return SimpleNamespace(**{name: fields.get(key) for name, key in _LETTERS.items()})
    return attribute_of(error, "diag") or error


def sqlstate_of(error: BaseException | None) -> str | None:
    return text_of(error, "sqlstate", "pgcode") or text_of(details_of(error), "sqlstate")


def mysql_number(error: BaseException) -> object:
    """Return the number of a MySQL driver's error, or what it has in its place."""
    # mariadb's and mysql.connector's is in `errno`, beside the server's text in `msg`.
    return attribute_of(error, "errno") or next(iter(error.args), None)


def text_of(holder: object, *names: str) -> str | None:
    """Return the first of these attributes that is a non-empty string, for any object."""
    values = (attribute_of(holder, name) for name in names)
    return next((value for value in values if isinstance(value, str) and value), None)


def attribute_of(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001 - a foreign property; describing an error must not fail
        return None
