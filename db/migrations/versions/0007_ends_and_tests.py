"""Where a benchmark's completions end, in the place of whether they end with the line; what a sample must pass."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("benchmark", sa.Column("ends", sa.Text(), nullable=False, server_default="line"))
    op.execute(sa.text("UPDATE benchmark SET ends = 'text' WHERE NOT ends_with_line"))
    op.drop_column("benchmark", "ends_with_line")
    op.add_column("sample", sa.Column("test", sa.Text()))
