"""What judges said of completions, and the view that shows it."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

COMPLETION_LABEL = """
CREATE VIEW completion_label AS
SELECT l.job_id, o.run_id, r.policy, r.benchmark, o.sample_id, l.judge, l.accepted
FROM label l JOIN run r ON r.job_id = l.job_id
  JOIN outcome o ON o.run_id = r.id AND o.sample_id = l.sample_id AND o.text = l.text
"""


def upgrade() -> None:
    op.create_table(
        "label",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("sample_id", ID, nullable=False),
        sa.Column("text_hash", sa.Text(), nullable=False),
        sa.Column("judge", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_label_job_id"),
        sa.ForeignKeyConstraint(["sample_id"], ["sample.id"], name="fk_label_sample_id"),
        sa.PrimaryKeyConstraint("job_id", "sample_id", "text_hash", "judge", name="pk_label"),
    )
    op.execute(COMPLETION_LABEL)
