"""What of a benchmark was found in a corpus, and a view of it."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

OVERLAP = """
CREATE VIEW overlap AS
SELECT s.id AS sample_id, b.name AS benchmark, s.position, s.name AS sample, o.corpus, o.shared, o.runs, o.found_in
FROM overlapping_sample o
  JOIN benchmark b ON b.id = o.benchmark_id
  JOIN sample s ON s.benchmark_id = o.benchmark_id AND s.position = o.position
"""


def upgrade() -> None:
    op.create_table(
        "corpus_overlap",
        sa.Column("benchmark_id", _ID, nullable=False),
        sa.Column("corpus", sa.Text(), nullable=False),
        sa.Column("texts", sa.BigInteger(), nullable=False),
        sa.Column("characters", sa.BigInteger(), nullable=False),
        sa.Column("judged", sa.Integer(), nullable=False),
        sa.Column("looked_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["benchmark_id"], ["benchmark.id"], name="fk_corpus_overlap_benchmark_id"),
        sa.PrimaryKeyConstraint("benchmark_id", "corpus", name="pk_corpus_overlap"),
    )
    op.create_table(
        "overlapping_sample",
        sa.Column("benchmark_id", _ID, nullable=False),
        sa.Column("corpus", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("shared", sa.Integer(), nullable=False),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("found_in", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["benchmark_id"], ["benchmark.id"], name="fk_overlapping_sample_benchmark_id"),
        sa.PrimaryKeyConstraint("benchmark_id", "corpus", "position", name="pk_overlapping_sample"),
    )
    op.execute(sa.text(OVERLAP))
