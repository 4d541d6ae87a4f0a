"""One runner migrates a database at a time; the others wait, and then find nothing to do."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from alembic.util import CommandError
from sqlalchemy import Connection, TextClause, text

logger = logging.getLogger("alembic.env")

# PostgreSQL's advisory locks belong to a database, MariaDB's and MySQL's to the whole server.
POSTGRESQL = (
    text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))"),
    text("SELECT pg_advisory_unlock(hashtextextended(:name, 0))"),
)
MARIADB = (
    text("SELECT GET_LOCK(CONCAT(DATABASE(), ':', :name), 0)"),
    text("SELECT RELEASE_LOCK(CONCAT(DATABASE(), ':', :name))"),
)
STATEMENTS: Mapping[str, tuple[TextClause, TextClause]] = {
    "postgresql": POSTGRESQL,
    "mariadb": MARIADB,
    "mysql": MARIADB,
}
PAUSE = 0.1


@contextmanager
def one_at_a_time(connection: Connection, name: str, wait: float) -> Iterator[None]:
    """Hold a lock of the session for a block: over its commits, until its end or the connection's.

    Alembic reads inside the block what the database has, so whoever comes second sees what the
    first has done. It is of no use through a PgBouncer in transaction mode, where a session has
    no server connection of its own.

    Args:
        connection: the one that migrates; it has begun no transaction.
        name: of the lock.
        wait: seconds.

    Raises:
        CommandError: somebody else has held the lock for so long, or a transaction has begun.
    """
    if connection.in_transaction():
        raise CommandError(
            "The connection for migrations has begun a transaction, and CREATE INDEX CONCURRENTLY "
            "needs to be outside of one: give Alembic `engine.connect()`, not `engine.begin()`."
        )
    take, release = STATEMENTS[connection.dialect.name]
    if not _ask(connection, take, name):
        logger.info("Another process is migrating this database; waiting up to %g s for it.", wait)
        _wait(connection, take, name, wait)
    try:
        yield
    finally:
        connection.rollback()  # whatever an error, or a command that only reads, has left open
        _ask(connection, release, name)


def _wait(connection: Connection, take: TextClause, name: str, wait: float) -> None:
    deadline = time.monotonic() + wait
    # Asked for again and again, in a transaction each: a statement that waits for the lock has a
    # snapshot, for whose end a CREATE INDEX CONCURRENTLY of the lock's holder would wait.
    while not _ask(connection, take, name):
        if time.monotonic() > deadline:
            raise CommandError(
                f"Another process has been migrating this database for more than {wait:g} s, and "
                f"holds the lock {name!r}. Wait for it, or look for a session that hangs."
            )
        time.sleep(PAUSE)


def _ask(connection: Connection, statement: TextClause, name: str) -> bool:
    answer = connection.scalar(statement, {"name": name})
    connection.commit()  # whatever is read next is of a snapshot that is younger than the lock
    return bool(answer)
