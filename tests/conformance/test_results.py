"""Results: what goes in comes out, and every sum equals a recount."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import claimed, planned_job, results_of, work
from sqlalchemy import event, text

from db import jobs, results
from db.errors import RecordError
from db.records import OutcomeRow, ShardResults, TokenArrays
from db.rollups import merge, of_results, rollup
from db.session import Database

ARRAYS = ("token_ids", "exit_layers", "layers_run", "decisions", "confidences", "drafts")
POLICIES = ("full", "self-speculative exit_layer=18")


def assert_same(left: OutcomeRow, right: OutcomeRow) -> None:
    assert replace(left, tokens=None) == replace(right, tokens=None)
    assert (left.tokens is None) == (right.tokens is None)
    for name in ARRAYS if left.tokens is not None else ():
        one, other = getattr(left.tokens, name), getattr(right.tokens, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=name)


def committed(db: Database, job_id: int) -> ShardResults:
    """Work the job off; all that was committed, in one."""
    whole = ShardResults()
    while (lease := _claim(db, job_id)) is not None:
        made = results_of(db, lease)
        results.commit_shard(db, lease, made)
        for name in ("outcomes", "scores", "timings"):
            getattr(whole, name).extend(getattr(made, name))
    return whole


def _claim(db: Database, job_id: int):
    from db import queue

    return queue.claim(db, "worker", kind="shard", job_id=job_id)


tokens = st.integers(0, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n),
        st.lists(st.integers(0, 2**15 - 1), min_size=n, max_size=n),
        st.lists(st.integers(0, 2**15 - 1), min_size=n, max_size=n),
        st.lists(st.integers(0, 1), min_size=n, max_size=n),
        st.lists(st.floats(0, 1, width=32) | st.just(float("nan")), min_size=n, max_size=n),
        st.lists(st.just(0) | st.integers(-(2**15) + 1, 2**15 - 1), min_size=n, max_size=n),
    )
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=tokens, text=st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20))
def test_any_outcome_comes_back_as_it_went_in(db: Database, columns: tuple, text: str) -> None:
    """Arrays bit by bit, text letter by letter, on both layouts."""
    job_id = planned_job(db, 1, policies=["full"])
    lease = claimed(db, job_id=job_id)
    [run] = jobs.runs(db, job_id)
    [sample] = results.samples_of(db, run.benchmark_id, 0, 1)
    dtypes = (np.int32, np.int16, np.int16, np.int16, np.float32, np.int16)
    arrays = TokenArrays(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))
    sent = OutcomeRow(run.id, sample.id, text, None, "eos", len(arrays), 3, 0, True, arrays)
    results.commit_shard(db, lease, ShardResults([sent], [], []))
    [received] = results.completions(db, run_id=run.id)
    assert_same(received.outcome, sent)


def test_completions_come_in_order_with_scores_and_tokens(db: Database) -> None:
    job_id = planned_job(db, 11, policies=POLICIES, benchmarks=("lines", "more"))
    sent = committed(db, job_id)
    received = list(results.completions(db, job_id=job_id))
    by_key = {(o.run_id, o.sample_id): o for o in sent.outcomes}
    assert len(received) == len(by_key) == 44
    for row in received:
        assert_same(row.outcome, by_key[row.run_id, row.sample.id])
        wanted = {s.metric: s.value for s in sent.scores if (s.run_id, s.sample_id) == (row.run_id, row.sample.id)}
        assert row.scores == wanted
    runs = [run.id for run in jobs.runs(db, job_id)]
    assert [(row.run_id, row.sample.position) for row in received] == [(r, p) for r in runs for p in range(11)]
    assert [row.sample.position for row in results.completions(db, run_id=runs[1], limit=3)] == [0, 1, 2]


def test_the_token_view_says_what_the_arrays_say(db: Database) -> None:
    """Row by row and type by type; a stop has no token id and is the last row of its completion."""
    job_id = planned_job(db, policies=POLICIES)
    sent = committed(db, job_id)
    columns = "run_id, job_id, policy, sample_id, position, token_id, exit_layer, layers_run, decision, confidence"
    columns += ", draft_layer, draft_kept"
    boolean = int if db.dialect == "sqlite" else bool
    with db.read() as connection:
        rows = connection.execute(text(f"SELECT {columns} FROM token ORDER BY 1, 4, 5")).all()
    labels = {run.id: run.policy for run in jobs.runs(db, job_id)}
    expected = [
        (
            o.run_id,
            job_id,
            labels[o.run_id],
            o.sample_id,
            i + 1,
            None if o.tokens.decisions[i] == 2 else int(o.tokens.token_ids[i]),
            int(o.tokens.exit_layers[i]),
            int(o.tokens.layers_run[i]),
            ("full", "exit", "stop")[o.tokens.decisions[i]],
            float(o.tokens.confidences[i]),
            abs(int(o.tokens.drafts[i])) or None,
            boolean(o.tokens.drafts[i] > 0) if o.tokens.drafts[i] else None,
        )
        for o in sorted(sent.outcomes, key=lambda o: (o.run_id, o.sample_id))
        if o.tokens is not None
        for i in range(len(o.tokens))
    ]
    assert [tuple(row) for row in rows] == expected
    assert [[type(value) for value in row] for row in rows] == [[type(value) for value in row] for row in expected]
    assert any(row.decision == "stop" for row in rows)
    assert {row.draft_kept for row in rows if row.policy != "full"} == {True, False, None}
    assert {row.draft_layer for row in rows if row.policy == "full"} == {None}
    with db.read() as connection:
        [shown] = connection.execute(text("SELECT shown FROM completion LIMIT 1")).one()
    assert type(shown) is boolean, "draft_kept is like every other boolean"


def test_streamed_tokens_equal_the_view(db: Database) -> None:
    """Column by column; what is NULL in the view has a value of its own in the arrays."""
    absent = {"token_id": -1, "draft_layer": 0, "draft_kept": False}
    job_id = planned_job(db, policies=POLICIES)
    committed(db, job_id)
    with db.read() as connection:
        rows = connection.execute(text("SELECT * FROM token ORDER BY run_id, sample_id, position")).mappings().all()
    batches = list(results.tokens(db, job_id=job_id))
    for name in batches[0].__dataclass_fields__:
        column = np.concatenate([getattr(batch, name) for batch in batches]).tolist()
        assert column == [absent[name] if row[name] is None else row[name] for row in rows], name


def test_outcomes_without_drafts_keep_nothing_of_them(db: Database) -> None:
    """Most policies never draft: NULL for the outcome on PostgreSQL, no sixth element in a token's record on SQLite."""
    sent = committed(db, planned_job(db, 23, policies=POLICIES)).outcomes
    columns = "tokens" if db.dialect == "sqlite" else "drafts"
    with db.read() as connection:
        rows = connection.execute(text(f"SELECT run_id, sample_id, {columns} FROM outcome")).all()
    kept = {(run_id, sample_id): value for run_id, sample_id, value in rows}
    for outcome in (o for o in sent if o.tokens is not None):
        found, drafts = kept[outcome.run_id, outcome.sample_id], outcome.tokens.drafts.tolist()
        if db.dialect == "sqlite":
            assert [len(record) for record in json.loads(found)] == [6 if draft else 5 for draft in drafts]
        else:
            assert found == (drafts if any(drafts) else None)


