"""A policy that is added to a job which is done: shards of its own, and everything else as it was."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from made import claimed, planned_job, planned_policy, results_of, summarise, work
from sqlalchemy import text
from test_checks import HASHES

from db import jobs, planning, pruning, queue, rescoring, results
from db.checks import check
from db.errors import BadInput, LeaseLost, RecordError
from db.jobs import JobState
from db.queue import Lease
from db.records import ShardResults
from db.rollups import rollup
from db.session import Database

BENCHMARKS = ("lines", "more")
LABEL = "sec exit=0.9"


@pytest.fixture
def done(db: Database) -> int:
    job_id = planned_job(db, 11, benchmarks=BENCHMARKS)
    work(db)
    assert results.finalise(db, job_id, summarise)
    return job_id


def add(db: Database, job_id: int, label: str = LABEL) -> None:
    planning.add_policy(db, job_id, planned_policy(label))


def only(made: ShardResults, run_ids: set[int]) -> ShardResults:
    return ShardResults(
        [row for row in made.outcomes if row.run_id in run_ids],
        [row for row in made.scores if row.run_id in run_ids],
        [replace(row, full_decode_ns=7) for row in made.timings if row.run_id in run_ids],
    )


def wanted(db: Database, lease: Lease, **options: int) -> ShardResults:
    """What a worker would commit: the runs that the record says are the shard's."""
    return only(results_of(db, lease, **options), {run.id for run in results.runs_of_shard(db, lease)})


def violations(db: Database) -> list[str]:
    """Of jobs: the hashes of test_checks know the first benchmark only."""
    return [sentence for sentence in check(db, HASHES) if not sentence.startswith("benchmark 2")]


def work_added(db: Database, job_id: int) -> int:
    shards = 0
    while lease := queue.claim(db, "worker", kind="shard", job_id=job_id):
        results.commit_shard(db, lease, wanted(db, lease))
        shards += 1
    return shards


def earlier(db: Database, run_ids: list[int]) -> list[object]:
    """All that the record holds of these runs but their place, tokens included."""
    chosen = ", ".join(map(str, run_ids))
    with db.read() as connection:
        tables = [
            f"SELECT * FROM outcome WHERE run_id IN ({chosen}) ORDER BY id",
            f"SELECT * FROM timing WHERE run_id IN ({chosen}) ORDER BY run_id, batch",
            f"SELECT * FROM rollup WHERE run_id IN ({chosen}) ORDER BY run_id, task_id",
            f"SELECT * FROM score WHERE run_id IN ({chosen}) ORDER BY run_id, revision, sample_id, metric",
            f"SELECT id, policy, score_revision, summary FROM run WHERE id IN ({chosen}) ORDER BY id",
            "SELECT * FROM task ORDER BY id LIMIT 7",  # the prepare task, and three shards a benchmark
        ]
        return [[tuple(map(str, row)) for row in connection.execute(text(sql))] for sql in tables]


def test_only_the_new_runs_are_computed_and_the_rest_stays_bit_for_bit(db: Database, done: int) -> None:
    runs = jobs.runs(db, done)
    before = earlier(db, [run.id for run in runs])
    add(db, done)
    assert jobs.job(db, done).state is JobState.RUNNING
    assert jobs.job(db, done).finished_at is None
    progress = jobs.progress(db, done)
    assert (progress.batches_done, progress.batches_total, progress.shards) == (12, 24, {"done": 6, "ready": 6})
    assert work_added(db, done) == 6
    assert results.finalise(db, done, summarise)
    assert earlier(db, [run.id for run in runs]) == before
    after = jobs.runs(db, done)
    policies = ["full", "confidence threshold=0.9", LABEL]
    assert [(run.benchmark, run.policy) for run in after] == [
        (name, label) for name in BENCHMARKS for label in policies
    ]
    assert [run.position for run in after] == list(range(6))
    assert jobs.job(db, done).state is JobState.DONE
    for run in after:
        rows = list(results.completions(db, run_id=run.id))
        assert [row.sample.position for row in rows] == list(range(11))
        assert all(row.scores for row in rows)
        assert run.summary == {"samples": 11, "policy": run.policy}
        assert rollup(db, run.id).samples == 11


def test_its_batches_are_those_of_the_job(db: Database, done: int) -> None:
    """Cut at the same places: pairs compare the same samples."""
    with db.read() as connection:
        extents = "SELECT benchmark_id, first_batch, end_batch FROM task WHERE kind = 'shard' ORDER BY id"
        before = connection.execute(text(extents)).all()
    add(db, done)
    with db.read() as connection:
        assert connection.execute(text(extents)).all() == [*before, *before]


def test_full_depth_beside_it_is_what_it_is_held_against(db: Database, done: int) -> None:
    """Its batches carry a time of their own for full depth; the runs of before have none."""
    add(db, done)
    work_added(db, done)
    for run in jobs.runs(db, done):
        beside = results.run_data(db, run.id).full_decode_ns
        assert (beside is None) if run.policy != LABEL else beside.tolist() == [7] * 6


