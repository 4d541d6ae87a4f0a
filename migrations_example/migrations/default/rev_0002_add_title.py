"""Expand: add `title`, which is not required yet.

It is nullable and has no default, so no row is rewritten, and the table is locked only briefly.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("book", sa.Column("title", sa.String(200), nullable=True))


def downgrade() -> None:
    op.drop_column("book", "title")
