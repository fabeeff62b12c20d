"""From sums over source groups to figures with intervals.

Every figure is a product of sums and of one over sums. Its 95 % interval is linearised over groups (Cochran 1977,
ch. 6 and 11): cheap enough for a thousand policies, where drawing groups anew is not.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from engine.replay.traced import Array

#: what is summed by source group; a policy's own first, then what is the same for all
SUMS = (
    "written", "right", "agree", "layers", "stops", "good_stops", "ideal_ns", "decoded",
    "samples", "wrong", "full_ideal_ns", "full_decoded",
)  # fmt: skip

#: the powers of the sums
FIGURES: dict[str, dict[str, int]] = {
    "tokens_right": {"right": 1, "written": -1},
    "agreement": {"agree": 1, "written": -1},
    "mean_exit_layer": {"layers": 1, "written": -1},
    "speedup_ideal": {"full_ideal_ns": 1, "full_decoded": -1, "ideal_ns": -1, "decoded": 1},
    "stop_share": {"stops": 1, "samples": -1},
    "stop_base_rate": {"wrong": 1, "samples": -1},
    "stop_precision": {"good_stops": 1, "stops": -1},
    "stop_recall": {"good_stops": 1, "wrong": -1},
    "stop_lift": {"good_stops": 1, "stops": -1, "wrong": -1, "samples": 1},
}
#: those that are shares
_SHARES = {"tokens_right", "agreement", "stop_share", "stop_base_rate", "stop_precision", "stop_recall"}
#: as in reports: fewer groups support no interval
FEWEST_GROUPS = 6


@dataclass(frozen=True)
class Figure:
    """A figure of each of r policies; nan where it cannot be known."""

    values: Array  #: [r]
    lows: Array  #: [r]
    highs: Array  #: [r]


def figures(sums: Array) -> dict[str, Figure]:
    """All `FIGURES` from sums [policies, groups, len(SUMS)]; groups without a sample do not count."""
    sums = sums[:, sums[0, :, SUMS.index("samples")] > 0]
    totals = sums.sum(1)
    products = sums.transpose(0, 2, 1) @ sums  # [policies, sums, sums]
    return {name: _figure(name, powers, totals, products, sums.shape[1]) for name, powers in FIGURES.items()}


def _figure(name: str, powers: dict[str, int], totals: Array, products: Array, groups: int) -> Figure:
    places = [SUMS.index(one) for one in powers]
    exponents = np.array(list(powers.values()))
    own = totals[:, places]
    with np.errstate(divide="ignore", invalid="ignore"):
        # A figure whose upper sums are 0 is 0: its slope in them is what is left of the product.
        values = np.prod(own ** exponents.astype(float), axis=1)
        weights = exponents * values[:, None] / own
    for i, exponent in enumerate(exponents):
        empty = (own[:, i] == 0) & (exponent > 0)
        weights[empty, i] = 0
    values[~np.isfinite(values)] = np.nan
    if groups < FEWEST_GROUPS:
        nothing = np.full(len(values), np.nan)
        return Figure(values, nothing, nothing)
    variance = np.einsum("pi,pij,pj->p", weights, products[:, places][:, :, places], weights)
    half = student.ppf(0.975, groups - 1) * np.sqrt(np.maximum(variance, 0) * groups / (groups - 1))
    lows, highs = values - half, values + half
    return Figure(values, np.maximum(lows, 0), np.minimum(highs, 1) if name in _SHARES else highs)


def pareto_front(speeds: Array, qualities: Array) -> Array:
    """[r] whether no other policy is at least as good in both and better in one; nan is never on the front."""
    front = np.zeros(len(speeds), np.bool_)
    known = np.flatnonzero(np.isfinite(speeds) & np.isfinite(qualities))
    best = -np.inf
    order = known[np.lexsort((-qualities[known], -speeds[known]))]
    before = (np.nan, np.nan)
    for place in order:
        pair = (speeds[place], qualities[place])
        if pair[1] > best or pair == before:  # two that are the same are both on it
            front[place] = True
            best, before = max(best, pair[1]), pair
    return front
