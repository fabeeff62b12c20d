"""Jobs: submitted, planned, watched, ended."""

from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from db import events
from db.cancelling import cancel_job
from db.clock import now
from db.errors import BadInput, Conflict, Missing
from db.events import LOCAL, What
from db.partial import whole
from db.planning import plan_job
from db.queue import NEW_TASK, OPEN, end_job, reopen_job
from db.records import (
    BenchmarkRow,
    DeadTask,
    JobRow,
    JobState,
    PlannedBenchmark,
    PlannedPolicy,
    Progress,
    RunRow,
    TaskState,
)
from db.session import Database
from db.tables import artifact as artifact_table
from db.tables import benchmark as benchmark_table
from db.tables import insert_new, rollup, run, task
from db.tables import job as job_table

__all__ = [
    "BenchmarkRow",
    "DeadTask",
    "JobRow",
    "JobState",
    "PlannedBenchmark",
    "PlannedPolicy",
    "Progress",
    "RunRow",
    "artifact",
    "batches",
    "benchmark",
    "cancel_job",
    "create_job",
    "dead_tasks",
    "fail_job",
    "finished",
    "insert_job",
    "job",
    "list_jobs",
    "pause_job",
    "plan_job",
    "progress",
    "resume_job",
    "retry_job",
    "runs",
    "unpause_job",
]


def create_job(
    db: Database,
    *,
    name: str,
    spec: dict[str, Any],
    priority: int = 0,
    principal: str = LOCAL,
    idempotency_key: str | None = None,
    body_hash: str | None = None,
) -> int:
    """Write a job and its prepare task. Returns the job's id.

    The same principal with the same key and body hash again gets the job that is there, and nothing is written; with
    another body hash `Conflict`; an empty key is `BadInput`. Of several at the same moment one writes.
    """
    if idempotency_key is not None and not idempotency_key.strip():
        raise BadInput(f"key {idempotency_key!r} is empty; give the job a name of its own, or leave the key out.")
    new = {"name": name, "spec": spec, "state": JobState.PREPARING, "priority": priority, "created_at": now()}
    new |= {"principal": principal, "idempotency_key": idempotency_key, "body_hash": body_hash}
    with db.write() as connection:
        if idempotency_key is None:
            return _insert_job(connection, new)
        is_new = insert_new(connection, job_table, new)
        job_id = _of_key(connection, principal, idempotency_key, body_hash)
        if is_new:
            _begin(connection, job_id, new)
    return job_id


def insert_job(
    connection: Connection, *, name: str, spec: dict[str, Any], priority: int, principal: str, schedule: str
) -> int:
    """As `create_job`, inside the caller's transaction: a job that the schedule of this name asks for."""
    new = {"name": name, "spec": spec, "state": JobState.PREPARING, "priority": priority, "created_at": now()}
    return _insert_job(connection, new | {"principal": principal}, schedule=schedule)


def _insert_job(connection: Connection, new: dict[str, Any], **detail: Any) -> int:
    job_id: int = connection.execute(insert(job_table).values(new).returning(job_table.c.id)).scalar_one()
    _begin(connection, job_id, new, **detail)
    return job_id


def _begin(connection: Connection, job_id: int, new: dict[str, Any], **detail: Any) -> None:
    prepare = {"job_id": job_id, "kind": "prepare", "priority": new["priority"]}
    connection.execute(insert(task).values(NEW_TASK | prepare))
    events.record(connection, job_id, new["principal"], What.SUBMITTED, **detail)


def _of_key(connection: Connection, principal: str, key: str, body_hash: str | None) -> int:
    """The job that the principal submitted under the key. Raises `Conflict` where it was asked for something else."""
    asked = select(job_table.c.id, job_table.c.body_hash).where(
        job_table.c.principal == principal, job_table.c.idempotency_key == key
    )
    found = connection.execute(asked).one()
    if found.body_hash != body_hash:
        raise Conflict(
            f"key {key!r} belongs to job {found.id}, which was submitted with another spec; take another key."
        )
    return int(found.id)


