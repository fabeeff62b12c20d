"""Faults put in on purpose, and what must hold after each of them."""

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from made import claimed, planned_job, results_of, summarise
from sqlalchemy import Engine, event, func, select
from sqlalchemy.engine.default import DefaultDialect

from db import jobs, queue, results
from db.errors import LeaseLost, RecordError
from db.queue import Lease
from db.records import Rollup, ScoreRow, ShardResults, TimingRow
from db.rollups import of_results, rollup
from db.session import Database, open_database
from db.tables import metadata, outcome, run, score, task, timing
from workers.holding import patiently

T = TypeVar("T")

#: processes of their own, forked from one that has imported the record: quick, and free of pytest's threads
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["faults", "alembic.command", "psycopg", "pytest"])

N_SAMPLES = 23
POLICIES = ("full", "self-speculative exit_layer=18")
DEADLINE_SECONDS = 120.0


# --- a job, and what it must have left behind ------------------------------------------------------------------


def planned(db: Database, n_samples: int = N_SAMPLES, *, shard_batches: int = 4) -> int:
    """A job of batches of two; with the samples that are usual here 12 batches in 3 shards."""
    return planned_job(db, n_samples, batch_size=2, shard_batches=shard_batches, policies=POLICIES)


def results_by_batch(db: Database, lease: Lease, *, end_batch: int | None = None, seed: int = 0) -> ShardResults:
    """As `made.results_of`, but a batch comes out the same whatever shard it is in, as a worker's does."""
    whole = ShardResults()
    for batch in range(lease.first_batch, end_batch or lease.end_batch):
        part = results_of(db, replace(lease, first_batch=batch), end_batch=batch + 1, seed=seed)
        for field in fields(whole):
            getattr(whole, field.name).extend(getattr(part, field.name))
    return whole


def commit(db: Database, lease: Lease, *, split_at: int | None = None, seed: int = 0) -> None:
    made = results_by_batch(db, lease, end_batch=split_at, seed=seed)
    results.commit_shard(db, lease, made, split_at=split_at)


def has_ended(db: Database, job_id: int) -> bool:
    """As a worker that found nothing to claim: end the job where all its shards have ended."""
    if jobs.finished(db, job_id):
        results.finalise(db, job_id, summarise)
    return jobs.job(db, job_id).state.ended


def work_off(db: Database, job_id: int) -> None:
    """Do what is ready, and end the job."""
    while lease := queue.claim(db, "worker", kind="shard", job_id=job_id):
        commit(db, lease)
    assert has_ended(db, job_id)


def work_until_ended(
    url: str, worker: str, job_id: int, pause_seconds: float = 0, lease_seconds: float = 30, start: Any = None
) -> None:
    """What a worker does, with results made up; may run in a process of its own."""
    with closing(patiently(lambda: open_database(url))) as db:
        if start is not None:
            start.wait(timeout=DEADLINE_SECONDS)
        while not patiently(lambda: has_ended(db, job_id)):
            lease = patiently(lambda: queue.claim(db, worker, kind="shard", job_id=job_id, lease_seconds=lease_seconds))
            if lease is None:
                patiently(lambda: take_back_expired(db))
                time.sleep(0.05)
                continue
            made = patiently(lambda held=lease: results_by_batch(db, held))
            time.sleep(pause_seconds)
            try:
                patiently(lambda held=lease, made=made: results.commit_shard(db, held, made))
            except LeaseLost:
                continue


def take_back_expired(db: Database) -> None:
    """No process has died: what expired was lost to the database, and is refunded."""
    for one in queue.reap(db):
        queue.refund(db, one.task_id, one.epoch)


@dataclass(frozen=True)
class Account:
    """What a job left behind, without the numbers that the database gave out."""

    completions: dict[tuple[str, str], tuple[Any, ...]]  #: by policy and sample
    timings: dict[tuple[str, int], tuple[Any, ...]]  #: by policy and batch
    sums: dict[str, Rollup]  #: by policy
    summaries: dict[str, Any]  #: by policy


def account(db: Database, job_id: int) -> Account:
    runs = {one.id: one for one in jobs.runs(db, job_id)}
    completions: dict[tuple[str, str], tuple[Any, ...]] = {}
    for row in results.completions(db, job_id=job_id):
        key, tokens = (row.policy, row.sample.name), row.outcome.tokens
        assert key not in completions, f"two outcomes of {key}"
        plain = replace(row.outcome, run_id=0, sample_id=0, tokens=None)
        arrays = () if tokens is None else tuple(getattr(tokens, field.name).tobytes() for field in fields(tokens))
        completions[key] = (plain, *arrays, *sorted(row.scores.items()))
    timings = {(runs[row.run_id].policy, row.batch): tuple(row)[1:] for row in _rows_of_job(db, timing, job_id)}
    return Account(
        completions=completions,
        timings=timings,
        sums={one.policy: rollup(db, one.id) for one in runs.values()},
        summaries={one.policy: one.summary for one in runs.values()},
    )


