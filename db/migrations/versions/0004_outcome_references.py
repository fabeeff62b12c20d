"""PostgreSQL looks up no more what outcomes and scores refer to: it did so for every single row, half of a commit.

A shard's transaction sees for itself that its runs and samples are there and stay. SQLite keeps the references: there
they cost little, and dropping one would write the table anew.
"""

from alembic import op

revision = "0004"
down_revision = "0003"

REFERENCES = [("outcome", "run_id"), ("outcome", "sample_id"), ("outcome", "task_id")]
REFERENCES += [("score", "run_id"), ("score", "sample_id")]


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table, column in REFERENCES:
            op.drop_constraint(f"fk_{table}_{column}", table, type_="foreignkey")
