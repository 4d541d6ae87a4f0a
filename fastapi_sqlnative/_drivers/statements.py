"""The effect of a statement, read from its compiled form."""

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from sqlalchemy import ClauseElement, Connection
from sqlalchemy.engine import CursorResult, Dialect
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import FunctionElement

from .transactions import changes

MYSQL: Final = {"mysql", "mariadb"}


class Effect(Enum):
    NONE = auto()
    WRITE = auto()
    DEFINE = auto()  # DDL, which makes MySQL commit
    UNKNOWN = auto()  # only the server can tell
    SAVEPOINT = auto()
    UNDO = auto()  # ROLLBACK TO SAVEPOINT


class Statement(NamedTuple):
    effect: Effect
    savepoint: str = ""  # the name of the one that it sets or rolls back to
    # A row count of 0 means that it wrote nothing. Not so with CTEs, nor for an INSERT without ON
    # CONFLICT, whose row a trigger may have put into another table.
    counted: bool = False
    calls: bool = False  # a procedure on MySQL, whose row count is that of the rows it has selected


def statement_of(compiled: Any) -> Statement:
    if getattr(compiled.statement, "is_dml", False):
        skips = not compiled.isinsert or "ON CONFLICT" in compiled.string
        counted = skips and not getattr(compiled, "ctes", None)
        found = Statement(Effect.WRITE, counted=counted)
    else:
        # Also for a SELECT that SQLAlchemy built: only its text shows what mappings or types add.
        found = _read_text(compiled.string)
    if found.effect is not Effect.WRITE or compiled.dialect.name not in MYSQL:
        return found
    # It can't be asked. A BEFORE trigger of an ignored row may have written, unnoticed.
    first = without_literals(compiled.string)[:6].upper()
    counted = found.counted or first in {"INSERT", "UPDATE", "DELETE"}
    return Statement(Effect.WRITE, counted=counted, calls=first.startswith("CALL"))


def changed_nothing(
    statement: Statement, result: CursorResult[Any], before: Mapping[Connection, float]
) -> bool:
    """Return whether a writing statement changed nothing, by its row count.

    SQLite's `total_changes` is better, because it also counts triggers' changes, but it counts
    those of a statement only when all rows have been fetched. It is compared with that of `before`.
    """
    if result.context.dialect.name == "sqlite":
        return not (result.returns_rows or any(changes(each) != before[each] for each in before))
    if result.context.executemany:
        return False
    if statement.calls:
        return result.returns_rows
    if not statement.counted:
        return False
    # With RETURNING added by SQLAlchemy, the rows are read and the cursor is closed by now.
    return result.rowcount == 0 or result.returned_defaults_rows == []


def writes(statement: Any, dialect: Dialect | None = None) -> bool:
    """Return whether a statement writes, before it is sent; functions that write go unnoticed."""
    if isinstance(statement, str):
        return _text_writes(statement)
    if isinstance(statement, ExecutableDDLElement):
        return True  # also where its text does not show that, as in DDL("DO ...")
    if not isinstance(statement, ClauseElement):
        return False  # a sequence, or what SQLAlchemy is about to refuse
    for part in visitors.iterate(statement):
        # `is_text` is True for text().columns(), but False for text().
        if getattr(part, "is_dml", False) or (
            getattr(part, "is_text", False) and _text_writes(str(part))
        ):
            return True
    # Text, also in from_statement() or a lambda, and the application's own constructs.
    opaque = not (getattr(statement, "is_select", False) or isinstance(statement, FunctionElement))
    return opaque and _text_writes(str(statement.compile(dialect=dialect)))


def _text_writes(text: str) -> bool:
    sql = without_literals(text)
    firsts = _FIRST[Effect.WRITE], _FIRST[Effect.DEFINE], _DROP
    parts = [part.lstrip() for part in sql.split(";")]  # psycopg sends a script as it is
    return bool(_WRITING.search(sql)) or any(each.match(part) for part in parts for each in firsts)


# -- text ----------------------------------------------------------------------------------------

