"""Lines: which runs of a schedule's firings may be held against one another, and which of them is the baseline.

A line is one benchmark under one policy on one device class. Other samples, exits or metric versions begin a new one:
what changes then is the yardstick. Exits that the schedule asks for as `latest` are what it measures, and go on.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.schedules.latest import is_latest
from cluster.schedules.spec import Baseline, ScheduleSpec
from db import events, jobs
from db.firings import firings
from db.records import JobState
from db.schedules import FiringRow, ScheduleRow, Verdict
from db.session import Database

#: firings that are read at once
LOOKED_AT = 200
_SOUND = (Verdict.PASS, Verdict.INCONCLUSIVE)
#: of a job's pinned facts, what the history shows when it changes
_FACTS = (
    "model",
    "weights_hash",
    "tokenizer_hash",
    "exits",
    "exits_hash",
    "device_class",
    "dtype",
    "threads",
    "batch_size",
    "git_revision",
)
_GROUPS = ("versions", "metrics", "benchmarks")


@dataclass(frozen=True)
class RunFigures:
    """What one run of a firing's job came to, as the history keeps it."""

    run_id: int
    benchmark: str
    policy: str
    line: dict[str, Any]  #: what must be the same in a run that it is held against
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)  #: metric or speed -> value, low, high


@dataclass(frozen=True)
class Held:
    """A run and what it is held against: a run of a job before it; None where its line begins with it, and why."""

    run_id: int
    baseline: int | None
    job_id: int | None
    reason: str


def run_figures(db: Database, spec: ScheduleSpec, job_id: int) -> list[RunFigures]:
    """The runs of a job that is done, as the history keeps them."""
    pinned = jobs.job(db, job_id).pinned or {}
    found = []
    for run in jobs.runs(db, job_id):
        summary = run.summary or {}
        names = ("speedup_token", "speedup_request")
        figures = {name: summary[name] for name in names if summary.get(name)} | summary.get("metrics", {})
        found.append(RunFigures(run.id, run.benchmark, run.policy, _line(spec, pinned, run.benchmark), figures))
    return found


def _line(spec: ScheduleSpec, pinned: dict[str, Any], benchmark: str) -> dict[str, Any]:
    asked = spec.job.exits
    metrics = sorted({rule.metric for rule in spec.gate.rules}) if spec.gate else []
    versions = pinned.get("metrics", {})
    return {
        "benchmark": pinned.get("benchmarks", {}).get(benchmark),
        "device class": pinned.get("device_class"),
        "exits": asked if is_latest(asked) else pinned.get("exits_hash"),
    } | {f"metric {name}": versions[name] for name in metrics if name in versions}


def provenance(db: Database, job_id: int) -> dict[str, Any]:
    """What a job was computed with, one entry a fact."""
    pinned = jobs.job(db, job_id).pinned or {}
    facts = {name: pinned[name] for name in _FACTS if pinned.get(name) is not None}
    for group in _GROUPS:
        facts |= {f"{group[:-1]} {name}": value for name, value in sorted(pinned.get(group, {}).items())}
    return facts


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts that differ, each with what it was and what it is."""
    names = [*after, *(name for name in before if name not in after)]
    return [
        {"what": name, "before": before.get(name), "after": after.get(name)}
        for name in names
        if before.get(name) != after.get(name)
    ]


def as_figures(rows: Sequence[RunFigures]) -> list[dict[str, Any]]:
    """As the record keeps them."""
    return [asdict(row) for row in rows]


def held_against(
    db: Database, row: ScheduleRow, spec: ScheduleSpec, now: FiringRow, runs: list[RunFigures]
) -> list[Held]:
    """The baseline of each run, by the schedule's rule."""
    if spec.baseline.job is not None:
        return [_pinned(db, spec.baseline.job, run) for run in runs]
    lines = _read_lines(db, row, now, runs, spec.baseline)
    metric = spec.gate.rules[0].metric if spec.gate else ""
    jobs_of = {one.jobs["run"] for line in lines for one, _ in line.firings}
    alive = {id for id, (state, _) in events.marks(db, jobs_of).items() if state is JobState.DONE}
    return [_of_history(line, alive, spec.baseline, metric) for line in lines]


