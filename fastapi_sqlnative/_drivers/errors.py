"""The kind, code and names that a driver's error states.

Message text is used only where there is no code, and then only text that the driver itself wrote,
or the number of quoted names in a server's message: some servers translate the words.
"""

import re
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy.exc import DBAPIError

from .details import attribute_of, details_of, mysql_number, sqlstate_of, text_of

# The server whose codes a driver passes on, by package and name of a base class of its errors.
# To add a driver, add a line here, and for a new server a column in `CODES`.
ERROR_CLASSES: Final = {
    ("MySQLdb", "MySQLError"): "mysql",
    ("asyncmy", "MySQLError"): "mysql",
    ("asyncpg", "InterfaceError"): "postgresql",
    ("asyncpg", "InternalClientError"): "postgresql",
    ("asyncpg", "PostgresError"): "postgresql",
    ("mariadb", "Error"): "mysql",
    ("mysql", "Error"): "mysql",  # mysql.connector's
    ("pg8000", "Error"): "postgresql",
    ("psycopg", "Error"): "postgresql",
    ("psycopg2", "Error"): "postgresql",
    ("pymysql", "MySQLError"): "mysql",  # aiomysql's, too
    ("sqlite3", "Error"): "sqlite",  # aiosqlite's, too
}


# The codes of each kind: PostgreSQL's SQLSTATEs (two digits mean a whole class) | MySQL's and
# MariaDB's numbers | SQLite's names (two words mean all names that start with them). An exact
# code takes precedence over its class; an unlisted code is `other`.
CODES: Final = {
    "unique": """23505 | 1022 1062 1169 1586
        | SQLITE_CONSTRAINT_UNIQUE SQLITE_CONSTRAINT_PRIMARYKEY SQLITE_CONSTRAINT_ROWID""",
    "exclusion": "23P01",
    "foreign_key": "23503 | | SQLITE_CONSTRAINT_FOREIGNKEY",
    "missing_parent": "| 1216 1452",
    "still_referenced": "23001 | 1217 1451",
    "not_null": "23502 | 1048 1364 | SQLITE_CONSTRAINT_NOTNULL",
    "check": "23514 44000 | 1369 3819 4025 | SQLITE_CONSTRAINT_CHECK",
    # Includes values too long for an index, oversized packets, malformed patterns and JSON.
    "bad_value": """22 54000 | 1139 1153 1264 1265 1292 1300 1366 1367 1406 1411 1690 3140 3141
        3143 3685 3688 3689 3690 3691 3692 3693 3694 3695 3696 3697 3698 3699
        | SQLITE_MISMATCH SQLITE_TOOBIG SQLITE_CONSTRAINT_DATATYPE""",
    # Codes of class 22 that no client's value causes: division by zero, an exhausted sequence.
    "other": "22002 22010 22012 22022 22024 2200H",
    "serialization": "40001 | 1020 3101 | SQLITE_BUSY_SNAPSHOT",
    "deadlock": "40P01 | 1213",
    "lock_not_available": "55P03 | 1205 3572 | SQLITE_BUSY SQLITE_LOCKED",
    "statement_timeout": "57014 25P04 | 1317 1969 3024 | SQLITE_INTERRUPT",
    "too_many_connections": "53300 | 1040 1203 1226",
    "unavailable": """08 53 57 25P03 | 1053 1152 1158 1159 1160 1161 1927 2002 2003 2005 2006
        2013 2055 4031 | SQLITE_CANTOPEN""",
    "read_only": "25006 | 1290 1792 1836 | SQLITE_READONLY",
    "permission_denied": "28 42501 | 1044 1045 1142 1143 1227 1370 | SQLITE_AUTH SQLITE_PERM",
    "aborted_transaction": "25P02",
    "outcome_unknown": "08007 40003",
}
_KINDS: Final = {
    (server, code): kind
    for kind, columns in CODES.items()
    for server, codes in zip(("postgresql", "mysql", "sqlite"), columns.split("|"), strict=False)
    for code in codes.split()
}


@dataclass(frozen=True, slots=True)
class StatedError:
    """The facts that a driver's error states, without guesses."""

    kind: str = ""  # the value of a `DatabaseErrorKind`
    code: str | None = None
    constraint: str | None = None
    table: str | None = None
    columns: tuple[str, ...] = ()
    key: tuple[str, ...] = ()  # the columns of the violated key
    nested: bool = False  # a server-side function, such as a trigger's, ran the statement
    server: str | None = None


def server_of(error: BaseException) -> str | None:
    """Return the server whose codes a driver's error carries; `None` if no driver raised it."""
    for each in type(error).__mro__:
        found = ERROR_CLASSES.get((str(each.__module__).partition(".")[0], each.__name__))
        if found is not None:
            return found
    return None


