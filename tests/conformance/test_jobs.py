"""Jobs: planned once, watched, and ended exactly once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from made import claimed, planned_benchmark, planned_job, planned_policy, results_of, summarise, work
from sqlalchemy import func, select

from db import jobs, queue, results
from db.errors import BadInput, LeaseLost
from db.jobs import JobState, PlannedBenchmark
from db.session import Database
from db.tables import benchmark, job_event, run, sample, task
from db.tables import job as job_table

PINNED = {"batch_size": 2, "shard_batches": 2}


def count(db: Database, table) -> int:
    with db.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def prepared(db: Database):
    job_id = jobs.create_job(db, name="made", spec={"b": 1, "a": [None, 1.5]})
    return queue.claim(db, "preparer", kind="prepare", job_id=job_id)


def plan(db: Database, lease, *benchmarks: PlannedBenchmark, policies=("full",), artifacts=()) -> None:
    jobs.plan_job(
        db,
        lease,
        pinned=PINNED,
        benchmarks=benchmarks,
        artifacts=artifacts,
        policies=[planned_policy(label) for label in policies],
    )


def test_a_job_is_planned_as_it_was_asked_for(db: Database) -> None:
    lease = prepared(db)
    before = jobs.job(db, lease.job_id)
    assert (before.state, before.spec, before.pinned) == (JobState.PREPARING, {"b": 1, "a": [None, 1.5]}, None)
    first, second = planned_benchmark(5, "first"), planned_benchmark(3, "second")
    plan(db, lease, first, second, policies=("full", "patience"), artifacts=[("exits", "hash", b"\x00\xff")])

    assert jobs.job(db, lease.job_id).state is JobState.READY
    assert jobs.job(db, lease.job_id).pinned == PINNED
    assert jobs.artifact(db, "hash") == b"\x00\xff"
    named = [(one.benchmark, one.policy, one.policy_kind) for one in jobs.runs(db, lease.job_id)]
    assert named == [(b, p, p) for b in ("first", "second") for p in ("full", "patience")]
    kept = jobs.benchmark(db, jobs.runs(db, lease.job_id)[0].benchmark_id)
    assert (kept.name, kept.n_samples, kept.left_out) == ("first", 5, ("file x was empty.",))
    read = results.samples_of(db, kept.id, 1, 4)
    assert [(s.name, s.prompt, s.reference, s.language, s.source_group) for s in read] == list(first.samples[1:4])
    assert [s.position for s in read] == [1, 2, 3]
    progress = jobs.progress(db, lease.job_id)
    assert (progress.batches_done, progress.batches_total, progress.shards) == (0, 5, {"ready": 3})


def test_samples_are_written_once_for_all_jobs_and_names(db: Database) -> None:
    """One content hash, one set of samples: under the same name, and under another."""
    plan(db, prepared(db), planned_benchmark(5, "one"))
    plan(db, prepared(db), planned_benchmark(5, "one"))
    lease = prepared(db)
    plan(db, lease, replace(planned_benchmark(5, "one"), name="two"))
    assert (count(db, benchmark), count(db, sample)) == (1, 5)
    assert jobs.runs(db, lease.job_id)[0].benchmark == "two"


def test_a_changed_benchmark_under_its_old_name_is_refused(db: Database) -> None:
    plan(db, prepared(db), planned_benchmark(5, "one"))
    lease = prepared(db)
    with pytest.raises(BadInput, match="benchmark 'one' version '1' has changed"):
        plan(db, lease, planned_benchmark(6, "one"))
    assert (count(db, benchmark), count(db, sample), count(db, run)) == (1, 5, 1)
    plan(db, lease, replace(planned_benchmark(6, "one"), version="2"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "has no runs"),
        ([replace(planned_benchmark(2), samples=[])], "'lines' has no samples"),
        (
            [planned_benchmark(2), replace(planned_benchmark(2), name="again")],
            "'again' has the same samples as 'lines'",
        ),
        ([replace(planned_benchmark(2), samples=[("s", "a\x00b", "", "", "")])], "sample 's': prompt holds a NUL"),
    ],
)
def test_bad_plans_are_refused_and_change_nothing(db: Database, wrong: list[PlannedBenchmark], message: str) -> None:
    lease = prepared(db)
    with pytest.raises(BadInput, match=message):
        plan(db, lease, *wrong)
    assert jobs.job(db, lease.job_id).state is JobState.PREPARING
    assert (count(db, benchmark), count(db, run), count(db, task)) == (0, 0, 1)
    queue.renew(db, lease, 0)


def test_a_plan_is_fenced_and_may_be_repeated(db: Database) -> None:
    lease = prepared(db)
    queue.reap(db, dead_workers=["preparer"])
    successor = queue.claim(db, "successor", kind="prepare")
    with pytest.raises(LeaseLost):
        plan(db, lease, planned_benchmark(3))
    assert count(db, benchmark) == 0
    plan(db, successor, planned_benchmark(3))
    plan(db, successor, planned_benchmark(3))
    assert (count(db, run), count(db, task)) == (1, 2)


def test_two_jobs_planned_at_once_share_their_samples(db: Database) -> None:
    """Two prepare tasks with the same new benchmarks, in opposite order, neither collide nor lock each other out."""
    leases = [prepared(db) for _ in range(4)]
    brought = [planned_benchmark(40, "one"), planned_benchmark(40, "two")]
    start = threading.Barrier(4)

    def plan_one(i: int) -> None:
        start.wait()
        plan(db, leases[i], *(brought if i % 2 else reversed(brought)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(plan_one, range(4)))
    assert (count(db, benchmark), count(db, sample), count(db, run)) == (2, 80, 8)


def test_cancel_while_planning_leaves_no_shard_behind(db: Database) -> None:
    lease = prepared(db)
    jobs.cancel_job(db, lease.job_id)
    with pytest.raises(LeaseLost):
        plan(db, lease, planned_benchmark(3))
    assert count(db, task) == 1


def test_a_cancel_that_waits_for_the_plan_still_takes_its_shards(postgresql_db: Database) -> None:
    """Guards the second sweep in `end_job`: the first one's snapshot is older than the shards."""
    lease = prepared(postgresql_db)
    with ThreadPoolExecutor(1) as pool:
        with postgresql_db.write() as connection:
            queue.complete(connection, lease)
            cancelling = pool.submit(jobs.cancel_job, postgresql_db, lease.job_id)
            _until_somebody_waits(connection)
            new = queue.NEW_TASK | {"job_id": lease.job_id, "kind": "shard", "priority": 0}
            connection.execute(task.insert().values(new))
        assert cancelling.result(timeout=10)
    assert queue.claim(postgresql_db, "w", kind="shard") is None


