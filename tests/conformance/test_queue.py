"""The queue: nothing is given twice, nothing is lost, and nobody writes under a lease that is gone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from made import claimed, planned_job, planned_policy, results_of, summarise, work
from sqlalchemy import Connection, event, func, select, text

from db import claims, demand, jobs, queue, results, schema
from db.clock import now
from db.errors import BadInput, LeaseLost, NewerSchema, OlderSchema, RecordError, Unavailable
from db.jobs import JobState
from db.planning import batch_costs
from db.records import PlannedBenchmark
from db.session import Database
from db.tables import job, metadata, outcome, task
from workers.holding import Holding


def row(db: Database, task_id: int):
    with db.read() as connection:
        return connection.execute(select(task).where(task.c.id == task_id)).one()


def contents(db: Database) -> dict[str, list]:
    """Everything in the record, to see that nothing changed."""
    with db.read() as connection:
        return {
            table.name: connection.execute(select(table).order_by(*table.primary_key)).all()
            for table in metadata.sorted_tables
            if table.name != "idle_worker"
        }


def extents(db: Database, job_id: int, *states: str) -> list[tuple[int, int]]:
    chosen = select(task.c.first_batch, task.c.end_batch).where(
        task.c.job_id == job_id, task.c.kind == "shard", task.c.state.in_(states)
    )
    with db.read() as connection:
        return [tuple(one) for one in connection.execute(chosen.order_by(task.c.first_batch))]


def test_eight_claimers_at_once_never_get_the_same_shard(db: Database) -> None:
    """Guards the claim: red on PostgreSQL without `with_for_update(skip_locked=True)` in db/claims.py."""
    planned_job(db, 40, batch_size=1, shard_batches=1)
    planned_job(db, 40, batch_size=1, shard_batches=1)
    start = threading.Barrier(8)

    def claim_all(worker: int) -> list[int]:
        start.wait()
        found = []
        while lease := queue.claim(db, f"worker {worker}", kind="shard"):
            found.append(lease.task_id)
        return found

    with ThreadPoolExecutor(8) as pool:
        found = [task_id for ids in pool.map(claim_all, range(8)) for task_id in ids]
    assert len(found) == 80
    assert len(set(found)) == 80


def test_claims_go_by_priority_then_age_and_stay_within_the_job(db: Database) -> None:
    plain = planned_job(db, 2)
    urgent = planned_job(db, 2, priority=1)
    assert claimed(db, job_id=plain).job_id == plain
    assert claimed(db).job_id == urgent
    assert queue.claim(db, "w", kind="shard") is None
    assert queue.claim(db, "w", kind="prepare") is None


def shards(db: Database, n: int, **options: int) -> int:
    """A job of so many shards."""
    return planned_job(db, n, batch_size=1, shard_batches=1, benchmarks=[f"{n} lines"], **options)


def test_jobs_of_one_priority_share_the_workers(db: Database) -> None:
    """The job with the fewest leased tasks comes next, then the oldest; a higher priority before both."""
    first, second = shards(db, 6), shards(db, 6)
    leases = [claimed(db) for _ in range(4)]
    assert [lease.job_id for lease in leases] == [first, second, first, second]
    results.commit_shard(db, leases[1], results_of(db, leases[1]))
    results.commit_shard(db, leases[3], results_of(db, leases[3]))
    assert [claimed(db).job_id for _ in range(3)] == [second, second, first]
    urgent, third = shards(db, 2, priority=1), shards(db, 1)
    assert [claimed(db).job_id for _ in range(4)] == [urgent, urgent, third, second]


def test_within_a_job_the_oldest_shard_comes_first(db: Database) -> None:
    job_id = shards(db, 3)
    assert [claimed(db, job_id=job_id).first_batch for _ in range(3)] == [0, 1, 2]


def test_a_job_without_a_claimable_task_is_passed_over(db: Database) -> None:
    """Its shards wait after a failure, or are all leased."""
    first, second = shards(db, 1), shards(db, 3)
    queue.fail(db, claimed(db, job_id=first), "it broke")
    assert [claimed(db).job_id for _ in range(2)] == [second, second]
    assert claimed(db).job_id == second


def test_tasks_of_a_paused_job_are_not_claimed(db: Database) -> None:
    """What is leased is finished; `unpause_job` lets the rest be claimed."""
    paused, other = shards(db, 3), shards(db, 1)
    unplanned = jobs.create_job(db, name="made", spec={})
    lease = claimed(db, job_id=paused)
    assert jobs.pause_job(db, paused)
    assert jobs.pause_job(db, unplanned)
    assert claimed(db).job_id == other
    assert queue.claim(db, "w", kind="shard") is None
    assert queue.claim(db, "w", kind="shard", job_id=paused) is None
    assert queue.claim(db, "w", kind="prepare") is None
    assert queue.renew(db, lease, 0) == queue.Renewal(cancelled=False)
    results.commit_shard(db, lease, results_of(db, lease))
    assert jobs.unpause_job(db, paused)
    assert claimed(db).job_id == paused


def test_a_claim_among_some_jobs_is_fair_to_these_and_leaves_the_others(db: Database) -> None:
    a, b, c = (shards(db, 2) for _ in range(3))
    found = [queue.claim(db, "w", kind="shard", job_id=[a, c]) for _ in range(5)]
    assert [lease and lease.job_id for lease in found] == [a, c, a, c, None]
    assert queue.claim(db, "w", kind="shard", job_id=[]) is None
    assert claimed(db).job_id == b


def test_open_jobs_are_told_with_what_there_is_to_do(db: Database) -> None:
    """By priority, then by age; neither what has ended nor what is paused."""
    first, urgent, paused, ended = shards(db, 3), planned_job(db, 2, priority=1), shards(db, 1), shards(db, 1)
    preparing = jobs.create_job(db, name="made", spec={"model": "m"})
    jobs.pause_job(db, paused)
    jobs.cancel_job(db, ended)
    claimed(db, job_id=first)
    found = demand.open_jobs(db)
    assert [(one.id, one.state, one.ready, one.leased) for one in found] == [
        (urgent, JobState.READY, 1, 0),
        (first, JobState.RUNNING, 2, 1),
        (preparing, JobState.PREPARING, 1, 0),
    ]
    assert (found[1].pinned["batch_size"], found[2].pinned, found[2].spec) == (1, None, {"model": "m"})
    assert [one.id for one in demand.open_jobs(db, [first, paused])] == [first]


def test_a_shard_is_claimed_with_all_that_it_consists_of(db: Database) -> None:
    """In one transaction: a worker asks the database three times a shard, not ten."""
    job_id = planned_job(db, 11, benchmarks=("a", "b"))
    claimed(db)
    shard = results.claim_shard(db, "w", job_id=job_id)
    lease = shard.lease
    assert (lease.first_batch, lease.worker, shard.pinned) == (2, "w", jobs.job(db, job_id).pinned)
    assert shard.benchmark == jobs.benchmark(db, lease.benchmark_id)
    assert shard.samples == results.samples_of(db, lease.benchmark_id, 4, 8)
    assert (shard.runs, shard.done_runs) == (results.runs_of_shard(db, lease), [])
    assert len(shard.runs) == 2
    assert results.claim_shard(db, "w", job_id=job_id + 1) is None


# --- at scale -------------------------------------------------------------------------------------------------

NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < :last)"
ENDED_JOBS = f"""
INSERT INTO job (name, spec, state, priority, created_at)
{NUMBERS} SELECT 'ended', '{{}}', 'done', 0, 0 FROM n
"""
MANY_SHARDS = f"""
INSERT INTO task (job_id, kind, state, priority, epoch, attempt, run_after, first_batch, end_batch, done_batches,
  deaths, guilty) {NUMBERS} SELECT :job_id, 'shard', 'ready', 0, 0, 0, 0, i, i + 1, 0, 0, '[]' FROM n
