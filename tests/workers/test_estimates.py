"""The run's summary: ratios of sums, paired comparisons, intervals over source groups."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.records import RunData
from workers.estimates import FEWEST_GROUPS, _ratio, estimate, summarise

MS = 1_000_000
GROUPS = [f"file{i}.py" for i in range(8)]


def run_data(decode_ms, decode_tokens, *, scores=None, full=None, **changes) -> RunData:
    """Batches of one sample each, a group each."""
    n = len(decode_ms)
    groups = np.array((GROUPS * n)[:n], object)
    tokens = np.asarray(decode_tokens, np.int64) + 1
    data = RunData(
        run_id=1,
        job_id=1,
        policy="confidence threshold=0.9",
        policy_kind="confidence",
        benchmark="mine",
        pinned={"n_layers": 30},
        sample=np.arange(n),
        source_group=groups,
        n_tokens=tokens,
        error=np.zeros(n, bool),
        stopped=np.zeros(n, bool),
        shown=np.ones(n, bool),
        cut=np.zeros(n, bool),
        isolated=np.zeros(n, bool),
        scores={name: np.asarray(values, np.float64) for name, values in (scores or {}).items()},
        batch=np.arange(n),
        batch_group=groups,
        prefill_ns=np.full(n, 50 * MS),
        decode_ns=np.asarray(decode_ms, np.int64) * MS,
        decode_tokens=np.asarray(decode_tokens, np.int64),
        flops=np.full(n, 10**12),
        ideal_ns=np.asarray(decode_ms, np.int64) * MS // 2,
        timed=np.ones(n, bool),
        exit_layer_sum=24 * int(tokens.sum()),
        layers_run_sum=27 * int(tokens.sum()),
        exit_histogram={30: 3, 18: int(tokens.sum()) - 3},
        stop_histogram={},
        decisions={"full": 3, "exit": int(tokens.sum()) - 3},
        full=full,
    )
    return replace(data, **changes)


def test_a_speedup_is_a_ratio_of_sums():
    """Per generated token, not the mean of the batches' ratios: the batch that took longest counts most."""
    full = run_data([100, 300], [10, 10])
    summary = summarise(run_data([50, 300], [10, 20], full=full))
    assert summary["speedup_token"]["value"] == pytest.approx((400 / 20) / (350 / 30))
    assert summary["speedup_request"]["value"] == pytest.approx(500 / 450)
    assert summary["speedup_ideal"] == pytest.approx((200 / 20) / (175 / 30))
    assert summary["efficiency"] == pytest.approx(1)
    assert summary["tokens_per_second"] == pytest.approx(30 / 0.350)


def test_a_slowdown_is_below_one():
    """Writing less is no speed: half the tokens in three quarters of the time is slower per token."""
    full = run_data([100] * 8, [10] * 8)
    summary = summarise(run_data([75] * 8, [5] * 8, full=full))
    assert summary["speedup_token"] == pytest.approx({"value": 2 / 3, "low": 2 / 3, "high": 2 / 3})
    assert summary["speedup_request"]["value"] > 1


def test_only_batches_that_both_runs_timed_are_compared():
    """A batch that either run did while its worker was not alone counts for no speed, and is counted."""
    full = run_data([100, 1, 100, 100], [10] * 4, timed=np.array([True, False, True, True]))
    run = run_data([50, 50, 9999, 50], [10] * 4, full=full, timed=np.array([True, True, False, True]))
    summary = summarise(run)
    assert summary["speedup_token"]["value"] == pytest.approx(2)
    assert summary["untimed_batches"] == 1
    assert summary["isolated"] == 0
    assert summary["decode_ms_p50"] == pytest.approx(50)
    assert summary["flops"] == 4 * 10**12


def test_samples_done_in_pieces_are_counted():
    """What is left out of the promise of equal bytes is not left out of the report."""
    run = replace(run_data([50] * 4, [10] * 4), isolated=np.array([False, True, True, False]))
    assert summarise(run)["isolated"] == 2


def test_batches_are_paired_by_their_index():
    """A run that lacks a batch (its shard died) is compared on the others."""
    full = run_data([100, 500, 100], [10] * 3)
    run = run_data([50, 100], [10] * 2, full=full, batch=np.array([0, 2]))
    assert summarise(run)["speedup_token"]["value"] == pytest.approx(200 / 150)


