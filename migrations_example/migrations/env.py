"""Alembic runs this for every command, to migrate the database of a section in alembic.ini.

It uses its own connection, synchronous or asynchronous depending on the URL; or the one in
`config.attributes["connection"]`; or, with `--sql`, none.
"""

import asyncio
from logging.config import fileConfig
from typing import Any

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine

from migrations_example.locking import one_at_a_time
from migrations_example.models import METADATA
from migrations_example.settings import migration_engine, migration_url

config = context.config
database = config.get_main_option("database", "default")
options: dict[str, Any] = {
    "target_metadata": METADATA[database],
    # Completed revisions stay applied, and no table lock is held during the next revision.
    "transaction_per_migration": True,
}

# If a change cannot lock its table, it fails rather than make every request queue behind it.
GIVE_UP_ON_LOCKS = {
    "postgresql": "SET lock_timeout = '5s'",
    "mariadb": "SET SESSION lock_wait_timeout = 5",
    "mysql": "SET SESSION lock_wait_timeout = 5",
}


def migrate(connection: Connection) -> None:
    """Run the command, while holding the lock."""
    wait = float(config.get_main_option("lock_wait", "300"))
    with one_at_a_time(connection, "bookshop migrations", wait):
        connection.execute(text(GIVE_UP_ON_LOCKS[connection.dialect.name]))
        connection.commit()
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()


async def migrate_asynchronously(engine: AsyncEngine) -> None:
    """Run the command with an asynchronous driver."""
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


def migrate_synchronously() -> None:
    """Connect, and migrate."""
    engine = migration_engine(database)
    if isinstance(engine, AsyncEngine):
        asyncio.run(migrate_asynchronously(engine))
        return
    with engine.connect() as connection:
        migrate(connection)
    engine.dispose()


def write_sql() -> None:
    """Print the statements instead of running them."""
    context.configure(
        url=migration_url(database),
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        **options,
    )
    with context.begin_transaction():
        context.run_migrations()


# Only the `alembic` command has these options: another process configures its own logging.
if config.cmd_opts is not None and config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)

given: Connection | None = config.attributes.get("connection")
if context.is_offline_mode():
    write_sql()
elif given is not None:
    migrate(given)
else:
    migrate_synchronously()