def fail_job(db: Database, job_id: int, error: str, *, who: str = LOCAL) -> bool:
    """End the job as failed; open tasks are cancelled. False when it had ended before."""
    with db.write() as connection:
        return end_job(connection, job_id, JobState.FAILED, error, who)


def pause_job(db: Database, job_id: int, *, who: str = LOCAL) -> bool:
    """Let none of the job's tasks be claimed; those that are leased go on. False when it was paused or has ended."""
    with db.write() as connection:
        return _set_paused(connection, job_id, True, who)


def unpause_job(db: Database, job_id: int, *, who: str = LOCAL) -> bool:
    """Let the job's tasks be claimed again. False when it was not paused."""
    with db.write() as connection:
        return _set_paused(connection, job_id, False, who)


def _set_paused(connection: Connection, job_id: int, paused: bool, who: str) -> bool:
    change = update(job_table).where(job_table.c.id == job_id, job_table.c.paused.is_(not paused))
    if paused:
        change = change.where(job_table.c.state.in_([state for state in JobState if not state.ended]))
    if connection.execute(change.values(paused=paused)).rowcount == 0:
        return False
    events.record(connection, job_id, who, What.PAUSED if paused else What.RESUMED)
    return True


def retry_job(db: Database, job_id: int, *, who: str = LOCAL) -> int:
    """Make the job's dead tasks ready again with fresh attempts, also when it has failed. Returns how many.

    Raises `Conflict` where the job was cancelled: the tasks that were open then are gone.
    """
    with db.write() as connection:
        return _retry(connection, job_id, who)


def resume_job(db: Database, job_id: int, *, who: str = LOCAL) -> int:
    """Let the job go on, whatever keeps it: as `unpause_job` and `retry_job`. Returns how many tasks are retried.

    Raises `BadInput` where there is no such job, or it was cancelled.
    """
    with db.write() as connection:
        state = connection.execute(select(job_table.c.state).where(job_table.c.id == job_id)).scalar_one_or_none()
        if state is None:
            raise _unknown(job_id)
        if state == JobState.CANCELLED:
            raise _was_cancelled(job_id)
        retried = _retry(connection, job_id, who)
        _set_paused(connection, job_id, False, who)
        return retried


def _retry(connection: Connection, job_id: int, who: str) -> int:
    # no worker held it under this attempt: a refund that comes late finds nothing to give back
    fresh = {"state": TaskState.READY, "attempt": 0, "run_after": 0.0, "worker": None}
    dead = (task.c.job_id == job_id, task.c.state == TaskState.DEAD)
    kinds = connection.execute(update(task).where(*dead).values(fresh).returning(task.c.kind)).scalars().all()
    if not kinds:
        return 0
    if not reopen_job(connection, job_id, kinds):
        raise _was_cancelled(job_id)
    events.record(connection, job_id, who, What.RETRIED, tasks=len(kinds))
    return len(kinds)


def _was_cancelled(job_id: int) -> Conflict:
    return Conflict(f"job {job_id} was cancelled, and what was left of it is gone; submit it again.")


def _unknown(job_id: int) -> Missing:
    return Missing(f"job {job_id} does not exist; `shortstop list` shows those that do.")


def dead_tasks(db: Database, job_id: int) -> list[DeadTask]:
    """The job's tasks whose last attempt failed, in order."""
    chosen = select(*(task.c[name] for name in DeadTask.__dataclass_fields__))
    dead = chosen.where(task.c.job_id == job_id, task.c.state == TaskState.DEAD).order_by(task.c.id)
    with db.read() as connection:
        return [DeadTask(*row) for row in connection.execute(dead)]


def job(db: Database, job_id: int) -> JobRow:
    """Raises `Missing` where there is no such job."""
    with db.read() as connection:
        row = connection.execute(select(job_table).where(job_table.c.id == job_id)).one_or_none()
    if row is None:
        raise _unknown(job_id)
    return _job(row)


def list_jobs(db: Database, *, limit: int | None = None) -> list[JobRow]:
    """Newest first; without those that are being imported, or pruned."""
    chosen = select(job_table).where(whole())
    with db.read() as connection:
        return [_job(row) for row in connection.execute(chosen.order_by(job_table.c.id.desc()).limit(limit))]


