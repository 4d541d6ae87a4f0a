"""Relax: `name` is no longer required."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.alter_column("book", "name", existing_type=sa.String(200), nullable=True)


def downgrade() -> None:
    op.execute("UPDATE book SET name = title")  # release 4 changed only titles
    op.alter_column("book", "name", existing_type=sa.String(200), nullable=False)
