"""What each rule of a gate says of each run, with the sentence that says why."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from cluster.comparing.model import Comparison, Difference, PairComparison
from cluster.comparing.words import floor
from cluster.gates import SPEEDS, Gate, Outcome, Rule, RuleVerdict
from cluster.reports.formats import milliseconds
from cluster.reports.model import Estimate
from engine.errors import BadInput
from engine.registry import unknown
from workers.differences import holm
from workers.estimates import FEWEST_GROUPS


def verdicts(gate: Gate, comparison: Comparison) -> list[RuleVerdict]:
    """Of every rule on every run that it is for, in the gate's order. Raises `BadInput` where there is no such run."""
    judged = [found for rule in gate.rules for found in _applied(rule, comparison)]
    corrected = iter(holm([_p_worse(one) for one in judged if one.rule.max_loss is not None]))
    return [
        _level_verdict(one, gate) if one.rule.max_loss is None else _loss_verdict(one, gate, next(corrected))
        for one in judged
    ]


@dataclass(frozen=True)
class _Applied:
    """One rule on one run."""

    rule: Rule
    pair: PairComparison
    difference: Difference


def _applied(rule: Rule, comparison: Comparison) -> list[_Applied]:
    pairs = comparison.pairs
    for field, names in (("benchmark", [one.benchmark for one in pairs]), ("policy", [one.policy_b for one in pairs])):
        wanted = getattr(rule, field)
        if wanted is not None and wanted not in names:
            raise BadInput(f"gate: rule for {rule.metric!r}: {unknown(field, wanted, sorted(set(names)))}")
    pairs = [one for one in pairs if rule.benchmark in (None, one.benchmark) and rule.policy in (None, one.policy_b)]
    found = [_Applied(rule, pair, one) for pair in pairs for one in _differences(rule.metric, pair)]
    if not found:
        known = sorted({one.metric for pair in pairs for one in pair.differences})
        raise BadInput(f"gate: {unknown('metric', rule.metric, known)}")
    return found


def _differences(metric: str, pair: PairComparison) -> list[Difference]:
    """A speed that was not measured is one of nothing, so that the other rules are judged all the same."""
    found = pair.difference(metric)
    return found or ([Difference(metric=metric, kind="speed")] if metric in SPEEDS else [])


def _p_worse(one: _Applied) -> float:
    return 1.0 if one.difference.p_worse is None else one.difference.p_worse


# --- max_loss ---------------------------------------------------------------------------------------------------------


def _loss_verdict(one: _Applied, gate: Gate, p_value: float) -> RuleVerdict:
    rule, difference = one.rule, one.difference
    limit = rule.max_loss or 0.0
    furthest = limit + rule.margin
    seen = _loss(one)
    loss = _beyond_noise(seen, difference)
    outcome, reason = _loss_outcome(loss, limit, furthest, p_value, gate.confidence, difference)
    would_do = None
    if outcome is Outcome.INCONCLUSIVE:
        drowned = _drowned(seen, loss, limit, furthest, difference)
        reason = drowned or reason
        would_do = None if drowned else _would_do(seen, limit, furthest, difference.units)
    sentence = f"{_where(one)}: {_written_loss(one, seen)}{_paced(difference)}; "
    sentence += f"{_amount(one, limit)} is allowed. {reason}"
    if would_do is not None:
        sentence += f" About {would_do:,} {_units(difference)} would do."
    return _verdict(one, outcome, sentence, loss, limit, p_value=p_value, would_do=would_do)


def _loss(one: _Applied) -> Estimate:
    """How much worse B is, as the samples or batches say: below 0 where it is better."""
    of = one.difference.relative if one.rule.is_relative else one.difference.change
    if not one.difference.more_is_better:
        return of
    return Estimate(value=_negative(of.value), low=_negative(of.high), high=_negative(of.low))


def _beyond_noise(loss: Estimate, difference: Difference) -> Estimate:
    """A speed's loss with ends no nearer than its floor; without ends where no floor is known."""
    if difference.kind != "speed" or loss.value is None:
        return loss
    share = None if difference.floor is None else difference.floor.share
    if share is None or loss.low is None or loss.high is None:
        return Estimate(value=loss.value)
    speed = 1 - loss.value  # A's time over B's: noise multiplies it
    return Estimate(
        value=loss.value,
        low=min(loss.low, 1 - speed / (1 - share)),
        high=max(loss.high, 1 - speed * (1 - share)),
    )


def _drowned(seen: Estimate, loss: Estimate, limit: float, furthest: float, difference: Difference) -> str | None:
    """Why more batches would not help: what they say is clear, and within what two runs of the same spec differ by."""
    if difference.kind != "speed" or seen.low is None or seen.high is None or loss.low is None:
        return None
    if not (seen.low > limit or seen.high <= furthest):
        return None
    return f"{floor(difference)} Run the same spec more often, or on a quieter machine."


