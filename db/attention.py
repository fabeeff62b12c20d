"""What of all jobs needs somebody: tasks whose last attempt failed, and what waits to be done."""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select

from db.records import DeadTask, JobState, TaskState
from db.session import Database
from db.tables import job, task


@dataclass(frozen=True)
class DeadOfJob:
    """A task whose last attempt failed, and its job."""

    job_id: int
    job: str
    principal: str
    state: JobState
    task: DeadTask


@dataclass(frozen=True)
class Queued:
    """What a job that has not ended still holds."""

    job_id: int
    job: str
    priority: int
    paused: bool
    ready: int  #: tasks that nobody has begun
    leased: int
    dead: int


def dead_of_all(db: Database, limit: int) -> list[DeadOfJob]:
    """Newest job first. Of cancelled jobs none: what was left of them is gone."""
    columns = [task.c[name] for name in DeadTask.__dataclass_fields__]
    asked = (
        select(job.c.id, job.c.name, job.c.principal, job.c.state, *columns)
        .join(job)
        .where(task.c.state == TaskState.DEAD, job.c.state != JobState.CANCELLED)
        .order_by(job.c.id.desc(), task.c.id)
        .limit(limit)
    )
    with db.read() as connection:
        return [
            DeadOfJob(id, name, whose, JobState(state), DeadTask(*rest))
            for id, name, whose, state, *rest in connection.execute(asked)
        ]


def queue(db: Database, limit: int) -> list[Queued]:
    """The jobs that have not ended, in the order in which their tasks are claimed."""

    def having(state: TaskState) -> ColumnElement[int]:
        return func.count().filter(task.c.state == state)

    is_open = job.c.state.in_([state for state in JobState if not state.ended])
    counts = [having(state) for state in (TaskState.READY, TaskState.LEASED, TaskState.DEAD)]
    asked = (
        select(job.c.id, job.c.name, job.c.priority, job.c.paused, *counts)
        .join(task, task.c.job_id == job.c.id)
        .where(is_open)
        .group_by(job.c.id, job.c.name, job.c.priority, job.c.paused)
        .order_by(job.c.priority.desc(), job.c.id)
        .limit(limit)
    )
    with db.read() as connection:
        return [Queued(*tuple(row)) for row in connection.execute(asked)]