def test_without_a_timed_batch_there_is_no_speed():
    """None, never a guess and never a NaN in the JSON; quality is estimated all the same."""
    untimed = np.zeros(8, bool)
    full = run_data([100] * 8, [10] * 8, timed=untimed, scores={"em": [1] * 8})
    summary = summarise(run_data([50] * 8, [10] * 8, timed=untimed, scores={"em": [0, 1] * 4}, full=full))
    nothing = {"value": None, "low": None, "high": None}
    assert summary["speedup_token"] == summary["speedup_request"] == nothing
    for name in (
        "speedup_ideal",
        "efficiency",
        "prefill_ms_p50",
        "decode_ms_p50",
        "decode_ms_p95",
        "tokens_per_second",
    ):
        assert summary[name] is None
    assert summary["untimed_batches"] == 8
    assert summary["metrics"]["em"]["value"] == 0.5
    json.dumps(summary, allow_nan=False)


def test_batches_that_decoded_nothing_have_no_speed():
    """Every completion ended with its first token: no step was timed, nothing is divided by zero."""
    full = run_data([100] * 8, [10] * 8)
    summary = summarise(run_data([0] * 8, [0] * 8, full=full))
    assert summary["speedup_token"] == {"value": None, "low": None, "high": None}
    assert summary["tokens_per_second"] is None
    json.dumps(summary, allow_nan=False)


def test_a_draw_without_tokens_has_no_speed():
    """One group of six decoded anything: the value is known, but draws without that group leave it undefined."""
    full = run_data([100] * 6, [10] * 6)
    speedup = summarise(run_data([50] + [0] * 5, [10] + [0] * 5, full=full))["speedup_token"]
    assert speedup == {"value": pytest.approx(2), "low": None, "high": None}


