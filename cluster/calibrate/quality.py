"""The promise of quality: by how much a metric may fall below full depth's, on completions that were really made.

The source groups are cut into three parts. A screens: what a replay says of them leaves at most 20 policies, in an
order from the safest. B tests these live, in that order, until one fails: no confidence has to be shared among them. C
takes no part in any choice, and says what the chosen one comes to.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from cluster.calibrate.agreement import check_enough, losses_of, speedup_of, wrong_tokens
from cluster.calibrate.found import Calibrated, Candidate, fastest, is_faster, promised
from cluster.calibrate.promise import HeldOut
from cluster.calibrate.pvalues import betting, groups_for_quality
from cluster.confirming import OnLive, run_live
from cluster.grids import ReplaySpec
from cluster.replays import ReplayedPolicy, replay_trace
from cluster.settings import Settings
from cluster.traced import Trace
from db import jobs
from db.records import RunRow
from db.results import run_data
from db.session import Database
from engine.errors import BadInput
from engine.replay.figures import FEWEST_GROUPS, pareto_front
from engine.replay.traced import Array
from engine.spec import parse_policy
from workers.scoring.metrics import TextMetric, metrics

#: of the source groups, those that screen and those that test; the rest reports
SHARES = (0.25, 0.55)
MOST_LIVE = 20


@dataclass(frozen=True)
class Parts:
    """Numbers of source groups."""

    screen: Array
    test: Array
    report: Array


def calibrate_quality(
    db: Database,
    trace: Trace,
    asked: ReplaySpec,
    *,
    metric: str,
    max_loss: float,
    confidence: float,
    settings: Settings,
    inline: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    on_live: OnLive = lambda now: None,
) -> Calibrated:
    """The fastest of the policies whose metric is below full depth's by at most so much in the mean.

    Raises `BadInput` where the metric cannot be promised or there are too few source groups, before anything is run.
    """
    highest = check_metric(metric)
    parts = parts_of(trace)
    check_enough(parts.test, "quality", max_loss / highest, 1 - confidence)
    rows = screened(trace, asked, parts.screen, on_progress)
    bound = max_loss / highest
    if not any(faster for _, faster in rows):
        [(row, _)] = rows
        fastest_one = Candidate(
            row.policy, row.spec, None, None, False, speedup_of(row, trace.pinned.n_layers), False, None
        )
        return _calibrated(trace, None, max_loss, confidence, 0, 0, [fastest_one])
    live = [row for row, faster in rows if faster]
    name = f"calibrate {trace.run.job_id}"
    tested = [parse_policy(one.spec) for one in live]
    job_id = run_live(db, trace, name, tested, [metric], settings, inline=inline, on_live=on_live)
    runs = {run.policy: run for run in jobs.runs(db, job_id)}
    tried: list[Candidate] = []
    held_out: dict[str, HeldOut | None] = {}
    losses = [live_losses(db, trace, runs[row.policy], metric, highest) for row in live]
    # groups in which full depth itself ended with errors do not count
    check_enough(losses[0].of(parts.test), "quality", bound, 1 - confidence)
    p_values, kept = in_sequence([one.of(parts.test) for one in losses], bound, 1 - confidence)
    groups, samples = 0, 0
    for place, (row, own) in enumerate(zip(live, losses, strict=True)):
        losses_of_test = own.of(parts.test)
        groups, samples = len(losses_of_test), int(own.counts[parts.test].sum())
        p_value = p_values[place] if place < len(p_values) else None
        needed = groups_for_quality(losses_of_test, bound, 1 - confidence)
        speed = _measured(runs[row.policy]) or speedup_of(row, trace.pinned.n_layers)
        loss = float(losses_of_test.mean()) * highest
        tried.append(Candidate(row.policy, row.spec, loss, p_value, place < kept, speed, is_faster(speed), needed))
        held_out[row.policy] = _held_out(own.of(parts.report) * highest)
    made = _calibrated(trace, job_id, max_loss, confidence, groups, samples, tried)
    if made.chosen is None:
        return made
    chosen = made.chosen.policy
    return promised(
        made,
        trace,
        metric=metric,
        level=1 - confidence,
        test="betting, in a fixed sequence",
        tested=1 + [one.policy for one in tried].index(chosen),
        speedup_ideal=next(speedup_of(row, trace.pinned.n_layers) for row in live if row.policy == chosen),
        speedup_token=_measured(runs[chosen]),
        held_out=held_out[chosen],
    )


def check_metric(name: str) -> float:
    """The highest value of a metric that can be promised. Raises `BadInput`."""
    metric = metrics[name]
    if not isinstance(metric, TextMetric) or not np.isfinite(metric.highest):
        able = ", ".join(
            one for one, known in metrics.items() if isinstance(known, TextMetric) and np.isfinite(known.highest)
        )
        raise BadInput(
            f"metric {name!r} cannot be promised: it must hold a completion's text against its reference, and have a "
            f"highest value; name one of {able}."
        )
    return metric.highest


def parts_of(trace: Trace) -> Parts:
    """The three parts: by the groups' names, so the same wherever and however often they are cut."""
    names = [hashlib.sha256(f"{trace.pinned.seed} {name}".encode()).digest() for name in trace.groups]
    order = np.array(sorted(range(len(names)), key=names.__getitem__), int)
    first, second = round(SHARES[0] * len(order)), round((SHARES[0] + SHARES[1]) * len(order))
    return Parts(np.sort(order[:first]), np.sort(order[first:second]), np.sort(order[second:]))


