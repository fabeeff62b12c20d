"""What a comparison is asked for."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from cluster.reports.model import Estimate
from workers import differences
from workers.differences import Interval
from workers.estimates import Figure


@dataclass(frozen=True)
class Wanted:
    """The options of `cluster.comparing.build.compare`."""

    confidence: float
    metrics: Sequence[str] | None
    levels: Collection[str]
    without: int | None

    def has(self, metric: str) -> bool:
        return self.metrics is None or metric in self.metrics

    def interval(self, figure: Figure, sums: Sequence[npt.NDArray[Any]]) -> Interval:
        """At the confidence that is wanted."""
        return differences.interval(figure, sums, self.confidence)


def as_estimate(found: Interval) -> Estimate:
    """Without its standard error."""
    return Estimate(value=found.value, low=found.low, high=found.high)