def test_the_baseline_is_held_against_itself():
    """Exactly 1 and exactly 0, without width."""
    summary = summarise(run_data(range(100, 108), range(1, 9), scores={"es": np.linspace(0, 1, 8)}))
    assert summary["speedup_token"] == summary["speedup_request"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert summary["change"]["es"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_changes_are_paired_by_sample():
    """Only samples that both runs have a score for; `rouge_l` also as a share of full depth's."""
    nan = float("nan")
    full = run_data([1] * 4, [1] * 4, scores={"rouge_l": [0.5, 0.9, 1.0, 0.5], "em": [1, 0, 1, nan]})
    scores = {"rouge_l": [0.4, 0.8, nan], "em": [0, 1, 1], "token_agreement": [1, 1, 1]}
    run = run_data([1] * 3, [1] * 3, scores=scores, full=full, sample=np.array([0, 2, 3]))
    summary = summarise(run)
    assert summary["metrics"]["rouge_l"]["value"] == pytest.approx(0.6)
    assert list(summary["change"]) == ["em", "rouge_l", "rouge_l_relative"]
    assert summary["change"]["rouge_l"]["value"] == pytest.approx((-0.1 - 0.2) / 2)
    assert summary["change"]["rouge_l_relative"]["value"] == pytest.approx(1.2 / 1.5 - 1)
    assert summary["change"]["em"]["value"] == pytest.approx((-1 + 0) / 2)


def test_counts_depth_and_histograms():
    """Weighted by tokens; keys are text, as JSON wants them; errors are not among what was shown or not."""
    run = run_data(
        [10] * 4,
        [9] * 4,
        error=np.array([False, False, False, True]),
        stopped=np.array([True, True, False, False]),
        shown=np.array([False, True, True, False]),
        cut=np.array([True, False, False, False]),
        n_tokens=np.array([10, 5, 5, 0]),
        exit_layer_sum=24 * 20,
        layers_run_sum=27 * 20,
        exit_histogram={30: 4, 6: 16},
        stop_histogram={18: 2},
        decisions={"full": 4, "exit": 16, "stop": 2},
    )
    summary = summarise(run)
    expected = {"samples": 4, "errors": 1, "tokens": 20, "stops": 2, "cut_prompts": 1, "n_layers": 30}
    assert {name: summary[name] for name in expected} == expected
    assert summary["shown"] == pytest.approx(2 / 3)
    assert (summary["mean_exit_layer"], summary["mean_layers_run"]) == (24, 27)
    assert summary["layers_skipped"] == pytest.approx(0.1)
    assert summary["exit_histogram"] == {"6": 16, "30": 4}
    assert summary["stop_histogram"] == {"18": 2}
    assert summary["decisions"] == {"full": 4, "exit": 16, "stop": 2}


def test_a_run_of_errors_has_a_summary():
    """Nothing completed: counts, and None for all that would be a mean of nothing."""
    n = 7
    nothing = np.zeros(n, np.int64)
    run = run_data([1] * n, [1] * n, error=np.ones(n, bool), n_tokens=nothing, timed=np.zeros(n, bool))
    run = replace(run, scores={"em": np.full(n, np.nan)}, exit_layer_sum=0, layers_run_sum=0, decisions={})
    summary = summarise(run)
    assert summary["errors"] == n
    for name in ("shown", "mean_exit_layer", "mean_layers_run", "layers_skipped"):
        assert summary[name] is None
    assert summary["metrics"]["em"] == summary["change"]["em"] == {"value": None, "low": None, "high": None}
    assert summary["decisions"] == {"full": 0, "exit": 0, "stop": 0}
    json.dumps(summary, allow_nan=False)


def test_an_interval_needs_enough_groups():
    """A handful of groups cannot carry a 95 % interval, however many samples they have."""
    groups = np.array([GROUPS[i % (FEWEST_GROUPS - 1)] for i in range(100)], object)
    few = estimate(_ratio, groups, np.arange(100), np.ones(100))
    assert few == {"value": pytest.approx(49.5), "low": None, "high": None}
    groups[0] = "one more"
    assert estimate(_ratio, groups, np.arange(100), np.ones(100))["low"] is not None


def test_an_interval_is_as_wide_as_theory_says():
    """Independent samples: mean ± 1.96 standard errors, and no error of the replicates' mean in their place."""
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = estimate(_ratio, np.array([f"{i}" for i in range(400)], object), values, np.ones(400))
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_intervals_cover_the_truth_because_groups_are_drawn_whole():
    """Batches of a file share what slows them down: over groups 95 % means about 95 %, over batches it does not."""
    rng = np.random.default_rng(7)
    covered = {"groups": 0, "batches": 0}
    for _ in range(100):
        shared = np.repeat(rng.normal(0, 0.3, 40), 5)  # 40 files of 5 batches
        full_ns, tokens = rng.gamma(9, 1, 200), rng.integers(5, 80, 200)
        run_ns = full_ns / np.exp(shared + rng.normal(0, 0.05, 200))
        truth = 1 / np.exp(0.3**2 / 2 + 0.05**2 / 2)  # E[full] / E[run], both independent of the tokens
        columns = (full_ns * tokens, tokens, run_ns * tokens, tokens)
        for name, groups in (("groups", np.repeat(np.arange(40), 5)), ("batches", np.arange(200))):
            interval = estimate(_ratio_of_sums, groups.astype(object), *columns)
            covered[name] += interval["low"] <= truth <= interval["high"]
    assert covered["groups"] >= 87
    assert covered["batches"] < 80


def _ratio_of_sums(full, full_tokens, run, run_tokens, *, axis):
    return (full.sum(axis) / full_tokens.sum(axis)) / (run.sum(axis) / run_tokens.sum(axis))


@given(
    st.lists(
        st.tuples(st.sampled_from(GROUPS), st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 50)),
        min_size=1,
        max_size=40,
    )
)
def test_estimates_hold_for_any_batches(rows):
    """The value is the ratio of sums, the interval is ordered and repeatable, and the rows' order does not matter."""
    groups, top, bottom, _ = (np.array(column) for column in zip(*rows, strict=True))
    found = estimate(_ratio, groups.astype(object), top, bottom)
    assert found["value"] == pytest.approx(top.sum() / bottom.sum())
    assert estimate(_ratio, groups[::-1].astype(object), top[::-1], bottom[::-1]) == pytest.approx(found)
    if found["low"] is not None:
        assert found["low"] <= found["high"]
        ratios = top / bottom
        assert ratios.min() * 0.999 <= found["low"] <= found["high"] <= ratios.max() * 1.001


def test_many_groups_stay_small_and_quick():
    """Twenty thousand groups are drawn in parts: tens of megabytes, not a gigabyte."""
    import tracemalloc

    n = 20_000
    groups = np.array([str(i) for i in range(n)], object)
    tracemalloc.start()
    estimate(_ratio, groups, np.arange(n), np.ones(n))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