def test_drafts_that_were_left_out_are_none() -> None:
    """Whoever reports no drafts need not say so."""
    arrays = TokenArrays(*(np.ones(3, t) for t in (np.int32, np.int16, np.int16, np.int16, np.float32)))
    assert (arrays.drafts.tolist(), arrays.drafts.dtype) == ([0, 0, 0], np.int16)


def test_rollups_equal_a_recount(db: Database) -> None:
    """Whatever the shards were, also after a split."""
    job_id = planned_job(db, 23, shard_batches=4, policies=POLICIES)
    lease = claimed(db)
    results.commit_shard(db, lease, results_of(db, lease, end_batch=1), split_at=1)
    work(db)
    for run in jobs.runs(db, job_id):
        sums = rollup(db, run.id)
        rows = [row.outcome for row in results.completions(db, run_id=run.id)]
        scores = [row.scores for row in results.completions(db, run_id=run.id)]
        with db.read() as connection:
            query = text(f"SELECT decision, exit_layer, layers_run FROM token WHERE run_id = {run.id}")
            tokens = connection.execute(query).all()
            timed = connection.execute(text(f"SELECT * FROM batch WHERE run_id = {run.id}")).all()
        kept = [t for t in tokens if t.decision != "stop"]
        stops = [t for t in tokens if t.decision == "stop"]
        assert asdict(sums) == {
            "samples": 23,
            "errors": sum(o.error is not None for o in rows),
            "shown": sum(o.shown for o in rows),
            "isolated": 0,
            "cut_prompts": sum(o.cut_tokens > 0 for o in rows),
            "tokens": sum(o.n_tokens for o in rows),
            "full_tokens": sum(t.decision == "full" for t in tokens),
            "exit_tokens": sum(t.decision == "exit" for t in tokens),
            "stops": sum(o.finish == "stop" for o in rows),
            "exit_layer_sum": sum(t.exit_layer for t in kept),
            "layers_run_sum": sum(t.layers_run for t in kept),
            "stop_layers_run_sum": sum(t.layers_run for t in stops),
            "timed_batches": sum(bool(t.timed) for t in timed),
            "untimed_batches": sum(not t.timed for t in timed),
            "prefill_ns": sum(t.prefill_ns for t in timed if t.timed),
            "decode_ns": sum(t.decode_ns for t in timed if t.timed),
            "decode_tokens": sum(t.decode_tokens for t in timed if t.timed),
            "ideal_ns": sum(t.ideal_ns for t in timed if t.timed),
            "flops": sum(t.flops for t in timed),
            "drafted": sum(t.drafted for t in timed),
            "drafts_kept": sum(t.drafts_kept for t in timed),
            "exit_histogram": recount(t.exit_layer for t in kept),
            "stop_histogram": recount(t.exit_layer for t in stops),
            "score_counts": {"em": 23, "es": 23},
            "score_sums": {m: sum(round(s[m] * 10**9) for s in scores) for m in ("em", "es")},
        }

    assert (rollup(db, jobs.runs(db, job_id)[0].id).drafted, sums.drafted, sums.drafts_kept) == (0, 12 * 7, 42)