def screened(
    trace: Trace, asked: ReplaySpec, part: Array, on_progress: Callable[[int, int], None] = lambda done, of: None
) -> list[tuple[ReplayedPolicy, bool]]:
    """At most 20 policies, the safest first, each with whether it is faster than full depth.

    Of those that a replay on this part calls faster, the front of speed and of completions that part from full depth;
    where it calls none faster, the fastest.
    """
    found = replay_trace(trace, asked, of_groups=part, on_progress=on_progress)
    rows = [row for row in found.policies if row.kind not in ("full", "oracle")]
    if not rows:
        raise BadInput("policies: none of them can be run; give others than full and oracle.")
    speeds = np.array([speedup_of(row, trace.pinned.n_layers) for row in rows])
    able = np.flatnonzero([is_faster(speed) for speed in speeds])
    if not len(able):
        return [(rows[int(np.argmax(speeds))], False)]
    policies = [parse_policy(rows[place].spec) for place in able]
    _, losses = losses_of(trace, policies, lambda policy, piece: wrong_tokens(policy, piece, piece.agrees))
    parted = losses[:, part].mean(1)
    front = np.flatnonzero(pareto_front(speeds[able], -parted))
    order = front[np.lexsort((speeds[able][front], parted[front]))]
    # two that part equally and are equally fast are most likely the same
    _, once = np.unique(np.stack([parted[order], speeds[able][order]]), axis=1, return_index=True)
    order = order[np.sort(once)]
    places = np.unique(np.linspace(0, len(order) - 1, min(MOST_LIVE, len(order))).round().astype(int))
    return [(rows[able[order[place]]], True) for place in places]


def in_sequence(losses: Sequence[Array], bound: float, level: float) -> tuple[list[float], int]:
    """The p-values of policies, the safest first, up to the first that fails; and how many before it keep the promise.

    losses: for each policy [groups], -1..1.
    """
    p_values: list[float] = []
    for own in losses:
        p_values.append(betting(own, bound))
        if p_values[-1] > level:
            return p_values, len(p_values) - 1
    return p_values, len(p_values)


@dataclass(frozen=True)
class GroupLosses:
    """By number of the source group: the mean of its samples' losses, and how many there are."""

    means: Array
    counts: Array

    def of(self, groups: Array) -> Array:
        """Of those among these groups that have samples."""
        return self.means[groups[self.counts[groups] > 0]]


def live_losses(db: Database, trace: Trace, run: RunRow, metric: str, highest: float) -> GroupLosses:
    """How far a live run is below full depth, as a share of the metric's highest value, -1..1.

    A completion that ended with an error is worth nothing; a sample at which full depth did is left out.
    """
    data = run_data(db, run.id)
    assert data.full is not None
    number = {name: place for place, name in enumerate(trace.groups)}
    full = dict(zip(data.full.sample.tolist(), data.full.scores[metric].tolist(), strict=True))
    means, counts = np.zeros(len(trace.groups)), np.zeros(len(trace.groups), int)
    rows = zip(data.sample.tolist(), data.source_group.tolist(), data.scores[metric].tolist(), strict=True)
    for position, group, score in rows:
        if group in number and np.isfinite(full.get(position, np.nan)):
            means[number[group]] += (full[position] - (score if np.isfinite(score) else 0.0)) / highest
            counts[number[group]] += 1
    return GroupLosses(means / np.maximum(counts, 1), counts)


def _measured(run: RunRow) -> float | None:
    """Speedup per token of the live run; None where nothing was timed."""
    speed = (run.summary or {}).get("speedup_token") or {}
    return speed.get("value")


def _held_out(losses: Array) -> HeldOut | None:
    if not len(losses):
        return None
    mean, low, high = float(losses.mean()), None, None
    if len(losses) >= FEWEST_GROUPS:
        half = float(student.ppf(0.975, len(losses) - 1) * losses.std(ddof=1) / np.sqrt(len(losses)))
        low, high = mean - half, mean + half
    return HeldOut(groups=len(losses), loss=mean, low=low, high=high)


def _calibrated(
    trace: Trace,
    job_id: int | None,
    bound: float,
    confidence: float,
    groups: int,
    samples: int,
    tried: list[Candidate],
) -> Calibrated:
    chosen, closest = fastest(tried)
    return Calibrated(
        job_id=trace.run.job_id,
        live_job=job_id,
        benchmark=trace.run.benchmark,
        kind="quality",
        bound=bound,
        confidence=confidence,
        groups=groups,
        samples=samples,
        tried=tried,
        chosen=chosen,
        closest=closest,
        promise=None,
    )
