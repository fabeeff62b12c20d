"""A replay of a job's trace: what is asked is checked against what was traced, and what is found becomes a table."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.grids import ReplaySpec, expand
from cluster.traced import Trace
from db.traces import traced_tokens
from engine.errors import BadInput
from engine.replay.decide import check_replayable
from engine.replay.figures import FIGURES
from engine.replay.replay import replay
from engine.replay.traced import Array, Traced
from engine.spec import PolicySpec


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval over source groups; None where it cannot be known."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ReplayedPolicy:
    """A policy's row."""

    policy: str  #: its label
    kind: str
    spec: dict[str, Any]  #: as a spec takes it
    front: bool  #: no other policy of the table is as good in speed and quality and better in one
    stopped: int  #: samples that were given up
    figures: dict[str, Estimate]  #: see `engine.replay.figures.FIGURES`


@dataclass(frozen=True)
class ReplayReport:
    """What a trace says of policies."""

    job_id: int
    benchmark: str
    model: str
    exits: str | None
    target: str  #: reference, or full
    exit_points: tuple[int, ...]
    n_layers: int
    batch_size: int  #: in whose steps the ideal speed is counted
    device_class: str
    samples: int
    tokens: int
    groups: int
    policies: list[ReplayedPolicy]

    def best(self) -> list[ReplayedPolicy]:
        """The Pareto front, fastest first."""
        front = [one for one in self.policies if one.front]
        return sorted(front, key=lambda one: -speed_of(one))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def to_csv(reports: Sequence[ReplayReport]) -> str:
    """A row a benchmark and policy, each figure with its interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    bounds = [column for name in FIGURES for column in (name, f"{name}_low", f"{name}_high")]
    writer.writerow(["benchmark", "policy", "kind", "front", "stopped", *bounds])
    unknown = Estimate(None, None, None)
    for report in reports:
        for one in report.policies:
            values = [value for name in FIGURES for value in asdict(one.figures.get(name, unknown)).values()]
            writer.writerow([report.benchmark, one.policy, one.kind, int(one.front), one.stopped, *values])
    return text.getvalue()


def replay_trace(
    trace: Trace,
    asked: ReplaySpec,
    *,
    of_groups: Array | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> ReplayReport:
    """Apply the policies that are asked for to a trace. Raises `BadInput`, before anything is read.

    of_groups: numbers of the source groups that figures are of; of all when absent.
    """
    policies, tokens = _checked(trace, asked)
    total = tokens * len(policies)
    return _report(trace, policies, trace.pieces, lambda done, _: on_progress(done, total), of_groups)


def replay_part(trace: Trace, asked: ReplaySpec, tokens: int) -> ReplayReport:
    """The same over about so many tokens at the most, see `Trace.part`. Raises `BadInput`."""
    policies, _ = _checked(trace, asked)
    part = trace.part(tokens)
    return _report(trace, policies, lambda: [part], lambda done, of: None)


def _checked(trace: Trace, asked: ReplaySpec) -> tuple[list[PolicySpec], int]:
    """The policies that are asked for, and the tokens of the trace. Raises `BadInput`."""
    pinned, run = trace.pinned, trace.run
    check_made_for(trace, asked)
    tokens = traced_tokens(trace.db, run.id)
    if not tokens:
        raise BadInput(f"job {run.job_id}: its trace of {run.benchmark!r} has no tokens; its samples are all errors.")
    policies = expand(asked.policies, tokens, len(trace.points))
    for policy in policies:
        check_replayable(policy, pinned.exit_points, pinned.n_layers, pinned.controller)
    return policies, tokens


def _report(
    trace: Trace,
    policies: list[PolicySpec],
    pieces: Callable[[], Iterable[Traced]],
    on_progress: Callable[[int, int], None],
    of_groups: Array | None = None,
) -> ReplayReport:
    pinned, run = trace.pinned, trace.run
    found = replay(
        pieces,
        policies,
        groups=len(trace.groups),
        model=trace.cost_model(),
        of_groups=of_groups,
        on_progress=on_progress,
    )
    rows = [
        ReplayedPolicy(
            policy=policy.label,
            kind=policy.kind,
            spec=policy.dump(),
            front=bool(found.front[place]),
            stopped=int(found.stopped[place]),
            figures={
                name: Estimate(*map(_finite, (figure.values[place], figure.lows[place], figure.highs[place])))
                for name, figure in found.figures.items()
            },
        )
        for place, policy in enumerate(policies)
    ]
    return ReplayReport(
        job_id=run.job_id,
        benchmark=run.benchmark,
        model=pinned.model,
        exits=pinned.exits,
        target=trace.target,
        exit_points=pinned.exit_points,
        n_layers=pinned.n_layers,
        batch_size=pinned.batch_size,
        device_class=pinned.device_class,
        samples=found.samples,
        tokens=found.tokens,
        groups=found.groups,
        policies=rows,
    )


def check_made_for(trace: Trace, asked: ReplaySpec) -> None:
    """Whether policies that say what they were made for may be asked of a trace. Raises `BadInput`."""
    pinned, run = trace.pinned, trace.run
    known: Iterable[tuple[str, str | None, str | None]] = (
        ("model", asked.model, pinned.model),
        ("exits", asked.exits, pinned.exits),
        ("benchmark", asked.benchmark, run.benchmark),
        ("weights_hash", asked.weights_hash, pinned.weights_hash),
        ("exits_hash", asked.exits_hash, pinned.exits_hash),
        ("content_hash", asked.content_hash, pinned.benchmarks.get(run.benchmark)),
    )
    for field, wanted, found in known:
        if wanted is not None and wanted != found:
            raise BadInput(
                f"{field}: the policies are for {_short(wanted)!r}, and the trace of job {run.job_id} is of "
                f"{_short(found or 'none')!r}; trace with {_short(wanted)!r}, or leave the field out."
            )


def _short(name: str) -> str:
    return f"{name[:12]}…" if len(name) >= 40 and name.isalnum() else name


def speed_of(one: ReplayedPolicy) -> float:
    """What the Pareto front goes by: ideal speed, or where no cost model is known, depth."""
    speed = one.figures.get("speedup_ideal")
    if speed is not None and speed.value is not None:
        return speed.value
    depth = one.figures["mean_exit_layer"].value
    return -np.inf if depth is None else -depth


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