def recount(layers) -> dict[int, int]:
    found = sorted(layers)
    return {layer: found.count(layer) for layer in sorted(set(found))}


def test_rollups_merge_exactly_in_any_order(db: Database) -> None:
    planned_job(db, 12)
    parts = []
    while (lease := _claim(db, 1)) is not None:
        parts.extend(of_results(results_of(db, lease)).values())
    assert merge(parts) == merge(reversed(parts)) == merge([merge(parts[:2]), merge(parts[2:])])


def test_run_data_holds_what_a_summary_needs(db: Database) -> None:
    job_id = planned_job(db, 11, policies=POLICIES)
    sent = committed(db, job_id)
    full, policy = jobs.runs(db, job_id)
    data = results.run_data(db, policy.id)
    assert data.full is not None
    assert (data.full.run_id, data.full.full, results.run_data(db, full.id).full) == (full.id, None, None)
    outcomes = sorted((o for o in sent.outcomes if o.run_id == policy.id), key=lambda o: o.sample_id)
    assert data.sample.tolist() == list(range(11))
    assert data.source_group.tolist() == [f"group/{i // 3}" for i in range(11)]
    assert data.n_tokens.tolist() == [o.n_tokens for o in outcomes]
    assert data.error.tolist() == [o.error is not None for o in outcomes]
    assert data.stopped.tolist() == [o.finish == "stop" for o in outcomes]
    assert data.shown.tolist() == [o.shown for o in outcomes]
    assert data.cut.tolist() == [o.cut_tokens > 0 for o in outcomes]
    scores = {(s.sample_id, s.metric): s.value for s in sent.scores if s.run_id == policy.id}
    assert data.scores["es"].tolist() == [scores[o.sample_id, "es"] for o in outcomes]
    timings = sorted((t for t in sent.timings if t.run_id == policy.id), key=lambda t: t.batch)
    for name in ("batch", "prefill_ns", "decode_ns", "decode_tokens", "flops", "ideal_ns", "timed"):
        assert getattr(data, name).tolist() == [getattr(t, name) for t in timings], name
    assert data.batch_group.tolist() == [f"group/{batch * 2 // 3}" for batch in range(6)]
    assert sum(data.decisions.values()) == sum(len(o.tokens) for o in outcomes if o.tokens is not None)
    assert sum(data.exit_histogram.values()) == data.n_tokens.sum()
    assert (data.drafted, data.drafts_kept) == (sum(t.drafted for t in timings), sum(t.drafts_kept for t in timings))
    assert (data.full.drafted, data.drafted) == (0, 42)


