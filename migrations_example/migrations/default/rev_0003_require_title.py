"""Tighten: every book has a `title`, after the backfill.

PostgreSQL checks the rows while others write, and then believes the constraint instead of reading
the table again under its strongest lock. Each statement is a transaction of its own: in one, the
lock of the first would be held over the check. So it can stop half-way, and begins by clearing up.
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
