"""Whether the record keeps what it promises: every violation is one sentence that says what, where and what to do.

What is looked at is one moment of the record (`db.recount.snapshot`); work may go on meanwhile.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from math import ceil
from typing import Any

from sqlalchemy import Connection, Row, Table, and_, delete, func, insert, select

from db.damage import BACKUP, damage
from db.jobs import runs_of
from db.partial import is_partial, remedy
from db.records import JobState, Rollup, RunRow, SampleRow, TaskState
from db.recount import Difference, differences, snapshot, stream
from db.session import Database
from db.tables import artifact, benchmark, job, job_event, metadata, outcome, run, sample, score, task, timing
from db.tables import rollup as rollup_table

#: shards whose rollups are rewritten in one transaction
_REWRITTEN = 100
_SUMS = [field.name for field in fields(Rollup)]
_PRUNE = "run `shortstop db prune` again"
_REBUILD = "run `shortstop db check --rebuild-rollups`"


@dataclass(frozen=True)
class Hashes:
    """How content is hashed; the wings above know."""

    benchmark: Callable[[str, str, Iterable[SampleRow]], str]  #: (version, ends, samples in order)
    artifact: Callable[[str, bytes], str]  #: (kind, content); of content that cannot be read: anything but its hash


@dataclass(frozen=True)
class _Shards:
    """The shards of a job on one benchmark."""

    done: dict[int, tuple[int, int]]  #: id -> (first batch, end batch)
    times: int | None  #: how often they cover the benchmark: once, and once more for each policy added; None: unevenly
    batch_size: int
    n_samples: int

    def samples(self, task_id: int) -> int:
        first, end = self.done[task_id]
        return min(end * self.batch_size, self.n_samples) - first * self.batch_size


def check(db: Database, hashes: Hashes) -> Iterator[str]:
    """Every violation, as it is found. Memory does not grow with the record."""
    with snapshot(db) as connection:
        yield from _orphans(connection)
        yield from _benchmarks(connection, hashes)
        yield from _artifacts(connection, hashes)
        for job_id in connection.execute(select(job.c.id).order_by(job.c.id)).scalars().all():
            yield from check_job(connection, job_id)


def rebuild_rollups(db: Database) -> int:
    """Write every rollup that differs from its recount anew, a hundred shards a transaction. Returns how many.

    Runs whose outcomes are damaged are left alone: there is nothing sound to count.
    """
    rewritten = 0
    with snapshot(db) as connection:
        for job_id in connection.execute(select(job.c.id).order_by(job.c.id)).scalars().all():
            damaged = {run_id for run_id, _ in damage(connection, job_id)}
            for one in (one for one in runs_of(connection, job_id) if one.id not in damaged):
                revision = connection.execute(select(run.c.score_revision).where(run.c.id == one.id)).scalar_one()
                wrong: list[Difference] = []
                for difference in differences(connection, one):
                    wrong.append(difference)
                    if len(wrong) == _REWRITTEN:
                        rewritten += _rewrite(db, one, revision, wrong)
                        wrong = []
                rewritten += _rewrite(db, one, revision, wrong)
    return rewritten


def check_job(connection: Connection, job_id: int) -> Iterator[str]:
    """The violations of one job, inside the caller's transaction."""
    row = connection.execute(select(job).where(job.c.id == job_id)).one()
    if is_partial(row):
        yield f"job {job_id} {remedy(row)}"
    else:
        yield from check_whole(connection, row, JobState(row.state))


def check_whole(connection: Connection, row: Row[Any], state: JobState) -> Iterator[str]:
    """The violations of a job, given its row, were it in that state."""
    job_id, runs = row.id, runs_of(connection, row.id)
    yield from _end(connection, row, state, runs)
    if row.pinned is None or not runs:
        return
    damaged = set()
    for run_id, sentence in damage(connection, job_id):
        damaged.add(run_id)
        yield sentence
    shards: dict[int, _Shards] = {}
    for one in runs:
        if one.benchmark_id not in shards:
            shards[one.benchmark_id] = _shards(connection, row, one)
            if shards[one.benchmark_id].times is None:
                yield (
                    f"job {job_id}: its shards do not cut benchmark {one.benchmark!r} into parts that cover every "
                    f"batch equally often; {BACKUP}, or submit the job again."
                )
        if one.id not in damaged:
            yield from _run(connection, row, state, one, shards[one.benchmark_id])


# --- what a row refers to -----------------------------------------------------------------------------------


