"""What a shard is estimated to cost, large ones first; and of which jobs a waiting worker would take a shard."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

READY = sa.text("state = 'ready'")


def upgrade() -> None:
    op.add_column("task", sa.Column("cost", sa.BigInteger(), nullable=False, server_default="0"))
    op.drop_index("ix_task_ready_of_job", "task")
    op.create_index(
        "ix_task_ready_of_job",
        "task",
        ["job_id", "kind", "run_after", sa.text("cost DESC"), "id"],
        sqlite_where=READY,
        postgresql_where=READY,
    )
    op.add_column("idle_worker", sa.Column("job_ids", sa.JSON()))