@dataclass
class _Line:
    """The firings before a run that are on its line, newest first, as far back as they were read."""

    run: RunFigures
    firings: list[tuple[FiringRow, dict[str, Any]]] = field(default_factory=list)
    newest: dict[str, Any] | None = None  #: of this benchmark and policy, on whatever line

    def read(self, one: FiringRow) -> None:
        """Take in the next older firing."""
        for other in one.figures:
            if (other["benchmark"], other["policy"]) == (self.run.benchmark, self.run.policy):
                self.newest = self.newest or other
                if other["line"] == self.run.line:
                    self.firings.append((one, other))

    def is_enough(self, rule: Baseline) -> bool:
        """Whether nothing older can be the baseline."""
        if rule.median:
            return sum(_is_sound(one) for one, _ in self.firings) >= rule.median
        return any(one.verdict is Verdict.PASS for one, _ in self.firings)


def _read_lines(
    db: Database, row: ScheduleRow, now: FiringRow, runs: Sequence[RunFigures], rule: Baseline
) -> list[_Line]:
    """The newest firings; where they do not do, older ones that did not fail, and then such as passed: a failure that
    lasts must not become a baseline.
    """
    lines, before = [_Line(run) for run in runs], now.fire_at
    for verdicts in (None, _SOUND, (Verdict.PASS,)):
        page = firings(db, row.id, before=before, limit=LOOKED_AT, judged=True, verdicts=verdicts)
        for one in page:
            for line in lines:
                line.read(one)
        if len(page) < LOOKED_AT or all(line.is_enough(rule) for line in lines):
            break
        before = page[-1].fire_at
    return lines


def _pinned(db: Database, job_id: int, run: RunFigures) -> Held:
    same = [one for one in jobs.runs(db, job_id) if (one.benchmark, one.policy) == (run.benchmark, run.policy)]
    if not same:
        return Held(run.run_id, None, None, f"job {job_id} has no {run.policy} on {run.benchmark}")
    return Held(run.run_id, same[0].id, job_id, "")


def _of_history(line: _Line, alive: set[int], rule: Baseline, metric: str) -> Held:
    """alive: jobs that were not pruned."""
    if not line.firings:
        return Held(line.run.run_id, None, None, _why_new(line.newest, line.run))
    # what failed is nobody's baseline, or a loss that stays would become the norm; only where all have failed from the
    # beginning there is nothing but that beginning
    able = [pair for pair in line.firings if _is_sound(pair[0])] or line.firings[-1:]
    kept = [pair for pair in able if pair[0].jobs["run"] in alive]
    if not kept:
        return Held(line.run.run_id, None, None, "the jobs before it were pruned")
    one, other = _middle(kept[: rule.median], metric) if rule.median else _last_passed(kept)
    return Held(line.run.run_id, other["run_id"], one.jobs["run"], "")


def _last_passed(kept: list[tuple[FiringRow, dict[str, Any]]]) -> tuple[FiringRow, dict[str, Any]]:
    """The oldest there is where none has passed yet."""
    return next((pair for pair in kept if pair[0].verdict is Verdict.PASS), kept[-1])


def _is_sound(one: FiringRow) -> bool:
    return one.verdict in _SOUND


def _middle(sound: list[tuple[FiringRow, dict[str, Any]]], metric: str) -> tuple[FiringRow, dict[str, Any]]:
    """The one in the middle by the gate's first metric: a run, so that samples stay paired."""
    known = [pair for pair in sound if _value(pair[1], metric) is not None] or sound
    ranked = sorted(known, key=lambda pair: (_value(pair[1], metric) or 0.0, pair[0].fire_at))
    return ranked[(len(ranked) - 1) // 2]


def _value(figures: dict[str, Any], metric: str) -> float | None:
    found = figures["figures"].get(metric)
    return None if found is None else found.get("value")


def _why_new(newest: dict[str, Any] | None, run: RunFigures) -> str:
    if newest is None:
        return "nothing was before it"
    parts = [one["what"] for one in changed(newest["line"], run.line)]
    return f"its {', '.join(parts)} changed"
