"""The findings of the checklist, with their fixes."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

# The newest guide; a test compares the address with pyproject.toml.
GUIDE: Final = "https://github.com/fastapi-sqlnative/fastapi-sqlnative/blob/main/docs/"
logger = logging.getLogger("fastapi_sqlnative")


class FindingStatus(StrEnum):
    """The outcome of one question about a database."""

    OK = "ok"
    WARNING = "warning"
    UNKNOWN = "unknown"  # the query failed, for example for lack of a privilege
    NO_ANSWER = "no answer"  # the database could not be reached
    ACCEPTED = "accepted"  # a row that --accept declares to be intended


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the checklist.

    Attributes:
        database: the name given to `install_database`; several names if the row is about databases
            whose pools share a server.
        subject: what was checked.
        status: the outcome.
        detail: what was found.
        fix: what to do about it; empty if nothing needs to be done.
        link: where the guide explains it; empty if there is no `fix`.
    """

    database: str
    subject: str
    status: FindingStatus
    detail: str
    fix: str = ""
    link: str = ""


# The fix for a warning, by subject. The guide explains each under an anchor of the same name.
FIXES: Final[Mapping[str, str]] = {
    "answer": "Fix what the message names: the address, network, credentials or connect_args.",
    "server version": "Upgrade to a version that still gets fixes.",
    "connect timeout": "Set connect_timeout=5 in connect_args; for asyncpg, timeout=5.",
    "pre-ping": "Set pool_pre_ping=True, or requests fail after each restart of the server.",
    "transactions": "Create the engine without AUTOCOMMIT, in which nothing can be rolled back.",
    "statement timeout": "Set it in connect_args (MySQL: init_command), or ALTER ROLE ... SET "
    "statement_timeout = '5s'.",
    "lock timeout": "Set it in connect_args, or ALTER ROLE ... SET lock_timeout = '2s'.",
    "idle in transaction": "Set it in connect_args (MariaDB: init_command), or ALTER ROLE ... SET "
    "idle_in_transaction_session_timeout = '30s'.",
    "TLS": "Set sslmode=verify-full in connect_args; for asyncpg or MySQL, pass an SSLContext as "
    "ssl.",
    "role": "Connect as a role that is not a superuser, bypasses nothing and owns no tables.",
    "writes": "Connect to the primary, without default_transaction_read_only, unless this database "
    "is only meant for reads.",
    "pooler": "Set prepare_threshold=None in connect_args; for asyncpg, statement_cache_size=0 and "
    "prepared_statement_cache_size=0.",
    "connections": "Use smaller pools, all with a limit, or fewer processes; or raise "
    "max_connections or the CONNECTION LIMIT.",
    "migrations": "Run alembic upgrade head before this release starts.",
    "journal mode": "Run PRAGMA journal_mode = WAL once per file, so that readers are not blocked.",
    "foreign keys": "Run PRAGMA foreign_keys = ON for each connection, in a listener.",
    "busy timeout": "Set timeout=5 in connect_args.",
}


def finding(database: str, subject: str, detail: str, status: FindingStatus) -> Finding:
    """Make a row, with a fix if it is a warning or the database does not answer."""
    if status in (FindingStatus.OK, FindingStatus.UNKNOWN):
        return Finding(database, subject, status, detail)
    link = f"{GUIDE}checklist.md#{subject.lower().replace(' ', '-')}"
    return Finding(database, subject, status, detail, FIXES[subject], link)


def summary(findings: Iterable[Finding]) -> str:
    counts = Counter(each.status for each in findings)
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "no database"


def log_findings(findings: Iterable[Finding]) -> None:
    """Log one line with the number of findings by status and the subjects that are not ok.

    Args:
        findings: the result of `check_databases`, called for example in the lifespan.
    """
    findings = list(findings)
    wrong = [f"{each.database}: {each.subject}" for each in findings if each.status != "ok"]
    hint = f" ({'; '.join(wrong)}). `python -m fastapi_sqlnative check` names the fixes."
    level = logging.WARNING if wrong else logging.INFO
    logger.log(level, "Checklist: %s%s", summary(findings), hint if wrong else ".")
