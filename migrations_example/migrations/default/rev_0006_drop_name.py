"""Contract: drop `name`, which no running release reads or writes."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.drop_column("book", "name")


def downgrade() -> None:
    op.add_column("book", sa.Column("name", sa.String(200), nullable=True))
    op.execute("UPDATE book SET name = title")
