"""Claims: whose turn it is, and which task comes next."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    Connection,
    Double,
    RowMapping,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from db import events, schema
from db.clock import now
from db.events import What
from db.records import JobState, TaskState
from db.session import Database
from db.tables import idle_worker, job, task

#: a worker that asked in vain within this time counts as waiting; workers ask more often
IDLE_SECONDS = 5

#: spelled out, not bound: so that SQLite uses the partial indices
READY = task.c.state == literal_column("'ready'")
LEASED = task.c.state == literal_column("'leased'")
#: of a job whose tasks may be claimed
CLAIMABLE = and_(
    job.c.state.in_([literal_column(f"'{state}'") for state in JobState if not state.ended]), ~job.c.paused
)
_ZERO: Any = literal_column("0")
_ONE: Any = literal_column("1")


@dataclass(frozen=True)
class Lease:
    """A task held by one worker until the lease ends or the epoch moves on."""

    task_id: int
    job_id: int
    kind: str  #: "prepare" or "shard"
    epoch: int
    attempt: int  #: from 1
    lease_seconds: float
    benchmark_id: int | None = None  #: of a shard
    first_batch: int = 0  #: of a shard
    end_batch: int = 0  #: of a shard; one past the last
    #: the shard is a suspect: from this batch on samples run alone, announced by `renew(alone=...)`; None: it is not
    isolated_from: int | None = None
    #: positions of samples (in the benchmark) that ended the process when they ran alone: they get an error outcome
    guilty: tuple[int, ...] = ()
    worker: str = ""  #: who holds it


def _claim(dialect: str, among: "Among") -> ReturningUpdate[Any]:
    """Built once: building takes longer than running. Parameters: of_kind, by_worker, for_seconds (and of_jobs).

    What it costs depends on how many jobs are open and how many tasks leased, not on how many are ready.
    """
    turns = _TURNS[among]()
    next_task = select(task.c.id).where(READY, task.c.kind == bindparam("of_kind"), task.c.run_after <= now())
    next_task = next_task.order_by(task.c.run_after, task.c.cost.desc(), task.c.id).limit(_ONE)
    if dialect == "postgresql":
        # Job after job in the order of `turns`, until one has a task that nobody is just taking. No ORDER BY out here:
        # it could be met by locking a task of every job and sorting them.
        turn = turns.subquery()
        found = next_task.where(task.c.job_id == turn.c.id).with_for_update(skip_locked=True).lateral()
        chosen = select(found.c.id).select_from(turn.join(found, true())).limit(_ONE)
    else:
        its_turn = turns.where(next_task.where(task.c.job_id == job.c.id).correlate(job).exists()).limit(_ONE)
        chosen = next_task.where(task.c.job_id == its_turn.scalar_subquery())
    return (
        update(task)
        .where(task.c.id == chosen.scalar_subquery())
        .values(
            state=TaskState.LEASED,
            epoch=task.c.epoch + 1,
            attempt=task.c.attempt + 1,
            worker=bindparam("by_worker"),
            lease_until=now() + bindparam("for_seconds", type_=Double),
            done_batches=0,
            alone=None,
        )
        .returning(*task.c, select(job.c.state).where(job.c.id == task.c.job_id).scalar_subquery().label("job_state"))
    )


def _turns() -> Select[Any]:
    """Jobs in the order in which the next worker is theirs: by priority, by how few tasks are leased, by age."""
    # without the zero SQLite would find all tasks of all jobs through `ix_task_job_id`, to have them grouped
    its_job = (task.c.job_id + _ZERO).label("job_id")
    held = select(its_job, func.count().label("n")).where(LEASED).group_by(its_job).subquery()
    jobs = select(job.c.id).select_from(job.outerjoin(held, held.c.job_id == job.c.id)).where(CLAIMABLE)
    return jobs.order_by(job.c.priority.desc(), func.coalesce(held.c.n, _ZERO), job.c.id)


def _turn_of_one() -> Select[Any]:
    return select(job.c.id).where(CLAIMABLE, job.c.id == bindparam("of_jobs"))


def _turns_of_some() -> Select[Any]:
    return _turns().where(job.c.id.in_(bindparam("of_jobs", expanding=True)))


#: of which jobs a task may be
Among = Literal["all", "some", "one"]
_TURNS = {"all": _turns, "some": _turns_of_some, "one": _turn_of_one}
_AMONG: tuple[Among, ...] = ("all", "some", "one")
_CLAIM = {(dialect, among): _claim(dialect, among) for dialect in ("sqlite", "postgresql") for among in _AMONG}


def claim(
    db: Database,
    worker: str,
    *,
    kind: str,
    lease_seconds: float = 30,
    job_id: int | Collection[int] | None = None,
    again: bool = False,
) -> Lease | None:
    """Take the next ready task of this kind; None when there is none.

    job_id: one job, or those that come into question; any where it is absent. Of the jobs that are open, not paused and
    have such a task the one of the highest priority comes first, then the one with the fewest leased tasks, then the
    oldest; within a job the task of the greatest cost, then the oldest, but those that failed after the others.
    again: the answer to this worker's last claim was lost, and it holds nothing that it knows of; what that claim took
    is taken up, or it would count as a death. Raises `OlderSchema`, `NewerSchema`.
    """
    with db.write() as connection:
        return take(connection, worker, kind=kind, lease_seconds=lease_seconds, job_id=job_id, again=again)


def take(
    connection: Connection,
    worker: str,
    *,
    kind: str,
    lease_seconds: float,
    job_id: int | Collection[int] | None = None,
    again: bool = False,
) -> Lease | None:
    """As `claim`, inside the caller's transaction."""
    asked: dict[str, Any] = {"of_kind": kind, "by_worker": worker, "for_seconds": lease_seconds}
    job_ids = [job_id] if isinstance(job_id, int) else None if job_id is None else sorted(job_id)
    among: Among = "all" if job_ids is None else "one" if len(job_ids) == 1 else "some"
    if job_ids is not None:
        asked["of_jobs"] = job_ids[0] if among == "one" else job_ids
    schema.hold(connection)
    if again and (taken := _taken_before(connection, worker, kind, lease_seconds)) is not None:
        return taken
    row = connection.execute(_CLAIM[connection.dialect.name, among], asked).mappings().one_or_none()
    if row is None:
        if kind == "shard":
            _remember_idle(connection, worker, job_ids)
        return None
    if kind == "shard" and row["job_state"] == JobState.READY:
        _start(connection, row)
    return _lease(row, lease_seconds)


