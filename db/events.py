"""What happened to a job, when, and who did it: written in the transaction that did it, and never changed."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, func, insert, select

from db.clock import now
from db.records import JobState
from db.session import Database
from db.tables import job, job_event

#: the principal who has the database at hand, without a server between
LOCAL = "local"


class What(StrEnum):
    """What happened to a job."""

    SUBMITTED = "submitted"
    PLANNED = "planned"  #: its runs and shards exist
    STARTED = "started"  #: its first shard was claimed
    PAUSED = "paused"
    RESUMED = "resumed"  #: it is paused no more
    RETRIED = "retried"  #: its dead tasks got fresh attempts
    CANCELLED = "cancelled"
    FAILED = "failed"
    DONE = "done"
    REAPED = "reaped"  #: a task was taken from a worker that went silent
    REFUNDED = "refunded"  #: the attempt that this took was given back
    SUSPECT = "suspect"  #: a shard's samples run alone from some batch on
    SHARD_DEAD = "shard dead"  #: a shard's last attempt failed
    POLICY_ADDED = "policy added"  #: it was done, and goes on with the runs of one more policy
    POLICY_TAKEN_BACK = "policy taken back"  #: it was cancelled meanwhile, and is done as it was before
    IMPORTED = "imported"  #: it came from another record, and has ended there
    LABELLED = "labelled"  #: what a judge said of its completions was imported
    COMPLETIONS_IMPORTED = "completions imported"  #: it was done, and ends again with a run that was made elsewhere
    RESCORING = "rescoring"  #: it had ended; new scores are written, under a revision of their own


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job."""

    id: int  #: rises in the order in which a job's events can be seen
    job_id: int
    at: float  #: seconds since 1970 by the database's clock
    who: str  #: the principal or the worker
    what: str  #: one of `What`
    detail: dict[str, Any]  #: the task, its attempt, the error, where there is one


def record(connection: Connection, job_id: int, who: str, what: What, **detail: Any) -> None:
    """Write an event in the caller's transaction, which holds the job's row from here to its end.

    So of two transactions the one that ends later has the higher number, and `events(after=...)` misses none.
    """
    connection.execute(select(job.c.id).where(job.c.id == job_id).with_for_update(key_share=True))
    connection.execute(insert(job_event).values(job_id=job_id, at=now(), who=who, what=what, detail=detail))


def newest(connection: Connection, job_id: int) -> int:
    """The id of the job's last event, 0 where there is none: while it is the same, nothing has happened to the job."""
    last = select(func.max(job_event.c.id)).where(job_event.c.job_id == job_id)
    return connection.execute(last).scalar_one() or 0


def marks(db: Database, job_ids: Collection[int]) -> dict[int, tuple[JobState, int]]:
    """Of each of these jobs the state and, of the same moment, the id of its last event: 0 where there is none."""
    last = select(func.max(job_event.c.id)).where(job_event.c.job_id == job.c.id).scalar_subquery()
    asked = select(job.c.id, job.c.state, last).where(job.c.id.in_(job_ids))
    with db.read() as connection:
        return {id: (JobState(state), last or 0) for id, state, last in connection.execute(asked)}


def events(db: Database, job_id: int, after: int = 0, limit: int | None = None) -> list[Event]:
    """What happened to the job since the event of the number `after`, in order; the first `limit` of it."""
    asked = select(job_event).where(job_event.c.job_id == job_id, job_event.c.id > after).order_by(job_event.c.id)
    asked = asked.limit(limit)
    with db.read() as connection:
        return [Event(**row) for row in connection.execute(asked).mappings()]