# Comments, literals (also PostgreSQL's with escapes or in dollar quotes) and quoted names. Nothing
# here backtracks, so the time is linear.
_LITERAL: Final = re.compile(
    r"""--[^\n]*+ | /\*(?:[^*]|\*(?!/))*+(?:\*/)? | '(?:[^']|'')*+'? | "(?:[^"]|"")*+"?
    | (?<![\w$])(\$(?:[^\W\d]\w*+)?\$)(?s:(?!\1).)*+(?:\1)?
    | (?<![\w$])[eE]'(?:[^'\\]|''|\\(?s:.))*+'?""",
    re.VERBOSE,
)
# Syntax that the pattern above may misread: escapes, dollar quotes, nested and conditional
# comments, and MySQL's comments and quotes.
_AMBIGUOUS: Final = re.compile(r"\\|\$\w*\$|/\*!|/\*[^*]*+/\*|[#`]")
_FIRST: Final = {
    Effect.WRITE: re.compile(r"(?:insert|update|delete|merge|replace|call)\b", re.IGNORECASE),
    Effect.DEFINE: re.compile(
        r"(?:alter|grant|revoke|comment|truncate|create(?: or replace)?+"
        r"(?! (?:global |local )?temp| \w+ pg_temp\.))\b",
        re.IGNORECASE,
    ),
    Effect.SAVEPOINT: re.compile(r"savepoint\s++(\S++)\Z", re.IGNORECASE),
    Effect.UNDO: re.compile(
        r"rollback\s++(?:(?:work|transaction)\s++)?to\s++(?:savepoint\s++)?(\S++)\Z", re.IGNORECASE
    ),
    Effect.NONE: re.compile(
        r"(?:select|with|values|table|show|set|lock|listen|release)\b", re.IGNORECASE
    ),
}
# How a statement writes although it starts like a read: in or after a CTE, by EXPLAIN or INTO.
_WRITING: Final = re.compile(
    r"(?:[()]|\Aexplain\b.*)\s*+(?<!for )(?<!key )(?:insert|update|delete|merge|call|create)\s"
    r"|(?<![.\w])into\s",
    re.IGNORECASE,
)
# Often used on temporary tables, or PostgreSQL's DO, so inside a transaction the server is asked.
_DROP: Final = re.compile(
    r"(?:drop|refresh|reindex|import)\b|do (?:language \S++ )?+''", re.IGNORECASE
)
# See `Statement.counted`.
_COUNTED: Final = re.compile(r"update|delete|.*\bon conflict\b", re.IGNORECASE)
_CALLED: Final = re.compile(r'(?<![\w.$"])([\w.$"]++)\s*+\(')
# Keywords that may precede a parenthesis, and built-in functions that write nothing and whose
# names a user-defined function is unlikely to have. A missing name costs a query to the server,
# never an error.
_HARMLESS: Final = frozenset(
    """all and any array as between by case cast distinct else except exists extract filter from
    group having in intersect is join lateral like limit materialized not offset on or order over
    partition recursive row rows select set some table then union using values when where with
    within bit char decimal float interval nchar numeric nvarchar time timestamp varbinary varbit
    varchar
    abs acos age array_agg array_append array_cat array_dims array_length array_lower
    array_position array_positions array_prepend array_remove array_replace array_to_json
    array_to_string array_upper ascii asin atan atan2 avg bit_and bit_or bool_and bool_or btrim
    cardinality cbrt ceil ceiling char_length chr clock_timestamp coalesce col_description
    concat concat_ws cos count cume_dist curdate current_database current_schema current_setting
    currval date date_add date_format date_part date_sub date_trunc daterange datetime decode
    degrees dense_rank encode find_in_set first_value floor format format_type from_unixtime
    gen_random_uuid generate_series greatest group_concat has_table_privilege hashtext ifnull
    inet_client_addr initcap instr int4range int8range isempty isfinite isnull json_agg
    json_array json_array_elements json_array_elements_text json_array_length json_build_array
    json_build_object json_contains json_each json_each_text json_extract json_extract_path
    json_extract_path_text json_object json_object_agg json_object_keys json_populate_record
    json_typeof json_unquote jsonb_agg jsonb_array_elements jsonb_array_elements_text
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
    jsonb_extract_path jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_agg
    jsonb_object_keys jsonb_path_exists jsonb_path_query jsonb_path_query_array
    jsonb_path_query_first jsonb_pretty jsonb_set jsonb_strip_nulls jsonb_typeof julianday
    justify_interval lag last_insert_id last_insert_rowid last_value lastval lead least left
    length log10 lower lower_inc lower_inf lpad ltrim make_date make_interval make_time
    make_timestamp make_timestamptz max md5 min mod nextval now nth_value ntile nullif numrange
    obj_description octet_length percent_rank percentile_cont percentile_disc pg_advisory_lock
    pg_advisory_lock_shared pg_advisory_unlock pg_advisory_unlock_shared pg_advisory_xact_lock
    pg_advisory_xact_lock_shared pg_backend_pid pg_column_size pg_current_xact_id
    pg_database_size pg_get_serial_sequence pg_is_in_recovery pg_relation_size pg_size_pretty
    pg_sleep pg_table_size pg_total_relation_size pg_try_advisory_lock
    pg_try_advisory_lock_shared pg_try_advisory_xact_lock pg_try_advisory_xact_lock_shared
    pg_typeof phraseto_tsquery pi plainto_tsquery power printf quote_ident quote_literal radians
    random range_agg range_merge rank regexp_match regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table replace right round row_number row_to_json rpad
    rtrim set_config setseed setval setweight sha256 similarity sin split_part sqrt st_area
    st_asbinary st_asewkb st_asgeojson st_astext st_contains st_distance st_dwithin
    st_geogfromtext st_geomfromewkb st_geomfromewkt st_geomfromgeojson st_geomfromtext
    st_intersects st_makeenvelope st_makepoint st_point st_setsrid st_transform st_within st_x
    st_y starts_with statement_timestamp stddev stddev_pop stddev_samp strftime string_agg
    string_to_array strpos substr substring sum tan timezone to_char to_date to_hex to_json
    to_jsonb to_number to_regclass to_timestamp to_tsquery to_tsvector total_changes
    transaction_timestamp trim trunc ts_headline ts_rank ts_rank_cd tsrange tstzrange
    txid_current unix_timestamp unixepoch unnest upper upper_inc upper_inf uuid uuid_generate_v4
    uuidv4 uuidv7 var_pop var_samp variance websearch_to_tsquery width_bucket word_similarity
    """.split()  # noqa: SIM905 - as prose
)


