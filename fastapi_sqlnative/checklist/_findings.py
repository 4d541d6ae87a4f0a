"""What the checklist finds, and what is said of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

# The guide of the newest version; a test holds it against pyproject.toml.
GUIDE: Final = "https://github.com/fastapi-sqlnative/fastapi-sqlnative/blob/main/docs/"
logger = logging.getLogger("fastapi_sqlnative")


class FindingStatus(StrEnum):
    """How one question about a database has ended."""

    OK = "ok"
    WARNING = "warning"
    UNKNOWN = "unknown"  # the server did not say, for want of a privilege perhaps
    NO_ANSWER = "no answer"  # there was nobody to ask
    ACCEPTED = "accepted"  # the command was told that it is meant to be so


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the checklist.

    Attributes:
        database: the name given to `install_database`; the names of all whose pools share a
            server, where the row is about those together.
        subject: what was looked at.
        status: how it stands.
        detail: what was found.
        fix: what to do about a warning; empty where nothing is to be done.
        link: the page of the guide that explains it, likewise.
    """

    database: str
    subject: str
    status: FindingStatus
    detail: str
    fix: str = ""
    link: str = ""


# By subject, what to do about a warning, and the page of the guide that explains it.
_TIMEOUTS: Final = "performance.md#timeouts"
FIXES: Final[Mapping[str, tuple[str, str]]] = {
    "answer": ("Fix the address, the network or the password.", "checklist.md#when-it-fails"),
    "server version": ("Upgrade to a version that gets fixes.", "checklist.md#rows"),
    "connect timeout": (
        "Give connect_args a connect_timeout of 5, with asyncpg a timeout.",
        _TIMEOUTS,
    ),
    "pre-ping": (
        "Set pool_pre_ping=True, or accept failed requests after each restart of the server.",
        "performance.md#connections-that-have-died",
    ),
    "transactions": (
        "Make the engine without AUTOCOMMIT, in which nothing can be rolled back.",
        "isolation.md#when-it-fails",
    ),
    "statement timeout": (
        "Set it in connect_args, or ALTER ROLE ... SET statement_timeout = '5s'.",
        _TIMEOUTS,
    ),
    "lock timeout": (
        "Set it in connect_args, or ALTER ROLE ... SET lock_timeout = '2s'.",
        _TIMEOUTS,
    ),
    "idle in transaction": (
        "Set it in connect_args, or ALTER ROLE ... SET idle_in_transaction_session_timeout = "
        "'30s'.",
        _TIMEOUTS,
    ),
    "TLS": (
        "Give connect_args sslmode=verify-full, with asyncpg an SSLContext as ssl.",
        "security.md#tls",
    ),
    "role": (
        "Connect as a role that is no superuser, bypasses nothing and owns no tables.",
        "security.md#roles",
    ),
    "writes": (
        "Connect to the primary, unless this database is meant for reads only.",
        "health.md#which-databases-count",
    ),
    "pooler": (
        "Give connect_args prepare_threshold=None, with asyncpg statement_cache_size=0 and "
        "prepared_statement_cache_size=0.",
        "pgbouncer.md",
    ),
    "connections": (
        "Make the pools smaller or the processes fewer, or raise max_connections.",
        "performance.md#connections",
    ),
    "migrations": ("Run alembic upgrade head before this release starts.", "migrations.md"),
    "journal mode": (
        "PRAGMA journal_mode = WAL, once for the file: else a writer locks readers out.",
        "checklist.md#sqlite",
    ),
    "foreign keys": (
        "PRAGMA foreign_keys = ON for each connection, in a listener.",
        "checklist.md#sqlite",
    ),
    "busy timeout": ("Give connect_args a timeout of 5.", "checklist.md#sqlite"),
}


def finding(database: str, subject: str, detail: str, status: FindingStatus) -> Finding:
    """Make a row; a warning says what to do, and so does a database that does not answer."""
    if status in (FindingStatus.OK, FindingStatus.UNKNOWN):
        return Finding(database, subject, status, detail)
    fix, page = FIXES[subject]
    return Finding(database, subject, status, detail, fix, GUIDE + page)


def summary(findings: Iterable[Finding]) -> str:
    """Count the findings by status."""
    counts = Counter(each.status for each in findings)
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "no database"


def log_findings(findings: Iterable[Finding]) -> None:
    """Log one line, for an application's lifespan: how many findings are ok, and which are not.

    Args:
        findings: what `check_databases` returned.
    """
    findings = list(findings)
    wrong = [f"{each.database}: {each.subject}" for each in findings if each.status != "ok"]
    hint = f" ({'; '.join(wrong)}). `python -m fastapi_sqlnative check` names the fixes."
    level = logging.WARNING if wrong else logging.INFO
    logger.log(level, "Checklist: %s%s", summary(findings), hint if wrong else ".")
