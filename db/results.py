"""Results: what a shard leaves behind, and how a job ends."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import product
from typing import Any

from sqlalchemy import ColumnElement, Connection, exists, insert, select, update

from db import events, queue, schema
from db.clock import now
from db.errors import RecordError
from db.events import What
from db.jobs import has_open_tasks, last_error, runs_of
from db.queue import Lease
from db.readings import completions, read_samples, run_data, samples_of, tokens
from db.records import BenchmarkRow, JobState, RunData, RunRow, SampleRow, ShardResults, TaskState
from db.rollups import insert_rollups, of_results
from db.score_rows import scores_sent
from db.session import Database
from db.tables import benchmark, job, outcome, run, sample, task, timing
from db.token_columns import insert_outcomes
from db.traces import insert_traces

__all__ = [
    "ClaimedShard",
    "claim_shard",
    "commit_shard",
    "completions",
    "finalise",
    "run_data",
    "runs_of_shard",
    "samples_of",
    "tokens",
]


@dataclass(frozen=True)
class ClaimedShard:
    """A shard in hand, and all that the record knows which its evaluation needs."""

    lease: Lease
    pinned: dict[str, Any]  #: of its job
    benchmark: BenchmarkRow
    runs: list[RunRow]  #: that it computes: see `runs_of_shard`
    done_runs: list[RunRow]  #: the others on its benchmark
    samples: list[SampleRow]  #: in the benchmark's order


def claim_shard(
    db: Database,
    worker: str,
    *,
    lease_seconds: float = 30,
    job_id: int | Collection[int] | None = None,
    again: bool = False,
) -> ClaimedShard | None:
    """As `queue.claim` of a shard, together with what it consists of, in one transaction."""
    with db.write() as connection:
        lease = queue.take(connection, worker, kind="shard", lease_seconds=lease_seconds, job_id=job_id, again=again)
        return None if lease is None else _claimed(connection, lease)


def _claimed(connection: Connection, lease: Lease) -> ClaimedShard:
    pinned = connection.execute(select(job.c.pinned).where(job.c.id == lease.job_id)).scalar_one()
    content = connection.execute(select(benchmark).where(benchmark.c.id == lease.benchmark_id)).one()
    lacking = set(connection.execute(select(run.c.id).where(*_lacking(lease, pinned["batch_size"]))).scalars())
    on_benchmark = [one for one in runs_of(connection, lease.job_id) if one.benchmark_id == lease.benchmark_id]
    size = pinned["batch_size"]
    return ClaimedShard(
        lease=lease,
        pinned=pinned,
        benchmark=BenchmarkRow(**content._asdict() | {"left_out": tuple(content.left_out)}),
        runs=[one for one in on_benchmark if one.id in lacking],
        done_runs=[one for one in on_benchmark if one.id not in lacking],
        samples=read_samples(connection, content.id, lease.first_batch * size, lease.end_batch * size),
    )


def commit_shard(
    db: Database, lease: Lease, results: ShardResults, *, split_at: int | None = None, pieces: int = 1
) -> None:
    """Complete a shard together with its results, in one transaction.

    results must hold exactly one outcome for every sample of the shard under each of its runs, see `runs_of_shard`
    (`RecordError` otherwise). split_at: only batches before this one are finished and in `results`; the rest becomes
    a ready shard, or as many as there are `pieces` (`db.queue.split`). Safe to repeat after `Unavailable`. Raises
    `LeaseLost`: nothing was written.
    """
    with db.write() as connection:
        done = _fence(connection, lease, split_at, pieces)
        if done is None:
            return
        revisions = _check_complete(connection, done, results)
        with scores_sent(connection, results.scores, revisions):  # and taken in while the sums are made
            sums = of_results(results)
        insert_outcomes(connection, done.task_id, results.outcomes)
        if results.timings:
            connection.execute(insert(timing), [vars(row) for row in results.timings])
        insert_traces(connection, results.traces)
        insert_rollups(connection, done.task_id, sums)


def _fence(connection: Connection, lease: Lease, split_at: int | None, pieces: int) -> Lease | None:
    """The shard that this transaction makes done; None where it was done before."""
    if split_at is None or split_at == lease.end_batch:
        return lease if queue.complete(connection, lease) else None
    return queue.split(connection, lease, split_at, pieces)


def runs_of_shard(db: Database, lease: Lease) -> list[RunRow]:
    """The runs that a shard computes: those on its benchmark that have no outcome in its extent yet.

    All of them, but where a policy was added to a job that was done: then only its runs.
    """
    with db.read() as connection:
        lacking = _lacking(lease, _batch_size(connection, lease))
        chosen = set(connection.execute(select(run.c.id).where(*lacking)).scalars())
        return [one for one in runs_of(connection, lease.job_id) if one.id in chosen]


def _lacking(lease: Lease, batch_size: int) -> list[ColumnElement[bool]]:
    """Of a run: it is on the shard's benchmark, without an outcome for the extent's first sample, hence for any."""
    first = sample.alias("first")
    its_place = (first.c.benchmark_id == lease.benchmark_id, first.c.position == lease.first_batch * batch_size)
    first_sample = select(first.c.id).where(*its_place).scalar_subquery()
    has_outcome = exists().where(outcome.c.run_id == run.c.id, outcome.c.sample_id == first_sample)
    return [run.c.job_id == lease.job_id, run.c.benchmark_id == lease.benchmark_id, ~has_outcome]


def _batch_size(connection: Connection, lease: Lease) -> int:
    asked = select(job.c.pinned["batch_size"].as_integer()).where(job.c.id == lease.job_id)
    return int(connection.execute(asked).scalar_one())


def _check_complete(connection: Connection, lease: Lease, results: ShardResults) -> dict[int, int]:
    """Every sample ends with exactly one outcome under every policy. Returns the scores' revision in force, by run."""
    batch_size = _batch_size(connection, lease)
    runs = connection.execute(select(run.c.id, run.c.score_revision).where(*_lacking(lease, batch_size))).all()
    within = select(sample.c.id).where(
        sample.c.benchmark_id == lease.benchmark_id,
        sample.c.position >= lease.first_batch * batch_size,
        sample.c.position < lease.end_batch * batch_size,
    )
    wanted = set(product((one.id for one in runs), connection.execute(within).scalars()))
    found = {(outcome.run_id, outcome.sample_id) for outcome in results.outcomes}
    if len(found) != len(results.outcomes) or found != wanted:
        raise RecordError(
            f"shard {lease.task_id} needs an outcome for each of {len(wanted)} samples under a policy and got "
            f"{len(results.outcomes)}, {len(found & wanted)} of them its own; evaluate its batches again."
        )
    scored = {(score.run_id, score.sample_id) for score in results.scores}
    if not scored | {(trace.run_id, trace.sample_id) for trace in results.traces} <= found:
        raise RecordError(f"shard {lease.task_id} got scores or traces of samples not its own; evaluate it again.")
    return {one.id: one.score_revision for one in runs}


