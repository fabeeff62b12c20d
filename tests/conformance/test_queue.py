"""The queue: nothing is given twice, nothing is lost, and nobody writes under a lease that is gone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from made import claimed, planned_job, results_of, work
from sqlalchemy import func, select, text

from db import jobs, queue, results
from db.errors import BadInput, LeaseLost, RecordError, Unavailable
from db.jobs import JobState
from db.session import Database
from db.tables import metadata, outcome, task


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
    """Guards the claim: red on PostgreSQL without `with_for_update(skip_locked=True)` in db/queue.py."""
    planned_job(db, 80, batch_size=1, shard_batches=1)
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
    assert queue.renew(db, lease, 2) == queue.Renewal(cancelled=False, hungry=False)


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


def test_a_refund_brings_a_shard_back_from_the_dead(db: Database) -> None:
    planned_job(db, 2)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "doomed")
        [reaped] = queue.reap(db, dead_workers=["doomed"])
    assert reaped.dead
    assert queue.refund(db, reaped.task_id, reaped.epoch)
    assert claimed(db).attempt == queue.MAX_ATTEMPTS


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


def test_hunger_shows_only_while_somebody_waits_in_vain(db: Database) -> None:
    planned_job(db, 4, batch_size=1, shard_batches=2)
    first, second = claimed(db, "a"), claimed(db, "b")
    assert not queue.renew(db, first, 0).hungry, "nobody asked"
    assert queue.claim(db, "c", kind="shard") is None
    assert queue.renew(db, first, 0).hungry
    queue.give_back(db, second)
    assert not queue.renew(db, first, 0).hungry, "a shard is ready"
    claimed(db, "c")
    assert not queue.renew(db, first, 0).hungry, "c has work now"


def test_renewal_does_not_wait_for_its_own_commit(postgresql_db: Database) -> None:
    """A long commit must not let the lease's renewal hang or fail (on SQLite a commit takes milliseconds)."""
    planned_job(postgresql_db, 2)
    lease = claimed(postgresql_db)
    with ThreadPoolExecutor(1) as pool, postgresql_db.write() as connection:
        queue.complete(connection, lease)
        renewal = pool.submit(queue.renew, postgresql_db, lease, 1).result(timeout=10)
        reaped = pool.submit(queue.reap, postgresql_db, dead_workers=["worker"]).result(timeout=10)
    assert renewal == queue.Renewal(cancelled=False, hungry=False)
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