def _until_somebody_waits(connection) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    for _ in range(10_000):
        if connection.exec_driver_sql(waiting).scalar_one():
            return
    raise AssertionError("nobody waited for the lock")


def test_a_job_is_finalised_once_by_two_at_once(db: Database) -> None:
    """Both compute, one writes: exactly one call says so."""
    job_id = planned_job(db)
    lease = claimed(db)
    assert not results.finalise(db, job_id, summarise), "a shard is still leased"
    results.commit_shard(db, lease, results_of(db, lease))
    work(db)
    assert jobs.finished(db, job_id)
    meet = threading.Barrier(2)

    def slowly(data):
        meet.wait(timeout=20)
        return summarise(data)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda _: results.finalise(db, job_id, slowly), range(2)))
    assert sorted(ended) == [False, True]
    done = jobs.job(db, job_id)
    assert (done.state, done.error) == (JobState.DONE, None)
    assert done.finished_at is not None
    assert [one.summary for one in jobs.runs(db, job_id)] == [
        {"samples": 11, "policy": "full"},
        {"samples": 11, "policy": "confidence threshold=0.9"},
    ]
    assert not results.finalise(db, job_id, summarise)
    assert not jobs.cancel_job(db, job_id)


def test_a_job_with_a_dead_shard_fails_at_its_end_and_can_be_resumed(db: Database) -> None:
    job_id = planned_job(db, 8)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "doomed")
        queue.reap(db, dead_workers=["doomed"])
    work(db)
    assert results.finalise(db, job_id, summarise)
    failed = jobs.job(db, job_id)
    assert failed.state is JobState.FAILED
    assert failed.error == "1 of 2 shards died after 4 attempts; last error: worker doomed went silent during attempt 4"
    assert jobs.runs(db, job_id)[0].summary == {"samples": 4, "policy": "full"}

    assert jobs.resume_job(db, job_id) == 1
    assert jobs.job(db, job_id).state is JobState.RUNNING
    work(db)
    assert results.finalise(db, job_id, summarise)
    assert jobs.job(db, job_id).state is JobState.DONE
    assert jobs.runs(db, job_id)[0].summary == {"samples": 8, "policy": "full"}
    assert jobs.resume_job(db, job_id) == 0


def test_a_job_resumed_while_its_summaries_are_made_is_not_ended(db: Database) -> None:
    """Finalising looks again under the job's lock: red without the `_ready_to_end` in `_end`, db/results.py."""
    job_id = planned_job(db, 8)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "doomed")
        queue.reap(db, dead_workers=["doomed"])
    work(db)

    def resume_meanwhile(data):
        jobs.resume_job(db, job_id)
        return summarise(data)

    assert not results.finalise(db, job_id, resume_meanwhile)
    assert jobs.job(db, job_id).state is JobState.RUNNING
    work(db)
    assert results.finalise(db, job_id, summarise)
    assert jobs.job(db, job_id).state is JobState.DONE