def test_scores_may_be_missing(db: Database) -> None:
    """A metric without a value for a sample is nan there, not zero."""
    job_id = planned_job(db, 2, policies=["full"])
    lease = claimed(db)
    made = results_of(db, lease)
    results.commit_shard(db, lease, ShardResults(made.outcomes, made.scores[:1], []))
    [run] = jobs.runs(db, job_id)
    data = results.run_data(db, run.id)
    assert np.isnan(data.scores["es"]).tolist() == [False, True]
    assert len(data.batch) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_tokens": 3},
        {"n_tokens": 2, "finish": "stop"},
        {"text": None, "error": "it broke", "n_tokens": 0},
        {"tokens": None},
    ],
)
def test_tokens_that_disagree_with_their_count_are_refused(db: Database, wrong: dict) -> None:
    """The view and the counts would say different things."""
    job_id = planned_job(db, 1, policies=["full"])
    lease = claimed(db)
    right = one_completion(db, job_id, "text")
    with pytest.raises(RecordError, match="token records where"):
        results.commit_shard(db, lease, ShardResults([replace(right, **wrong)], [], []))
    assert jobs.progress(db, job_id).shards == {"leased": 1}


def one_completion(db: Database, job_id: int, text: str) -> OutcomeRow:
    """Two tokens for the only sample of the job."""
    [run] = jobs.runs(db, job_id)
    [sample] = results.samples_of(db, run.benchmark_id, 0, 1)
    arrays = TokenArrays(*(np.zeros(2, t) for t in (np.int32, np.int16, np.int16, np.int16, np.float32)))
    return OutcomeRow(run.id, sample.id, text, None, "eos", 2, 3, 0, True, arrays)


def test_what_no_database_keeps_is_replaced_in_texts(db: Database) -> None:
    """A model may write NUL; the shard must not die of it, and both databases keep the same text."""
    job_id = planned_job(db, 1, policies=["full"])
    lease = claimed(db)
    results.commit_shard(db, lease, ShardResults([one_completion(db, job_id, "a\x00b\ud800")], [], []))
    [received] = results.completions(db, job_id=job_id)
    assert received.outcome.text == "a\ufffdb?"


def test_scores_of_what_is_not_in_the_shard_are_refused(db: Database) -> None:
    """PostgreSQL does not look up what a score refers to."""
    planned_job(db, 2, policies=["full"])
    lease = claimed(db)
    made = results_of(db, lease)
    stray = replace(made.scores[0], sample_id=99)
    with pytest.raises(RecordError, match="scores or traces of samples not its own"):
        results.commit_shard(db, lease, replace(made, scores=[*made.scores, stray]))
    results.commit_shard(db, lease, made)


def test_a_summary_reads_no_texts(db: Database) -> None:
    """Nor tokens: they would fill the memory of whoever finalises a big job."""
    job_id = planned_job(db)
    work(db)
    asked: list[str] = []
    event.listen(db._engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    assert len(results.run_data(db, jobs.runs(db, job_id)[1].id).sample) == 11
    assert any("outcome.n_tokens" in statement for statement in asked)
    for column in ("outcome.text", "outcome.tokens", "outcome.token_ids", "sample.prompt", "sample.reference"):
        assert not any(column in statement for statement in asked)
