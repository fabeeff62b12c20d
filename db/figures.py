"""Figures about all jobs, for whoever watches: what waits, who works on what, what was done.

Every question is answered by an index, from the tasks that are ready or leased and the jobs that are open: jobs that
ended long ago cost nothing.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from sqlalchemy import Connection, and_, case, exists, func, literal_column, or_, select

from db.claims import IDLE_SECONDS, LEASED, READY
from db.clock import now
from db.events import What
from db.records import JobState, TaskState
from db.session import Database
from db.tables import idle_worker, job, job_event, rollup, run, task

#: spelled out, not bound: so that the partial index is used
_OPEN = job.c.state.in_([literal_column(f"'{state}'") for state in JobState if not state.ended])
_HOLDS = exists().where(LEASED, task.c.worker == idle_worker.c.worker)
_WAITING = and_(idle_worker.c.asked_at > now() - IDLE_SECONDS, ~_HOLDS)
#: a task became ready when its job's shards were planned, or planned anew
_PLANNED = (What.SUBMITTED, What.PLANNED, What.POLICY_ADDED)
#: upper edges of the histogram of shards by their seconds
SHARD_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


_HELD = ("worker", "job_id", "id", "kind", "first_batch", "end_batch", "done_batches", "attempt")


@dataclass(frozen=True)
class QueueFigures:
    """What waits and what is held, at this moment."""

    jobs: dict[str, int]  #: by state; `paused` counts those that are open and paused
    #: by kind and state: ready; delayed, after a failure; paused, with its job; leased
    tasks: dict[tuple[str, str], int]
    oldest_ready_seconds: dict[str, float]  #: by kind; 0 where nothing is ready
    expired: int  #: leases that ended and were not taken back yet
    busy: int  #: workers that hold a task
    idle: int  #: workers that asked in vain a moment ago


@dataclass(frozen=True)
class JobFigures:
    """What happened in one job so far; none of it ever gets less, but after `db prune`."""

    job_id: int
    ended: bool
    claims: int  #: of its shards
    shards_done: int
    events: dict[str, int]  #: by `db.events.What`


@dataclass(frozen=True)
class ShardFigures:
    """What the shards of one job that are done came to."""

    samples: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0  #: of prefill and decoding under all policies; loading, scoring and committing left out
    by_seconds: tuple[int, ...] = field(
        default=(0,) * (len(SHARD_SECONDS) + 1)
    )  #: shards up to each edge; the last: all


@dataclass(frozen=True)
class Holder:
    """A worker and the task that it holds."""

    worker: str
    job_id: int
    task_id: int
    kind: str  #: prepare or shard
    first_batch: int
    end_batch: int
    done_batches: int
    attempt: int
    lease_seconds: float  #: until the lease ends; below 0: it has ended


def queue_figures(db: Database) -> QueueFigures:
    """What waits and what is held, over all jobs."""
    by_job = (
        select(
            task.c.job_id,
            task.c.kind,
            job.c.paused,
            job.c.created_at,
            func.sum(case((task.c.run_after <= now(), 1), else_=0)).label("due"),
            func.count().label("all"),
            func.min(task.c.run_after).label("first"),
        )
        .join(job)
        .where(READY, _OPEN)
        .group_by(task.c.job_id, task.c.kind, job.c.paused, job.c.created_at)
    )
    with db.read() as connection:
        rows = connection.execute(by_job).all()
        planned = _planned(connection, {row.job_id for row in rows if row.due and not row.paused})
        moment = float(connection.execute(select(now())).scalar_one())
        by_state = select(job.c.state, job.c.paused, func.count()).where(_OPEN).group_by(job.c.state, job.c.paused)
        jobs = {str(state): 0 for state in JobState if not state.ended} | {"paused": 0}
        for state, paused, count in connection.execute(by_state):
            jobs["paused" if paused else state] += count
        held = connection.execute(
            select(task.c.kind, func.count(), func.sum(case((task.c.lease_until < now(), 1), else_=0)))
            .where(LEASED)
            .group_by(task.c.kind)
        ).all()
        busy = connection.execute(select(func.count(task.c.worker.distinct())).where(LEASED)).scalar_one()
        idle = connection.execute(select(func.count()).select_from(idle_worker).where(_WAITING)).scalar_one()
    tasks = {(kind, state): 0 for kind in ("prepare", "shard") for state in ("ready", "delayed", "paused", "leased")}
    oldest = {"prepare": 0.0, "shard": 0.0}
    for row in rows:
        tasks[row.kind, "paused" if row.paused else "ready"] += int(row.due)
        tasks[row.kind, "paused" if row.paused else "delayed"] += int(row.all - row.due)
        if row.due and not row.paused:
            since = max(row.first, planned.get(row.job_id, row.created_at))
            oldest[row.kind] = max(oldest[row.kind], moment - since)
    tasks |= {(kind, "leased"): int(count) for kind, count, _ in held}
    return QueueFigures(jobs, tasks, oldest, sum(int(expired) for *_, expired in held), int(busy), int(idle))


def _planned(connection: Connection, job_ids: Collection[int]) -> dict[int, float]:
    """When the tasks of these jobs came into being."""
    latest = select(job_event.c.job_id, func.max(job_event.c.at)).where(
        job_event.c.job_id.in_(job_ids), job_event.c.what.in_(_PLANNED)
    )
    return dict(connection.execute(latest.group_by(job_event.c.job_id)).all())


def clock(db: Database) -> float:
    """Seconds since 1970, by the database's clock."""
    with db.read() as connection:
        return float(connection.execute(select(now())).scalar_one())


