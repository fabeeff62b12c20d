"""Removing finished jobs that are old, and content that nobody refers to any more, in small transactions.

The first transaction makes a job one that was cancelled and cannot go on, or content one that no job can find; from
there on it is only taken apart, and whoever is interrupted is finished by the next prune.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    and_,
    delete,
    event,
    exists,
    func,
    literal,
    make_url,
    or_,
    select,
    text,
    tuple_,
    update,
)

from db import schema
from db.clock import now
from db.errors import BadInput
from db.events import What
from db.partial import PRUNED
from db.queue import close_tasks
from db.records import JobState, TaskState
from db.schedule_tables import firing, firing_job, schedule
from db.schedules import RUN
from db.session import Database
from db.tables import (
    artifact,
    benchmark,
    benchmark_name,
    corpus_overlap,
    job,
    job_event,
    job_kernels,
    label,
    outcome,
    overlapping_sample,
    rollup,
    run,
    sample,
    score_row,
    task,
    timing,
    trace,
)

#: rows that one transaction removes at the most
_ROWS = 5_000
_ENDED = [state for state in JobState if state.ended]

#: what hangs on a job, each before what it refers to: by run, then by job
OF_RUN = (score_row, timing, rollup, trace, outcome)
OF_JOB = (label, task, run, job_kernels)

#: foreign keys that PostgreSQL looks up and no index serves: every row that goes would cost a scan of all that remain
_UNSERVED = ((rollup, "task_id"), (task, "parent_id"), (trace, "sample_id"), (label, "sample_id"))


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be."""

    jobs: list[int]
    outcomes: int
    benchmarks: int
    samples: int
    artifacts: int


def prune(db: Database, older_than_s: float, *, on_job: Callable[[int], None] = lambda job_id: None) -> Pruned:
    """Remove the jobs that ended longer ago than this with all that hangs on them, and content that is nobody's.

    Jobs that have not ended are never touched. Safe to interrupt and to repeat, while work goes on. on_job: called with
    the id of each job that is gone.
    """
    _remove_lost_events(db)
    found = planned(db, older_than_s)
    if not (found.jobs or found.benchmarks or found.artifacts):
        return found
    removed = []
    outcomes = 0
    with _unserved(db) as quick:
        for job_id in found.jobs:
            if _condemn(quick, job_id, _old(older_than_s)):
                outcomes += _take_apart(quick, job_id)
                removed.append(job_id)
                on_job(job_id)
        benchmarks, samples = _remove_benchmarks(quick)
        artifacts = _remove_artifacts(quick)
    return Pruned(removed, outcomes, benchmarks, samples, artifacts)


def planned(db: Database, older_than_s: float) -> Pruned:
    """What `prune` would remove now. Changes nothing."""
    doomed = select(job.c.id).where(_old(older_than_s))
    unused = _unused_benchmarks(doomed)
    lost = _unused_artifacts(doomed)
    counted = select(func.count()).select_from(outcome).join(run)
    with db.read() as connection:
        return Pruned(
            jobs=list(connection.execute(doomed.order_by(job.c.id)).scalars()),
            outcomes=connection.execute(counted.where(run.c.job_id.in_(doomed))).scalar_one(),
            benchmarks=connection.execute(select(func.count()).select_from(benchmark).where(unused)).scalar_one(),
            samples=connection.execute(
                select(func.count()).where(sample.c.benchmark_id.in_(select(benchmark.c.id).where(unused)))
            ).scalar_one(),
            artifacts=connection.execute(select(func.count()).select_from(artifact).where(lost)).scalar_one(),
        )


# --- jobs ---------------------------------------------------------------------------------------------------


def _old(older_than_s: float) -> ColumnElement[bool]:
    """Ended that long ago; a job that came from elsewhere was imported that long ago, too.

    What a schedule is held against stays: the job that it names, and that of its last firing that passed.
    """
    moment = now() - older_than_s
    is_baseline = select(schedule.c.id).where(schedule.c.baseline_job == job.c.id).exists()
    of_job = (job_event.c.job_id == job.c.id, job_event.c.what == What.IMPORTED)
    lately = select(job_event.c.id).where(*of_job, job_event.c.at >= moment).exists()
    is_old = and_(job.c.finished_at < moment, ~lately, ~is_baseline, ~_passed_last())
    return job.c.state.in_(_ENDED) & or_(is_old, job.c.error == PRUNED)


