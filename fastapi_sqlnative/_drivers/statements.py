"""What a statement may do, read from its compiled form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any, Final

from sqlalchemy import ColumnClause, TextClause
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import FunctionElement, GenericFunction


class Effect(Enum):
    """What a statement may do to the transaction it runs in."""

    NONE = auto()
    WRITE = auto()
    UNKNOWN = auto()  # only the server can tell
    SAVEPOINT = auto()
    UNDO = auto()  # of a savepoint


_START: Final = r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
_ONE_STATEMENT: Final = r"\b[^;]*;?\s*\Z"
# The group is the savepoint's name.
_TEXT: Final[Mapping[Effect, re.Pattern[str]]] = {
    effect: re.compile(_START + pattern, re.IGNORECASE | re.DOTALL)
    for effect, pattern in {
        Effect.WRITE: rf"(?:insert|update|delete|merge|replace){_ONE_STATEMENT}()",
        Effect.SAVEPOINT: r"savepoint\s+([^\s;]+)",
        Effect.UNDO: r"rollback\s+(?:work\s+|transaction\s+)?to\s+(?:savepoint\s+)?([^\s;]+)",
        Effect.NONE: r"(?:select|with|values|table|show|set|lock|listen|notify|release|explain)"
        rf"{_ONE_STATEMENT}()",
    }.items()
}
# Words that let a statement write that begins as if it read. FOR UPDATE only locks.
_WRITING: Final = re.compile(
    r"\b(?:insert|(?<!for\s)(?<!\bkey\s)update|delete|merge|into|call)\b", re.IGNORECASE
)
_CALLED: Final = re.compile(r"([\w.\"]+)\s*\(")
# What may stand before a parenthesis and calls nothing, and functions of the databases' own that
# write nothing. A function missing here costs a question to the server, never an error.
_HARMLESS: Final = frozenset(
    """all and any array as between by cast distinct else except exists filter from group having
    in intersect is join lateral like limit not offset on or order over partition row rows select
    set some table then union using values when where with within materialized recursive case
    abs age array_agg array_length avg bool_and bool_or btrim cardinality ceil ceiling char_length
    clock_timestamp coalesce concat concat_ws count cume_dist current_database current_schema
    current_setting current_user date date_format date_part date_trunc datetime day decode
    dense_rank encode every exp extract first_value floor format gen_random_uuid generate_series
    greatest group_concat hour hex ifnull initcap json_agg json_array_length json_build_object
    json_each json_extract json_object_agg jsonb_agg jsonb_array_elements jsonb_build_object
    jsonb_each jsonb_object_agg julianday lag last_value lead least left length ln localtime log
    lower lpad ltrim make_date make_interval max md5 min mod month now nth_value ntile nullif
    octet_length percent_rank plainto_tsquery position power quote_ident random rank regexp_replace
    repeat replace reverse right round row_number row_to_json rpad rtrim session_user setseed sign
    similarity split_part sqrt statement_timestamp stddev strftime string_agg strpos substr
    substring sum time timezone to_char to_date to_json to_jsonb to_number to_timestamp
    to_tsquery to_tsvector transaction_timestamp translate trim trunc ts_rank unixepoch unnest upper
    uuid variance version websearch_to_tsquery year""".split()  # noqa: SIM905 - read as prose
)
_HARMLESS_PREFIX: Final = "pg_"


def writes(statement: Any) -> bool:
    """Tell a statement that writes before it is sent; a function that writes is not recognised."""
    if getattr(statement, "is_text", False) or isinstance(statement, TextClause):
        return _effect_of_text(str(statement))[0] is Effect.WRITE
    return any(getattr(part, "is_dml", False) for part in visitors.iterate(statement))


def effect_of(compiled: Any) -> tuple[Effect, str]:
    """Tell what a compiled statement may do, and the name of the savepoint it is about."""
    statement = compiled.statement
    if statement is None or getattr(statement, "is_text", isinstance(statement, TextClause)):
        return _effect_of_text(compiled.string)
    if statement.is_dml:
        return Effect.WRITE, ""
    if not statement.is_select:
        return Effect.UNKNOWN, ""
    if any(getattr(cte.element, "is_dml", False) for cte in getattr(compiled, "ctes", None) or ()):
        return Effect.WRITE, ""
    return (Effect.UNKNOWN if any(_doubtful(statement)) else Effect.NONE), ""


def _effect_of_text(sql: str) -> tuple[Effect, str]:
    for effect, pattern in _TEXT.items():
        found = pattern.match(sql)
        if found is not None:
            doubtful = effect is Effect.NONE and _may_write(sql)
            return Effect.UNKNOWN if doubtful else effect, found[1].strip('"`').lower()
    return Effect.UNKNOWN, ""


def _may_write(sql: str) -> bool:
    return _WRITING.search(sql) is not None or not all(
        _is_harmless(name) for name in _CALLED.findall(sql)
    )


def _is_harmless(function: str) -> bool:
    name = function.strip('"').lower()
    name = name.removeprefix("pg_catalog.")
    return name in _HARMLESS or name.startswith(_HARMLESS_PREFIX)


def _doubtful(statement: Any) -> Iterator[bool]:
    """Yield, for each part of a SELECT, whether it may call something that writes."""
    for part in visitors.iterate(statement):
        if isinstance(part, FunctionElement) and not _is_known(type(part)):
            yield not _is_harmless(".".join((*part.packagenames, part.name)))
        elif isinstance(part, TextClause):
            yield _may_write(part.text)
        elif isinstance(part, ColumnClause) and part.is_literal:
            yield _may_write(part.name)


def _is_known(function: type[Any]) -> bool:
    """Tell whether SQLAlchemy has a class of its own for a function, as for `func.count`."""
    return issubclass(function, GenericFunction) and function.__module__.startswith("sqlalchemy.")