def open_jobs(db: Database) -> list[int]:
    """The numbers of the jobs that have not ended, in the order in which workers come to them."""
    with db.read() as connection:
        return list(
            connection.execute(select(job.c.id).where(_OPEN).order_by(job.c.priority.desc(), job.c.id)).scalars()
        )


def idle_workers(db: Database) -> list[str]:
    """Who asked for a task in vain a moment ago and holds none."""
    with db.read() as connection:
        return sorted(connection.execute(select(idle_worker.c.worker).where(_WAITING)).scalars())


def newest_job(db: Database) -> int:
    """The highest number of a job, 0 where there is none."""
    with db.read() as connection:
        return connection.execute(select(func.max(job.c.id))).scalar_one() or 0


def job_figures(db: Database, *, after: int, also: Collection[int] = ()) -> list[JobFigures]:
    """Of the jobs that are open, of those with a higher number than `after`, and of those in `also`."""
    wanted = select(job.c.id, job.c.state)
    numbered = or_(job.c.id > after, job.c.id.in_(also)) if also else job.c.id > after
    with db.read() as connection:
        states = dict(connection.execute(wanted.where(_OPEN)).all())
        states |= dict(connection.execute(wanted.where(numbered)).all())
        # a cancelled task's epoch went on once more than it was claimed; a split one's claims stand in its done part
        claims = case((task.c.state == TaskState.CANCELLED, task.c.epoch - 1), else_=task.c.epoch)
        shards = (
            select(task.c.job_id, func.sum(claims), func.sum(case((task.c.state == TaskState.DONE, 1), else_=0)))
            .where(task.c.job_id.in_(states), task.c.kind == "shard", task.c.state != TaskState.SPLIT)
            .group_by(task.c.job_id)
        )
        counted = {job_id: (int(claims), int(done)) for job_id, claims, done in connection.execute(shards)}
        events: dict[int, dict[str, int]] = {job_id: {} for job_id in states}
        happened = select(job_event.c.job_id, job_event.c.what, func.count()).where(job_event.c.job_id.in_(states))
        for job_id, what, count in connection.execute(happened.group_by(job_event.c.job_id, job_event.c.what)):
            events[job_id][what] = count
    return [
        JobFigures(job_id, JobState(state).ended, *counted.get(job_id, (0, 0)), events=events[job_id])
        for job_id, state in states.items()
    ]


def shard_figures(db: Database, job_id: int) -> ShardFigures:
    """Sums over the shards of a job that are done."""
    shards = (
        select(
            func.sum(rollup.c.samples).label("samples"),
            func.sum(rollup.c.errors).label("errors"),
            func.sum(rollup.c.tokens).label("tokens"),
            # prefill is done once and stands in the row of every policy
            (func.sum(rollup.c.decode_ns) + func.max(rollup.c.prefill_ns)).label("ns"),
        )
        .join(run)
        .where(run.c.job_id == job_id)
        .group_by(rollup.c.task_id)
        .subquery()
    )
    up_to = [func.sum(case((shards.c.ns <= edge * 10**9, 1), else_=0)) for edge in SHARD_SECONDS]
    sums = [func.sum(shards.c[name]) for name in ("samples", "errors", "tokens", "ns")]
    with db.read() as connection:
        row = connection.execute(select(*sums, *up_to, func.count()).select_from(shards)).one()
    samples, errors, tokens, ns, *counts = row
    if samples is None:
        return ShardFigures()
    return ShardFigures(int(samples), int(errors), int(tokens), int(ns) / 1e9, tuple(int(count) for count in counts))


def holders(db: Database) -> list[Holder]:
    """Who holds what, by worker."""
    columns = [task.c[name] for name in _HELD]
    chosen = select(*columns, task.c.lease_until - now()).where(and_(LEASED, task.c.worker.is_not(None)))
    with db.read() as connection:
        rows = connection.execute(chosen).all()
    return sorted((Holder(*tuple(row)) for row in rows), key=lambda one: one.worker)
