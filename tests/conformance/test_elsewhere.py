"""Completions made elsewhere: a run like every other, which no worker computes, and which leaves the record whole."""

import pytest
from made import planned_job, summarise, work

from db import jobs, rescoring, results
from db.cancelling import cancel_job
from db.checks import Hashes, check
from db.elsewhere import NOT_THERE, Made, add_completions, imported_policy, new_job
from db.errors import BadInput, Conflict, Missing
from db.planning import add_policy
from db.records import JobState, PlannedBenchmark
from db.rescoring import Completed
from db.session import Database
from db.tables import benchmark

SAMPLES = 11
POLICY = imported_policy("theirs", {"source": "theirs.jsonl", "sha256": "ab"})
VERSIONS = {"es": "es@test-1"}


@pytest.fixture
def done(db: Database) -> int:
    job_id = planned_job(db, SAMPLES, benchmarks=("lines", "more"))
    work(db)
    assert results.finalise(db, job_id, summarise)
    return job_id


def made(positions: range) -> dict[int, Made]:
    return {position: Made(f"theirs {position}", {"es": position / 16}) for position in positions}


def of_second(db: Database, job_id: int) -> int:
    return jobs.runs(db, job_id)[-1].benchmark_id


def violations(db: Database) -> list[str]:
    """All but what hangs on the hashes of made-up content."""
    with db.read() as connection:
        columns = benchmark.select().with_only_columns(benchmark.c.id, benchmark.c.content_hash)
        hashes = dict(connection.execute(columns).all())
    known = iter([hashes[id] for id in sorted(hashes)])

    def of_benchmark(version: str, ends: str, samples: object) -> str:
        list(samples)  # type: ignore[call-overload]
        return next(known)

    return list(check(db, Hashes(of_benchmark, lambda kind, content: "hash-of-exits")))


def test_they_become_a_run_with_an_outcome_for_every_sample(db: Database, done: int) -> None:
    """On the benchmarks that they are of, behind the others; nothing else changes, and the record is whole."""
    before = [(run.id, run.policy, run.benchmark) for run in jobs.runs(db, done)]
    kept = {run: list(map(repr, results.completions(db, run_id=run))) for run, _, _ in before}
    add_completions(db, done, POLICY, {of_second(db, done): made(range(3, SAMPLES))}, VERSIONS)
    assert jobs.job(db, done).state is JobState.RUNNING
    assert results.finalise(db, done, summarise)
    runs = jobs.runs(db, done)
    assert [(run.id, run.policy, run.benchmark) for run in runs[:-1]] == before
    assert (runs[-1].policy, runs[-1].policy_kind, runs[-1].benchmark) == ("theirs", "imported", "more")
    assert [run.position for run in runs] == list(range(5))
    assert runs[-1].summary == {"samples": SAMPLES, "policy": "theirs"}
    rows = list(results.completions(db, run_id=runs[-1].id))
    assert [row.outcome.text for row in rows] == [None] * 3 + [f"theirs {i}" for i in range(3, SAMPLES)]
    assert [row.outcome.error for row in rows] == [NOT_THERE] * 3 + [None] * (SAMPLES - 3)
    assert [row.scores for row in rows] == [{}] * 3 + [{"es": i / 16} for i in range(3, SAMPLES)]
    assert not any(len(batch) for batch in results.tokens(db, run_id=runs[-1].id))
    assert {run: list(map(repr, results.completions(db, run_id=run))) for run, _, _ in before} == kept
    assert violations(db) == []


def test_on_the_first_benchmark_the_others_move_on(db: Database, done: int) -> None:
    first = jobs.runs(db, done)[0].benchmark_id
    add_completions(db, done, POLICY, {first: made(range(SAMPLES))}, VERSIONS)
    order = [(run.benchmark, run.policy) for run in jobs.runs(db, done)]
    assert order == [
        ("lines", "full"),
        ("lines", "confidence threshold=0.9"),
        ("lines", "theirs"),
        ("more", "full"),
        ("more", "confidence threshold=0.9"),
    ]
    assert violations(db) == []