def progress(db: Database, job_id: int) -> Progress:
    """How far the job is; all zero while it is being prepared."""
    errors = select(func.coalesce(func.sum(rollup.c.errors), 0)).join(run).where(run.c.job_id == job_id)
    with db.read() as connection:
        by_state = _shards(connection, job_id)
        done, total = _batches(by_state)
        return Progress(
            batches_done=done,
            batches_total=total,
            shards={state: count for state, (count, _, _) in by_state.items()},
            errors=int(connection.execute(errors).scalar_one()),
            last_error=last_error(connection, job_id),
        )


def batches(db: Database, job_id: int) -> tuple[int, int]:
    """As `progress` has them: the batches done, and all. Without the errors, which stand in every rollup of the job."""
    with db.read() as connection:
        return _batches(_shards(connection, job_id))


def _shards(connection: Connection, job_id: int) -> dict[str, tuple[int, int, int]]:
    """By state: how many shards, their batches, and those done of them."""
    extent = func.sum(task.c.end_batch - task.c.first_batch)
    shards = (
        select(task.c.state, func.count(), extent, func.sum(task.c.done_batches))
        .where(task.c.job_id == job_id, task.c.kind == "shard", task.c.state != TaskState.SPLIT)
        .group_by(task.c.state)
    )
    return {state: (int(n), int(all), int(done)) for state, n, all, done in connection.execute(shards)}


def _batches(by_state: dict[str, tuple[int, int, int]]) -> tuple[int, int]:
    done = by_state.get(TaskState.DONE, (0, 0, 0))[1] + by_state.get(TaskState.LEASED, (0, 0, 0))[2]
    return done, sum(batches for _, batches, _ in by_state.values())


def last_error(connection: Connection, job_id: int) -> str | None:
    """Of the job's tasks, the newest one's."""
    failed = select(task.c.error).where(task.c.job_id == job_id, task.c.error.is_not(None))
    return connection.execute(failed.order_by(task.c.id.desc()).limit(1)).scalar_one_or_none()


def finished(db: Database, job_id: int) -> bool:
    """Whether no task of the job is ready or leased any more."""
    with db.read() as connection:
        return not has_open_tasks(connection, job_id)


def has_open_tasks(connection: Connection, job_id: int) -> bool:
    still = select(task.c.id).where(task.c.job_id == job_id, task.c.state.in_(OPEN)).limit(1)
    return connection.execute(still).first() is not None


def runs(db: Database, job_id: int) -> list[RunRow]:
    """In the report's order: by benchmark, then by policy."""
    with db.read() as connection:
        return runs_of(connection, job_id)


def runs_of(connection: Connection, job_id: int) -> list[RunRow]:
    """As `runs`, inside the caller's transaction."""
    chosen = select(*(run.c[name] for name in RunRow.__dataclass_fields__)).where(run.c.job_id == job_id)
    return [RunRow(*row) for row in connection.execute(chosen.order_by(run.c.position))]


def artifact(db: Database, hash: str) -> bytes:
    """Raises `BadInput` where there is none."""
    with db.read() as connection:
        content = connection.execute(
            select(artifact_table.c.content).where(artifact_table.c.hash == hash)
        ).scalar_one_or_none()
    if content is None:
        raise BadInput(f"artifact {hash!r} is not in the record; prepare the job again.")
    return bytes(content)


def benchmark(db: Database, benchmark_id: int) -> BenchmarkRow:
    """Raises `BadInput` where there is none."""
    with db.read() as connection:
        row = connection.execute(select(benchmark_table).where(benchmark_table.c.id == benchmark_id)).one_or_none()
    if row is None:
        raise BadInput(f"benchmark {benchmark_id} is not in the record; `shortstop list` shows the jobs that are.")
    return BenchmarkRow(**row._asdict() | {"left_out": tuple(row.left_out)})


def _job(row: Row[Any]) -> JobRow:
    fields = {name: getattr(row, name) for name in JobRow.__dataclass_fields__}
    return JobRow(**fields | {"state": JobState(row.state)})
