"""Scoring again: nothing shows until everything is there, and whatever was under way before never mixes in."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from made import claimed, planned_job, results_of, summarise, work
from sqlalchemy import text

from db import jobs, pruning, queue, rescoring, results
from db.errors import BadInput
from db.records import CompletionRow, RunData
from db.rescoring import Completed, rescore
from db.rollups import BILLION, rollup
from db.session import Database

POLICIES = ("full", "confidence threshold=0.9", "sec exit=0.9")
SAMPLES = 23


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several transactions for a job as small as these."""
    monkeypatch.setattr(rescoring, "_WINDOW", 4)


@pytest.fixture
def done(db: Database) -> int:
    return done_job(db)


def done_job(db: Database) -> int:
    job_id = planned_job(db, SAMPLES, policies=POLICIES, benchmarks=("lines", "more"))
    work(db)
    assert results.finalise(db, job_id, summary)
    return job_id


def summary(data: RunData) -> dict[str, object]:
    """With a figure that depends on the scores."""
    return summarise(data) | {
        "metrics": {name: float(values[values == values].sum()) for name, values in data.scores.items()}
    }


def length(completed: Completed) -> dict[str, float]:
    """Depends on the text, the reference and both lists of tokens."""
    full = -1 if completed.full_token_ids is None else len(completed.full_token_ids)
    own = len(completed.token_ids or [])
    return {"length": (len(completed.text) + 100 * len(completed.reference) + 10**4 * own + 10**6 * full) / 1000}


def again(db: Database, job_id: int, name: str = "length", version: str = "length@1", **options: object):
    def score_one(completed: Completed) -> dict[str, float]:
        return {name: length(completed)["length"]}

    return rescore(db, job_id, {name: version}, score_one, summary, with_tokens=True, **options)


def everything(db: Database, job_id: int) -> dict[str, object]:
    """All that anybody can see of the job's scores."""
    runs = jobs.runs(db, job_id)
    with db.read() as connection:
        versions = "SELECT run_id, sample_id, metric, version, value FROM completion_score ORDER BY 1, 2, 3"
        return {
            "scores": connection.execute(text(versions)).all(),
            "read": [(row.run_id, row.sample.position, row.scores) for row in results.completions(db, job_id=job_id)],
            "rollups": {run.id: rollup(db, run.id) for run in runs},
            "summaries": {run.id: run.summary for run in runs},
            "pinned": jobs.job(db, job_id).pinned,
        }


def revisions(db: Database, job_id: int) -> set[int]:
    """Those that have scores."""
    with db.read() as connection:
        found = "SELECT DISTINCT revision FROM score JOIN run ON run.id = run_id WHERE job_id = :job"
        return set(connection.execute(text(found), {"job": job_id}).scalars())


def expected(row: CompletionRow, full: dict[int, CompletionRow]) -> float:
    outcome, other = row.outcome, full[row.sample.id].outcome
    assert outcome.text is not None
    own, theirs = outcome.n_tokens, -1 if other.text is None else other.n_tokens
    return (len(outcome.text) + 100 * len(row.sample.reference) + 10**4 * own + 10**6 * theirs) / 1000


def test_a_metric_is_added_and_the_others_stay(db: Database, done: int) -> None:
    """From text, reference and the tokens of both depths; errors have none; sums and summaries follow."""
    before = {(row.run_id, row.sample.id): row for row in results.completions(db, job_id=done)}
    told: list[tuple[int, int]] = []
    rescored = again(db, done, on_progress=lambda ended, total: told.append((ended, total)))
    assert rescored.revision == 2
    assert (told[0], told[-1]) == ((0, 6 * SAMPLES), (6 * SAMPLES, 6 * SAMPLES))
    runs = jobs.runs(db, done)
    full = {
        row.sample.id: row for run in runs if run.policy == "full" for row in before.values() if row.run_id == run.id
    }
    completions = 0
    for run in runs:
        values = []
        for row in results.completions(db, run_id=run.id):
            old = before[run.id, row.sample.id].scores
            if row.outcome.error is not None:
                assert row.scores == old
                continue
            values.append(expected(row, full))
            assert row.scores == old | {"length": values[-1]}
        completions += len(values)
        sums = rollup(db, run.id)
        assert sums.score_counts == {"em": SAMPLES, "es": SAMPLES, "length": len(values)}
        assert sums.score_sums["length"] == sum(round(value * BILLION) for value in values)
        assert run.summary["metrics"].keys() == {"em", "es", "length"}
        assert run.summary["metrics"]["length"] == pytest.approx(sum(values))
    assert rescored.completions == completions
    assert jobs.job(db, done).pinned["metrics"] == {"length": "length@1"}
    assert jobs.job(db, done).state is jobs.JobState.DONE