"""


def plan_of(db: Database, job_id: int | list[int] | None) -> str:
    """How the database runs the claim: it is made, and explained."""
    seen: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, ___: Any, ____: Any) -> None:
        if statement.startswith("UPDATE task"):
            seen.append((statement, parameters))

    event.listen(db._engine, "before_cursor_execute", note)
    claimed(db, job_id=job_id)
    event.remove(db._engine, "before_cursor_execute", note)
    [(statement, parameters)] = seen
    explain = "EXPLAIN QUERY PLAN" if db.dialect == "sqlite" else "EXPLAIN"
    with db.read() as connection:
        return "\n".join(str(row[-1]) for row in connection.exec_driver_sql(f"{explain} {statement}", parameters))


@pytest.mark.parametrize("analysed", [False, True])
def test_a_claim_among_100_000_shards_reads_indices_only(db: Database, analysed: bool) -> None:
    """What a claim costs does not grow with what is queued. Red on SQLite without the zero in `_turns`."""
    open_jobs = [shards(db, 1) for _ in range(3)]
    with db.write() as connection:
        connection.execute(text(ENDED_JOBS), {"last": 2_999})
        for job_id, n in zip(open_jobs, (90_000, 9_000, 1_000), strict=True):
            connection.execute(text(MANY_SHARDS), {"last": n - 1, "job_id": job_id})
        if analysed:
            connection.execute(text("ANALYZE"))
    claimed(db)
    assert [claimed(db).job_id for _ in range(2)] == open_jobs[1:]
    for job_id in (None, open_jobs, open_jobs[0]):
        plan = plan_of(db, job_id)
        assert "ix_task_ready_of_job" in plan
        assert "ix_task_job_id" not in plan
        assert "Seq Scan" not in plan
        if job_id is None:
            assert "ix_job_open" in plan
        if not isinstance(job_id, int):
            assert "ix_task_leased" in plan


def test_a_job_runs_from_its_first_claim(db: Database) -> None:
    job_id = planned_job(db)
    assert jobs.job(db, job_id).state is JobState.READY
    claimed(db)
    assert jobs.job(db, job_id).state is JobState.RUNNING
    assert jobs.job(db, job_id).started_at is not None


def test_a_late_worker_writes_nothing(db: Database) -> None:
    """The fence. Red when `_fence` in db/queue.py looks at the id alone (drop `*_held(lease)`'s epoch and state)."""
    planned_job(db)
    late = claimed(db, "late")
    queue.reap(db, dead_workers=["late"])
    successor = claimed(db, "successor")
    assert (successor.task_id, successor.epoch) == (late.task_id, late.epoch + 1)
    before = contents(db)

    with pytest.raises(LeaseLost):
        results.commit_shard(db, late, results_of(db, late, seed=1))
    with pytest.raises(LeaseLost):
        results.commit_shard(db, late, results_of(db, late, seed=1, end_batch=1), split_at=1)
    with pytest.raises(LeaseLost):
        queue.renew(db, late, 1)
    assert not queue.give_back(db, late)
    assert not queue.fail(db, late, "too late")
    assert contents(db) == before

    results.commit_shard(db, successor, results_of(db, successor, seed=2))
    before = contents(db)
    with pytest.raises(LeaseLost):
        results.commit_shard(db, late, results_of(db, late, seed=1))
    assert contents(db) == before


def test_done_at_ones_own_epoch_is_success(db: Database) -> None:
    """The answer to a COMMIT may be lost: the same commit again is no error and writes nothing."""
    planned_job(db)
    lease = claimed(db)
    results.commit_shard(db, lease, results_of(db, lease, seed=1))
    before = contents(db)
    results.commit_shard(db, lease, results_of(db, lease, seed=2))
    assert contents(db) == before
    assert queue.renew(db, lease, 2) == queue.Renewal(cancelled=False)


def test_a_commit_that_lacks_a_sample_is_refused(db: Database) -> None:
    """Every sample of a shard ends with exactly one outcome under every policy."""
    planned_job(db)
    lease = claimed(db)
    whole = results_of(db, lease)
    before = contents(db)
    for outcomes in (
        whole.outcomes[1:],
        [*whole.outcomes, whole.outcomes[0]],
        [whole.outcomes[0], *whole.outcomes[:-1]],
    ):
        partial = type(whole)(outcomes, [], [])
        with pytest.raises(RecordError, match="needs an outcome"):
            results.commit_shard(db, lease, partial)
    assert contents(db) == before


def test_split_keeps_results_and_extents_exact(db: Database) -> None:
    """After any number of splits the shards still cover each batch once, and each sample has one outcome."""
    job_id = planned_job(db, 23, batch_size=2, shard_batches=6)
    assert extents(db, job_id, "ready") == [(0, 6), (6, 12)]
    lease = claimed(db)
    results.commit_shard(db, lease, results_of(db, lease, end_batch=4), split_at=4)
    assert extents(db, job_id, "split") == [(0, 6)]
    assert extents(db, job_id, "done") == [(0, 4)]
    assert extents(db, job_id, "ready") == [(4, 6), (6, 12)]

    before = contents(db)
    results.commit_shard(db, lease, results_of(db, lease, end_batch=4, seed=9), split_at=4)
    assert contents(db) == before, "repeating a split that was committed changes nothing"

    lease = claimed(db, job_id=job_id)
    results.commit_shard(db, lease, results_of(db, lease, end_batch=7), split_at=7)
    work(db)
    done = extents(db, job_id, "done")
    assert [batch for first, end in done for batch in range(first, end)] == list(range(12))
    with db.read() as connection:
        assert connection.execute(select(func.count()).select_from(outcome)).scalar_one() == 2 * 23
    assert jobs.progress(db, job_id).batches_done == jobs.progress(db, job_id).batches_total == 12


@pytest.mark.parametrize("at_batch", [0, 2, 5])
def test_a_split_outside_the_shard_is_refused(db: Database, at_batch: int) -> None:
    planned_job(db)
    lease = claimed(db)
    with pytest.raises(BadInput, match="cannot be split"), db.write() as connection:
        queue.split(connection, lease, at_batch)
    assert row(db, lease.task_id).state == "leased"


def test_an_expired_lease_goes_to_the_next(db: Database) -> None:
    """Also the lease is measured by the database's clock: nothing here waits or tells the time."""
    planned_job(db, 2)
    lease = claimed(db, "silent", lease_seconds=-1)
    [reaped] = queue.reap(db)
    assert (reaped.task_id, reaped.worker, reaped.attempt, reaped.dead) == (lease.task_id, "silent", 1, False)
    assert queue.reap(db) == []
    assert claimed(db, "next").attempt == 2


def test_eight_reapers_at_once_count_each_death_once(db: Database) -> None:
    """Red on SQLite with `BEGIN` for `BEGIN IMMEDIATE` in db/session.py: a reader that turns writer is turned away."""
    planned_job(db, 24, batch_size=1, shard_batches=1)
    taken = [claimed(db, "silent").task_id for _ in range(24)]
    start = threading.Barrier(8)

    def reap_all(_: int) -> list[int]:
        start.wait()
        return [one.task_id for _ in range(3) for one in queue.reap(db, dead_workers=["silent"])]

    with ThreadPoolExecutor(8) as pool:
        reaped = [task_id for ids in pool.map(reap_all, range(8)) for task_id in ids]
    assert sorted(reaped) == sorted(taken)
    assert {row(db, task_id).deaths for task_id in taken} == {1}


def test_a_renewed_lease_is_left_alone(db: Database) -> None:
    planned_job(db, 2)
    lease = replace(claimed(db, lease_seconds=-1), lease_seconds=30)
    queue.renew(db, lease, 1)
    assert queue.reap(db) == []
    assert row(db, lease.task_id).done_batches == 1


def test_attempts_end_and_a_refund_gives_one_back(db: Database) -> None:
    """Four deaths kill a shard; a death that was the node's, or a lease handed back, does not count."""
    job_id = planned_job(db, 2)
    lease = claimed(db)
    assert queue.give_back(db, lease)
    for attempt in range(1, queue.MAX_ATTEMPTS + 1):
        lease = claimed(db, "doomed")
        assert lease.attempt == attempt
        if attempt == 3:
            [reaped] = queue.reap(db, dead_workers=["doomed"])
            assert queue.refund(db, reaped.task_id, reaped.epoch)
            assert not queue.refund(db, reaped.task_id, reaped.epoch + 1)
            lease = claimed(db, "doomed")
            assert lease.attempt == attempt
        [reaped] = queue.reap(db, dead_workers=["doomed"])
        assert reaped.dead == (attempt == queue.MAX_ATTEMPTS)
    assert queue.claim(db, "next", kind="shard") is None
    assert jobs.finished(db, job_id)

    assert jobs.resume_job(db, job_id) == 1
    assert claimed(db).attempt == 1


def killed(db: Database, kind: str = "shard") -> queue.Reaped:
    """The next task, after its last attempt."""
    for _ in range(queue.MAX_ATTEMPTS):
        queue.claim(db, "doomed", kind=kind)
        [reaped] = queue.reap(db, dead_workers=["doomed"])
    assert reaped.dead
    return reaped


def test_a_refund_brings_a_shard_back_from_the_dead(db: Database) -> None:
    planned_job(db, 2)
    reaped = killed(db)
    assert queue.refund(db, reaped.task_id, reaped.epoch)
    assert claimed(db).attempt == queue.MAX_ATTEMPTS


def test_an_attempt_is_refunded_once(db: Database) -> None:
    """Also where the answer to the first refund was lost; and never after somebody gave fresh attempts."""
    job_id = planned_job(db, 2)
    for _ in range(2):
        claimed(db, "doomed")
        [reaped] = queue.reap(db, dead_workers=["doomed"])
    assert queue.refund(db, reaped.task_id, reaped.epoch)
    assert not queue.refund(db, reaped.task_id, reaped.epoch)
    assert row(db, reaped.task_id).attempt == 1
    for _ in range(queue.MAX_ATTEMPTS - 1):
        claimed(db, "doomed")
        [reaped] = queue.reap(db, dead_workers=["doomed"])
    jobs.retry_job(db, job_id)
    assert not queue.refund(db, reaped.task_id, reaped.epoch)
    assert row(db, reaped.task_id).attempt == 0


@pytest.mark.parametrize("kind", ["prepare", "shard"])
def test_a_refund_undoes_the_failure_of_the_job(db: Database, kind: str) -> None:
    """The last attempt was the node's loss, and the job had failed of it before that was known."""
    job_id = jobs.create_job(db, name="made", spec={}) if kind == "prepare" else planned_job(db, 2)
    reaped = killed(db, kind)
    results.finalise(db, job_id, summarise)
    assert jobs.job(db, job_id).state is JobState.FAILED
    assert queue.refund(db, reaped.task_id, reaped.epoch)
    after = jobs.job(db, job_id)
    assert after.state is (JobState.PREPARING if kind == "prepare" else JobState.RUNNING)
    assert (after.error, after.finished_at) == (None, None)
    assert queue.claim(db, "next", kind=kind, job_id=job_id) is not None


def test_a_refund_opens_nothing_in_a_cancelled_job(db: Database) -> None:
    job_id = shards(db, 2)
    reaped = killed(db)
    jobs.cancel_job(db, job_id)
    assert not queue.refund(db, reaped.task_id, reaped.epoch)
    assert jobs.finished(db, job_id)


def test_a_failed_attempt_waits_and_the_last_one_kills(db: Database) -> None:
    job_id = planned_job(db, 2)
    for attempt in range(1, queue.MAX_ATTEMPTS + 1):
        lease = claimed(db)
        assert queue.fail(db, lease, f"error {attempt}")
        assert queue.claim(db, "w", kind="shard") is None, "a failed shard waits before it is tried again"
        with db.write() as connection:
            connection.execute(task.update().values(run_after=0))
    assert row(db, lease.task_id).state == "dead"
    assert jobs.progress(db, job_id).last_error == "error 4"
    assert jobs.progress(db, job_id).shards == {"dead": 1}


def test_a_refunded_failure_does_not_count(db: Database) -> None:
    planned_job(db, 2)
    lease = claimed(db)
    queue.fail(db, lease, "the node went away", refund=True)
    assert row(db, lease.task_id).attempt == 0


def test_pauses_after_failures_grow_vary_and_end(db: Database) -> None:
    """Twice as long each time, half as much to and fro, never more than five minutes."""
    planned_job(db, 2)
    for attempt in (1, 2, 3):
        lease = claimed(db)
        queue.fail(db, lease, "it broke")
        with db.write() as connection:
            pause = connection.execute(select(task.c.run_after - now()).where(task.c.id == lease.task_id)).scalar_one()
            connection.execute(task.update().values(run_after=0))
        assert 2**attempt * 0.5 - 1 < pause <= 2**attempt * 1.5
    for attempt in range(1, 40):
        several = {queue.back_off_seconds(attempt) for _ in range(50)}
        assert all(min(2**attempt * 0.5, 300) <= pause <= min(2**attempt * 1.5, 300) for pause in several)
        assert len(several) > 1 or attempt > 8


def test_a_dead_prepare_task_fails_its_job(db: Database) -> None:
    job_id = jobs.create_job(db, name="made", spec={})
    for _ in range(queue.MAX_ATTEMPTS):
        queue.claim(db, "doomed", kind="prepare")
        queue.reap(db, dead_workers=["doomed"])
    assert jobs.job(db, job_id).state is JobState.FAILED
    assert "went silent" in (jobs.job(db, job_id).error or "")
    assert jobs.resume_job(db, job_id) == 1
    assert jobs.job(db, job_id).state is JobState.PREPARING


def test_two_deaths_make_a_suspect_and_the_sample_that_kills_alone_is_guilty(db: Database) -> None:
    """One poisonous sample costs one error outcome, not its shard."""
    planned_job(db, 8, batch_size=2, shard_batches=4)
    for deaths in range(2):
        lease = claimed(db, "victim")
        assert lease.isolated_from is None, deaths
        queue.renew(db, lease, 1)
        queue.reap(db, dead_workers=["victim"])
    lease = claimed(db, "victim")
    assert lease.isolated_from == 1, "batch 0 was done when the process died"

    for guilty in (3, 5):
        queue.renew(db, lease, 1, alone=guilty)
        [reaped] = queue.reap(db, dead_workers=["victim"])
        assert not reaped.dead, "naming a guilty sample is progress, not an attempt"
        lease = claimed(db, "victim")
    assert lease.guilty == (3, 5)
    assert lease.isolated_from == 1

    queue.renew(db, lease, 1, alone=7)
    [reaped] = queue.reap(db, dead_workers=["victim"])
    queue.refund(db, reaped.task_id, reaped.epoch)
    lease = claimed(db, "victim")
    assert lease.guilty == (3, 5), "the node died, not the sample"

    results.commit_shard(db, lease, results_of(db, lease, end_batch=3), split_at=3)
    rest = claimed(db)
    assert rest.guilty == (3, 5)


def test_cancel_takes_leases_away(db: Database) -> None:
    """Cancel bumps the epoch: the holder learns of it at the renewal, and cannot commit."""
    job_id = planned_job(db)
    lease = claimed(db)
    assert jobs.cancel_job(db, job_id)
    assert not jobs.cancel_job(db, job_id)
    assert row(db, lease.task_id).epoch == lease.epoch + 1
    assert queue.renew(db, lease, 1).cancelled
    with pytest.raises(LeaseLost):
        results.commit_shard(db, lease, results_of(db, lease))
    assert queue.claim(db, "w", kind="shard") is None
    assert jobs.job(db, job_id).state is JobState.CANCELLED
    assert jobs.finished(db, job_id)


def test_cancel_reaches_a_running_worker_within_one_renewal(db: Database) -> None:
    """A lease is renewed three times in its length: nobody computes longer than that for nothing."""
    job_id = planned_job(db)
    with Holding(db, claimed(db, lease_seconds=1.5)) as holding:
        jobs.cancel_job(db, job_id)
        with pytest.raises(LeaseLost, match=f"job {job_id} was cancelled"):
            keep_checking(holding)


def keep_checking(holding: Holding) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        holding.check()
        time.sleep(0.01)


# --- versions -------------------------------------------------------------------------------------------------


def set_version(db: Database, version: str) -> None:
    with db.write() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{version}'")


@pytest.mark.parametrize(("version", "refusal"), [("9999", NewerSchema), ("0001", OlderSchema)])
def test_a_worker_of_another_version_is_refused(db: Database, version: str, refusal: type[BadInput]) -> None:
    """Somebody upgraded the database under it. Red without `schema.hold` in `claim` and in `_fence`."""
    planned_job(db, 8)
    unplanned = jobs.create_job(db, name="made", spec={})
    lease = claimed(db)
    whole, part = results_of(db, lease), results_of(db, lease, end_batch=1)
    set_version(db, version)
    before = contents(db)
    for act in (
        lambda: queue.claim(db, "w", kind="shard"),
        lambda: queue.claim(db, "w", kind="prepare", job_id=unplanned),
        lambda: results.commit_shard(db, lease, whole),
        lambda: results.commit_shard(db, lease, part, split_at=1),
    ):
        with pytest.raises(refusal, match=f"has schema {version}"):
            act()
    assert contents(db) == before
    set_version(db, schema.head())
    results.commit_shard(db, lease, whole)


def test_an_upgrade_and_a_commit_wait_for_each_other(postgresql_db: Database) -> None:
    """Neither comes between the other's look and its end. Red without the lock in `schema.hold`."""
    planned_job(postgresql_db, 8)
    lease = claimed(postgresql_db)
    with ThreadPoolExecutor(1) as pool:
        with postgresql_db.write() as connection:
            queue.complete(connection, lease)
            upgrading = pool.submit(set_version, postgresql_db, "9999")
            until_somebody_waits(connection)
        upgrading.result(timeout=10)
        set_version(postgresql_db, schema.head())
        with postgresql_db.write() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
            claiming = pool.submit(queue.claim, postgresql_db, "w", kind="shard")
            until_somebody_waits(connection)
        with pytest.raises(NewerSchema):
            claiming.result(timeout=10)


def until_somebody_waits(connection: Connection) -> None:
    deadline = time.monotonic() + 20
    while not connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar_one():
        assert time.monotonic() < deadline, "nobody waited for the lock"
        time.sleep(0.01)


# --- what only PostgreSQL can get wrong -----------------------------------------------------------------------


def test_a_shard_that_is_just_being_claimed_hides_no_other(postgresql_db: Database) -> None:
    """The claim goes on to the next task, then to the next job; it does not come back with nothing."""
    first, second = shards(postgresql_db, 2), shards(postgresql_db, 1)
    with postgresql_db.write() as connection, ThreadPoolExecutor(1) as pool:
        held = {"of_kind": "shard", "by_worker": "slow", "for_seconds": 30.0}
        taken = connection.execute(claims._CLAIM["postgresql", "all"], held).mappings().one()
        others = [pool.submit(claimed, postgresql_db).result(timeout=10) for _ in range(2)]
        assert pool.submit(queue.claim, postgresql_db, "w", kind="shard").result(timeout=10) is None
    assert (taken["job_id"], taken["first_batch"]) == (first, 0)
    assert {(lease.job_id, lease.first_batch) for lease in others} == {(first, 1), (second, 0)}


def test_claims_of_a_running_job_do_not_wait_for_its_row(postgresql_db: Database) -> None:
    """Somebody may be finalising, pausing or writing an event."""
    job_id = shards(postgresql_db, 3)
    claimed(postgresql_db)
    with postgresql_db.write() as connection, ThreadPoolExecutor(1) as pool:
        connection.execute(select(job.c.id).where(job.c.id == job_id).with_for_update())
        pool.submit(claimed, postgresql_db).result(timeout=10)


def test_hunger_shows_only_while_somebody_waits_in_vain(db: Database) -> None:
    job_id = planned_job(db, 4, batch_size=1, shard_batches=2)
    jobs.pause_job(db, shards(db, 1))  # what is ready there is nobody's
    first, second = claimed(db, "a"), claimed(db, "b")
    assert not queue.renew(db, first, 0).hungry, "nobody asked"
    assert queue.claim(db, "c", kind="shard") is None
    assert queue.renew(db, first, 0).hungry == 1
    jobs.pause_job(db, job_id)
    assert not queue.renew(db, first, 0).hungry, "nobody could claim what a split leaves"
    jobs.unpause_job(db, job_id)
    queue.give_back(db, second)
    assert not queue.renew(db, first, 0).hungry, "a shard is ready"
    claimed(db, "c")
    assert not queue.renew(db, first, 0).hungry, "c has work now"


def test_hunger_tells_jobs_apart(db: Database) -> None:
    """A worker that may only work on one job makes no holder of another split, nor do ready shards there feed it."""
    mine = planned_job(db, 2, batch_size=1, shard_batches=2)
    other = planned_job(db, 4, batch_size=1, shard_batches=2, benchmarks=("others",))
    of_mine, of_other = claimed(db, "a", job_id=mine), claimed(db, "b", job_id=other)
    assert queue.claim(db, "c", kind="shard", job_id=mine) is None
    assert queue.renew(db, of_mine, 0).hungry == 1, "shards are ready, but not for c"
    assert not queue.renew(db, of_other, 0).hungry, "c would not take it"
    claimed(db, "d", job_id=other)
    assert queue.claim(db, "e", kind="shard", job_id=[mine, other]) is None
    assert queue.renew(db, of_mine, 0).hungry == 2
    assert queue.renew(db, of_other, 0).hungry == 1


def test_hunger_is_told_to_those_who_have_most_left(db: Database) -> None:
    """One waits, one splits: the others would cut their shards for nobody."""
    planned_job(db, 12, batch_size=1, shard_batches=4)
    held = [claimed(db, f"holder {n}") for n in range(3)]
    assert queue.claim(db, "waiting", kind="shard") is None
    told = [queue.renew(db, lease, done).hungry for lease, done in zip(held, (3, 1, 2), strict=True)]
    assert told[2] == 0, "the second holder has more left"
    assert [queue.renew(db, lease, done).hungry for lease, done in zip(held, (3, 1, 2), strict=True)] == [0, 1, 0]


def test_what_a_holder_leaves_is_cut_for_those_who_wait(db: Database) -> None:
    """In one piece it would go from hand to hand, and one would work while the others wait."""
    job_id = planned_job(db, 8, batch_size=1, shard_batches=8)
    lease = claimed(db)
    results.commit_shard(db, lease, results_of(db, lease, end_batch=1), split_at=1, pieces=3)
    assert extents(db, job_id, "ready") == [(1, 3), (3, 5), (5, 8)]
    last = claimed(db)
    results.commit_shard(db, last, results_of(db, last, end_batch=last.first_batch + 1), split_at=6, pieces=9)
    assert extents(db, job_id, "ready") == [(1, 3), (3, 5), (6, 7), (7, 8)]
    with db.read() as connection:
        ready = select(func.sum(task.c.cost)).where(task.c.job_id == job_id, task.c.state.in_(["ready", "done"]))
        assert (
            connection.execute(ready).scalar_one()
            == connection.execute(
                select(task.c.cost).where(task.c.job_id == job_id, task.c.parent_id.is_(None), task.c.kind == "shard")
            ).scalar_one()
        )


def test_large_shards_come_first_and_very_large_ones_are_cut(db: Database) -> None:
    """What takes long must not begin last."""
    prompts = [10] * 8 + [90] * 4 + [10] * 7
    samples = [(f"s/{i}", "x" * n, "r", "python", "g") for i, n in enumerate(prompts)]
    job_id = jobs.create_job(db, name="made", spec={})
    jobs.plan_job(
        db,
        queue.claim(db, "preparer", kind="prepare", job_id=job_id),
        pinned={"batch_size": 1, "shard_batches": 4, "max_new_tokens": 1, "n_layers": 30},
        benchmarks=[PlannedBenchmark("lines", "1", "hash", "line", samples)],
        artifacts=[],
        policies=[planned_policy("full")],
    )
    [costs] = [[10 + 24 if n == 10 else 90 + 24 for n in prompts]]
    assert batch_costs(prompts, 1, 1) == costs
    order = [(lease.first_batch, lease.end_batch) for lease in iter(lambda: queue.claim(db, "w", kind="shard"), None)]
    assert order == [(8, 10), (10, 12), (0, 4), (4, 8), (12, 16), (16, 19)]


def test_renewal_does_not_wait_for_its_own_commit(postgresql_db: Database) -> None:
    """A long commit must not let the lease's renewal hang or fail (on SQLite a commit takes milliseconds)."""
    planned_job(postgresql_db, 2)
    lease = claimed(postgresql_db)
    with ThreadPoolExecutor(1) as pool, postgresql_db.write() as connection:
        queue.complete(connection, lease)
        renewal = pool.submit(queue.renew, postgresql_db, lease, 1).result(timeout=10)
        reaped = pool.submit(queue.reap, postgresql_db, dead_workers=["worker"]).result(timeout=10)
    assert renewal == queue.Renewal(cancelled=False)
    assert reaped == [], "nor does the reaper take what is being committed"


def test_a_lost_connection_can_be_tried_again(postgresql_db: Database) -> None:
    """The server ends the connection in the middle of a commit: one retryable error of ours, nothing written."""
    planned_job(postgresql_db, 2)
    lease = claimed(postgresql_db)
    before = contents(postgresql_db)

    def commit_and_be_cut_off() -> None:
        with postgresql_db.write() as connection:
            queue.complete(connection, lease)
            mine = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            with postgresql_db.write() as other:
                other.execute(text(f"SELECT pg_terminate_backend({mine})"))
            connection.execute(text("SELECT 1"))

    with pytest.raises(Unavailable, match="try again") as caught:
        commit_and_be_cut_off()
    assert caught.value.retryable
    assert contents(postgresql_db) == before
    results.commit_shard(postgresql_db, lease, results_of(postgresql_db, lease))


def test_workers_that_are_gone_are_forgotten(db: Database) -> None:
    """The table would grow by a row with every worker that ever waited. Red without `forget_idle` in `reap`."""
    for worker in ("gone", "here"):
        assert queue.claim(db, worker, kind="shard") is None
    with db.write() as connection:
        connection.execute(text("UPDATE idle_worker SET asked_at = asked_at - 100 WHERE worker = 'gone'"))
    queue.reap(db)
    with db.read() as connection:
        assert connection.execute(text("SELECT worker FROM idle_worker")).scalars().all() == ["here"]
