"""From what a run left in the record to its summary: speed, quality and their 95 % intervals.

Every speed is a ratio of sums, every comparison is paired with the `full` run of the same benchmark, and what is drawn
anew for an interval are whole source groups, because samples of one file or task are not independent.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import DegenerateDataWarning, bootstrap

from db.records import RunData

Numbers: TypeAlias = npt.NDArray[Any]  # nanoseconds and tokens are whole, scores are not
#: a figure from sums over groups: arrays that end in one axis of the same length -> that axis summed away
Figure: TypeAlias = Callable[..., Numbers]
Estimate: TypeAlias = dict[str, float | None]

RESAMPLES = 2_000
#: with five groups even the whole range of what was seen covers the truth less than 95 times in 100 (1 - 2 ** -4)
FEWEST_GROUPS = 6
SEED = 20240414
#: of one gathered array, so that an interval over many groups stays within some tens of megabytes
GATHERED_VALUES = 1_000_000

MILLISECOND = 1e6
SECOND = 1e9


def summarise(run: RunData) -> dict[str, Any]:
    """The run's summary as plain JSON values; what cannot be known is None.

    `run.full` is what the run is held against, a run without one is the baseline itself; `n_layers` is pinned.
    """
    full = run.full or run
    return {
        **_counts(run),
        **_depth(run, run.pinned["n_layers"]),
        **_speed(run, full),
        **_latency(run),
        **_drafts(run),
        "metrics": {name: mean_of(run.source_group, values) for name, values in run.scores.items()},
        "change": _change(run, full),
        "change_from_original": {} if run.original is None else _change(run, run.original),
        "exit_histogram": _by_layer(run.exit_histogram),
        "stop_histogram": _by_layer(run.stop_histogram),
        "decisions": {name: int(run.decisions.get(name, 0)) for name in ("full", "exit", "stop")},
    }


def estimate(figure: Figure, groups: npt.NDArray[np.object_], *columns: npt.ArrayLike) -> Estimate:
    """A figure and its 95 % interval: paired percentile bootstrap over groups (Efron and Tibshirani 1993, ch. 13).

    groups and columns: one place a sample or batch. figure gets the columns summed by group and sums over its last
    axis. Value, low or high is None where it is not finite, the interval also below `FEWEST_GROUPS` groups.
    """
    names, group = np.unique(groups.astype(str), return_inverse=True)
    sums = [np.bincount(group, np.asarray(column, np.float64), minlength=len(names)) for column in columns]
    value = _finite(figure(*sums, axis=-1))
    if value is None or len(names) < FEWEST_GROUPS:
        return {"value": value, "low": None, "high": None}
    low, high = _interval(figure, sums)
    return {"value": value, "low": _finite(low), "high": _finite(high)}


def _interval(figure: Figure, sums: list[Numbers]) -> tuple[float, float]:
    """Of a figure over groups; nan where a draw of groups leaves it undefined, such as one without a single token."""
    # A draw without a single right token makes a relative change infinite; scipy takes the spread of all draws.
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            sums,
            figure,
            n_resamples=RESAMPLES,
            batch=max(1, GATHERED_VALUES // len(sums[0])),
            vectorized=True,
            paired=True,
            axis=-1,
            confidence_level=0.95,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
    return found.confidence_interval.low, found.confidence_interval.high


def _ratio(top: Numbers, bottom: Numbers, *, axis: int) -> Numbers:
    """Σ top / Σ bottom."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(top.sum(axis), bottom.sum(axis))


def _relative_change(new: Numbers, old: Numbers, *, axis: int) -> Numbers:
    """Σ new / Σ old - 1."""
    return _ratio(new, old, axis=axis) - 1