def test_a_metric_is_renewed_and_nothing_else_of_the_job_changes(db: Database, done: int) -> None:
    def all_but_scores() -> list[object]:
        with db.read() as connection:
            tables = {
                "outcome": "SELECT * FROM outcome ORDER BY id",
                "timing": "SELECT * FROM timing ORDER BY run_id, batch",
                "task": "SELECT id, state, epoch FROM task ORDER BY id",
            }
            return [connection.execute(text(sql)).all() for sql in tables.values()]

    before, sums = all_but_scores(), {run.id: rollup(db, run.id) for run in jobs.runs(db, done)}
    again(db, done, "es", "es@test-2")
    assert all_but_scores() == before
    for run_id, old in sums.items():
        new = rollup(db, run_id)
        assert new.score_sums["es"] != old.score_sums["es"]
        assert new.score_sums["em"] == old.score_sums["em"]
        assert replace(new, score_counts={}, score_sums={}) == replace(old, score_counts={}, score_sums={})
    with db.read() as connection:
        versions = text("SELECT DISTINCT metric, version FROM completion_score ORDER BY 1")
        assert [tuple(row) for row in connection.execute(versions)] == [("em", "em@test-1"), ("es", "es@test-2")]


def test_the_same_again_is_the_same(db: Database, done: int) -> None:
    """And of the revisions only the one before is kept."""
    again(db, done)
    once = everything(db, done)
    assert revisions(db, done) == {1, 2}
    again(db, done)
    assert everything(db, done) == once
    assert revisions(db, done) == {2, 3}


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 5, 11, "summary", "flip"])
def test_interrupted_it_leaves_the_old_revision_in_force(
    db: Database, done: int, at: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every stage; and when it is called again it does all of it, over what was left behind."""
    before = everything(db, done)

    def die(*_: object, **__: object) -> None:
        raise Killed

    windows = iter(range(at if isinstance(at, int) else 1000))
    with monkeypatch.context() as patch:
        if at == "summary":
            patch.setattr(rescoring, "run_data", die)
        if at == "flip":
            patch.setattr(rescoring, "replace_scores", die)
        with pytest.raises(Killed):
            again(db, done, on_progress=lambda ended, total: next(windows, None) is not None or die())
    assert everything(db, done) == before
    assert revisions(db, done) == ({1} if at == 0 else {1, 2})
    undisturbed = done_job(db)
    again(db, undisturbed)
    again(db, done)
    assert revisions(db, done) == {1, 3}
    assert [row[2] for row in everything(db, done)["read"]] == [row[2] for row in everything(db, undisturbed)["read"]]


def test_a_killed_flip_changes_nothing_of_it(db: Database, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of one revision never stand beside the scores of another."""
    before = everything(db, done)
    replacing = rescoring.replace_scores

    def replace_and_die(*arguments: object) -> None:
        replacing(*arguments)
        raise Killed

    monkeypatch.setattr(rescoring, "replace_scores", replace_and_die)
    with pytest.raises(Killed):
        again(db, done)
    assert everything(db, done) == before


@pytest.mark.parametrize("names", [("length", "length"), ("length", "width")])
def test_two_at_once_do_not_mix(db: Database, done: int, names: tuple[str, str]) -> None:
    """The one that comes second starts over from what the first left, so that both end in force."""
    meet = threading.Barrier(2, timeout=30)
    met: dict[int, bool] = {}

    def together(ended: int, total: int) -> None:
        if ended == total and not met.setdefault(threading.get_ident(), False):
            met[threading.get_ident()] = True
            meet.wait()

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(again, db, done, name, f"{name}@1", on_progress=together) for name in names]
        taken = {call.result(timeout=60).revision for call in calls}
    assert len(taken) == 2
    assert max(taken) == 4, "the loser's first attempt had a revision of its own"
    one_by_one = done_job(db)
    for name in names:
        again(db, one_by_one, name, f"{name}@1")
    assert [row[2] for row in everything(db, done)["read"]] == [row[2] for row in everything(db, one_by_one)["read"]]
    for ours, theirs in zip(jobs.runs(db, done), jobs.runs(db, one_by_one), strict=True):
        assert rollup(db, ours.id) == rollup(db, theirs.id)
        assert ours.summary == theirs.summary
    assert max(revisions(db, done)) == max(taken)


