"""What a statement may do, read from its compiled form."""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from sqlalchemy import TextClause
from sqlalchemy.sql import visitors


class Effect(Enum):
    """What a statement may do to the transaction it runs in."""

    NONE = auto()
    WRITE = auto()
    DEFINE = auto()  # tables, functions and the like; MySQL commits with it
    UNKNOWN = auto()  # only the server can tell
    SAVEPOINT = auto()
    UNDO = auto()  # of a savepoint


class Statement(NamedTuple):
    """What is known of a statement.

    Attributes:
        effect: what it may do.
        savepoint: the name of the one it is about.
        counted: a count of no row tells that it has written nothing. Not where it has more than
            one part, nor for an INSERT, whose row a trigger may have put elsewhere.
    """

    effect: Effect
    savepoint: str = ""
    counted: bool = False


def statement_of(compiled: Any) -> Statement:
    """Tell what a compiled statement may do."""
    statement = compiled.statement
    if not getattr(statement, "is_dml", False):
        # Also a SELECT that SQLAlchemy has built: its text has what a mapping or a type adds.
        return _read_text(compiled.string)
    skips = not compiled.isinsert or "ON CONFLICT" in compiled.string
    return Statement(Effect.WRITE, counted=skips and not getattr(compiled, "ctes", None))


def writes(statement: Any) -> bool:
    """Tell a statement that writes before it is sent; a function that writes is not recognised."""
    if isinstance(statement, str) or _is_text(statement):
        sql = _without_literals(str(statement))
        return bool(_FIRST[Effect.WRITE].match(sql) or _WRITING.search(sql))
    return any(getattr(part, "is_dml", False) for part in visitors.iterate(statement))


def _is_text(statement: Any) -> bool:
    # text().columns() says so by itself; of text() `is_text` is False.
    return isinstance(statement, TextClause) or bool(getattr(statement, "is_text", False))


# -- text ----------------------------------------------------------------------------------------

# Comments, literals and quoted names. Nothing here backtracks: a long text costs its length.
_LITERAL: Final = re.compile(
    r"""--[^\n]*+ | /\*(?:[^*]|\*(?!/))*+(?:\*/)? | '(?:[^']|'')*+'? | "(?:[^"]|"")*+"? """,
    re.VERBOSE,
)
# What makes that reading doubtful: escapes, dollar quotes, nested and conditional comments, and
# MySQL's comments and quotes.
_STRANGE: Final = re.compile(r"\\|\$\w*\$|/\*!|/\*[^*]*+/\*|[#`]")
_FIRST: Final = {
    Effect.WRITE: re.compile(
        r"(?:insert|update|delete|merge|replace|call|truncate)\b", re.IGNORECASE
    ),
    Effect.DEFINE: re.compile(r"(?:alter|grant|revoke|comment|create(?!\s+temp))\b", re.IGNORECASE),
    Effect.SAVEPOINT: re.compile(r"savepoint\s++(\S++)\Z", re.IGNORECASE),
    Effect.UNDO: re.compile(
        r"rollback\s++(?:(?:work|transaction)\s++)?to\s++(?:savepoint\s++)?(\S++)\Z", re.IGNORECASE
    ),
    Effect.NONE: re.compile(
        r"(?:select|with|values|table|show|set|lock|listen|notify|release)\b", re.IGNORECASE
    ),
}
# Words that let a statement write that begins as if it read. FOR UPDATE only locks.
_WRITING: Final = re.compile(
    r"\b(?:insert|(?<!for\s)(?<!\bkey\s)update|delete|merge|into|call|create)\b", re.IGNORECASE
)
_CALLED: Final = re.compile(r'(?<![\w.$"])([\w.$"]++)\s*+\(')
# What may stand before a parenthesis and calls nothing, and functions of the databases' own that
# write nothing and whose names nobody is likely to give his own. One that is missing here costs
# a question to the server, never an error.
_HARMLESS: Final = frozenset(
    """all and any array as between by case cast distinct else except exists extract filter from
    group having in intersect is join lateral like limit materialized not offset on or order over
    partition recursive row rows select set some table then union using values when where with
    within bit char decimal float interval nchar numeric nvarchar time timestamp varbinary varbit
    varchar
    abs array_agg array_length avg bool_and bool_or btrim cardinality ceil ceiling char_length
    clock_timestamp coalesce concat concat_ws count cume_dist current_database current_schema
    current_setting date_part date_trunc dense_rank first_value floor gen_random_uuid
    generate_series greatest group_concat ifnull initcap json_agg json_build_object json_extract
    json_object_agg jsonb_agg jsonb_array_elements jsonb_build_object jsonb_object_agg lag
    last_value lead least length lower lpad ltrim make_interval max md5 min now nth_value ntile
    nullif octet_length percent_rank pg_advisory_lock pg_advisory_unlock pg_advisory_xact_lock
    pg_backend_pid pg_is_in_recovery pg_sleep pg_try_advisory_lock pg_try_advisory_xact_lock
    pg_typeof plainto_tsquery rank regexp_replace replace round row_number row_to_json rpad rtrim
    similarity split_part sqrt statement_timestamp strftime string_agg strpos substr substring sum
    to_char to_date to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector trim trunc
    ts_rank unixepoch unnest upper websearch_to_tsquery""".split()  # noqa: SIM905 - as prose
)


def _read_text(sql: str) -> Statement:
    cleaned = _without_literals(sql)
    if ";" in cleaned or _STRANGE.search(sql):
        # Several statements, or one that is not read by these rules.
        return Statement(Effect.UNKNOWN)
    for effect, pattern in _FIRST.items():
        found = pattern.match(cleaned)
        if found is not None:
            doubtful = effect is Effect.NONE and _may_write(cleaned)
            savepoint = found[1].lower() if pattern.groups else ""
            counted = cleaned[:6].lower() in {"update", "delete"}
            return Statement(Effect.UNKNOWN if doubtful else effect, savepoint, counted)
    return Statement(Effect.UNKNOWN)


def _without_literals(sql: str) -> str:
    """Blank out comments, literals and quoted names; drop the end of the statement."""
    return _LITERAL.sub(_blank, sql).strip(" \t\r\n;")


def _blank(literal: re.Match[str]) -> str:
    return {"'": "''", '"': '"q"'}.get(literal[0][0], " ")


def _may_write(cleaned: str) -> bool:
    return _WRITING.search(cleaned) is not None or any(
        name.lower().removeprefix("pg_catalog.") not in _HARMLESS
        for name in _CALLED.findall(cleaned)
    )