def test_retry_gives_dead_tasks_fresh_attempts(db: Database) -> None:
    """Also while the rest of the job is still worked on; the dead are listed with the reason."""
    job_id = planned_job(db, 8)
    for attempt in range(queue.MAX_ATTEMPTS):
        lease = claimed(db)
        queue.fail(db, lease, f"error {attempt}")
        with db.write() as connection:
            connection.execute(task.update().values(run_after=0))
    [dead] = jobs.dead_tasks(db, job_id)
    assert (dead.id, dead.kind, dead.attempt, dead.worker) == (lease.task_id, "shard", 4, "worker")
    assert (dead.benchmark_id, dead.first_batch, dead.end_batch, dead.error) == (lease.benchmark_id, 0, 2, "error 3")

    assert jobs.retry_job(db, job_id) == 1
    assert jobs.dead_tasks(db, job_id) == []
    again = claimed(db)
    assert (again.task_id, again.attempt, again.epoch) == (lease.task_id, 1, lease.epoch + 1)
    assert jobs.retry_job(db, job_id) == 0
    assert jobs.job(db, job_id).state is JobState.RUNNING


def test_a_dead_prepare_task_is_retried(db: Database) -> None:
    job_id = jobs.create_job(db, name="made", spec={})
    for _ in range(queue.MAX_ATTEMPTS):
        queue.claim(db, "doomed", kind="prepare")
        queue.reap(db, dead_workers=["doomed"])
    assert [dead.kind for dead in jobs.dead_tasks(db, job_id)] == ["prepare"]
    assert jobs.retry_job(db, job_id) == 1
    plan(db, queue.claim(db, "preparer", kind="prepare"), planned_benchmark(3))
    assert jobs.job(db, job_id).state is JobState.READY


def test_a_cancelled_job_stays_cancelled(db: Database) -> None:
    """What was open then is gone: with its dead shards alone it would end as done and lack samples."""
    job_id = planned_job(db, 8)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "doomed")
        queue.reap(db, dead_workers=["doomed"])
    jobs.cancel_job(db, job_id)
    for again in (jobs.retry_job, jobs.resume_job):
        with pytest.raises(BadInput, match=f"job {job_id} was cancelled"):
            again(db, job_id)
    assert jobs.finished(db, job_id)
    assert jobs.job(db, job_id).state is JobState.CANCELLED


def test_a_job_is_paused_until_it_is_resumed(db: Database) -> None:
    job_id = planned_job(db)
    assert jobs.pause_job(db, job_id)
    assert not jobs.pause_job(db, job_id)
    assert jobs.job(db, job_id).paused
    assert jobs.resume_job(db, job_id) == 0
    assert not jobs.job(db, job_id).paused
    assert not jobs.unpause_job(db, job_id)
    work(db)
    results.finalise(db, job_id, summarise)
    assert not jobs.pause_job(db, job_id), "it has ended"


def test_the_same_key_again_is_the_same_job(db: Database) -> None:
    """A client that lost the answer asks again, and nothing is written twice."""
    asked = {"name": "made", "spec": {"a": 1}, "idempotency_key": "k"}
    job_id = jobs.create_job(db, **asked, body_hash="h")
    assert jobs.create_job(db, **asked, body_hash="h") == job_id
    with pytest.raises(BadInput, match=f"key 'k' belongs to job {job_id}, which was submitted with another spec"):
        jobs.create_job(db, **asked, body_hash="other")
    assert (count(db, job_table), count(db, task), count(db, job_event)) == (1, 1, 1)
    assert jobs.create_job(db, **asked, body_hash="other", principal="ada") != job_id, "another's key"
    assert jobs.job(db, job_id).principal == "local"
    without = [jobs.create_job(db, name="made", spec={}) for _ in range(2)]
    assert without[0] != without[1]


def test_of_eight_submits_at_once_under_one_key_one_writes(db: Database) -> None:
    start = threading.Barrier(8)

    def submit(_: int) -> int:
        start.wait()
        return jobs.create_job(db, name="made", spec={}, idempotency_key="k", body_hash="h")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(submit, range(8)))) == 1
    assert (count(db, job_table), count(db, task)) == (1, 1)


def test_failing_a_job_keeps_the_reason(db: Database) -> None:
    job_id = planned_job(db)
    assert jobs.fail_job(db, job_id, "no such\x00 model")
    assert jobs.job(db, job_id).error == "no such\ufffd model"
    assert not jobs.fail_job(db, job_id, "later")
    assert [one.id for one in jobs.list_jobs(db)] == [job_id]


def test_progress_counts_what_holders_report(db: Database) -> None:
    job_id = planned_job(db, 8)
    lease = claimed(db)
    queue.renew(db, lease, 1)
    assert jobs.progress(db, job_id).batches_done == 1
    committed = results_of(db, lease)
    results.commit_shard(db, lease, committed)
    progress = jobs.progress(db, job_id)
    assert (progress.batches_done, progress.batches_total) == (2, 4)
    assert progress.errors == sum(outcome.error is not None for outcome in committed.outcomes)


def test_unknown_things_are_named(db: Database) -> None:
    for ask, message in [
        (lambda: jobs.job(db, 7), "job 7 does not exist"),
        (lambda: jobs.artifact(db, "h"), "artifact 'h'"),
        (lambda: jobs.benchmark(db, 7), "benchmark 7"),
        (lambda: results.run_data(db, 7), "run 7 does not exist"),
        (lambda: list(results.completions(db, run_id=7)), "run 7 does not exist"),
    ]:
        with pytest.raises(BadInput, match=message):
            ask()
