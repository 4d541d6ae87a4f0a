"""Nobody has to write `name` any more."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.alter_column("book", "name", existing_type=sa.String(200), nullable=True)


def downgrade() -> None:
    op.execute("UPDATE book SET name = title")  # release 4 has changed titles only
    op.alter_column("book", "name", existing_type=sa.String(200), nullable=False)
