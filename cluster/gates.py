"""Gates: rules that a comparison passes or fails, and the sentence that says why.

A rule fails where the loss is certainly larger than what it allows, passes where it is certainly no larger than that
and its margin, and is inconclusive in between. Certain means: with the gate's confidence, one-sided; and for a failure
the difference must also stand against chance, all rules of the gate considered together (Holm).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cluster.comparing.model import Comparison, Difference, PairComparison
from cluster.reports.model import Estimate, Part
from cluster.spec import complaint, read_yaml
from engine.errors import BadInput
from engine.registry import unknown
from engine.spec import Spec
from workers.differences import holm
from workers.estimates import FEWEST_GROUPS

if TYPE_CHECKING:
    from cluster.comparing.sides import Asked
    from db.session import Database


ERRORS = "errors"
SPEEDS = ("speedup_token", "speedup_request")


class Outcome(StrEnum):
    """What a gate says."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> int:
        return {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 3}[self]


class Rule(Spec):
    """One line of a gate file."""

    metric: str = Field(min_length=1, description="a metric, `errors`, `speedup_token` or `speedup_request`")
    max_loss: float | None = Field(None, ge=0, description="how much worse B may be than A")
    min: float | None = Field(None, description="how good B must be, whatever A is")
    scale: Literal["relative", "absolute"] = Field(
        "relative", description="of max_loss and margin: a share of A's value, or the metric's own unit"
    )
    margin: float = Field(0.02, ge=0, description="how far beyond it uncertainty may reach for a pass")
    benchmark: str | None = Field(None, min_length=1, description="only on this one")
    policy: str | None = Field(None, min_length=1, description="only under this one of B's")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Rule":
        if (self.max_loss is None) == (self.min is None):
            raise ValueError(f"rule for {self.metric!r}: give one of max_loss and min, like max_loss: 0.02.")
        if self.max_loss is not None and self.metric in SPEEDS and self.scale == "absolute":
            raise ValueError(
                f"rule for {self.metric!r}: scale is 'absolute', but a speed changes by a share; leave it out."
            )
        return self

    @property
    def is_relative(self) -> bool:
        """An error rate is mostly 0, and has no shares."""
        return self.scale == "relative" and self.metric != ERRORS


class Gate(Spec):
    """A gate file."""

    rules: list[Rule] = Field(min_length=1)
    confidence: float = Field(0.99, gt=0.5, le=0.9999, description="one-sided, of every pass and failure")
    on_inconclusive: Literal["pass", "fail", "inconclusive"] = "inconclusive"

    @property
    def two_sided(self) -> float:
        """The confidence of the intervals that the gate reads."""
        return 2 * self.confidence - 1


class RuleVerdict(Part):
    """What one rule says of one run."""

    metric: str
    benchmark: str
    policy: str  #: of B
    device_class: str | None
    outcome: Outcome
    sentence: str
    value: (
        Estimate  #: of max_loss the loss, so that a gain is below 0; of min the figure itself; at the gate's confidence
    )
    limit: float  #: max_loss or min
    scale: Literal["relative", "absolute"]
    p_value: float | None = None  #: of a loss: one-sided, corrected for all rules
    would_do: int | None = None  #: about so many samples would be enough; batches where it is a speed
    kind: Literal["quality", "speed"]


class Verdict(Part):
    """What a gate says of a comparison."""

    outcome: Outcome
    sentence: str
    rules: list[RuleVerdict]  #: failures first
    job_a: int
    job_b: int
    confirmation: str | None = None  #: how a failure was asked again, and what came of it

    @property
    def failed(self) -> list[RuleVerdict]:
        return [one for one in self.rules if one.outcome is Outcome.FAIL]


def parse_gate(value: Any) -> Gate:
    """Check what a gate file holds. Raises `BadInput`."""
    if not isinstance(value, dict):
        raise BadInput(
            f"gate: {value!r} is not a mapping; give at least rules, like [{{metric: rouge_l, max_loss: 0.02}}]."
        )
    try:
        return Gate.model_validate(value)
    except ValidationError as error:
        raise BadInput(f"gate: {complaint(error)}") from None


def read_gate(source: str | Path) -> Gate:
    """Read a gate file; `-` is standard input. Raises `BadInput`."""
    return parse_gate(read_yaml(source, word="gate", like="rules: [{metric: rouge_l, max_loss: 0.02}]"))


def judge(db: "Database", gate: Gate, a: "Asked", b: "Asked | None" = None) -> Verdict:
    """Compare two sides (see `cluster.comparing.sides.parse_side`) as the gate needs it, and decide.

    a alone: every policy of a job is held against `full` of the same job. Raises `BadInput` (of engine or db).
    """
    from cluster.comparing.build import compare

    levels = {rule.metric for rule in gate.rules if rule.min is not None}
    return decide(gate, compare(db, a, b, confidence=gate.two_sided, levels=levels))


