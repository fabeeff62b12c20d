"""How a comparison writes its numbers: the same on the terminal and on the page."""

from cluster.comparing.model import Difference, PairComparison
from cluster.reports import formats
from cluster.reports.model import Estimate

#: a corrected p-value up to here is called a finding
FOUND = 0.05
#: a noise floor that says nothing but that little is known
TOO_WIDE = 0.5


def signed_percent(share: float | None) -> str:
    """A change in percent, always with its sign; what rounds to nothing has none."""
    if share is None:
        return formats.ABSENT
    written = formats.percent(share)
    if written.strip("−") == "0.0%":
        return "0.0%"
    return f"+{written}" if share > 0 else written


def signed_percents(estimate: Estimate) -> str:
    """An interval of such; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{signed_percent(estimate.low)} to {signed_percent(estimate.high)}"


def value(one: Difference, of: float | None) -> str:
    """What the metric came to on one side."""
    return formats.milliseconds(of) if one.kind == "speed" else formats.score(of)


def p_value(p: float | None) -> str:
    """Three digits are all that anybody reads."""
    if p is None:
        return formats.ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def standing(one: Difference) -> str:
    """`worse` or `better` where that is no chance, and for a speed more than noise; else empty."""
    if one.p_holm is None or one.p_holm > FOUND:
        return ""
    if one.kind == "speed" and _within_floor(one):
        return ""
    return "worse" if one.is_worse else "better"


def _within_floor(one: Difference) -> bool:
    if one.floor is None or one.floor.share is None or one.relative.value is None:
        return True
    speed = 1 + one.relative.value
    return 1 - one.floor.share <= speed <= 1 / (1 - one.floor.share)


def floor(one: Difference) -> str:
    """What a speed was held against, and what is known of its noise."""
    return f"Held against full depth of its own job. {_floor(one)}" if one.paced else _floor(one)


def _floor(one: Difference) -> str:
    if one.floor is None or one.floor.share is None:
        return "How far two runs of one spec differ is not known, so no change can be told from noise."
    if not one.floor.pairs:
        return "Both were timed in turns within one job."
    pairs = f"{formats.count(one.floor.pairs)} pair{'' if one.floor.pairs == 1 else 's'}"
    if one.floor.share > TOO_WIDE:
        return f"Runs of one spec are known in {pairs}, too few to tell a change from noise."
    return f"Two runs of one spec differ by up to {formats.percent(one.floor.share)} ({pairs})."


def policies(pair: PairComparison) -> str:
    """The policy, or both where they differ."""
    return pair.policy_b if pair.policy_a == pair.policy_b else f"{pair.policy_a} → {pair.policy_b}"


def agreement(pair: PairComparison) -> str:
    """How far the completions themselves are the same, as one sentence."""
    found = pair.agreement
    said = f"The same tokens for {formats.percent(found.exact)} of the samples"
    if found.median_divergence is None:
        return f"{said}."
    return f"{said}; where they differ, half do by token {found.median_divergence + 1:g}."


def headline(pair: PairComparison) -> str:
    """What changed beyond chance, as one sentence."""
    found = [f"{one.metric} {_amount(one)}" for one in pair.differences if standing(one)]
    return f"Beyond chance: {', '.join(found)}." if found else "Nothing changed that could not be chance."


def _amount(one: Difference) -> str:
    written = signed_percent(one.relative.value)
    return f"{formats.signed(one.change.value)}" if one.relative.value is None else written
