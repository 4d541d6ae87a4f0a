"""Tighten: require `title`, after the backfill.

PostgreSQL validates the rows while others write, and then relies on the constraint instead of
scanning the table under an exclusive lock. Each statement has its own transaction: in a single
one, the first lock would be held during validation. It can stop halfway, so it cleans up first.
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    if context.get_context().dialect.name == "postgresql":
        with context.get_context().autocommit_block():
            op.execute("ALTER TABLE book DROP CONSTRAINT IF EXISTS book_title_is_backfilled")
            op.execute(
                "ALTER TABLE book ADD CONSTRAINT book_title_is_backfilled"
                " CHECK (title IS NOT NULL) NOT VALID"
            )
            op.execute("ALTER TABLE book VALIDATE CONSTRAINT book_title_is_backfilled")
            op.execute("ALTER TABLE book ALTER COLUMN title SET NOT NULL")
            op.execute("ALTER TABLE book DROP CONSTRAINT book_title_is_backfilled")
    else:
        op.alter_column("book", "title", existing_type=sa.String(200), nullable=False)


def downgrade() -> None:
    op.alter_column("book", "title", existing_type=sa.String(200), nullable=True)