def _taken_before(connection: Connection, worker: str, kind: str, lease_seconds: float) -> Lease | None:
    """The task that the worker has without knowing."""
    held = select(task.c.id).where(LEASED, task.c.kind == kind, task.c.worker == worker).limit(1).scalar_subquery()
    longer = (
        update(task)
        .where(task.c.id == held, LEASED, task.c.worker == worker)
        .values(lease_until=now() + lease_seconds, done_batches=0, alone=None)
        .returning(*task.c)
    )
    row = connection.execute(longer).mappings().one_or_none()
    return None if row is None else _lease(row, lease_seconds)


def _start(connection: Connection, row: RowMapping) -> None:
    """The job's first shard was claimed; of several at once one finds the job not yet running."""
    started = (
        update(job)
        .where(job.c.id == row["job_id"], job.c.state == JobState.READY)
        .values(state=JobState.RUNNING, started_at=now())
    )
    if connection.execute(started).rowcount == 1:
        events.record(connection, row["job_id"], row["worker"], What.STARTED)


def _remember_idle(connection: Connection, worker: str, job_ids: list[int] | None) -> None:
    connection.execute(delete(idle_worker).where(idle_worker.c.worker == worker))
    connection.execute(insert(idle_worker).values(worker=worker, asked_at=now(), job_ids=job_ids))


def forget_idle(connection: Connection) -> None:
    """Remove workers that have not asked for long: they are gone. No two that do so wait for each other."""
    long_ago = idle_worker.c.asked_at < now() - 12 * IDLE_SECONDS
    gone = select(idle_worker.c.worker).where(long_ago).with_for_update(skip_locked=True)
    connection.execute(delete(idle_worker).where(idle_worker.c.worker.in_(gone)))


def hungry(connection: Connection, lease: Lease, worker: str) -> int:
    """How many other workers, which hold nothing, asked in vain a moment ago for what this lease may leave.

    Nobody waits for it who would take a shard of another job that is ready, nor while the job is paused. Of several
    holders those that have most left are told, one for each that waits, so that a shard is not cut for nobody.
    """
    waiting = _waiting(connection, lease.job_id, worker)
    if not waiting or not _claimable(connection, lease.job_id):
        return 0
    ready = _ready_jobs(connection)
    fed = sum(1 for job_ids in waiting if (ready if job_ids is None else ready & set(job_ids)))
    unfed = len(waiting) - fed
    return unfed if unfed > _ahead(connection, lease) else 0


def _waiting(connection: Connection, job_id: int, worker: str) -> list[list[int] | None]:
    """Of each idle worker that would take a shard of the job, the jobs of which it would take one."""
    busy = exists().where(LEASED, task.c.worker == idle_worker.c.worker)
    recent = idle_worker.c.asked_at > now() - IDLE_SECONDS
    rows = connection.execute(select(idle_worker.c.job_ids).where(idle_worker.c.worker != worker, recent, ~busy))
    return [job_ids for job_ids in rows.scalars() if job_ids is None or job_id in job_ids]


def _claimable(connection: Connection, job_id: int) -> bool:
    return connection.execute(select(job.c.id).where(job.c.id == job_id, CLAIMABLE)).first() is not None


def _ready_jobs(connection: Connection) -> set[int]:
    """Those of which a shard can be claimed."""
    shard = exists().where(READY, task.c.kind == "shard", task.c.job_id == job.c.id)
    return set(connection.execute(select(job.c.id).where(CLAIMABLE, shard.correlate(job))).scalars())


def _ahead(connection: Connection, lease: Lease) -> int:
    """How many other leased shards of the job have more left to split than this one."""
    left = task.c.end_batch - task.c.first_batch - task.c.done_batches
    of_mine = select(left).where(task.c.id == lease.task_id).scalar_subquery()
    more = or_(left > of_mine, and_(left == of_mine, task.c.id < lease.task_id))
    others = select(func.count()).where(LEASED, task.c.job_id == lease.job_id, task.c.kind == "shard", more)
    return int(connection.execute(others).scalar_one())


def _lease(row: RowMapping, lease_seconds: float) -> Lease:
    return Lease(
        task_id=row["id"],
        job_id=row["job_id"],
        kind=row["kind"],
        epoch=row["epoch"],
        attempt=row["attempt"],
        lease_seconds=lease_seconds,
        benchmark_id=row["benchmark_id"],
        first_batch=row["first_batch"],
        end_batch=row["end_batch"],
        isolated_from=row["isolated_from"],
        guilty=tuple(row["guilty"]),
        worker=row["worker"],
    )