def _read_text(sql: str) -> Statement:
    cleaned = without_literals(sql)
    # Several statements, or one that these patterns may misread; not so its first word.
    ambiguous = ";" in cleaned or _AMBIGUOUS.search(sql)
    for effect, pattern in _FIRST.items():
        found = pattern.match(cleaned)
        if found is None:
            continue
        if ambiguous:
            known = effect in {Effect.WRITE, Effect.DEFINE}
            return Statement(effect if known else Effect.UNKNOWN)
        doubtful = effect is Effect.NONE and _may_write(cleaned)
        savepoint = found[1].lower() if pattern.groups else ""
        counted = _COUNTED.match(cleaned) is not None
        return Statement(Effect.UNKNOWN if doubtful else effect, savepoint, counted)
    return Statement(Effect.UNKNOWN)


def without_literals(sql: str) -> str:
    """Blank out comments, literals and quoted names; collapse spaces, drop final semicolons."""
    return " ".join(_LITERAL.sub(_blank, sql).split()).rstrip("; ")


def _blank(literal: re.Match[str]) -> str:
    return {"-": " ", "/": " ", '"': '"q"'}.get(literal[0][0], "''")


def _may_write(cleaned: str) -> bool:
    return _WRITING.search(cleaned) is not None or any(
        name.lower().removeprefix("pg_catalog.") not in _HARMLESS
        for name in _CALLED.findall(cleaned)
    )