@cache
def undisturbed(n_samples: int = N_SAMPLES) -> Account:
    """Of one worker, in other shards, in a record of its own: none of these may show."""
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(open_database(f"sqlite:///{folder}/record.db")) as db,
    ):
        job_id = planned(db, n_samples, shard_batches=5)
        work_off(db, job_id)
        return account(db, job_id)


def assert_as_undisturbed(db: Database, job_id: int, n_samples: int = N_SAMPLES) -> None:
    """One outcome a sample and policy, each batch in one shard, sums that equal a recount, and the very same bytes."""
    assert jobs.job(db, job_id).state is jobs.JobState.DONE
    assert extents(db, job_id, "ready", "leased", "dead", "cancelled") == []
    done = extents(db, job_id, "done")
    assert [batch for first, end in done for batch in range(first, end)] == list(range((n_samples + 1) // 2))
    with db.read() as connection:
        of_job = select(func.count()).select_from(outcome).join(run).where(run.c.job_id == job_id)
        assert connection.execute(of_job).scalar_one() == n_samples * len(POLICIES)
    assert_rollups_equal_a_recount(db, job_id)
    assert account(db, job_id) == undisturbed(n_samples)


def assert_rollups_equal_a_recount(db: Database, job_id: int) -> None:
    """Every row that is kept is counted again."""
    kept = ShardResults(
        [row.outcome for row in results.completions(db, job_id=job_id)],
        [
            ScoreRow(row.run_id, row.sample_id, row.metric, row.version, row.value)
            for row in _rows_of_job(db, score, job_id)
        ],
        [TimingRow(*row) for row in _rows_of_job(db, timing, job_id)],
    )
    recount = of_results(kept)
    assert {one.id: rollup(db, one.id) for one in jobs.runs(db, job_id)} == recount


def extents(db: Database, job_id: int, *states: str) -> list[tuple[int, int]]:
    chosen = select(task.c.first_batch, task.c.end_batch).where(
        task.c.job_id == job_id, task.c.kind == "shard", task.c.state.in_(states)
    )
    with db.read() as connection:
        return [tuple(one) for one in connection.execute(chosen.order_by(task.c.first_batch))]


def contents(db: Database) -> dict[str, list[Any]]:
    """Everything in the record, to see that nothing changed."""
    with db.read() as connection:
        return {
            table.name: connection.execute(select(table).order_by(*table.primary_key)).all()
            for table in metadata.sorted_tables
            if table.name != "idle_worker"
        }


def _rows_of_job(db: Database, table: Any, job_id: int) -> list[Any]:
    chosen = select(table).join(run).where(run.c.job_id == job_id)
    with db.read() as connection:
        return list(connection.execute(chosen).all())


# --- several at once, and processes that die -------------------------------------------------------------------


def answer(act: Callable[[], T]) -> T | RecordError:
    """What it gave, or which of the record's errors it raised."""
    try:
        return act()
    except RecordError as error:
        return error


def at_once(*acts: Callable[[], Any]) -> list[Any]:
    """The answers of several that start together."""
    start = threading.Barrier(len(acts))

    def one(act: Callable[[], Any]) -> Any:
        start.wait(timeout=DEADLINE_SECONDS)
        return answer(act)

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(one, acts))


@contextmanager
def reaching(point: str, act: Callable[[], None]) -> Iterator[None]:
    """Do something when a transaction of this process comes to a point: before or after a statement that begins so.

    What goes through the driver's own connection is not seen: that are the outcomes and scores.
    """
    when, words = point.split(" ", 1)

    def look(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().startswith(words):
            act()

    def end(dialect: DefaultDialect, connection: Any) -> None:
        if point == "before COMMIT":
            act()
        commit_of_driver(dialect, connection)
        if point == "after COMMIT":
            act()

    commit_of_driver = DefaultDialect.do_commit
    event.listen(Engine, f"{when}_cursor_execute", look)
    DefaultDialect.do_commit = end  # type: ignore[method-assign]
    try:
        yield
    finally:
        DefaultDialect.do_commit = commit_of_driver  # type: ignore[method-assign]
        event.remove(Engine, f"{when}_cursor_execute", look)


def die() -> None:
    """As `kill -9`: nothing is cleaned up, flushed or told."""
    os._exit(9)


def commit_and_die(url: str, point: str, split_at: int | None) -> None:
    """Runs in a process of its own."""
    db = open_database(url)
    lease = claimed(db, "victim")
    made = results_by_batch(db, lease, end_batch=split_at)
    with reaching(point, die):
        results.commit_shard(db, lease, made, split_at=split_at)


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """A process that is gone when the block is left."""
    child = context.Process(target=target, args=arguments)
    child.start()
    try:
        yield child
    finally:
        child.kill()  # wakes and ends also one that is frozen
        child.join(DEADLINE_SECONDS)


def exit_code(target: Callable[..., None], *arguments: Any) -> int | None:
    """Of a process that ends by itself."""
    with process(target, *arguments) as child:
        child.join(DEADLINE_SECONDS)
        return child.exitcode