def _passed_last() -> ColumnElement[bool]:
    """Whether the job is that of a schedule's last firing that passed."""
    later = firing.alias()
    newer = exists().where(
        later.c.schedule_id == firing.c.schedule_id, later.c.verdict == "pass", later.c.fire_at > firing.c.fire_at
    )
    of_job = (firing_job.c.job_id == job.c.id, firing_job.c.role == RUN, firing.c.id == firing_job.c.firing_id)
    return exists().where(*of_job, firing.c.verdict == "pass", ~newer)


def _condemn(db: Database, job_id: int, which: ColumnElement[bool]) -> bool:
    """Make sure that the job stays ended: nobody can resume it, add to it, or get it by its key.

    None of its tasks can be committed from here on: nothing that is written later could refer to what is removed.
    False: it moved on, and is not one of `which` any more.
    """
    with db.write() as connection:
        locked = select(job.c.id).where(job.c.id == job_id, job.c.state.in_(_ENDED), which).with_for_update()
        if connection.execute(locked).one_or_none() is None:
            return False
        connection.execute(
            update(job).where(job.c.id == job_id).values(state=JobState.CANCELLED, error=PRUNED, idempotency_key=None)
        )
        connection.execute(
            update(task)
            .where(task.c.job_id == job_id, task.c.state == TaskState.DEAD)
            .values(state=TaskState.CANCELLED)
        )
        close_tasks(connection, job_id)
    return True


def remove_condemned(db: Database, job_id: int) -> None:
    """Remove a job that bears the mark; where a prune is under way, the next one does."""
    with suppress(BadInput), _unserved(db) as quick:
        _take_apart(quick, job_id)


def withdraw(db: Database, job_id: int) -> None:
    """Remove a job that has ended, now, with content that is nobody's then; during a prune, the next one does."""
    if _condemn(db, job_id, job.c.id == job_id):
        with suppress(BadInput), _unserved(db) as quick:
            _take_apart(quick, job_id)
            _remove_benchmarks(quick)
            _remove_artifacts(quick)


def _take_apart(db: Database, job_id: int) -> int:
    """Remove a condemned job. Returns how many outcomes it had."""
    with db.read() as connection:
        runs = connection.execute(select(run.c.id).where(run.c.job_id == job_id)).scalars().all()
    outcomes = 0
    for table in OF_RUN:
        for run_id in runs:
            rows = _remove(db, table, table.c.run_id == run_id)
            outcomes += rows if table is outcome else 0
    for table in OF_JOB:
        _remove(db, table, table.c.job_id == job_id)
    _remove(db, job, job.c.id == job_id)
    _remove(db, job_event, job_event.c.job_id == job_id)
    return outcomes


def _remove_lost_events(db: Database) -> None:
    """Of jobs that were gone before a prune was interrupted."""
    _remove(db, job_event, ~select(job.c.id).where(job.c.id == job_event.c.job_id).exists())


def _remove(db: Database, table: Table, which: ColumnElement[bool]) -> int:
    """Delete rows, newest first (a shard before the one that it was split from), some thousand a transaction."""
    key = list(table.primary_key)
    # in the order of an index that begins with what the rows have in common, or each time all that are left are sorted
    order = {outcome: [outcome.c.sample_id], sample: [sample.c.position]}.get(table, key)
    some = select(*key).where(which).order_by(*(column.desc() for column in order)).limit(_ROWS)
    removed = 0
    while True:
        with db.write() as connection:
            schema.hold(connection)
            rows = connection.execute(delete(table).where(which, tuple_(*key).in_(some))).rowcount
        removed += rows
        if rows < _ROWS:
            return removed


# --- content ------------------------------------------------------------------------------------------------


