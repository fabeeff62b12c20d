"""What judges said of completions: how many they accept, how well a proxy predicts them, how much they agree.

Several judges of one completion count as one who is drawn among them at random: what they say is the share of them who
accept it. With one judge that is what the judge said.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from workers.estimates import Estimate, estimate
from workers.estimates import _ratio as ratio


@dataclass(frozen=True)
class Predicted:
    """How well the proxy predicts judges, over completions that have both. All in 0..1."""

    completions: int
    proxy: Estimate  #: share that the proxy accepts
    precision: Estimate  #: of what the proxy accepts, the share that judges accept
    recall: Estimate  #: of what judges accept, the share that the proxy accepts
    agreement: Estimate  #: share of which both say the same


def acceptance_rate(groups: Sequence[str], accepted: Sequence[float]) -> Estimate:
    """Share of completions that judges accept, with its interval over source groups. One place a completion."""
    return estimate(ratio, np.array(groups, object), accepted, np.ones(len(accepted)))


def predicted(groups: Sequence[str], accepted: Sequence[float], proxy: Sequence[float]) -> Predicted:
    """How well a proxy of 0 or 1 predicts judges. One place a completion; intervals over source groups."""
    ours, theirs = np.array(accepted, np.float64), np.array(proxy, np.float64)
    names, ones, both = np.array(groups, object), np.ones(len(accepted)), ours * theirs
    return Predicted(
        completions=len(ones),
        proxy=estimate(ratio, names, theirs, ones),
        precision=estimate(ratio, names, both, theirs),
        recall=estimate(ratio, names, both, ours),
        agreement=estimate(ratio, names, both + (1 - ours) * (1 - theirs), ones),
    )


def krippendorff_alpha(ratings: Sequence[tuple[Hashable, str, bool]]) -> float | None:
    """Krippendorff's alpha (nominal) of (item, judge, accepted): 1 where judges agree, 0 where only as chance would.

    Any number of judges, of whom each may have judged some items only (Krippendorff 2011). None where no item has two
    judges, or all of them said the same of everything: then there is nothing to agree or disagree about.
    """
    from krippendorff import alpha

    items = {item: place for place, item in enumerate(dict.fromkeys(item for item, _, _ in ratings))}
    judges = {judge: place for place, judge in enumerate(dict.fromkeys(judge for _, judge, _ in ratings))}
    table = np.full((len(judges), len(items)), np.nan)
    for item, judge, accepted in ratings:
        table[judges[judge], items[item]] = accepted
    shared = table[:, (~np.isnan(table)).sum(axis=0) > 1]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return float(alpha(reliability_data=shared, level_of_measurement="nominal"))