def decide(gate: Gate, comparison: Comparison) -> Verdict:
    """What the gate says. comparison: at `Gate.two_sided`. Raises `BadInput` for a rule that nothing answers to."""
    if abs(comparison.confidence - gate.two_sided) > 1e-9:
        raise ValueError("the comparison has intervals at another confidence than the gate")
    judged = [found for rule in gate.rules for found in _applied(rule, comparison)]
    corrected = iter(holm([_p_worse(one) for one in judged if one.rule.max_loss is not None]))
    rules = [
        _level_verdict(one, gate) if one.rule.max_loss is None else _loss_verdict(one, gate, next(corrected))
        for one in judged
    ]
    return concluded(gate, rules, comparison.a.job_id, comparison.b.job_id)


def concluded(gate: Gate, rules: list[RuleVerdict], job_a: int, job_b: int, confirmation: str | None = None) -> Verdict:
    """The verdict that these rules come to."""
    order = [Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS]
    rules = sorted(rules, key=lambda one: order.index(one.outcome))
    outcome, sentence = rules[0].outcome, _summary(rules)
    if outcome is Outcome.INCONCLUSIVE and gate.on_inconclusive != "inconclusive":
        outcome = Outcome(gate.on_inconclusive)
        sentence += f" The gate counts that as {outcome}."
    return Verdict(outcome=outcome, sentence=sentence, rules=rules, job_a=job_a, job_b=job_b, confirmation=confirmation)


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
    found = [_Applied(rule, pair, one) for pair in pairs for one in pair.difference(rule.metric)]
    if not found:
        known = sorted({one.metric for pair in pairs for one in pair.differences})
        if rule.metric in SPEEDS:
            raise BadInput(
                f"gate: rule for {rule.metric!r}: no batch was timed on the same device class under both; run both "
                "on one kind of machine, with workers that are alone on it."
            )
        raise BadInput(f"gate: {unknown('metric', rule.metric, known)}")
    return found


def _p_worse(one: _Applied) -> float:
    return 1.0 if one.difference.p_worse is None else one.difference.p_worse


# --- max_loss ---------------------------------------------------------------------------------------------------------


def _loss_verdict(one: _Applied, gate: Gate, p_value: float) -> RuleVerdict:
    rule, difference = one.rule, one.difference
    limit = rule.max_loss or 0.0
    loss = _loss(one)
    outcome, reason = _loss_outcome(loss, limit, limit + rule.margin, p_value, gate.confidence, difference)
    would_do = (
        _would_do(loss, limit, limit + rule.margin, difference.units) if outcome is Outcome.INCONCLUSIVE else None
    )
    written = _written_loss(one, loss)
    sentence = f"{_where(one)}: {written}; {_amount(one, limit)} is allowed. {reason}"
    if would_do is not None:
        sentence += f" About {would_do:,} {_units(difference)} would do."
    return _verdict(one, outcome, sentence, loss, limit, p_value=p_value, would_do=would_do)


def _loss(one: _Applied) -> Estimate:
    """How much worse B is: below 0 where it is better. A speed's ends are never nearer than its floor."""
    of = one.difference.relative if one.rule.is_relative else one.difference.change
    if not one.difference.more_is_better or of.value is None:
        return of
    low, high = (None if of.high is None else -of.high), (None if of.low is None else -of.low)
    if one.difference.kind == "speed":
        share = None if one.difference.floor is None else one.difference.floor.share
        if share is None or low is None or high is None:
            return Estimate(value=-of.value)
        low, high = min(low, -of.value - share), max(high, -of.value + share)
    return Estimate(value=-of.value, low=low, high=high)


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
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            "There is no interval: too few source groups, or nothing to hold it against.",
        )
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
    if loss.value <= 0:
        gain = Estimate(value=-loss.value, low=_negative(loss.high), high=_negative(loss.low))
        return f"a gain of {_amount(one, gain.value or 0.0)}{_between(gain, lambda value: _amount(one, value or 0.0))}"
    return f"a loss of {_amount(one, loss.value)}{_between(loss, lambda value: _amount(one, value or 0.0))}"


def _amount(one: _Applied, value: float) -> str:
    return f"{100 * value:.2f} %".replace("-", "−") if one.rule.is_relative else _number(value)


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}".replace("-", "−")


def _between(estimate: Estimate, write: Callable[[float | None], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({write(estimate.low)} to {write(estimate.high)})"


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _units(difference: Difference) -> str:
    return "batches" if difference.kind == "speed" else "samples"


def _summary(rules: list[RuleVerdict]) -> str:
    first = rules[0]
    counts = {outcome: sum(one.outcome is outcome for one in rules) for outcome in Outcome}
    if first.outcome is Outcome.PASS:
        return f"All {len(rules)} rules hold." if len(rules) > 1 else first.sentence
    others = counts[first.outcome] - 1
    return first.sentence + (f" And {others} more like it." if others else "")
