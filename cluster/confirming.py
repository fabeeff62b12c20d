"""`replay --confirm`: finalists of a replay run live, and what a replay cannot know stands beside what it said.

Two things part them. Skipped keys and values make a later token's signals others than those of the trace: seen where a
token behind the very same text is decided otherwise. And a token that differs changes the context of all that follow:
the rest of the drift. Every finalist is run under each way of paying for skipped layers.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster import jobs as cluster_jobs
from cluster.errors import Interrupted
from cluster.grids import ReplaySpec
from cluster.replays import ReplayedPolicy, ReplayReport, replay_trace, speed_of
from cluster.settings import Settings
from cluster.spec import JobSpec, parse_job
from cluster.traced import Trace
from db import jobs, results
from db.records import CompletionRow, JobState, Progress, RunRow
from db.session import Database
from engine.errors import BadInput, EngineError
from engine.record import Decision
from engine.replay.decide import decide
from engine.replay.figures import pareto_front
from engine.replay.traced import Traced
from engine.spec import PolicySpec, Sec, parse_policy

OnLive = Callable[[Progress], None]  #: how far the live job is

#: of `engine.replay.figures.FIGURES`, those that a live run has as well
COMPARED = ("tokens_right", "agreement", "mean_exit_layer", "speedup_ideal", "stop_share")


@dataclass(frozen=True)
class Pair:
    """One figure, replayed and measured."""

    replayed: float | None
    measured: float | None

    @property
    def drift(self) -> float | None:
        """Measured less replayed."""
        return None if self.replayed is None or self.measured is None else self.measured - self.replayed


@dataclass(frozen=True)
class Confirmed:
    """A finalist, live beside replayed, under one way of paying for skipped layers."""

    policy: str
    kv: str
    job_id: int  #: the live one
    figures: dict[str, Pair]
    compared: int  #: tokens behind the first that the policy wrote itself, up to the first that is not the target
    decided_otherwise: int  #: of these: keys and values, or a tie, made the difference


def confirm_live(
    db: Database,
    trace: Trace,
    found: ReplayReport,
    count: int,
    settings: Settings,
    *,
    inline: bool = False,
    on_live: OnLive = lambda now: None,
) -> list[Confirmed]:
    """Run the best of a replay on the trace's benchmark, as a job of its own in the same record.

    count: finalists, spread over the Pareto front of those that can be run. Raises `BadInput` where none can be, or the
    benchmark is not what it was, and `EngineError` where the job fails.
    """
    finalists = [parse_policy(one.spec) for one in _finalists(found, count)]
    variants = list(dict.fromkeys(variant for one in finalists for variant in _ways(one)))
    replayed = replay_trace(trace, ReplaySpec(policies=[one.dump() for one in variants])).policies
    name = f"confirm {trace.run.job_id}"
    job_id = run_live(db, trace, name, variants, ["token_agreement"], settings, inline=inline, on_live=on_live)
    runs = [run for run in jobs.runs(db, job_id) if parse_policy(run.policy_spec) in variants]
    return [
        _confirmed(db, trace, one, run, told)
        for told, one in zip(replayed, variants, strict=True)
        for run in runs
        if parse_policy(run.policy_spec) == one
    ]


def run_live(
    db: Database,
    trace: Trace,
    name: str,
    policies: Sequence[PolicySpec],
    metrics: Sequence[str],
    settings: Settings,
    *,
    inline: bool,
    on_live: OnLive = lambda now: None,
) -> int:
    """Run policies on a trace's benchmark, as a job under this name. Returns its number, when it is done.

    Raises `BadInput` where the benchmark is not what it was, and `EngineError` where the job fails.
    """
    job_id = see_done(db, _live_spec(db, trace, name, policies, metrics), settings, inline=inline, on_live=on_live)
    _check_same(db, trace, job_id)
    return job_id


def see_done(
    db: Database,
    spec: JobSpec,
    settings: Settings,
    *,
    inline: bool,
    on_live: OnLive = lambda now: None,
    go_on: str = "the same command goes on with it",
) -> int:
    """Submit a job, or find the one that was interrupted, and work on it until it is done. Returns its number.

    go_on: what is said of how to go on where it is interrupted. Raises `BadInput`, `EngineError`, `Interrupted`.
    """
    job_id = _begun(db, spec) or cluster_jobs.submit(db, spec)
    try:
        state = cluster_jobs.work(
            db,
            job_id,
            workers=settings.workers,
            inline=inline,
            gpus_per_worker=settings.gpus_per_worker,
            ray_address=settings.ray_address,
            lease_seconds=settings.lease_seconds,
            on_progress=on_live,
        )
    except KeyboardInterrupt:
        raise Interrupted(f"job {job_id}: interrupted; {go_on.format(job_id=job_id)}") from None
    if state is not JobState.DONE:
        raise EngineError(f"job {job_id}, {spec.name!r}, {state}; `shortstop show {job_id}` tells why.")
    return job_id


def _begun(db: Database, spec: JobSpec) -> int | None:
    """The newest job of the very same spec that has not ended, if it is among the last thousand."""
    body = json.loads(json.dumps(cluster_jobs.anchored(spec, Path.cwd()).dump()))
    begun = (one.id for one in jobs.list_jobs(db, limit=1000) if not one.state.ended and one.spec == body)
    return next(begun, None)


def _finalists(found: ReplayReport, count: int) -> list[ReplayedPolicy]:
    able = [one for one in found.policies if one.kind not in ("full", "oracle")]
    speeds = np.array([speed_of(one) for one in able])
    qualities = np.array([one.figures["tokens_right"].value for one in able], float)
    front = [able[place] for place in np.flatnonzero(pareto_front(speeds, qualities))]
    live = sorted(front, key=lambda one: -speed_of(one))
    if not live:
        raise BadInput("confirm: no policy of the replay can be run; replay others than full and oracle.")
    places = np.unique(np.linspace(0, len(live) - 1, min(count, len(live))).round().astype(int))
    return [live[place] for place in places]


def _ways(policy: PolicySpec) -> list[PolicySpec]:
    """The policy under every way of paying that it allows."""
    if isinstance(policy, Sec):
        return [policy]
    named = {} if policy.name is None else {"name": None}
    return [policy.model_copy(update={"kv": kv} | named) for kv in ("copy", "recompute", "mask")]


def _live_spec(
    db: Database, trace: Trace, name: str, policies: Sequence[PolicySpec], metrics: Sequence[str]
) -> JobSpec:
    """The trace's own spec with policies in the place of the trace, on its one benchmark."""
    runs = jobs.runs(db, trace.run.job_id)
    place = list(dict.fromkeys(run.benchmark_id for run in runs)).index(trace.run.benchmark_id)
    spec = dict(jobs.job(db, trace.run.job_id).spec)
    spec |= {
        "trace": None,
        "name": name,
        "benchmarks": [spec["benchmarks"][place]],
        "policies": ["full", *(one.dump() for one in policies)],
        "metrics": [*metrics],
        "generation": spec["generation"] | {"batch_size": trace.pinned.batch_size},
        "threads": trace.pinned.threads,
    }
    return parse_job(spec)


