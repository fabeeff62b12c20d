"""Schedules: what recurs, each firing once, whom to tell of incidents, and what was told."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"

Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "schedule",
        sa.Column("id", Id, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("overlap", sa.Text(), nullable=False),
        sa.Column("baseline_job", Id),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("next_at", sa.Double()),
        sa.Column("paused", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.PrimaryKeyConstraint("id", name="pk_schedule"),
        sa.UniqueConstraint("name", name="uq_schedule_name"),
    )
    waits = sa.text("NOT paused")
    op.create_index("ix_schedule_next_at", "schedule", ["next_at"], sqlite_where=waits, postgresql_where=waits)
    op.create_table(
        "firing",
        sa.Column("id", Id, nullable=False),
        sa.Column("schedule_id", Id, nullable=False),
        sa.Column("fire_at", sa.Double(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("resolved", sa.JSON(), nullable=False),
        sa.Column("made_at", sa.Double(), nullable=False),
        sa.Column("settled_at", sa.Double()),
        sa.Column("verdict", sa.Text()),
        sa.Column("sentence", sa.Text()),
        sa.Column("judged", sa.JSON(none_as_null=True)),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.Column("provenance", sa.JSON(), nullable=False),
        sa.Column("changed", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_firing"),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedule.id"], name="fk_firing_schedule_id"),
        sa.UniqueConstraint("schedule_id", "fire_at", name="uq_firing_schedule_id_fire_at"),
    )
    is_open = sa.text("settled_at IS NULL")
    op.create_index("ix_firing_open", "firing", ["state", "id"], sqlite_where=is_open, postgresql_where=is_open)
    op.create_table(
        "firing_job",
        sa.Column("firing_id", Id, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("job_id", Id, nullable=False),
        sa.PrimaryKeyConstraint("firing_id", "role", name="pk_firing_job"),
        sa.ForeignKeyConstraint(["firing_id"], ["firing.id"], name="fk_firing_job_firing_id"),
    )
    op.create_index("ix_firing_job_job_id", "firing_job", ["job_id"])
    op.create_table(
        "incident",
        sa.Column("id", Id, nullable=False),
        sa.Column("schedule_id", Id, nullable=False),
        sa.Column("opened_at", sa.Double(), nullable=False),
        sa.Column("opened_by", Id, nullable=False),
        sa.Column("firings", sa.Integer(), nullable=False),
        sa.Column("closed_at", sa.Double()),
        sa.Column("closed_by", Id),
        sa.PrimaryKeyConstraint("id", name="pk_incident"),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedule.id"], name="fk_incident_schedule_id"),
        sa.ForeignKeyConstraint(["opened_by"], ["firing.id"], name="fk_incident_opened_by"),
        sa.ForeignKeyConstraint(["closed_by"], ["firing.id"], name="fk_incident_closed_by"),
    )
    still = sa.text("closed_at IS NULL")
    op.create_index(
        "uq_incident_open", "incident", ["schedule_id"], unique=True, sqlite_where=still, postgresql_where=still
    )
    op.create_table(
        "webhook",
        sa.Column("id", Id, nullable=False),
        sa.Column("schedule_id", Id, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_webhook"),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedule.id"], name="fk_webhook_schedule_id"),
        sa.UniqueConstraint("schedule_id", "url", name="uq_webhook_schedule_id_url"),
    )
    op.create_table(
        "message",
        sa.Column("id", Id, nullable=False),
        sa.Column("webhook_id", Id, nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("made_at", sa.Double(), nullable=False),
        sa.Column("next_at", sa.Double()),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("answer", sa.Text()),
        sa.Column("ended_at", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_message"),
        sa.ForeignKeyConstraint(["webhook_id"], ["webhook.id"], name="fk_message_webhook_id"),
        sa.UniqueConstraint("event_id", name="uq_message_event_id"),
    )
    waiting = sa.text("state = 'waiting'")
    op.create_index(
        "ix_message_waiting", "message", ["webhook_id", "id"], sqlite_where=waiting, postgresql_where=waiting
    )