def test_results_of_the_wrong_runs_are_refused(db: Database, done: int) -> None:
    """Red where a shard of an added policy may bring outcomes of runs that have theirs, or none at all."""
    add(db, done)
    lease = claimed(db, job_id=done)
    everything = results_of(db, lease)
    with pytest.raises(RecordError, match="needs an outcome for each of 4 samples under a policy and got 12"):
        results.commit_shard(db, lease, everything)
    with pytest.raises(RecordError, match="got 0"):
        results.commit_shard(db, lease, ShardResults())
    others = {run.id for run in jobs.runs(db, done) if run.policy != LABEL}
    with pytest.raises(RecordError, match="0 of them its own"):
        results.commit_shard(db, lease, only(everything, others - {max(others)}))
    results.commit_shard(db, lease, wanted(db, lease))


def test_a_shard_of_a_new_job_covers_every_run(db: Database) -> None:
    job_id = planned_job(db)
    lease = claimed(db)
    assert results.runs_of_shard(db, lease) == jobs.runs(db, job_id)
    made = results_of(db, lease)
    with pytest.raises(RecordError, match="needs an outcome"):
        results.commit_shard(db, lease, only(made, {jobs.runs(db, job_id)[1].id}))


def test_a_split_shard_knows_its_runs_in_both_parts(db: Database, done: int) -> None:
    add(db, done)
    lease = claimed(db, job_id=done)
    results.commit_shard(db, lease, wanted(db, lease, end_batch=1), split_at=1)
    rest = claimed(db, job_id=done)
    assert [run.policy for run in results.runs_of_shard(db, rest)] == [LABEL]
    results.commit_shard(db, rest, wanted(db, rest))
    work_added(db, done)
    assert results.finalise(db, done, summarise)
    assert all(run.summary == {"samples": 11, "policy": run.policy} for run in jobs.runs(db, done))


def test_a_second_policy_can_follow(db: Database, done: int) -> None:
    for label in (LABEL, "patience patience=2"):
        add(db, done, label)
        work_added(db, done)
        assert results.finalise(db, done, summarise)
    assert [run.policy for run in jobs.runs(db, done)][2:4] == [LABEL, "patience patience=2"]
    assert [run.position for run in jobs.runs(db, done)] == list(range(8))
    assert jobs.job(db, done).spec["policies"] == [{"sec": {}}, {"patience": {}}]


def test_bad_input_changes_nothing(db: Database, done: int) -> None:
    under_way = planned_job(db)
    runs = jobs.runs(db, done)
    for ask, message in [
        (lambda: add(db, done, "confidence threshold=0.9"), "'confidence threshold=0.9' already; give the new one"),
        (lambda: add(db, under_way), f"job {under_way} is ready; a policy can be added to a job that is done"),
        (lambda: add(db, 77), "job 77 does not exist"),
    ]:
        with pytest.raises(BadInput, match=message):
            ask()
    assert jobs.job(db, done).state is JobState.DONE
    assert jobs.runs(db, done) == runs
    assert jobs.progress(db, done).shards == {"done": 6}


def test_of_two_at_once_one_is_added(db: Database, done: int) -> None:
    start = threading.Barrier(2)

    def try_to_add(label: str) -> str | None:
        start.wait(timeout=20)
        try:
            add(db, done, label)
        except BadInput as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(try_to_add, [LABEL, "patience patience=2"]))
    assert sorted(sentence is None for sentence in told) == [False, True]
    assert len(jobs.runs(db, done)) == 6
    assert jobs.progress(db, done).batches_total == 24


def test_a_pause_of_before_does_not_hold_it_up(db: Database) -> None:
    """A job that was paused while its last shard was in hand has ended, and is paused still."""
    job_id = planned_job(db, 2)
    lease = claimed(db)
    jobs.pause_job(db, job_id)
    results.commit_shard(db, lease, results_of(db, lease))
    assert results.finalise(db, job_id, summarise)
    add(db, job_id)
    assert work_added(db, job_id) == 1


def test_shards_that_die_fail_the_job_and_can_be_resumed(db: Database, done: int) -> None:
    add(db, done)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "doomed", job_id=done)
        queue.reap(db, dead_workers=["doomed"])
    work_added(db, done)
    assert results.finalise(db, done, summarise)
    assert jobs.job(db, done).state is JobState.FAILED
    assert [run.summary["samples"] for run in jobs.runs(db, done)] == [11, 11, 7, 11, 11, 11]
    assert jobs.resume_job(db, done) == 1
    work_added(db, done)
    assert results.finalise(db, done, summarise)
    assert [run.summary["samples"] for run in jobs.runs(db, done)] == [11] * 6


def test_scores_of_an_added_policy_are_of_the_revision_in_force(db: Database, done: int) -> None:
    """After scoring again; and scoring again covers the added runs."""

    def score(version: str) -> None:
        rescoring.rescore(db, done, {"length": version}, lambda one: {"length": float(len(one.text))}, summarise)

    score("length@1")
    add(db, done)
    work_added(db, done)
    with pytest.raises(BadInput, match="is running"):
        score("length@2")
    assert results.finalise(db, done, summarise)
    added = [run for run in jobs.runs(db, done) if run.policy == LABEL]
    assert all(row.scores.keys() == {"em", "es"} for row in results.completions(db, run_id=added[0].id))
    score("length@2")
    rows = [row for row in results.completions(db, job_id=done) if row.outcome.text is not None]
    assert {tuple(row.scores) for row in rows} == {("em", "es", "length")}


