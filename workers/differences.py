"""How sure a difference between two runs is: intervals, tests and what could have been found at all.

Everything is paired (the same samples, the same batches) and whole source groups are drawn or swapped, because samples
of one file or task are not independent.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.stats import DegenerateDataWarning, binomtest, bootstrap, norm, t

from workers.estimates import FEWEST_GROUPS, SEED, Figure, Numbers

#: groups beyond these are put together at random: intervals stay true, and cost stays what it is. The jackknife of BCa
#: grows with the square of their number
MOST_CLUSTERS = 1_000
RESAMPLES = 4_000
#: random swaps of a test; the smallest p-value is one over one more, which Holm multiplies by the size of the family
SWAPS = 19_999
#: of one array of swaps or draws
_BATCH_VALUES = 1_000_000
#: a floor: as good as nothing is known
_WIDEST = 0.9999
_SMALLEST = 1e-9  #: of what two sums that are equal on paper may differ by, as a share


@dataclass(frozen=True)
class Interval:
    """A figure with its interval; None where it is not finite, an end also below `FEWEST_GROUPS` groups."""

    value: float | None
    low: float | None
    high: float | None
    error: float | None  #: standard error


@dataclass(frozen=True)
class Chance:
    """p-values of a figure that is above 0 where B is better, below where it is worse."""

    two_sided: float
    worse: float  #: of at most this figure, if swapping A and B changed nothing


class Clusters:
    """Sums by source group, or by groups put together where there are very many."""

    def __init__(self, groups: npt.NDArray[np.object_]) -> None:
        """groups: the source group of each sample or batch."""
        numbers: dict[str, int] = {}  # an array of texts would be as wide as the longest everywhere
        self._group = np.array([numbers.setdefault(name, len(numbers)) for name in groups.tolist()], np.int64)
        self.groups = len(numbers)
        self.n = min(self.groups, MOST_CLUSTERS)
        if self.groups > MOST_CLUSTERS:
            dealt = np.random.default_rng(SEED).permutation(self.groups) % MOST_CLUSTERS
            self._group = dealt[self._group]

    def sums(self, *columns: npt.ArrayLike) -> list[Numbers]:
        """Each column (one place a sample or batch) summed: [n]."""
        return [np.bincount(self._group, np.asarray(column, np.float64), minlength=self.n) for column in columns]


def interval(figure: Figure, sums: Sequence[Numbers], confidence: float = 0.95) -> Interval:
    """BCa bootstrap over clusters (Efron 1987), as scipy has it. confidence: two-sided.

    sums: [n] each, that figure sums over its last axis. The level is widened by what a normal quantile lacks with few
    clusters (Hesterberg 2015, "expanded percentile"), or with few that move: most samples come out the same.
    """
    n = len(sums[0])
    value = _finite(figure(*sums, axis=-1)) if n else None
    if value is None or n < FEWEST_GROUPS:
        return Interval(value, None, None, None)
    if _nothing_moves(figure, sums, value):
        return Interval(value, value, value, 0.0)
    drawn = {
        "n_resamples": RESAMPLES,
        "batch": max(1, _BATCH_VALUES // n),
        "vectorized": True,
        "paired": True,
        "axis": -1,
        "confidence_level": _expanded(confidence, n, _freedom(figure, sums)),
        "rng": np.random.default_rng(SEED),
    }
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(list(sums), figure, method="BCa", **drawn)
        ends = found.confidence_interval
        if not np.isfinite([ends.low, ends.high]).all():  # all of one draw alike: there is nothing to accelerate
            drawn |= {"n_resamples": 0, "bootstrap_result": found}
            ends = bootstrap(list(sums), figure, method="percentile", **drawn).confidence_interval
    return Interval(value, _finite(ends.low), _finite(ends.high), _finite(found.standard_error))


def chance(figure: Figure, a: Sequence[Numbers], b: Sequence[Numbers]) -> Chance:
    """Permutation test: A and B swapped in whole clusters, at random (Good 2005, ch. 3).

    a, b: the same sums of either side, [n] each; figure gets the swapped sums of A, then those of B. The p-values are
    never too small, whatever the distribution, if A and B are exchangeable within a group when there is no difference.
    """
    seen = float(figure(*a, *b, axis=-1)) if len(a[0]) else np.nan
    if not np.isfinite(seen):
        return Chance(1.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        swapped = _swapped(figure, np.stack(a), np.stack(b))
    near = _SMALLEST * max(abs(seen), float(np.nanmax(np.abs(swapped), initial=0.0)))
    # what is not finite counts against a finding
    as_extreme = ~(np.abs(swapped) < abs(seen) - near)
    as_bad = ~(swapped > seen + near)
    return Chance(float(1 + as_extreme.sum()) / (SWAPS + 1), float(1 + as_bad.sum()) / (SWAPS + 1))


def _swapped(figure: Figure, a: Numbers, b: Numbers) -> Numbers:
    """The figure of every random swap. a, b: [columns, n]."""
    total_a, total_b, difference = a.sum(-1), b.sum(-1), (b - a).T
    found = []
    for swaps in _swaps(a.shape[1]):
        moved = swaps.astype(np.float64) @ difference  # [some, columns]
        # the figure sums over its last axis: one place is the sum itself
        sides = [*(total_a + moved).T[..., None], *(total_b - moved).T[..., None]]
        found.append(figure(*sides, axis=-1))
    return np.concatenate(found)


@lru_cache(maxsize=2)
def _swaps(n: int) -> list[npt.NDArray[np.bool_]]:
    """`SWAPS` rows of n coins, in pieces."""
    rng, size = np.random.default_rng(SEED), max(1, _BATCH_VALUES // n)
    return [rng.random((min(size, SWAPS - first), n)) < 0.5 for first in range(0, SWAPS, size)]


def mcnemar(lost: int, gained: int) -> float:
    """Exact McNemar: two-sided p-value of so uneven a split, samples taken as independent."""
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979), in their order."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, at in enumerate(order):
        largest = max(largest, min(1.0, p_values[at] * (len(p_values) - place)))
        corrected[at] = largest
    return corrected


def detectable(error: float | None, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The difference that a two-sided test finds with this power, of a figure with this standard error."""
    return None if error is None else error * float(norm.ppf(1 - alpha / 2) + norm.ppf(power))


