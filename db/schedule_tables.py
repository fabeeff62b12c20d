"""The tables of schedules: what recurs, what came of it, and who is told. `db/tables.py` has the others.

Jobs are named, not referred to: they may be pruned while the history of a schedule stays.
"""

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from db.tables import Id, metadata

schedule = Table(
    "schedule",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("principal", Text, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("overlap", Text, nullable=False),
    Column("baseline_job", Id),  # the pinned one, which is not pruned
    Column("created_at", Double, nullable=False),
    Column("next_at", Double),  # NULL: it has come to its end
    Column("paused", Boolean, nullable=False, server_default=false()),
)
_WAITS = ~schedule.c.paused
Index("ix_schedule_next_at", schedule.c.next_at, sqlite_where=_WAITS, postgresql_where=_WAITS)

#: a moment at which a schedule was to fire, once; and what came of it
firing = Table(
    "firing",
    metadata,
    Column("id", Id, primary_key=True),
    Column("schedule_id", Id, ForeignKey("schedule.id"), nullable=False),
    Column("fire_at", Double, nullable=False),
    Column("cause", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("resolved", JSON, nullable=False),
    Column("made_at", Double, nullable=False),
    Column("settled_at", Double),
    Column("verdict", Text),
    Column("sentence", Text),
    Column("judged", JSON(none_as_null=True)),
    Column("figures", JSON, nullable=False),
    Column("provenance", JSON, nullable=False),
    Column("changed", JSON, nullable=False),
    UniqueConstraint("schedule_id", "fire_at"),
)
_OPEN = firing.c.settled_at.is_(None)
Index("ix_firing_open", firing.c.state, firing.c.id, sqlite_where=_OPEN, postgresql_where=_OPEN)

firing_job = Table(
    "firing_job",
    metadata,
    Column("firing_id", Id, ForeignKey("firing.id"), nullable=False),
    Column("role", Text),
    Column("job_id", Id, nullable=False),
    PrimaryKeyConstraint("firing_id", "role"),
    Index("ix_firing_job_job_id", "job_id"),
)

#: from the first failure to the next pass; at most one of a schedule is open
incident = Table(
    "incident",
    metadata,
    Column("id", Id, primary_key=True),
    Column("schedule_id", Id, ForeignKey("schedule.id"), nullable=False),
    Column("opened_at", Double, nullable=False),
    Column("opened_by", Id, ForeignKey("firing.id"), nullable=False),
    Column("firings", Integer, nullable=False),
    Column("closed_at", Double),
    Column("closed_by", Id, ForeignKey("firing.id")),
)
_STILL = incident.c.closed_at.is_(None)
Index("uq_incident_open", incident.c.schedule_id, unique=True, sqlite_where=_STILL, postgresql_where=_STILL)

#: the secret signs, so that it is kept as it is
webhook = Table(
    "webhook",
    metadata,
    Column("id", Id, primary_key=True),
    Column("schedule_id", Id, ForeignKey("schedule.id"), nullable=False),
    Column("url", Text, nullable=False),
    Column("secret", Text, nullable=False),
    UniqueConstraint("schedule_id", "url"),
)

#: what a webhook is told: written with what happened, sent later, in this order
message = Table(
    "message",
    metadata,
    Column("id", Id, primary_key=True),
    Column("webhook_id", Id, ForeignKey("webhook.id"), nullable=False),
    Column("event_id", Text, nullable=False, unique=True),
    Column("body", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("made_at", Double, nullable=False),
    Column("next_at", Double),
    Column("attempts", Integer, nullable=False),
    Column("answer", Text),
    Column("ended_at", Double),
)
_WAITING = message.c.state == "waiting"
Index("ix_message_waiting", message.c.webhook_id, message.c.id, sqlite_where=_WAITING, postgresql_where=_WAITING)
