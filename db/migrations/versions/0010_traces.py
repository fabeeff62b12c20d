"""What every exit point predicted for every token of a target: a row a sample, see `db.traces`."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "trace",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("sample_id", ID, nullable=False),
        sa.Column("layout", sa.Integer(), nullable=False),
        sa.Column("n_points", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("prompt_key", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_trace_run_id"),
        sa.ForeignKeyConstraint(["sample_id"], ["sample.id"], name="fk_trace_sample_id"),
        sa.PrimaryKeyConstraint("run_id", "sample_id", name="pk_trace"),
    )