def _loss_outcome(
    loss: Estimate, limit: float, furthest: float, p_value: float, confidence: float, difference: Difference
) -> tuple[Outcome, str]:
    sure = f"with {100 * confidence:g} % confidence"
    if loss.low is None or loss.high is None:
        return Outcome.INCONCLUSIVE, _no_interval(loss, difference)
    if loss.low > limit and p_value <= 1 - confidence:
        return Outcome.FAIL, f"It is more than that {sure}."
    if loss.high <= furthest:
        return Outcome.PASS, f"It is no more than that and its margin {sure}."
    if loss.low > limit:
        return Outcome.INCONCLUSIVE, f"It may be chance: among all rules of the gate, p = {p_value:.3g}."
    return Outcome.INCONCLUSIVE, f"It may be less and it may be more than that and its margin {sure}."


def _no_interval(loss: Estimate, difference: Difference) -> str:
    if difference.kind == "speed" and not difference.units:
        return (
            "No batch was timed on the same device class under both; run both on one kind of machine, with batches of "
            "one size and workers that are alone on it."
        )
    if difference.groups < FEWEST_GROUPS:
        return f"Samples from {difference.groups} source groups are too few; at least {FEWEST_GROUPS} are needed."
    if loss.value is None:
        return "A's value is 0, so that there is no share of it to lose; give the rule scale: absolute."
    if difference.kind == "speed":
        return (
            f"Nobody knows how far two runs of the same spec differ on {difference.device_class}; run one of the two "
            "jobs again, more than once."
        )
    return "There is no interval."


def _would_do(loss: Estimate, limit: float, furthest: float, units: int) -> int | None:
    """About how many samples bring the end of the interval to where it decides; errors fall with their square root."""
    if loss.value is None or loss.low is None or loss.high is None:
        return None
    ratios = []
    if loss.value < furthest and loss.high > furthest:
        ratios.append((loss.high - loss.value) / (furthest - loss.value))
    if loss.value > limit and loss.low <= limit:
        ratios.append((loss.value - loss.low) / (loss.value - limit))
    return ceil(units * min(ratios) ** 2) if ratios else None


# --- min --------------------------------------------------------------------------------------------------------------


def _level_verdict(one: _Applied, gate: Gate) -> RuleVerdict:
    limit, metric = one.rule.min or 0.0, one.rule.metric
    level = one.pair.levels.get(metric, Estimate())
    sure = f"with {100 * gate.confidence:g} % confidence"
    written = (
        f"{_where(one)}: {_number(level.value)}{_between(level, _number)}; at least {_number(limit)} is asked for."
    )
    if level.low is None or level.high is None:
        outcome = Outcome.INCONCLUSIVE
        reason = "There is no interval: too few source groups, or no full depth beside it."
    elif level.low >= limit:
        outcome, reason = Outcome.PASS, f"It is that {sure}."
    elif level.high < limit:
        outcome, reason = Outcome.FAIL, f"It is less {sure}."
    else:
        outcome, reason = Outcome.INCONCLUSIVE, f"It may be less and it may be more {sure}."
    return _verdict(one, outcome, f"{written} {reason}", level, limit)


# --- words ------------------------------------------------------------------------------------------------------------


def _verdict(
    one: _Applied,
    outcome: Outcome,
    sentence: str,
    value: Estimate,
    limit: float,
    *,
    p_value: float | None = None,
    would_do: int | None = None,
) -> RuleVerdict:
    return RuleVerdict(
        metric=one.rule.metric,
        benchmark=one.pair.benchmark,
        policy=one.pair.policy_b,
        device_class=one.difference.device_class,
        outcome=outcome,
        sentence=sentence,
        value=value,
        limit=limit,
        scale="relative" if one.rule.is_relative else "absolute",
        p_value=p_value,
        would_do=would_do,
        kind=one.difference.kind,
    )


def _where(one: _Applied) -> str:
    return f"{one.rule.metric} of {one.pair.policy_b} on {one.pair.benchmark}"


def _written_loss(one: _Applied, loss: Estimate) -> str:
    if loss.value is None:
        return "no loss can be told"
    if loss.value == 0:
        return f"no loss{_between(loss, lambda value: _amount(one, value or 0.0))}"
    if loss.value < 0:
        gain = Estimate(value=-loss.value, low=_negative(loss.high), high=_negative(loss.low))
        return f"a gain of {_amount(one, gain.value or 0.0)}{_between(gain, lambda value: _amount(one, value or 0.0))}"
    return f"a loss of {_amount(one, loss.value)}{_between(loss, lambda value: _amount(one, value or 0.0))}"


def _paced(difference: Difference) -> str:
    """What a speed was held against, beside what the clock says, which may be the opposite."""
    if not difference.paced:
        return ""
    return f" against full depth of its own job ({milliseconds(difference.a)} → {milliseconds(difference.b)})"


def _amount(one: _Applied, value: float) -> str:
    return f"{100 * value:.2f} %".replace("-", "−") if one.rule.is_relative else _number(value)


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}".replace("-", "−")


def _between(estimate: Estimate, write: Callable[[float | None], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({write(estimate.low)} to {write(estimate.high)})"


def _negative(value: float | None) -> float | None:
    return None if value is None else 0.0 - value  # never -0.0


def _units(difference: Difference) -> str:
    return "batches" if difference.kind == "speed" else "samples"
