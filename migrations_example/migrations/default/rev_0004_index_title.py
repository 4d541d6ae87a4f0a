"""Index `title` while others write: outside a transaction, and in a separate revision.

A failed attempt leaves an invalid index behind, which is dropped before the next attempt.
"""

from alembic import context, op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    with context.get_context().autocommit_block():
        if context.get_context().dialect.name == "postgresql":
            # It waits for all older transactions, but nothing queues behind it.
            op.execute("SET lock_timeout = '1h'")
            op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_book_title")
        op.create_index("ix_book_title", "book", ["title"], postgresql_concurrently=True)
        if context.get_context().dialect.name == "postgresql":
            op.execute("SET lock_timeout = '5s'")


def downgrade() -> None:
    with context.get_context().autocommit_block():
        op.drop_index("ix_book_title", "book", postgresql_concurrently=True, if_exists=True)
