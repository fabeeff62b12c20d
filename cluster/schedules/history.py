"""The history of a schedule in words: what changed, and how its figures went."""

from dataclasses import dataclass
from typing import Any

from cluster.gates import SPEEDS
from cluster.reports.formats import score, times
from db.schedules import FiringRow

#: of a hash; more of it tells nobody more
_HASH = 12


@dataclass(frozen=True)
class Point:
    """One figure of one firing."""

    at: float
    value: float
    low: float | None
    high: float | None
    verdict: str | None
    job_id: int | None
    begins_line: bool  #: what was before it is not to be held against it


@dataclass(frozen=True)
class Series:
    """One figure of one policy on one benchmark, through time; oldest first."""

    benchmark: str
    policy: str
    metric: str
    points: list[Point]


def changes(one: FiringRow) -> list[str]:
    """Each fact of the provenance that differs from the firing before."""
    return [f"{each['what']}: {_short(each['before'])} → {_short(each['after'])}" for each in one.changed]


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = str(value)
    is_hash = len(text) >= 32 and all(char in "0123456789abcdef" for char in text)
    return text[:_HASH] if is_hash else text


def figures(one: FiringRow) -> list[str]:
    """A line a run."""
    return [
        f"{run['benchmark']} / {run['policy']}: "
        + ", ".join(f"{name} {written(name, found.get('value'))}" for name, found in run["figures"].items())
        for run in one.figures
    ]


def written(metric: str, value: float | None) -> str:
    """A figure as reports write it."""
    return times(value) if metric in SPEEDS else score(value)


def series(firings: list[FiringRow]) -> list[Series]:
    """Every figure through the firings (newest first) that left any."""
    found: dict[tuple[str, str, str], list[Point]] = {}
    lines: dict[tuple[str, str], Any] = {}
    for one in reversed(firings):
        for run in one.figures:
            of_run = (run["benchmark"], run["policy"])
            begins = of_run in lines and lines[of_run] != run["line"]
            lines[of_run] = run["line"]
            for metric, figure in run["figures"].items():
                if figure.get("value") is not None:
                    point = Point(
                        one.fire_at,
                        figure["value"],
                        figure.get("low"),
                        figure.get("high"),
                        None if one.verdict is None else one.verdict.value,
                        one.jobs.get("run"),
                        begins,
                    )
                    found.setdefault((*of_run, metric), []).append(point)
    return [Series(*key, points) for key, points in found.items()]
