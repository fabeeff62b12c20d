"""A metric under both sides, sample by sample."""

from typing import Any

import numpy as np

from cluster.comparing.model import Difference, McNemar
from cluster.comparing.wanted import Wanted, as_estimate
from workers.differences import Clusters, chance, detectable, mcnemar, mean_change, relative_change


def quality_of(metric: str, version: str | None, clusters: Clusters, a: Any, b: Any, wanted: Wanted) -> Difference:
    """A metric over the samples that have it under both; clusters: of all places of a and b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    known = ~(np.isnan(a) | np.isnan(b))
    old, new, count = clusters.sums(np.where(known, a, 0), np.where(known, b, 0), known)
    units = int(known.sum())
    more_is_better = metric != "errors"
    sums = [old, count, new, count]
    keep = count > 0
    sums = [column[keep] for column in sums]
    change = wanted.interval(mean_change, sums)
    relative = wanted.interval(relative_change, [sums[0], sums[2]])
    # towards better: errors count the other way round
    sides = (sums[:2], sums[2:]) if more_is_better else (sums[2:], sums[:2])
    odds = chance(mean_change, *sides)
    binary = bool(units) and np.isin(a[known], (0, 1)).all() and np.isin(b[known], (0, 1)).all()
    return Difference(
        metric=metric,
        kind="quality",
        version=version,
        more_is_better=more_is_better,
        a=float(a[known].mean()) if units else None,
        b=float(b[known].mean()) if units else None,
        change=as_estimate(change),
        relative=as_estimate(relative),
        p_value=odds.two_sided,
        p_worse=odds.worse,
        mcnemar=_mcnemar(a[known], b[known]) if binary else None,
        detectable=detectable(change.error),
        detectable_relative=detectable(relative.error),
        units=units,
        groups=int(keep.sum()) if clusters.groups <= clusters.n else clusters.groups,
    )


def _mcnemar(a: Any, b: Any) -> McNemar:
    lost, gained = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return McNemar(lost=lost, gained=gained, p_value=mcnemar(lost, gained))
