"""Who asked for a job and under which key, whether it is paused, what happened to it, and indices for fair claims."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
READY = sa.text("state = 'ready'")
OPEN = sa.text("state IN ('preparing', 'ready', 'running')")


def upgrade() -> None:
    op.add_column("job", sa.Column("principal", sa.Text(), nullable=False, server_default="local"))
    op.add_column("job", sa.Column("idempotency_key", sa.Text()))
    op.add_column("job", sa.Column("body_hash", sa.Text()))
    op.add_column("job", sa.Column("paused", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("uq_job_principal", "job", ["principal", "idempotency_key"], unique=True)
    op.drop_index("ix_task_ready", "task")
    op.create_index("ix_job_open", "job", [sa.text("priority DESC"), "id"], sqlite_where=OPEN, postgresql_where=OPEN)
    op.create_index(
        "ix_task_ready_of_job",
        "task",
        ["job_id", "kind", "run_after", "id"],
        sqlite_where=READY,
        postgresql_where=READY,
    )
    op.create_table(
        "job_event",
        sa.Column("id", ID, primary_key=True),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_event"),
    )
    op.create_index("ix_job_event_job_id", "job_event", ["job_id", "id"])
    op.add_column("timing", sa.Column("full_decode_ns", sa.BigInteger()))
    replace_view("batch", BATCH)
    for statement in ON_SQLITE if op.get_bind().dialect.name == "sqlite" else ON_POSTGRESQL:
        op.execute(statement)


def replace_view(name: str, select: str) -> None:
    """New columns stand behind the old ones: PostgreSQL then keeps the view, and what was granted on it."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"DROP VIEW {name}")
        op.execute(f"CREATE VIEW {name} AS {select}")
    else:
        op.execute(f"CREATE OR REPLACE VIEW {name} AS {select}")


BATCH = """
SELECT r.job_id, t.run_id, r.policy, r.benchmark, t.batch, t.rows, t.prefill_ns, t.decode_ns, t.decode_tokens,
  t.flops, t.ideal_ns, t.device_class, t.timed, t.drafted, t.drafts_kept, t.full_decode_ns
FROM timing t JOIN run r ON r.id = t.run_id
"""

#: events are written once: never changed, and removed only after their job was
ON_SQLITE = (
    """
CREATE TRIGGER job_event_is_final BEFORE UPDATE ON job_event
BEGIN SELECT RAISE(ABORT, 'an event is never changed'); END
""",
    """
CREATE TRIGGER job_event_stays BEFORE DELETE ON job_event WHEN EXISTS (SELECT 1 FROM job WHERE id = OLD.job_id)
BEGIN SELECT RAISE(ABORT, 'an event stays as long as its job'); END
""",
)
ON_POSTGRESQL = (
    """
CREATE FUNCTION keep_job_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'UPDATE' THEN RAISE EXCEPTION 'an event is never changed'; END IF;
  IF EXISTS (SELECT 1 FROM job WHERE id = OLD.job_id) THEN RAISE EXCEPTION 'an event stays as long as its job'; END IF;
  RETURN OLD;
END $$
""",
    """
CREATE TRIGGER job_event_stays BEFORE UPDATE OR DELETE ON job_event
FOR EACH ROW EXECUTE FUNCTION keep_job_event()
""",
)