def _orphans(connection: Connection) -> Iterator[str]:
    """Rows that name something that is not there: foreign keys, and what is no foreign key."""
    for table in metadata.sorted_tables:
        for key in sorted(table.foreign_keys, key=lambda key: key.parent.name):
            yield from _orphans_of(connection, table, key.parent.name, key.column.table)
    gone = select(func.count()).where(~select(job.c.id).where(job.c.id == job_event.c.job_id).exists())
    events = connection.execute(gone.select_from(job_event)).scalar_one()
    if events:
        yield f"table job_event: {events} rows are of jobs that are gone; {_PRUNE}, which was interrupted."
    named = job.c.pinned["exits_hash"].as_string()
    lost = select(job.c.id, named).where(named.is_not(None), ~select(artifact).where(artifact.c.hash == named).exists())
    for job_id, hash in connection.execute(lost.order_by(job.c.id)):
        yield f"job {job_id}: its exits {hash[:12]} are not among the artifacts; {BACKUP}, or submit the job again."


def _orphans_of(connection: Connection, table: Table, column: str, parent: Table) -> Iterator[str]:
    named, there = table.c[column], parent.alias()
    [key] = parent.primary_key
    absent = ~select(there).where(there.c[key.name] == named).exists()
    found = select(func.count(), func.min(named)).select_from(table).where(named.is_not(None), absent)
    rows, first = connection.execute(found).one()
    if rows:
        yield f"table {table.name}: {rows} rows have a {column} that is not in {parent.name}, {first} first; {BACKUP}."


# --- content and its hash -----------------------------------------------------------------------------------


def _benchmarks(connection: Connection, hashes: Hashes) -> Iterator[str]:
    for row in connection.execute(select(benchmark).order_by(benchmark.c.id)).all():
        if is_partial(row):
            yield f"benchmark {row.id} {remedy(row)}"
            continue
        samples = _Counted(samples_of(connection, row.id))
        found = hashes.benchmark(row.version, row.ends, samples)
        if samples.count != row.n_samples or samples.gap:
            yield (
                f"benchmark {row.id} ({row.name!r}) has {samples.count} samples where {row.n_samples} belong, one at "
                f"each position; {BACKUP}."
            )
        elif found != row.content_hash:
            yield (
                f"benchmark {row.id} ({row.name!r}): its samples hash to {found[:12]}, its content hash is "
                f"{row.content_hash[:12]}; {BACKUP}."
            )


class _Counted:
    """Samples on their way to be hashed."""

    def __init__(self, samples: Iterator[SampleRow]) -> None:
        self._samples = samples
        self.count, self.gap = 0, False

    def __iter__(self) -> Iterator[SampleRow]:
        for one in self._samples:
            self.gap |= one.position != self.count
            self.count += 1
            yield one


def samples_of(connection: Connection, benchmark_id: int) -> Iterator[SampleRow]:
    """In the benchmark's order, streamed."""
    columns = [sample.c[name] for name in SampleRow.__dataclass_fields__]
    chosen = select(*columns).where(sample.c.benchmark_id == benchmark_id).order_by(sample.c.position)
    return (SampleRow(*tuple(row)) for row in stream(connection, chosen))


def _artifacts(connection: Connection, hashes: Hashes) -> Iterator[str]:
    for hash in connection.execute(select(artifact.c.hash).order_by(artifact.c.hash)).scalars().all():
        kept = select(artifact.c.kind, artifact.c.content).where(artifact.c.hash == hash)
        kind, content = connection.execute(kept).one()
        if hashes.artifact(kind, bytes(content)) != hash:
            yield f"artifact {hash[:12]} ({kind}): its content does not have this hash; {BACKUP}."


# --- a job --------------------------------------------------------------------------------------------------


def _end(connection: Connection, row: Row[Any], state: JobState, runs: list[RunRow]) -> Iterator[str]:
    """Whether a job that is done is done."""
    if state is not JobState.DONE:
        return
    if not runs:
        yield f"job {row.id} is done and has no runs; {BACKUP}, or submit it again."
    unfinished = select(func.count(), func.min(task.c.id)).where(
        task.c.job_id == row.id, task.c.state.in_([TaskState.READY, TaskState.LEASED, TaskState.DEAD])
    )
    count, first = connection.execute(unfinished).one()
    if count:
        yield f"job {row.id} is done and has {count} tasks that are not, {first} first; {BACKUP}, or submit it again."
    for one in runs:
        if one.summary is None:
            yield (
                f"job {row.id} is done and run {one.id} ({one.policy} on {one.benchmark}) has no summary; {BACKUP}, "
                "or submit it again."
            )


def _shards(connection: Connection, row: Row[Any], one: RunRow) -> _Shards:
    chosen = select(task.c.id, task.c.first_batch, task.c.end_batch, task.c.state).where(
        task.c.job_id == row.id,
        task.c.kind == "shard",
        task.c.benchmark_id == one.benchmark_id,
        task.c.state != TaskState.SPLIT,
    )
    rows = connection.execute(chosen).all()
    size = select(benchmark.c.n_samples).where(benchmark.c.id == one.benchmark_id)
    n_samples = connection.execute(size).scalar_one()
    batch_size = row.pinned["batch_size"]
    return _Shards(
        done={r.id: (r.first_batch, r.end_batch) for r in rows if r.state == TaskState.DONE},
        times=_covered([(r.first_batch, r.end_batch) for r in rows], ceil(n_samples / batch_size)),
        batch_size=batch_size,
        n_samples=n_samples,
    )


