"""What B alone comes to, for rules that ask for no less."""

from typing import Any

import numpy as np

from cluster.comparing.speeds import speed_of
from cluster.comparing.wanted import Wanted, as_estimate
from cluster.reports.model import Estimate
from db.jobs import runs as runs_of
from db.pairs import paired_batches
from db.records import RunRow
from db.session import Database
from workers.differences import Clusters


def levels(
    db: Database, b: RunRow, pinned: dict[str, Any], clusters: Clusters, scores: dict[str, Any], wanted: Wanted
) -> dict[str, Estimate]:
    """What B alone comes to; speed: over `full` of its own job, on the device class with most batches."""
    found = {}
    for name in wanted.levels:
        if name in scores:
            known = ~np.isnan(scores[name])
            sums = clusters.sums(np.where(known, scores[name], 0), known)
            level = wanted.interval(_mean, [column[sums[1] > 0] for column in sums])
            found[name] = as_estimate(level)
        elif name.startswith("speedup_"):
            found |= _speed_level(db, b, pinned, name, wanted)
    return found


def _mean(total: Any, count: Any, *, axis: int) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return total.sum(axis) / count.sum(axis)


def _speed_level(db: Database, b: RunRow, pinned: dict[str, Any], name: str, wanted: Wanted) -> dict[str, Estimate]:
    same = [one for one in runs_of(db, b.job_id) if one.benchmark_id == b.benchmark_id and one.policy_kind == "full"]
    if not same or same[0].id == b.id:
        return {}
    batches = paired_batches(db, same[0], b, pinned["batch_size"])
    if not len(batches):
        return {}
    names, counts = np.unique(batches.device_class.astype(str), return_counts=True)
    gain = speed_of(name, str(names[counts.argmax()]), batches, wanted).relative
    return {name: Estimate(**{end: None if of is None else of + 1 for end, of in gain})}
