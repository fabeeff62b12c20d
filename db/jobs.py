"""Jobs: submitted, planned, watched, ended."""

from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from db.clock import now
from db.errors import BadInput
from db.planning import plan_job
from db.queue import NEW_TASK, OPEN, end_job
from db.records import BenchmarkRow, JobRow, JobState, PlannedBenchmark, PlannedPolicy, Progress, RunRow, TaskState
from db.session import Database
from db.tables import artifact as artifact_table
from db.tables import benchmark as benchmark_table
from db.tables import job as job_table
from db.tables import rollup, run, task

__all__ = [
    "BenchmarkRow",
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
    "fail_job",
    "finished",
    "job",
    "list_jobs",
    "plan_job",
    "progress",
    "resume_job",
    "runs",
]


def create_job(db: Database, *, name: str, spec: dict[str, Any], priority: int = 0) -> int:
    """Write a job and its prepare task. Returns the job's id."""
    new = {"name": name, "spec": spec, "state": JobState.PREPARING, "priority": priority, "created_at": now()}
    with db.write() as connection:
        job_id: int = connection.execute(insert(job_table).values(new).returning(job_table.c.id)).scalar_one()
        connection.execute(insert(task).values(NEW_TASK | {"job_id": job_id, "kind": "prepare", "priority": priority}))
    return job_id


def fail_job(db: Database, job_id: int, error: str) -> bool:
    """End the job as failed; open tasks are cancelled. False when it had ended before."""
    with db.write() as connection:
        return end_job(connection, job_id, JobState.FAILED, error)


def cancel_job(db: Database, job_id: int) -> bool:
    """End the job as cancelled; whoever works on it learns so at the next renewal. False when it had ended before."""
    with db.write() as connection:
        return end_job(connection, job_id, JobState.CANCELLED, None)


def resume_job(db: Database, job_id: int) -> int:
    """Make the dead tasks of a failed job ready again with fresh attempts. Returns how many."""
    fresh = {"state": TaskState.READY, "attempt": 0, "run_after": 0.0}
    dead = (task.c.job_id == job_id, task.c.state == TaskState.DEAD)
    with db.write() as connection:
        kinds = connection.execute(update(task).where(*dead).values(fresh).returning(task.c.kind)).scalars().all()
        if kinds:
            state = JobState.PREPARING if "prepare" in kinds else JobState.RUNNING
            connection.execute(
                update(job_table).where(job_table.c.id == job_id).values(state=state, error=None, finished_at=None)
            )
    return len(kinds)


def job(db: Database, job_id: int) -> JobRow:
    """Raises `BadInput` where there is no such job."""
    with db.read() as connection:
        row = connection.execute(select(job_table).where(job_table.c.id == job_id)).one_or_none()
    if row is None:
        raise BadInput(f"job {job_id} does not exist; `shortstop list` shows those that do.")
    return _job(row)


def list_jobs(db: Database, *, limit: int | None = None) -> list[JobRow]:
    """Newest first."""
    with db.read() as connection:
        return [_job(row) for row in connection.execute(select(job_table).order_by(job_table.c.id.desc()).limit(limit))]


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