def _covered(extents: list[tuple[int, int]], n_batches: int) -> int | None:
    """How often the extents cover the batches `[0, n_batches)`; None: unevenly, never, or beyond."""
    change: dict[int, int] = {}
    for first, end in extents:
        change[first] = change.get(first, 0) + 1
        change[end] = change.get(end, 0) - 1
    moved = {at: by for at, by in change.items() if by}
    times = moved.get(0, 0)
    return times if moved == {0: times, n_batches: -times} and times > 0 else None


# --- a run --------------------------------------------------------------------------------------------------


def _run(connection: Connection, row: Row[Any], state: JobState, one: RunRow, shards: _Shards) -> Iterator[str]:
    """Whether each shard left what it must, and the rollups are its sums."""
    where = f"run {one.id} ({one.policy} on {one.benchmark}) of job {row.id}"
    seen: dict[int, int] = {}
    batches = scored = 0
    for difference in differences(connection, one, everything=True):
        if difference.counted is not None:
            seen[difference.task_id] = difference.counted.samples
            batches += difference.counted.timed_batches + difference.counted.untimed_batches
            scored += sum(difference.counted.score_counts.values())
        if difference.kept != difference.counted:
            yield _differs(where, difference)
    lacking = {
        task_id: shards.samples(task_id) - seen.get(task_id, 0)
        for task_id in sorted(shards.done)
        if shards.times == 1 or task_id in seen
    }
    for task_id, n in lacking.items():
        if n:
            name = _first_without_outcome(connection, one, shards, task_id)
            yield (
                f"{where}: {n} samples of shard {task_id}, which is done, have no outcome, {name!r} first; {BACKUP}, "
                "or submit the job again."
            )
    if state is JobState.DONE and not any(lacking.values()) and sum(seen.values()) != shards.n_samples:
        yield (
            f"{where}: {sum(seen.values())} of {shards.n_samples} samples have an outcome though the job is done; "
            f"{BACKUP}, or submit the job again."
        )
    yield from _strays(connection, one, where, batches, scored)


def _strays(connection: Connection, one: RunRow, where: str, batches: int, scored: int) -> Iterator[str]:
    """Timings and scores in force that belong to no outcome."""
    timings = connection.execute(select(func.count()).where(timing.c.run_id == one.id)).scalar_one()
    if timings != batches:
        yield f"{where}: {timings - batches} batches are timed outside its done shards; {BACKUP}."
    revision = select(run.c.score_revision).where(run.c.id == one.id).scalar_subquery()
    scores = select(func.count()).where(score.c.run_id == one.id, score.c.revision == revision)
    scores_kept = connection.execute(scores).scalar_one()
    if scores_kept != scored:
        yield f"{where}: {scores_kept - scored} scores are of samples without an outcome; {BACKUP}."


def _first_without_outcome(connection: Connection, one: RunRow, shards: _Shards, task_id: int) -> str:
    first, end = shards.done[task_id]
    has = select(outcome.c.id).where(outcome.c.run_id == one.id, outcome.c.sample_id == sample.c.id).exists()
    chosen = select(sample.c.name).where(
        sample.c.benchmark_id == one.benchmark_id,
        sample.c.position >= first * shards.batch_size,
        sample.c.position < end * shards.batch_size,
        ~has,
    )
    return str(connection.execute(chosen.order_by(sample.c.position).limit(1)).scalar_one_or_none())


def _differs(where: str, difference: Difference) -> str:
    kept, counted = difference.kept, difference.counted
    if kept is None or counted is None:
        lacks = "is missing" if kept is None else "counts outcomes that are not there"
        return f"{where}: the rollup of shard {difference.task_id} {lacks}; {_REBUILD}."
    name = next(name for name in _SUMS if getattr(kept, name) != getattr(counted, name))
    return (
        f"{where}: the rollup of shard {difference.task_id} says {name} {getattr(kept, name)}, counted are "
        f"{getattr(counted, name)}; {_REBUILD}."
    )


def _rewrite(db: Database, one: RunRow, revision: int, wrong: list[Difference]) -> int:
    """In one transaction; nothing where the run was scored anew meanwhile."""
    if not wrong:
        return 0
    ids = [difference.task_id for difference in wrong]
    rows = [
        {"run_id": one.id, "task_id": difference.task_id} | vars(difference.counted)
        for difference in wrong
        if difference.counted is not None
    ]
    with db.write() as connection:
        locked = select(run.c.score_revision).where(run.c.id == one.id).with_for_update()
        if connection.execute(locked).scalar_one_or_none() != revision:
            return 0
        connection.execute(
            delete(rollup_table).where(and_(rollup_table.c.run_id == one.id, rollup_table.c.task_id.in_(ids)))
        )
        if rows:
            connection.execute(insert(rollup_table), rows)
    return len(wrong)
