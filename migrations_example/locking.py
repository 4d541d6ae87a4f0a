"""A lock that lets one runner at a time migrate a database, while the others wait."""

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from alembic.util import CommandError
from sqlalchemy import Connection, TextClause, text

logger = logging.getLogger("alembic.env")

# PostgreSQL's advisory locks are per database, MariaDB's and MySQL's per server.
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
def one_at_a_time(connection: Connection, name: str, wait: float) -> Generator[None]:
    """Hold a session-level lock for a block, across commits, until the block or connection ends.

    Alembic reads the current revision inside the block, so a second runner sees what the
    first has done. It does not work through PgBouncer in transaction mode, where a session has
    no server connection of its own.

    Args:
        connection: the connection that migrates, without an open transaction.
        name: the name of the lock.
        wait: how long to wait for the lock, in seconds.

    Raises:
        CommandError: another process held the lock for that long, or a transaction is open.
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
        connection.rollback()  # a transaction left open by an error or a read-only command
        _ask(connection, release, name)


def _wait(connection: Connection, take: TextClause, name: str, wait: float) -> None:
    deadline = time.monotonic() + wait
    # Poll, each time in a new transaction: a statement that waits for the lock holds a
    # snapshot, and the lock holder's CREATE INDEX CONCURRENTLY would wait for it.
    while not _ask(connection, take, name):
        if time.monotonic() > deadline:
            raise CommandError(
                f"Another process has been migrating this database for more than {wait:g} s, and "
                f"holds the lock {name!r}. Wait for it, or look for a session that hangs."
            )
        time.sleep(PAUSE)


def _ask(connection: Connection, statement: TextClause, name: str) -> bool:
    answer = connection.scalar(statement, {"name": name})
    connection.commit()  # so that the next read has a snapshot taken after the lock
    return bool(answer)