def test_a_policy_can_be_added_behind_them(db: Database, done: int) -> None:
    """Only its runs are computed."""
    add_completions(db, done, POLICY, {of_second(db, done): made(range(SAMPLES))}, VERSIONS)
    results.finalise(db, done, summarise)
    theirs = jobs.runs(db, done)[-1].id
    kept = list(map(repr, results.completions(db, run_id=theirs)))
    add_policy(db, done, imported_policy("ours", {}))
    seen = set()
    while shard := results.claim_shard(db, "worker"):
        seen |= {run.policy for run in shard.runs}
        assert theirs in {run.id for run in shard.done_runs} or shard.benchmark.name == "lines"
        jobs.cancel_job(db, done)
    assert seen == {"ours"}
    assert jobs.job(db, done).state is JobState.DONE
    assert list(map(repr, results.completions(db, run_id=theirs))) == kept
    assert violations(db) == []


def test_cancelled_before_it_has_ended_the_job_is_as_before(db: Database, done: int) -> None:
    before = [(run.id, run.position) for run in jobs.runs(db, done)]
    ended = jobs.job(db, done).finished_at
    add_completions(db, done, POLICY, {jobs.runs(db, done)[0].benchmark_id: made(range(SAMPLES))}, VERSIONS)
    assert cancel_job(db, done)
    assert [(run.id, run.position) for run in jobs.runs(db, done)] == before
    job = jobs.job(db, done)
    assert (job.state, job.finished_at) == (JobState.DONE, ended)
    assert violations(db) == []


def test_scored_again_they_have_no_tokens_to_compare(db: Database, done: int) -> None:
    """None, not zero: nobody knows how they agree with full depth."""
    add_completions(db, done, POLICY, {of_second(db, done): made(range(SAMPLES))}, VERSIONS)
    results.finalise(db, done, summarise)
    seen: list[Completed] = []

    def score_one(completed: Completed) -> dict[str, float]:
        seen.append(completed)
        return {"length": len(completed.text)}

    rescoring.rescore(db, done, {"length": "length@1"}, score_one, summarise, with_tokens=True)
    theirs = [one for one in seen if one.text.startswith("theirs")]
    assert len(theirs) == SAMPLES
    assert {one.token_ids is None for one in theirs} == {True}
    assert {one.token_ids is None for one in seen if one not in theirs} == {False}
    assert violations(db) == []


def test_a_job_of_nothing_else(db: Database) -> None:
    samples = [(f"s/{i}", f"prompt {i}", f"reference {i}", "python", f"g/{i}") for i in range(SAMPLES)]
    planned = PlannedBenchmark("lines", "1", "hash", "line", samples)
    pinned = {"batch_size": 4, "n_layers": None, "metrics": VERSIONS}
    job_id = new_job(db, "theirs", pinned, [planned], POLICY, {0: made(range(SAMPLES))}, VERSIONS, who="anna")
    assert results.finalise(db, job_id, summarise)
    job = jobs.job(db, job_id)
    assert (job.state, job.principal, job.name) == (JobState.DONE, "anna", "theirs")
    assert [row.outcome.text for row in results.completions(db, job_id=job_id)] == [f"theirs {i}" for i in range(11)]
    assert violations(db) == []
    with pytest.raises(BadInput, match="has changed: its content hash was hash and is other"):
        new_job(db, "x", pinned, [PlannedBenchmark("lines", "1", "other", "line", samples)], POLICY, {}, VERSIONS)
    assert len(jobs.list_jobs(db)) == 1


def test_what_cannot_be_is_refused_and_nothing_is_written(db: Database, done: int) -> None:
    of = {of_second(db, done): made(range(SAMPLES))}
    with pytest.raises(Missing, match="job 99 does not exist"):
        add_completions(db, 99, POLICY, of, VERSIONS)
    with pytest.raises(Conflict, match=f"job {done} has a run 'full' already; give the new one another name"):
        add_completions(db, done, imported_policy("full", {}), of, VERSIONS)
    with pytest.raises(BadInput, match="has no sample at position 11"):
        add_completions(db, done, POLICY, {of_second(db, done): made(range(SAMPLES + 1))}, VERSIONS)
    waiting = planned_job(db)
    with pytest.raises(Conflict, match=f"job {waiting} is ready; completions can be imported into a job that is done"):
        add_completions(db, waiting, POLICY, of, VERSIONS)
    assert len(jobs.runs(db, done)) == 4
    assert jobs.job(db, done).state is JobState.DONE
    assert violations(db) == []