def driver_error(error: BaseException) -> BaseException:
    """Unwrap the driver's own error from SQLAlchemy's."""
    found = (error.orig if isinstance(error, DBAPIError) else None) or error
    if type(found).__module__.startswith("sqlalchemy.dialects."):
        return found.__cause__ or found  # asyncpg's, translated by SQLAlchemy
    return found


def read_error(error: DBAPIError) -> StatedError:
    """Read the facts and the kind of a driver's error that SQLAlchemy has wrapped."""
    original = driver_error(error)
    statement = error.statement if isinstance(error.statement, str) else None
    server = server_of(original)
    readers = {"postgresql": _read_postgres, "mysql": _read_mysql, "sqlite": _read_sqlite}
    stated = readers.get(server or "", _read_other)(original, statement)
    kind = stated.kind or _kind(stated.code or "", server or "", error)
    if kind == "foreign_key":
        # If the database doesn't say which side failed, the statement does.
        verb = _VERB.search(_ASIDE.sub(" ", statement or ""))
        directions = {"INSERT": "missing_parent", "DELETE": "still_referenced"}
        kind = directions.get(verb[1].upper() if verb else "", "foreign_key")
    return replace(stated, kind=kind, server=server)


def _kind(code: str, server: str, error: DBAPIError) -> str:
    class_ = code[:2] if server == "postgresql" else "_".join(code.split("_")[:2])
    kind = _KINDS.get((server, code)) or _KINDS.get((server, class_))
    if kind == "bad_value" and not error.params and (error.statement or code == "22023"):
        return "other"  # without parameters the bad value is the service's own or a stored one
    return kind or ("unavailable" if error.connection_invalidated else "other")


def _read_other(error: BaseException, statement: str | None) -> StatedError:
    """Classify a built-in exception that a driver lets through: a timeout or a bad value."""
    if isinstance(error, OSError):
        waited = isinstance(error, TimeoutError) and statement is not None
        return StatedError("statement_timeout" if waited else "unavailable")
    is_value = isinstance(error, ValueError | OverflowError) and statement is not None
    return StatedError("bad_value" if is_value else "")


# Comments, literals and quoted names.
_ASIDE: Final = re.compile(r"--[^\n]*|/\*.*?(?:\*/|\Z)|'[^']*'|\"[^\"]*\"", re.DOTALL)
_VERB: Final = re.compile(r"\b(INSERT(?! OR REPLACE)|DELETE|UPDATE)\b", re.IGNORECASE)


# -- PostgreSQL ------------------------------------------------------------------------------

_KEY: Final = re.compile(r"\(([^()]*)\)=\(")
_QUOTE: Final = re.compile('["«»„“”「」『』]')

# When a server refuses a connection, libpq passes on its message but no code. A message in another
# language than English matches none of these, and the server counts as unavailable.
_REFUSALS: Final = {
    "too_many_connections": re.compile(
        r"(sorry, too many clients|remaining connection slots|too many connections for"
        r"|no more connections allowed|client connections exceeded) "  # PgBouncer's
    ),
    "permission_denied": re.compile(
        r"(.* authentication failed for user |no pg_hba\.conf entry for |permission denied "
        r"|pg_hba\.conf rejects connection for "
        r'|role ".*" (does not exist|is not permitted to log in))'
    ),
    "other": re.compile(r'database ".*" does not exist'),
}


def _read_postgres(error: BaseException, statement: str | None) -> StatedError:
    code = sqlstate_of(error)
    if code is None:
        return StatedError(_without_code(error, statement))
    details = details_of(error)
    column = text_of(details, "column_name")
    key = _KEY.search(text_of(details, "message_detail", "detail") or "", 0, 500)
    stated = StatedError(
        "",
        code,
        text_of(details, "constraint_name"),
        text_of(details, "table_name"),
        (column,) if column else (),
        tuple(name.strip('"') for name in key[1].split(", ")) if key else (),
        text_of(details, "context") is not None,
    )
    return replace(stated, kind=_beyond_the_code(error, details, stated))


def _beyond_the_code(error: BaseException, details: object, stated: StatedError) -> str:
    if stated.code == "22000" and isinstance(error.__cause__, TypeError | AttributeError):
        return "other"  # asyncpg's, for a value of the wrong type: the service's mistake
    routine = text_of(details, "source_function", "server_source_function")
    if stated.code == "42501" and routine == "ExecWithCheckOptions":
        return "row_security"
    said = text_of(details, "message_primary", "message") or ""
    if stated.code == "08P01" and _REFUSALS["too_many_connections"].match(said):
        return "too_many_connections"  # PgBouncer's, which has one code for all its errors
    if stated.code != "23503":
        return ""
    # The message names the table and the constraint, and for a DELETE the referring table too.
    for name in stated.constraint, stated.table:
        said = said.replace(f'"{name}"', '""')
    return {4: "missing_parent", 6: "still_referenced"}.get(len(_QUOTE.findall(said)), "")


