"""From the record to a JobReport, through the doors of `db`."""

from itertools import groupby
from string import ascii_uppercase
from typing import Any

from cluster.reports.examples import Decode, pick_examples
from cluster.reports.labels import Labels, labels_of
from cluster.reports.model import BenchmarkReport, Estimate, JobReport, RunReport, RunSummary
from cluster.reports.overlap import overlap_of
from db import devices, jobs
from db.records import JobRow, Rollup, RunRow
from db.rollups import rollups_of_job
from db.session import Database

#: examples in a report, shared out among its benchmarks
EXAMPLES = 8

#: of one benchmark, however many there are
FEWEST_EXAMPLES = 2

BILLIONTH = 1e-9


def build_report(db: Database, job_id: int, decode: Decode | None = None, *, with_examples: bool = True) -> JobReport:
    """What a job found. Of a job under way: the sums so far, marked partial.

    decode: the texts of token ids, one each; without it examples are plain text, not coloured by exit layer.
    with_examples: without them nothing but sums and summaries is read, whatever the size of the job.
    Raises `db.errors.BadInput` where there is no such job.
    """
    job, (done, total), runs = jobs.job(db, job_id), jobs.batches(db, job_id), jobs.runs(db, job_id)
    by_benchmark = [list(group) for _, group in groupby(runs, key=lambda run: run.benchmark_id)]
    room = 0 if not with_examples else max(FEWEST_EXAMPLES, EXAMPLES // len(by_benchmark)) if by_benchmark else 0
    pinned = job.pinned or {}
    kernels = devices.kernels_of(db, job_id)
    is_partial = not job.state.ended or not runs or any(run.summary is None for run in runs)
    sums = rollups_of_job(db, job_id) if is_partial else {}
    labels = labels_of(db, runs)
    return JobReport(
        job_id=job.id,
        name=job.name,
        state=job.state.value,
        error=job.error,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        partial=is_partial,
        batches_done=done,
        batches_total=total,
        model=_asked_or_pinned(job, "model") or "",
        exits=_asked_or_pinned(job, "exits"),
        provenance=pinned | ({"kernels": kernels} if kernels else {}),
        benchmarks=[_benchmark(db, runs, sums, pinned, decode, room, labels) for runs in by_benchmark],
    )


def _asked_or_pinned(job: JobRow, field: str) -> str | None:
    return (job.pinned or {}).get(field) or job.spec.get(field)


def _benchmark(
    db: Database,
    runs: list[RunRow],
    sums: dict[int, Rollup],
    pinned: dict[str, Any],
    decode: Decode | None,
    room: int,
    labels: Labels,
) -> BenchmarkReport:
    found = jobs.benchmark(db, runs[0].benchmark_id)
    summaries = _summaries(runs, sums, pinned.get("n_layers"))
    texts_kept = found.content_hash not in pinned.get("withheld", {})
    reports = [
        RunReport(
            run_id=run.id,
            mark=mark_of(place),
            policy=run.policy,
            kind=run.policy_kind,
            options=run.policy_spec.get(run.policy_kind, {}),
            summary=summary,
            labels=labels.runs.get(run.id),
        )
        for place, (run, summary) in enumerate(zip(runs, summaries, strict=True))
    ]
    return BenchmarkReport(
        name=runs[0].benchmark,
        version=found.version,
        content_hash=found.content_hash,
        samples=found.n_samples,
        left_out=list(found.left_out),
        texts_kept=texts_kept,
        overlap=overlap_of(db, found, reports, ended=not sums),
        runs=reports,
        examples=pick_examples(db, reports, room, decode) if room and texts_kept else [],
        judges=labels.judges.get(runs[0].benchmark_id),
    )


def mark_of(place: int) -> str:
    """A to Z, then AA, AB, ..."""
    rounds, letter = divmod(place, len(ascii_uppercase))
    return (mark_of(rounds - 1) if rounds else "") + ascii_uppercase[letter]


def _summaries(runs: list[RunRow], sums: dict[int, Rollup], n_layers: int | None) -> list[RunSummary]:
    """Of each run the stored summary while it is in force, the sums so far elsewhere. sums: none where the job ended.

    Only a policy that was added to a finished job has sums beside summaries: what it is held against is known when it
    ends, because full depth is timed again beside it.
    """
    stored = [run.summary if _is_in_force(run, sums) else None for run in runs]
    is_added = any(summary is not None for summary in stored)
    full = next((sums.get(run.id) for run in runs if run.policy_kind == "full" and not is_added), None)
    return [
        live_summary(sums[run.id], full, n_layers) if summary is None else RunSummary.model_validate(summary)
        for run, summary in zip(runs, stored, strict=True)
    ]


def _is_in_force(run: RunRow, sums: dict[int, Rollup]) -> bool:
    """Whether a stored summary counts all that is done: that of a job which failed and was resumed soon does not."""
    return run.summary is not None and (run.id not in sums or run.summary["samples"] == sums[run.id].samples)


def live_summary(run: Rollup, full: Rollup | None, n_layers: int | None) -> RunSummary:
    """What can be said of a run from its sums: no intervals, no percentiles."""
    layers_run = _ratio(run.layers_run_sum, run.tokens)
    metrics = _means(run)
    speed = _live_speed(run, full)
    return RunSummary(
        samples=run.samples,
        errors=run.errors,
        tokens=run.tokens,
        stops=run.stops,
        cut_prompts=run.cut_prompts,
        isolated=run.isolated,
        shown=_ratio(run.shown, run.samples - run.errors),
        n_layers=n_layers,
        mean_exit_layer=_ratio(run.exit_layer_sum, run.tokens),
        mean_layers_run=layers_run,
        layers_skipped=None if layers_run is None or not n_layers else 1 - layers_run / n_layers,
        tokens_per_second=_ratio(run.decode_tokens, run.decode_ns * BILLIONTH),
        flops=run.flops,
        untimed_batches=run.untimed_batches,
        drafted=run.drafted,
        drafts_kept=run.drafts_kept,
        drafts_kept_share=_ratio(run.drafts_kept, run.drafted),
        metrics={name: Estimate(value=value) for name, value in metrics.items()},
        change=_live_change(metrics, _means(full)) if full is not None else {},
        exit_histogram={str(layer): number for layer, number in sorted(run.exit_histogram.items())},
        stop_histogram={str(layer): number for layer, number in sorted(run.stop_histogram.items())},
        decisions={"full": run.full_tokens, "exit": run.exit_tokens, "stop": run.stops},
        **speed,
    )


def _live_speed(run: Rollup, full: Rollup | None) -> dict[str, Any]:
    """Ratios of sums, only while both runs have timed the same number of batches: otherwise they are not paired."""
    if full is None or run.timed_batches != full.timed_batches:
        return {}
    speedup = _ratio_of_rates(full.decode_ns, full.decode_tokens, run.decode_ns, run.decode_tokens)
    ideal = _ratio_of_rates(full.ideal_ns, full.decode_tokens, run.ideal_ns, run.decode_tokens)
    request = _ratio(full.prefill_ns + full.decode_ns, run.prefill_ns + run.decode_ns)
    return {
        "speedup_token": Estimate(value=speedup),
        "speedup_ideal": ideal,
        "efficiency": _ratio(speedup, ideal),
        "speedup_request": Estimate(value=request),
    }


def _means(run: Rollup) -> dict[str, float]:
    return {
        name: run.score_sums[name] * BILLIONTH / number for name, number in sorted(run.score_counts.items()) if number
    }


def _live_change(metrics: dict[str, float], full: dict[str, float]) -> dict[str, Estimate]:
    change = {name: Estimate(value=value - full[name]) for name, value in metrics.items() if name in full}
    if "rouge_l" in change:
        relative = _ratio(metrics["rouge_l"] - full["rouge_l"], full["rouge_l"])
        change["rouge_l_relative"] = Estimate(value=relative)
    return change


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return top / bottom if top is not None and bottom else None


def _ratio_of_rates(full: int, full_tokens: int, run: int, run_tokens: int) -> float | None:
    """(full / its tokens) / (run / its tokens)."""
    return _ratio(_ratio(full, full_tokens), _ratio(run, run_tokens))
