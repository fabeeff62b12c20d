"""What is looked at often and must answer at once: the list of jobs, a page at a time, and who works on what."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Select, bindparam, func, or_, select

from db.clock import now
from db.partial import whole
from db.records import JobState, TaskState
from db.session import Database
from db.tables import idle_worker, job, task

#: a worker that asked in vain this long ago and was not heard of since is gone
_SILENT_SECONDS = 60.0


@dataclass(frozen=True)
class JobSummary:
    """A line of the list of jobs. Times are seconds since 1970 by the database's clock."""

    id: int
    name: str
    state: JobState
    paused: bool
    model: str | None
    priority: int
    principal: str  #: who asked for it
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: str | None


@dataclass(frozen=True)
class WorkerRow:
    """A worker that was heard of lately, and the task that it holds."""

    worker: str
    job_id: int | None  #: of the task in hand, as all that follows; None: the worker asks for work in vain
    task_id: int | None
    kind: str | None  #: "prepare" or "shard"
    first_batch: int | None
    end_batch: int | None
    done_batches: int | None
    attempt: int | None
    lease_left: float | None  #: seconds; below zero: it went silent


_MODEL = job.c.spec["model"].as_string().label("model")
#: what LIKE reads otherwise than as itself
_LITERAL = str.maketrans({mark: f"\\{mark}" for mark in "%_\\"})
_SUMMARY = [_MODEL if name == "model" else job.c[name] for name in JobSummary.__dataclass_fields__]


def summaries(
    db: Database,
    *,
    before: int | None = None,
    limit: int | None = None,
    states: Collection[str] = (),
    search: str | None = None,
    principal: str | None = None,
) -> list[JobSummary]:
    """Newest first. before: only jobs of a lower number; search: part of the name or the model, in any case."""
    wanted = {"before": before, "states": list(states), "principal": principal, "limit": limit}
    given = {name: value for name, value in wanted.items() if value not in (None, [])}
    if search:
        given["search"] = f"%{search.translate(_LITERAL)}%"
    with db.read() as connection:
        rows = connection.execute(_asked(frozenset(given)), given)
        return [JobSummary(row[0], row[1], JobState(row[2]), *row[3:]) for row in rows]


@cache
def _asked(given: frozenset[str]) -> Select[Any]:
    """The question with these of its parameters: made once, which takes longer than the answer."""
    sought = func.lower(bindparam("search"))
    conditions = {
        "before": job.c.id < bindparam("before"),
        "states": job.c.state.in_(bindparam("states", expanding=True)),
        "principal": job.c.principal == bindparam("principal"),
        "search": or_(*(func.lower(part).like(sought, escape="\\") for part in (job.c.name, _MODEL))),
    }
    chosen = select(*_SUMMARY).where(whole(), *(condition for name, condition in conditions.items() if name in given))
    return chosen.order_by(job.c.id.desc()).limit(bindparam("limit") if "limit" in given else None)


def workers(db: Database) -> list[WorkerRow]:
    """Those that hold a task, by name, then those that wait for one."""
    names = ("worker", "job_id", "id", "kind", "first_batch", "end_batch", "done_batches", "attempt")
    held = select(*(task.c[name] for name in names), task.c.lease_until - now())
    held = held.where(task.c.state == TaskState.LEASED).order_by(task.c.worker, task.c.id)
    idle = select(idle_worker.c.worker).where(idle_worker.c.asked_at > now() - _SILENT_SECONDS)
    with db.read() as connection:
        working = [WorkerRow(*tuple(row)) for row in connection.execute(held)]
        busy = {row.worker for row in working}
        waiting = sorted(name for name in connection.execute(idle).scalars() if name not in busy)
    return [*working, *(WorkerRow(name, None, None, None, None, None, None, None, None) for name in waiting)]


def counts(db: Database) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Jobs by state, and tasks of jobs that have not ended by kind and state."""
    by_state = select(job.c.state, func.count()).group_by(job.c.state)
    is_open = job.c.state.in_([state for state in JobState if not state.ended])
    tasks = select(task.c.kind, task.c.state, func.count()).join(job).where(is_open).group_by(task.c.kind, task.c.state)
    with db.read() as connection:
        found = {(kind, state): n for kind, state, n in connection.execute(tasks)}
        return dict(connection.execute(by_state).tuples().all()), found