# The words of asyncpg, and of pg8000.
_LOST: Final = re.compile(r"connection is closed|network error|Can't create a connection")


def _without_code(error: BaseException, statement: str | None) -> str:
    """Classify an error that carries no code, because the client library raised it."""
    classes = {class_.__name__ for class_ in type(error).__mro__}
    said = str(error.args[0]) if error.args and isinstance(error.args[0], str) else ""
    is_lost = "InterfaceError" in classes and _LOST.search(said)
    if is_lost or "TargetServerAttributeNotMatched" in classes:
        return "unavailable"
    if "DataError" in classes and ("NUL" in said or "list" in said):
        return "bad_value"  # other DataErrors: psycopg read a value that Python can't represent
    # With a statement it is a mistake in the service, unless SQLAlchemy found the connection lost.
    return _refusal(said) if "OperationalError" in classes and statement is None else ""


def _refusal(said: str) -> str:
    if "no password supplied" in said:
        return "permission_denied"
    words = [line.partition("FATAL:  ")[2] for line in said.splitlines()]
    found = (name for name, each in _REFUSALS.items() if any(map(each.match, words)))
    return next(found, "unavailable")


# -- MySQL, MariaDB and SQLite, which state names only in the message ------------------------

_IN_BACKTICKS: Final = r"`((?:[^`]|``)++)`"
_NAMES: Final = tuple(
    re.compile(pattern.replace("`", _IN_BACKTICKS), re.DOTALL)
    for pattern in (
        r"UNIQUE constraint failed: index '(?P<constraint>[^']+)'",
        r"(?:UNIQUE|NOT NULL) constraint failed: (?P<paths>.+)",
        r"CHECK constraint failed: (?P<constraint>[\w.-]+)",
        r"Duplicate entry '.*' for key '(?P<constraint>[^']+)'",
        r"Column '(?P<column>[^']+)' cannot be null",
        r"Field '(?P<column>[^']+)' doesn't have a default value",
        r"CONSTRAINT (?P<constraint>`) failed for `\.(?P<table>`)",
        r"Check constraint '(?P<constraint>[^']+)' is violated\.",
        r"Cannot [a-z ]+: a foreign key constraint fails "
        r"\(`\.(?P<table>`), CONSTRAINT (?P<constraint>`) FOREIGN KEY .*",
    )
)


def _read_mysql(error: BaseException, statement: str | None) -> StatedError:
    number = mysql_number(error)
    if not isinstance(number, int) or not 0 < number < 100_000:
        is_infinite = isinstance(number, str) and number.endswith(" can not be used with MySQL")
        return StatedError("bad_value" if is_infinite else "")
    said = text_of(error, "msg") or next(reversed(error.args), None)
    stated = replace(_named_in(said), code=str(number))
    # MySQL prefixes a key's name with its table; in MariaDB a name may contain a dot.
    table, _, name = (stated.constraint or "").partition(".")
    if name and re.search(rf"\b{re.escape(table)}\b", statement or ""):
        return replace(stated, table=table, constraint=name)
    return stated


def _read_sqlite(error: BaseException, _statement: str | None) -> StatedError:
    # Python 3.11 lacks the name of the error that a STRICT table raises.
    is_strict = attribute_of(error, "sqlite_errorcode") == 3091
    code = "SQLITE_CONSTRAINT_DATATYPE" if is_strict else text_of(error, "sqlite_errorname")
    return replace(_named_in(error.args[-1] if error.args else None), code=code)


def _named_in(text: object) -> StatedError:
    """Read names from the parts of a message that cannot contain a row's values."""
    matches = (each.fullmatch(text) for each in _NAMES) if isinstance(text, str) else ()
    found = next(filter(None, matches), None)
    names = found.groupdict() if found else {}
    unquoted = {name: each.strip("`").replace("``", "`") for name, each in names.items()}
    if "paths" in names:
        paths = [path.split(".") for path in names["paths"].split(", ")]
        columns = tuple(path[-1] for path in paths)
        is_clear = all(len(path) == 2 for path in paths)
        return StatedError(table=paths[0][0], columns=columns) if is_clear else StatedError()
    column = unquoted.get("column")
    return StatedError(
        constraint=unquoted.get("constraint"),
        table=unquoted.get("table"),
        columns=(column,) if column else (),
    )