def test_a_job_that_is_done_again_is_finalised_once(db: Database, done: int) -> None:
    """Two at once, and once more when it has ended."""
    add(db, done)
    assert not results.finalise(db, done, summarise), "its shards are ready"
    work_added(db, done)
    meet = threading.Barrier(2)
    waited = threading.local()

    def slowly(data):
        if not getattr(waited, "yes", False):
            waited.yes = True
            meet.wait(timeout=20)
        return summarise(data)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda _: results.finalise(db, done, slowly), range(2)))
    assert sorted(ended) == [False, True]
    summaries, finished_at = [run.summary for run in jobs.runs(db, done)], jobs.job(db, done).finished_at
    assert not results.finalise(db, done, summarise)
    assert ([run.summary for run in jobs.runs(db, done)], jobs.job(db, done).finished_at) == (summaries, finished_at)


def test_a_finaliser_that_comes_late_stores_nothing(db: Database, done: int) -> None:
    """Protects summaries: what one froze with, before the job took another policy, is not what the job ended with."""
    add(db, done)
    work_added(db, done)

    def frozen(data: object) -> dict[str, object]:
        if not meanwhile:
            meanwhile.append(results.finalise(db, done, summarise))
            add(db, done, "patience patience=3")
            work_added(db, done)
        return {"by": "late"}

    meanwhile: list[bool] = []
    assert not results.finalise(db, done, frozen)
    assert meanwhile == [True]
    assert results.finalise(db, done, summarise)
    summaries = [one.summary for one in jobs.runs(db, done)]
    assert None not in summaries
    assert {"by": "late"} not in summaries


@pytest.mark.parametrize("shards", [0, 3])
def test_a_cancel_takes_only_the_added_policy_back(db: Database, done: int, shards: int) -> None:
    """The job is done as before, with its report; the policy may come again. Red where the job just ends."""
    runs, row = jobs.runs(db, done), jobs.job(db, done)
    before = earlier(db, [run.id for run in runs])
    add(db, done)
    for _ in range(shards):
        lease = claimed(db, job_id=done)
        at = 1 if lease.first_batch == 0 else None
        results.commit_shard(db, lease, wanted(db, lease, **({"end_batch": 1} if at else {})), split_at=at)
    lease = claimed(db, "late", job_id=done)
    late = wanted(db, lease)
    assert jobs.cancel_job(db, done)
    with pytest.raises(LeaseLost):
        results.commit_shard(db, lease, late)
    spec = {"model": "none", "policies": []}
    assert jobs.job(db, done) == replace(row, spec=spec)
    assert jobs.runs(db, done) == runs
    assert earlier(db, [run.id for run in runs]) == before
    assert [one.id for one in jobs.list_jobs(db)] == [done]
    assert violations(db) == []
    assert not jobs.cancel_job(db, done), "it has ended"
    add(db, done)
    assert work_added(db, done) == 6
    assert results.finalise(db, done, summarise)
    assert violations(db) == []
    assert not jobs.cancel_job(db, done), "it has ended with its policy"


def test_a_policy_is_taken_back_also_after_its_shards_had_died(db: Database, done: int) -> None:
    """Retried, the job goes on with it; cancelled, it is done."""
    runs = jobs.runs(db, done)
    add(db, done)
    while lease := queue.claim(db, "worker", kind="shard", job_id=done):
        if lease.benchmark_id == runs[0].benchmark_id:
            results.commit_shard(db, lease, wanted(db, lease))
        else:
            with db.write() as connection:
                connection.execute(text(f"UPDATE task SET attempt = 9 WHERE id = {lease.task_id}"))
            queue.fail(db, lease, "it broke")
    assert results.finalise(db, done, summarise)
    assert jobs.job(db, done).state is JobState.FAILED
    assert jobs.retry_job(db, done) == 3
    assert jobs.cancel_job(db, done)
    assert jobs.job(db, done).state is JobState.DONE
    assert jobs.runs(db, done) == runs
    assert violations(db) == []


def test_what_an_interrupted_cancel_leaves_goes_with_the_next_prune(
    db: Database, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is done at once; its parted runs are nobody's."""
    runs = jobs.runs(db, done)
    add(db, done)
    lease = claimed(db, job_id=done)
    results.commit_shard(db, lease, wanted(db, lease))
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "remove_condemned", lambda db, job_id: None)
        assert jobs.cancel_job(db, done)
    assert jobs.runs(db, done) == runs
    assert [one.id for one in jobs.list_jobs(db)] == [done]
    [sentence] = violations(db)
    assert "is half removed; run `shortstop db prune` again" in sentence
    pruning.prune(db, 86_400)
    assert violations(db) == []
