"""Speeds of two jobs are held against full depth of each: pairs whose runs are still here are measured anew."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    for name in ("paced_token", "paced_request"):
        op.add_column("noise_pair", sa.Column(name, sa.Double()))
    here = "EXISTS (SELECT 1 FROM run WHERE run.id = noise_pair.{})"
    op.execute(f"DELETE FROM noise_pair WHERE {here.format('run_a')} AND {here.format('run_b')}")
