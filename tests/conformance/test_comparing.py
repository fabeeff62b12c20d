"""What pages look for in a job: samples on which policies differ, and tasks that need somebody."""

from dataclasses import replace

import numpy as np
import pytest
from made import claimed, planned_job, results_of, token_arrays

from db import comparing, jobs, queue, results
from db.attention import dead_of_all
from db.attention import queue as queue_of
from db.comparing import Kind, compared, sample_under_all
from db.errors import Missing
from db.records import ScoreRow, ShardResults
from db.session import Database

POLICIES = ("full", "sec exit=0.9", "confidence threshold=0.9")
N = 12
#: by sample and policy: text, how it ended, whether it counts as accepted; all others write "same" and are not accepted
TOLD = {
    (1, "sec exit=0.9"): ("other", "length", 0.0),
    (2, "full"): ("right", "line", 1.0),
    (2, "sec exit=0.9"): ("ri", "stop", 0.0),
    (2, "confidence threshold=0.9"): ("right", "line", 1.0),
    (3, "full"): ("right", "line", 1.0),
    (4, "full"): ("right", "line", 1.0),
    (4, "confidence threshold=0.9"): ("right", "line", 1.0),
    (5, "sec exit=0.9"): ("same", "stop", 0.0),  # rightly: full depth was not accepted either
}
BROKEN = (7, "confidence threshold=0.9")


def told_job(db: Database, **options: object) -> int:
    """A job whose samples are as `TOLD` says, of two shards of which `done` are committed."""
    done = options.pop("done", 2)
    job_id = planned_job(db, N, batch_size=3, shard_batches=2, policies=POLICIES)
    rng = np.random.default_rng(0)
    policies = {run.id: run.policy for run in jobs.runs(db, job_id)}
    for _ in range(done):  # type: ignore[call-overload]
        lease = claimed(db, job_id=job_id)
        made = results_of(db, lease)
        places = {row.id: row.position for row in results.samples_of(db, lease.benchmark_id or 0, 0, N)}
        outcomes, scores = [], []
        for one in made.outcomes:
            at = (places[one.sample_id], policies[one.run_id])
            text, finish, accepted = TOLD.get(at, ("same", "length", 0.0))
            if at == BROKEN:
                outcomes.append(
                    replace(one, text=None, error="it broke", finish=None, n_tokens=0, shown=False, tokens=None)
                )
                continue
            tokens = token_arrays(rng, 2, stop=finish == "stop")
            outcomes.append(
                replace(
                    one, text=text, error=None, finish=finish, shown=True, tokens=tokens, n_tokens=2, prompt_tokens=3
                )
            )
            scores.append(ScoreRow(one.run_id, one.sample_id, "accepted", "accepted@1", accepted))
        results.commit_shard(db, lease, ShardResults(outcomes, scores, made.timings))
    return job_id


def found(db: Database, job_id: int, kind: Kind | None, policy: str | None = None, **options: int) -> list[int]:
    full, *others = jobs.runs(db, job_id)
    others = [run for run in others if policy in (None, run.policy)]
    page = compared(db, full, others, N, kind=kind, **options)
    return [row.sample.position for row in page.samples]


def test_each_kind_has_its_samples(db: Database) -> None:
    job_id = told_job(db)
    assert found(db, job_id, None) == list(range(N))
    assert found(db, job_id, Kind.DIFFER) == [1, 2, 3, 4]
    assert found(db, job_id, Kind.DIFFER, "confidence threshold=0.9") == [3]
    assert found(db, job_id, Kind.WRONGLY_STOPPED) == [2]
    assert found(db, job_id, Kind.WRONGLY_STOPPED, "confidence threshold=0.9") == []
    assert found(db, job_id, Kind.ONLY_FULL) == [3]
    assert found(db, job_id, Kind.ONLY_FULL, "sec exit=0.9") == [2, 3, 4]
    assert found(db, job_id, Kind.ERRORS) == [7]
    assert found(db, job_id, Kind.ERRORS, "sec exit=0.9") == []


def test_what_has_not_ended_is_of_no_kind(db: Database) -> None:
    """A policy that has not come to a sample yet has not failed on it."""
    job_id = told_job(db, done=1)
    assert found(db, job_id, Kind.DIFFER) == [1, 2, 3, 4]
    assert found(db, job_id, Kind.ONLY_FULL) == [3]
    full, *others = jobs.runs(db, job_id)
    rows = compared(db, full, others, N).samples
    assert [len(row.ended) for row in rows] == [3] * 6 + [0] * 6


def test_a_list_goes_on_where_it_ended(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = told_job(db)
    full, *others = jobs.runs(db, job_id)
    seen, start, looks = [], 0, 0
    monkeypatch.setattr(comparing, "LOOKED_AT", 5)
    while start is not None:
        page = compared(db, full, others, N, kind=Kind.DIFFER, start=start, limit=2)
        assert len(page.samples) <= 2
        seen += [row.sample.position for row in page.samples]
        start, looks = page.next, looks + 1
    assert seen == [1, 2, 3, 4]
    assert looks == 3  # 1 and 2; 3 and 4; from 8 on none


def test_a_sample_under_all_policies(db: Database) -> None:
    job_id = told_job(db, done=1)
    full, *others = jobs.runs(db, job_id)
    samples = [row.sample for row in compared(db, full, others, N).samples]
    under, neighbours = sample_under_all(db, job_id, samples[2].id)
    assert [(run.policy, row.outcome.text if row else None) for run, row in under] == [
        ("full", "right"),
        ("sec exit=0.9", "ri"),
        ("confidence threshold=0.9", "right"),
    ]
    assert all(row.sample.id == samples[2].id for _, row in under if row)
    assert (neighbours.before, neighbours.behind) == (samples[1].id, samples[3].id)
    first, neighbours = sample_under_all(db, job_id, samples[0].id)
    assert [row.sample.position for _, row in first if row] == [0, 0, 0]
    assert neighbours.before is None
    late, neighbours = sample_under_all(db, job_id, samples[-1].id)
    assert [row for _, row in late] == [None, None, None]
    assert neighbours.behind is None
    with pytest.raises(Missing, match="no sample 999999"):
        sample_under_all(db, job_id, 999999)


def test_dead_tasks_and_what_waits(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    calm, doomed = planned_job(db, priority=1), planned_job(db, 4, benchmarks=("short",))  # one shard
    monkeypatch.setattr(queue, "back_off_seconds", lambda attempt: 0.0)
    for _ in range(queue.MAX_ATTEMPTS):
        assert queue.fail(db, claimed(db, job_id=doomed), "it broke")
    [dead] = dead_of_all(db, 10)
    assert (dead.job_id, dead.task.error, dead.job) == (doomed, "it broke", "made")
    waiting = queue_of(db, 10)
    assert [one.job_id for one in waiting] == [calm, doomed]
    assert (waiting[1].dead, waiting[1].ready, waiting[1].leased) == (1, 0, 0)
    jobs.cancel_job(db, doomed)
    assert dead_of_all(db, 10) == []
    assert [one.job_id for one in queue_of(db, 10)] == [calm]