def _unused_benchmarks(doomed: Select[Any]) -> ColumnElement[bool]:
    """Whether a row of `benchmark` is referred to by no job, those left out that are doomed."""
    return ~select(run.c.id).where(run.c.benchmark_id == benchmark.c.id, run.c.job_id.not_in(doomed)).exists() & (
        ~select(task.c.id).where(task.c.benchmark_id == benchmark.c.id, task.c.job_id.not_in(doomed)).exists()
    )


def _unused_artifacts(doomed: Select[Any]) -> ColumnElement[bool]:
    named = job.c.pinned["exits_hash"].as_string()
    return ~select(job.c.id).where(named == artifact.c.hash, job.c.id.not_in(doomed)).exists()


_NOBODY = select(job.c.id).where(literal(False))


def _remove_benchmarks(db: Database) -> tuple[int, int]:
    """(benchmarks, samples) removed. A benchmark first loses its hash and its names: no job finds it any more."""
    with db.write() as connection:
        _keep_planners_out(connection)
        unused = connection.execute(select(benchmark.c.id).where(_unused_benchmarks(_NOBODY))).scalars().all()
        for benchmark_id in unused:
            connection.execute(delete(benchmark_name).where(benchmark_name.c.benchmark_id == benchmark_id))
            mark = {"content_hash": f"{PRUNED}: {benchmark_id}"}
            connection.execute(update(benchmark).where(benchmark.c.id == benchmark_id).values(mark))
    samples = 0
    for benchmark_id in unused:
        for table in (overlapping_sample, corpus_overlap):
            _remove(db, table, table.c.benchmark_id == benchmark_id)
        samples += _remove(db, sample, sample.c.benchmark_id == benchmark_id)
        _remove(db, benchmark, benchmark.c.id == benchmark_id)
    return len(unused), samples


def _remove_artifacts(db: Database) -> int:
    """One a transaction: they are large."""
    with db.read() as connection:
        unused = connection.execute(select(artifact.c.hash).where(_unused_artifacts(_NOBODY))).scalars().all()
    removed = 0
    for hash in unused:
        with db.write() as connection:
            _keep_planners_out(connection)
            still = (artifact.c.hash == hash, _unused_artifacts(_NOBODY))
            removed += connection.execute(delete(artifact).where(*still)).rowcount
    return removed


def _keep_planners_out(connection: Connection) -> None:
    """Until the end of the transaction no job is planned: it might take what is being removed for what it can use.

    Planning inserts into these tables, in this order, before its runs. SQLite has one writer at a time anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE artifact, benchmark IN SHARE ROW EXCLUSIVE MODE"))


# --- foreign keys -------------------------------------------------------------------------------------------


@contextmanager
def _unserved(db: Database) -> Iterator[Database]:
    """The record with foreign keys that are checked quickly: on PostgreSQL by indices that stay as long as the prune.

    Indices for good would be paid by every worker at every commit. SQLite does not check at all here: rows go before
    what they refer to, and what is referred to only in a transaction that has seen that nobody does.
    """
    if db.dialect == "sqlite":
        unchecked = Database(make_url(db.url))
        event.listen(unchecked._engine, "connect", lambda driver, _: driver.execute("PRAGMA foreign_keys = OFF"))
        with closing(unchecked):
            yield unchecked
        return
    with db._translated(), db._engine.connect() as connection:
        own = connection.execution_options(isolation_level="AUTOCOMMIT")
        if not own.execute(text("SELECT pg_try_advisory_lock(5740738)")).scalar_one():
            raise BadInput(f"database {db.shown} is being pruned by somebody else; wait until that has ended.")
        try:
            _drop_indices(own)  # left by one that was killed
            for table, column in _UNSERVED:
                own.execute(text(f"CREATE INDEX CONCURRENTLY {_index(table, column)} ON {table.name} ({column})"))
            yield db
        finally:
            _drop_indices(own)
            own.execute(text("SELECT pg_advisory_unlock(5740738)"))


def _drop_indices(connection: Connection) -> None:
    for table, column in _UNSERVED:
        connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {_index(table, column)}"))


def _index(table: Table, column: str) -> str:
    return f"prune_{table.name}_{column}"