def _check_same(db: Database, trace: Trace, job_id: int) -> None:
    """Whether a live job is of the trace's weights, exits and benchmark. Raises `BadInput`."""
    pinned = jobs.job(db, job_id).pinned or {}
    for field in ("weights_hash", "exits_hash", "tokenizer_hash"):
        if pinned[field] != getattr(trace.pinned, field):
            raise BadInput(f"{field} has changed since job {trace.run.job_id} was traced; trace it again.")
    if [*pinned["benchmarks"].values()] != [trace.pinned.benchmarks[trace.run.benchmark]]:
        raise BadInput(
            f"benchmark {trace.run.benchmark!r} has changed since job {trace.run.job_id} was traced; trace it again."
        )


def _confirmed(db: Database, trace: Trace, policy: PolicySpec, run: RunRow, told: ReplayedPolicy) -> Confirmed:
    compared = otherwise = right = written = 0
    for piece, live in _side_by_side(db, trace, run):
        decisions = decide(policy, piece)
        layers = piece.layers[decisions.places]
        stops = np.zeros(len(piece), np.bool_) if decisions.stops is None else decisions.stops
        for begin, length, row in zip(piece.starts.tolist(), piece.lengths.tolist(), live, strict=True):
            tokens = None if row is None else row.outcome.tokens
            if tokens is None:
                continue
            ids, target = tokens.token_ids, piece.targets[begin : begin + length]
            both = min(len(ids), length)
            same = ids[:both] == target[:both]
            written += len(ids) - int((tokens.decisions == Decision.STOP).sum())
            right += int(same.sum())
            end = min(both, 1 + int(np.argmin(same)) if not same.all() else both)
            own = slice(1, end)  # the first comes out of prefill
            stopped, told_stop = tokens.decisions[own] == Decision.STOP, stops[begin : begin + end][own]
            differs = (tokens.exit_layers[own] != layers[begin : begin + end][own]) | (stopped != told_stop)
            # behind a stop that one of them made there is nothing to compare
            gone = stopped | told_stop
            last = int(np.argmax(gone)) + 1 if gone.any() else len(gone)
            compared += last
            otherwise += int(differs[:last].sum())
    return Confirmed(
        policy=told.policy,
        kv=policy.kv,
        job_id=run.job_id,
        figures=_pairs(told, run, right / written if written else None),
        compared=compared,
        decided_otherwise=otherwise,
    )


def _side_by_side(db: Database, trace: Trace, run: RunRow) -> Iterator[tuple[Traced, list[CompletionRow | None]]]:
    """Pieces of the trace, each with the completions of its samples."""
    rows = results.completions(db, run_id=run.id)
    ahead: dict[int, CompletionRow] = {}
    for piece, positions in trace.numbered_pieces():
        # completions come in the benchmark's order: with the last position, or one behind it, all are there
        while max(ahead, default=-1) < positions[-1] and (row := next(rows, None)) is not None:
            ahead[row.sample.position] = row
        yield piece, [ahead.pop(position, None) for position in positions]
        ahead = {position: row for position, row in ahead.items() if position > positions[-1]}


def _pairs(told: ReplayedPolicy, run: RunRow, right: float | None) -> dict[str, Pair]:
    summary = run.summary or {}
    samples = summary["samples"] - summary["errors"]
    measured = {
        "tokens_right": right,
        "agreement": summary["metrics"].get("token_agreement", {}).get("value"),
        "mean_exit_layer": summary["mean_exit_layer"],
        "speedup_ideal": summary["speedup_ideal"],
        "stop_share": summary["stops"] / samples if samples else None,
    }
    return {name: Pair(told.figures[name].value, measured[name]) for name in COMPARED if name in told.figures}