def noise_floor(log_ratios: Sequence[float], confidence: float = 0.99) -> float | None:
    """The slowdown below which a change of speed is no news, as a share: of pairs with the same spec so many lie below.

    log_ratios: of pairs with the same spec, as `log_speed` has them. Which of the two is A is arbitrary, so their mean
    is known to be 0, and with their root mean square they follow Student's t. Never below the largest that was seen,
    and wide where there are few. None without a pair.
    """
    if not log_ratios:
        return None
    seen = np.abs(np.asarray(log_ratios, np.float64))
    wide = float(t.ppf((1 + confidence) / 2, len(seen))) * float(np.sqrt(np.mean(seen**2)))
    return min(-float(np.expm1(-max(wide, float(seen.max())))), _WIDEST)


def mean_change(a: Numbers, count_a: Numbers, b: Numbers, count_b: Numbers, *, axis: int) -> Numbers:
    """Σ b / Σ count - Σ a / Σ count."""
    return b.sum(axis) / count_b.sum(axis) - a.sum(axis) / count_a.sum(axis)


def relative_change(a: Numbers, b: Numbers, *, axis: int) -> Numbers:
    """Σ b / Σ a - 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return b.sum(axis) / a.sum(axis) - 1


def speed_gain(*columns: Numbers, axis: int) -> Numbers:
    """A's time for a unit over B's, - 1; below 0 where B is slower.

    columns: times and units of A, then of B: (Σ a / Σ units) / (Σ b / Σ units) - 1. With the times and units of a
    reference behind those of either side, each side's time is taken as a multiple of its reference's.
    """
    half = len(columns) // 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return _pace(columns[:half], axis) / _pace(columns[half:], axis) - 1


def log_speed(*columns: Numbers, axis: int) -> Numbers:
    """The logarithm of `speed_gain` + 1: as far from 0 when A and B are swapped."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log1p(speed_gain(*columns, axis=axis))


def _pace(columns: Sequence[Numbers], axis: int) -> Numbers:
    time, units, *reference = (column.sum(axis) for column in columns)
    return time / units if not reference else time / units / (reference[0] / reference[1])


def _nothing_moves(figure: Figure, sums: Sequence[Numbers], value: float) -> bool:
    """Whether every cluster alone has the figure of all: no draw can differ."""
    kept = [column[np.any(np.stack(sums) != 0, axis=0)] for column in sums]
    with np.errstate(divide="ignore", invalid="ignore"):
        alone = np.asarray(figure(*(column[:, None] for column in kept), axis=-1))
    return bool(np.all(alone == value))


def _expanded(confidence: float, n: int, freedom: float) -> float:
    quantile = t.ppf((1 + confidence) / 2, freedom) * np.sqrt(n / (n - 1))
    return min(float(2 * norm.cdf(quantile) - 1), 1 - 1e-9)


def _freedom(figure: Figure, sums: Sequence[Numbers]) -> float:
    """Degrees of freedom of the variance of a figure over clusters, after Satterthwaite: of n that are normal n - 1.

    Where most clusters say nothing and few say much (a high kurtosis of what each contributes) it is as if there were
    as few of them.
    """
    n = len(sums[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        without = np.asarray(figure(*((column.sum() - column)[:, None] for column in sums), axis=-1))
    contributed = without - without.mean()
    kurtosis = np.mean(contributed**4) / max(float(np.mean(contributed**2) ** 2), 1e-300)
    if not np.isfinite(kurtosis) or kurtosis <= 1:
        return float(n - 1)
    return float(np.clip(2 * n / (kurtosis - 1), 1.0, n - 1))


def _finite(value: object) -> float | None:
    number = float(value)  # type: ignore[arg-type]
    return number if np.isfinite(number) else None