def finalise(db: Database, job_id: int, summarise: Callable[[RunData], dict[str, Any]]) -> bool:
    """Once all shards have ended: store every run's summary and end the job (failed where a shard died).

    Idempotent: may be called by anybody at any time. True for the one call that ended the job. `summarise` runs outside
    any transaction; it is not asked about a run without outcomes. Where something happened to the job meanwhile, as
    a policy that was added, nothing is stored: call again. Raises `OlderSchema`, `NewerSchema`.
    """
    with db.read() as connection:
        if not _ready_to_end(connection, job_id):
            return False
        rows, seen = runs_of(connection, job_id), events.newest(connection, job_id)
    data = (run_data(db, row.id) for row in rows)  # one at a time: a run may have very many samples
    summaries = {one.run_id: summarise(one) for one in data if len(one.sample)}
    with db.write() as connection:
        if not _end(connection, job_id, seen):
            return False
        for run_id, summary in summaries.items():
            connection.execute(update(run).where(run.c.id == run_id).values(summary=summary))
        return True


def _ready_to_end(connection: Connection, job_id: int) -> bool:
    state = connection.execute(select(job.c.state).where(job.c.id == job_id)).scalar_one_or_none()
    return state in (JobState.READY, JobState.RUNNING) and not has_open_tasks(connection, job_id)


def _end(connection: Connection, job_id: int, seen: int) -> bool:
    """Move the job to its last state, unless its newest event is not `seen` any more.

    Of two that try at once one waits for the other, and then finds the job ended.
    """
    schema.hold(connection)
    whose = connection.execute(select(job.c.principal).where(job.c.id == job_id).with_for_update()).scalar_one()
    if not _ready_to_end(connection, job_id) or events.newest(connection, job_id) != seen:
        return False
    error = _deaths(connection, job_id)
    state, what = (JobState.DONE, What.DONE) if error is None else (JobState.FAILED, What.FAILED)
    connection.execute(update(job).where(job.c.id == job_id).values(state=state, error=error, finished_at=now()))
    events.record(connection, job_id, whose, what, **({} if error is None else {"error": error}))
    return True


def _deaths(connection: Connection, job_id: int) -> str | None:
    """What became of the shards that died; None where all are done."""
    shards = select(task.c.state).where(
        task.c.job_id == job_id, task.c.kind == "shard", task.c.state != TaskState.SPLIT
    )
    found = connection.execute(shards).scalars().all()
    dead = found.count(TaskState.DEAD)
    if dead == 0:
        return None
    last = last_error(connection, job_id)
    return f"{dead} of {len(found)} shards died after {queue.MAX_ATTEMPTS} attempts; last error: {last}"