def test_a_job_that_has_not_ended_is_refused(db: Database) -> None:
    job_id = planned_job(db)
    with pytest.raises(BadInput, match=f"job {job_id} is ready; score it again once it has ended"):
        again(db, job_id)
    with pytest.raises(BadInput, match="job 77 does not exist"):
        again(db, 77)
    unprepared = jobs.create_job(db, name="made", spec={})
    jobs.cancel_job(db, unprepared)
    with pytest.raises(BadInput, match="before it had runs"):
        again(db, unprepared)


@pytest.mark.parametrize("moment", ["while writing", "before the flip"])
def test_work_that_goes_on_meanwhile_is_never_left_without_scores(
    db: Database, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed job is resumed and ends while its scores are made: the attempt knows nothing of the new outcomes."""
    job_id = planned_job(db, SAMPLES, policies=POLICIES)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "doomed")
        queue.reap(db, dead_workers=["doomed"])
    work(db)
    assert results.finalise(db, job_id, summary)

    def resume_and_end() -> None:
        if jobs.resume_job(db, job_id):
            lease = claimed(db, job_id=job_id)
            results.commit_shard(db, lease, results_of(db, lease))
            assert results.finalise(db, job_id, summary)

    attempt: Callable[[], object]
    if moment == "while writing":
        attempt = lambda: again(db, job_id, on_progress=lambda ended, total: resume_and_end() if ended else None)  # noqa: E731
    else:

        def late(data: RunData) -> dict[str, object]:
            resume_and_end()
            return summary(data)

        attempt = lambda: rescore(db, job_id, {"length": "length@1"}, length, late, with_tokens=True)  # noqa: E731
    with pytest.raises(BadInput, match="worked on again"):
        attempt()
    assert {tuple(row.scores) for row in results.completions(db, job_id=job_id)} == {("em", "es")}
    again(db, job_id)
    assert all("length" in row.scores for row in results.completions(db, job_id=job_id) if row.outcome.text is not None)


def test_a_cancelled_job_keeps_having_no_summaries(db: Database) -> None:
    """What was done before the end is scored, and stays what it is: a part."""
    job_id = planned_job(db, SAMPLES, policies=POLICIES)
    lease = claimed(db)
    results.commit_shard(db, lease, results_of(db, lease))
    jobs.cancel_job(db, job_id)
    assert again(db, job_id).completions > 0
    assert [run.summary for run in jobs.runs(db, job_id)] == [None] * 3
    assert rollup(db, jobs.runs(db, job_id)[0].id).score_counts["length"] > 0


def test_scores_of_another_job_are_left_alone(db: Database, done: int) -> None:
    """Two jobs share their samples."""
    other = done_job(db)
    before = [row.scores for row in results.completions(db, job_id=other)]
    again(db, done)
    again(db, done)
    assert [row.scores for row in results.completions(db, job_id=other)] == before
    assert revisions(db, other) == {1}


def test_a_job_that_is_being_pruned_is_not_scored(db: Database, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the record from scores of a run that goes: before an attempt, and in the middle of one."""

    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    def condemn() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(pruning, "_take_apart", killed)
            with pytest.raises(KeyboardInterrupt):
                pruning.prune(db, 0)

    def score_one(completed: Completed) -> dict[str, float]:
        if not condemned:
            condemned.append(True)
            condemn()
        return length(completed)

    condemned: list[bool] = []
    with pytest.raises(BadInput, match="is being pruned"):
        rescore(db, done, {"length": "length@1"}, score_one, summary, with_tokens=True)
    with pytest.raises(BadInput, match="does not exist"):
        again(db, done)
    pruning.prune(db, 0)
    with db.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM score")).scalar_one() == 0
