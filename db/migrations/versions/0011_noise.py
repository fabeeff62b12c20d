"""By how much two runs of the same spec differ in speed."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "noise_pair",
        sa.Column("run_a", ID),
        sa.Column("run_b", ID),
        sa.Column("device_class", sa.Text()),
        sa.Column("content_hash", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("log_token", sa.Double(), nullable=False),
        sa.Column("log_request", sa.Double(), nullable=False),
        sa.Column("measured_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("run_a", "run_b", "device_class", name="pk_noise_pair"),
    )
    op.create_index("ix_noise_pair_content_hash", "noise_pair", ["content_hash", "policy", "device_class"])
