"""How sure it is that a mean lies below a bound, for losses of which nothing is known but their range.

Every p-value here is valid for any distribution and any number of groups: under a mean of at least the bound it is
below d with probability d at most. None depends on the order of the groups.
"""

from collections.abc import Callable
from math import ceil, log

import numpy as np
from scipy.special import logsumexp, xlogy
from scipy.stats import binom

from engine.replay.traced import Array

#: beyond that nobody collects groups
MOST_GROUPS = 10**9
#: of the bets that are mixed: shares of the largest one that cannot ruin, dense at both ends
_SHARES = np.sin(np.pi / 2 * (np.arange(100) + 0.5) / 100) ** 2


def hoeffding_bentkus(mean: float, groups: int, bound: float) -> float:
    """Of losses in 0..1 whose mean over so many groups is given (Bates et al. 2021, used by Learn-then-Test)."""
    low = min(mean, bound)
    divergence = xlogy(low, low / bound) + xlogy(1 - low, (1 - low) / (1 - bound))
    # what is a whole number but for rounding must not become the next one
    bentkus = np.e * binom.cdf(ceil(groups * mean - 1e-9), groups, bound)
    return float(min(1.0, np.exp(-groups * divergence), bentkus))


def betting(losses: Array, bound: float) -> float:
    """Of losses [groups] from -1 to 1, or from 0 to 1 (Waudby-Smith and Ramdas 2024).

    Whoever bets, group by group, that losses lie below the bound cannot expect to win where their mean does not; one
    over what was won is a p-value. Bets of many sizes are mixed, so nothing has to be chosen beforehand.
    """
    return float(min(1.0, np.exp(-_log_wealth(_log_factors(losses, bound)))))


def groups_for_agreement(mean: float, bound: float, level: float) -> int | None:
    """Groups that would do if their mean stayed what it is; None: no number would."""
    if mean >= bound:
        return None
    return _fewest(lambda groups: hoeffding_bentkus(mean, groups, bound) <= level)


def groups_for_quality(losses: Array, bound: float, level: float) -> int | None:
    """The same, if groups went on as these."""
    if float(np.mean(losses)) >= bound:
        return None
    growth = _log_factors(losses, bound) / len(losses)
    return _fewest(lambda groups: _log_wealth(growth * groups) >= -log(level))


def fewest_groups(kind: str, bound: float, level: float) -> int:
    """Groups without which nothing can be promised, not even where no group has any loss."""
    found = (
        groups_for_agreement(0.0, bound, level)
        if kind == "agreement"
        else groups_for_quality(np.zeros(1), bound, level)
    )
    assert found is not None
    return found


def _log_factors(losses: Array, bound: float) -> Array:
    """[bets] of the wealth that each bet comes to."""
    won = (bound - np.asarray(losses, float)) / (1 - bound)  # at least -1, and no share is 1
    return np.asarray(np.log1p(_SHARES[:, None] * won).sum(1))


def _log_wealth(log_factors: Array) -> float:
    return float(logsumexp(log_factors) - log(len(log_factors)))


def _fewest(does: Callable[[int], bool]) -> int | None:
    """The least number that does, where every larger one does."""
    high = 1
    while not does(high):
        high *= 2
        if high > MOST_GROUPS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if does(middle) else (middle, high)
    return high