def _ratio_of_rates(full: Numbers, full_tokens: Numbers, run: Numbers, run_tokens: Numbers, *, axis: int) -> Numbers:
    """(Σ full / Σ full tokens) / (Σ run / Σ run tokens): above 1 where the run costs less per token."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _ratio(full, full_tokens, axis=axis) / _ratio(run, run_tokens, axis=axis)


def _counts(run: RunData) -> dict[str, Any]:
    completed = ~run.error
    return {
        "samples": len(run.sample),
        "errors": int(run.error.sum()),
        "tokens": int(run.n_tokens.sum()),
        "stops": int(run.stopped.sum()),
        "cut_prompts": int(run.cut.sum()),
        "isolated": int(run.isolated.sum()),
        "shown": float(run.shown[completed].mean()) if completed.any() else None,
        "flops": int(run.flops.sum()),
        "untimed_batches": int((~run.timed).sum()),
    }


def _depth(run: RunData, n_layers: int) -> dict[str, Any]:
    """Means over tokens: a long completion counts for more than a short one."""
    tokens = int(run.n_tokens.sum())
    layers_run = run.layers_run_sum / tokens if tokens else None
    return {
        "n_layers": n_layers,
        "mean_exit_layer": run.exit_layer_sum / tokens if tokens else None,
        "mean_layers_run": layers_run,
        "layers_skipped": None if layers_run is None else 1 - layers_run / n_layers,
    }


def _speed(run: RunData, full: RunData) -> dict[str, Any]:
    """Over the batches that both runs timed; full depth's time is the one beside the run where it was done again."""
    ours = run.timed & np.isin(run.batch, full.batch[full.timed])
    theirs = full.timed & np.isin(full.batch, run.batch[run.timed])
    groups, tokens, full_tokens = run.batch_group[ours], run.decode_tokens[ours], full.decode_tokens[theirs]
    if run.full_decode_ns is None:
        full_decode, prefill = full.decode_ns[theirs], full.prefill_ns[theirs]
    else:
        full_decode, prefill = run.full_decode_ns[ours], run.prefill_ns[ours]
    token = estimate(_ratio_of_rates, groups, full_decode, full_tokens, run.decode_ns[ours], tokens)
    request = estimate(_ratio, groups, prefill + full_decode, run.prefill_ns[ours] + run.decode_ns[ours])
    ideal = _finite(_ratio_of_rates(full.ideal_ns[theirs], full_tokens, run.ideal_ns[ours], tokens, axis=-1))
    return {
        "speedup_token": token,
        "speedup_ideal": ideal,
        "efficiency": token["value"] / ideal if token["value"] and ideal else None,
        "full_timed_again": run.full_decode_ns is not None,
        "speedup_request": request,
    }


def _latency(run: RunData) -> dict[str, Any]:
    """Of the timed batches; tokens per second are those of the decode steps, which write all but a row's first."""
    prefill, decode = run.prefill_ns[run.timed] / MILLISECOND, run.decode_ns[run.timed] / MILLISECOND
    return {
        "prefill_ms_p50": _percentile(prefill, 50),
        "decode_ms_p50": _percentile(decode, 50),
        "decode_ms_p95": _percentile(decode, 95),
        "tokens_per_second": _finite(_ratio(run.decode_tokens[run.timed] * SECOND, run.decode_ns[run.timed], axis=-1)),
    }


def _drafts(run: RunData) -> dict[str, Any]:
    """Over all batches. The share is of all drafts: one that was undone behind a wrong one is a loss as well."""
    kept_share = run.drafts_kept / run.drafted if run.drafted else None
    return {"drafted": run.drafted, "drafts_kept": run.drafts_kept, "drafts_kept_share": kept_share}


def mean_of(groups: npt.NDArray[np.object_], values: Numbers) -> Estimate:
    """Over the samples that have the value; groups: of each sample."""
    known = ~np.isnan(values)
    return estimate(_ratio, groups[known], values[known], np.ones(known.sum()))


def _change(run: RunData, full: RunData) -> dict[str, Estimate]:
    """Mean differences over the samples that both runs have a score for, and the relative one of `rouge_l`."""
    ours, theirs = np.isin(run.sample, full.sample), np.isin(full.sample, run.sample)
    groups = run.source_group[ours]
    change = {}
    for name in run.scores.keys() & full.scores.keys():
        new, old = run.scores[name][ours], full.scores[name][theirs]
        change[name] = mean_of(groups, new - old)
        if name == "rouge_l":
            known = ~np.isnan(new - old)
            change["rouge_l_relative"] = estimate(_relative_change, groups[known], new[known], old[known])
    return dict(sorted(change.items()))


def _by_layer(histogram: dict[int, int]) -> dict[str, int]:
    return {str(layer): int(count) for layer, count in sorted(histogram.items())}


def _percentile(values: Numbers, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
