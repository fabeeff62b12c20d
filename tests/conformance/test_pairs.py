"""Two runs side by side, as a comparison reads them; and the pairs of the same spec that are kept."""

from dataclasses import replace

import numpy as np
import pytest
from made import claimed, planned_job, results_of, summarise

from db import jobs, noise, pairs, results
from db.errors import Missing
from db.noise import NoisePair
from db.records import ShardResults, TokenArrays
from db.session import Database
from db.tables import timing

N = 11


def finished(db: Database, seed: int, *, n: int = N, name: str = "lines") -> int:
    job_id = planned_job(db, n, policies=("full", "sec exit=0.9"), benchmarks=(name,))
    for _ in range(-(-n // 4)):
        lease = claimed(db, job_id=job_id)
        results.commit_shard(db, lease, results_of(db, lease, seed=seed))
    assert results.finalise(db, job_id, summarise)
    return job_id


def test_outcomes_are_paired_by_sample(db: Database) -> None:
    first, second = (finished(db, seed) for seed in (1, 2))
    a, b = jobs.runs(db, first)[0], jobs.runs(db, second)[1]
    rows = list(pairs.paired_outcomes(db, a, b))
    of_a, of_b = ({row.sample.position: row for row in results.completions(db, run_id=one.id)} for one in (a, b))
    assert [row.position for row in rows] == list(range(N))
    for row in rows:
        one, other = of_a[row.position].outcome, of_b[row.position].outcome
        assert (row.failed_a, row.failed_b) == (one.error is not None, other.error is not None)
        assert row.ids_a == written(one.tokens)
        assert row.ids_b == written(other.tokens)
        assert not row.is_same
        assert (row.name, row.source_group) == (f"s/{row.position}", f"group/{row.position // 3}")
    assert any(row.failed_a for row in rows) or any(row.failed_b for row in rows)


def written(tokens: TokenArrays | None) -> list[int] | None:
    return None if tokens is None else [token for token in tokens.token_ids.tolist() if token >= 0]


def test_the_same_tokens_are_the_same(db: Database) -> None:
    """Also where the probabilities beside them differ, as they do on another device."""
    first = finished(db, 3)
    second = planned_job(db, N, policies=("full", "sec exit=0.9"))
    for _ in range(3):
        lease = claimed(db, job_id=second)
        made = results_of(db, lease, seed=3)
        outcomes = [
            one
            if one.tokens is None
            else replace(one, tokens=replace(one.tokens, confidences=one.tokens.confidences / 2))
            for one in made.outcomes
        ]
        results.commit_shard(db, lease, ShardResults(outcomes, made.scores, made.timings))
    a, b = jobs.runs(db, first)[1], jobs.runs(db, second)[1]
    rows = list(pairs.paired_outcomes(db, a, b))
    assert [row.is_same for row in rows] == [not row.failed_a for row in rows]
    assert all(row.is_same for row in pairs.paired_outcomes(db, a, a) if not row.failed_a)


def test_what_has_not_ended_is_on_one_side_only(db: Database) -> None:
    first = finished(db, 1)
    second = planned_job(db, N, policies=("full", "sec exit=0.9"))
    lease = claimed(db, job_id=second)
    results.commit_shard(db, lease, results_of(db, lease))
    rows = list(pairs.paired_outcomes(db, jobs.runs(db, first)[0], jobs.runs(db, second)[0]))
    assert [row.failed_b is None for row in rows] == [False] * 4 + [True] * 7


def test_scores_stand_at_their_samples(db: Database) -> None:
    [run, _] = jobs.runs(db, finished(db, 4))
    scores = pairs.scores_of(db, run)
    assert sorted(scores) == ["em", "es"]
    for row in results.completions(db, run_id=run.id):
        assert scores["es"][row.sample.position] == row.scores["es"]


def test_batches_count_where_both_timed_them(db: Database) -> None:
    first, second = (finished(db, seed) for seed in (1, 2))
    a, b = jobs.runs(db, first)[0], jobs.runs(db, second)[0]
    found = pairs.paired_batches(db, a, b, 2)
    mine, theirs = results.run_data(db, a.id), results.run_data(db, b.id)
    both = mine.timed & theirs.timed
    assert 0 < len(found) == both.sum() < 6
    assert found.decode_a.tolist() == mine.decode_ns[both].tolist()
    assert found.prefill_b.tolist() == theirs.prefill_ns[both].tolist()
    assert found.tokens_b.tolist() == theirs.decode_tokens[both].tolist()
    assert found.source_group.tolist() == mine.batch_group[both].tolist()
    assert set(found.device_class.tolist()) == {"cpu-test"}


def test_full_depth_stands_beside_what_both_timed(db: Database) -> None:
    """Protects the pace that speeds of two jobs are held against: the same batches of full depth in either job."""
    first, second = (finished(db, seed) for seed in (1, 2))
    (full_a, a), (full_b, b) = jobs.runs(db, first), jobs.runs(db, second)
    found = pairs.paired_batches(db, a, b, 2)
    ours, theirs = (results.run_data(db, one.id) for one in (a, b))
    of_a, of_b = (results.run_data(db, one.id) for one in (full_a, full_b))
    both = ours.timed & theirs.timed
    paced = of_a.timed & of_b.timed
    assert (both & paced).sum() > 0
    full = found.full
    assert full is not None
    assert full.timed.tolist() == paced[both].tolist()
    assert full.decode[0].tolist() == np.where(paced, of_a.decode_ns, 0)[both].tolist()
    assert full.decode[1].tolist() == np.where(paced, of_b.decode_ns, 0)[both].tolist()
    assert full.prefill[1].tolist() == np.where(paced, of_b.prefill_ns, 0)[both].tolist()
    assert full.tokens[0].tolist() == np.where(paced, of_a.decode_tokens, 0)[both].tolist()
    columns = found.per_token(full.timed)
    assert columns[2].tolist() == full.decode[0, full.timed].tolist()
    assert columns[3].tolist() == full.tokens[0, full.timed].tolist()
    assert columns[6].tolist() == full.decode[1, full.timed].tolist()
    requests = found.per_request(full.timed)
    assert requests[6].tolist() == (full.prefill + full.decode)[1, full.timed].tolist()
    assert requests[7].tolist() == [1] * full.timed.sum()
    assert pairs.paired_batches(db, full_a, full_b, 2).full is None, "full depth has only the clock"
    assert pairs.paired_batches(db, full_a, a, 2).full is None, "policies of one job were timed in turns"


def test_some_batches_of_full_depth_tell_nothing_of_all(db: Database) -> None:
    """Protects a comparison where full depth was timed for some: their pace is not that of the others."""
    first, second = (finished(db, seed) for seed in (1, 2))
    (full_a, a), (full_b, b) = jobs.runs(db, first), jobs.runs(db, second)
    everything = np.ones(len(pairs.paired_batches(db, a, b, 2)), bool)
    with db.write() as connection:
        of_full = timing.update().where(timing.c.run_id.in_([full_a.id, full_b.id]))
        connection.execute(of_full.values(timed=True))
    assert len(pairs.paired_batches(db, a, b, 2).per_token(everything)) == 8
    both = results.run_data(db, a.id).timed & results.run_data(db, b.id).timed
    with db.write() as connection:
        one = timing.update().where(timing.c.run_id == full_b.id, timing.c.batch == int(np.flatnonzero(both)[0]))
        connection.execute(one.values(timed=False))
    found = pairs.paired_batches(db, a, b, 2)
    assert found.full is not None
    assert (~found.full.timed).sum() == 1
    assert len(found.per_token(everything)) == len(found.per_request(everything)) == 4
    assert len(found.per_token(found.full.timed)) == 8


def test_what_was_added_later_is_held_against_its_own_hour(db: Database) -> None:
    """Protects a run that was added to its job: full depth was timed again beside it, on whatever machine that was."""
    first, second = (finished(db, seed) for seed in (1, 2))
    a, b = jobs.runs(db, first)[1], jobs.runs(db, second)[1]
    with db.write() as connection:
        later = timing.update().where(timing.c.run_id == b.id)
        connection.execute(later.values(full_decode_ns=7, prefill_ns=5, device_class="cpu-test"))
        of_full = timing.update().where(timing.c.run_id == jobs.runs(db, second)[0].id)
        connection.execute(of_full.values(device_class="cpu-other"))
    full = pairs.paired_batches(db, a, b, 2).full
    assert full is not None
    assert full.timed.any()
    assert set(full.decode[1, full.timed].tolist()) == {7}
    assert set(full.prefill[1, full.timed].tolist()) == {5}
    other = pairs.paired_batches(db, jobs.runs(db, second)[0], b, 2)
    assert other.full is None
    assert len(other) == 0, "the clock of another device class"


def test_samples_that_a_job_had_are_known_by_their_texts(db: Database) -> None:
    first, larger = finished(db, 1), finished(db, 1, n=17, name="more")
    [run, _] = jobs.runs(db, larger)
    assert pairs.positions_seen(db, run.benchmark_id, first) == set(range(N))


def test_pairs_of_one_spec_are_kept_once(db: Database) -> None:
    ids = [finished(db, seed) for seed in (1, 2, 3)]
    [a, b, c] = [jobs.runs(db, job_id)[0] for job_id in ids]
    content = jobs.benchmark(db, a.benchmark_id).content_hash
    waiting = noise.unpaired_runs(db, content, "full", newest=10)
    assert [run.id for run, _ in waiting] == [a.id, b.id, c.id]
    assert waiting[0][1]["batch_size"] == 2
    pair = NoisePair(a.id, b.id, "cpu-test", content, "full", 0.25, -0.5, 0.125, None)
    noise.keep_pairs(db, [pair])
    noise.keep_pairs(db, [replace(pair, log_token=9.0)])
    assert noise.pairs_of(db, content, "full") == [pair]
    assert noise.pairs_of(db, content, "sec exit=0.9") == []
    assert [run.id for run, _ in noise.unpaired_runs(db, content, "full", newest=10)] == [c.id]


def test_an_unknown_run_is_missing(db: Database) -> None:
    with pytest.raises(Missing, match="run 77 does not exist"):
        pairs.run_of(db, 77)
    run = jobs.runs(db, finished(db, 1))[1]
    assert pairs.run_of(db, run.id) == run


def test_nan_where_a_sample_has_no_score(db: Database) -> None:
    job_id = planned_job(db, 4, batch_size=4)
    lease = claimed(db, job_id=job_id)
    made = results_of(db, lease)
    results.commit_shard(db, lease, ShardResults(made.outcomes, made.scores[2:], made.timings))
    scores = pairs.scores_of(db, jobs.runs(db, job_id)[0])
    assert np.isnan(scores["es"]).tolist() == [True, False, False, False]
