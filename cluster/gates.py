"""Gates: rules that a comparison passes or fails, and the sentence that says why.

A rule fails where the loss is certainly larger than what it allows, passes where it is certainly no larger than that
and its margin, and is inconclusive in between. Certain means: with the gate's confidence, one-sided; and for a failure
the difference must also stand against chance, all rules of the gate considered together (Holm).
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cluster.comparing.model import Comparison
from cluster.reports.model import Estimate, Part
from cluster.spec import complaint, read_yaml
from engine.errors import BadInput
from engine.spec import Spec

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
    max_loss: float | None = Field(None, ge=0, allow_inf_nan=False, description="how much worse B may be than A")
    min: float | None = Field(None, allow_inf_nan=False, description="how good B must be, whatever A is")
    scale: Literal["relative", "absolute"] = Field(
        "relative", description="of max_loss and margin: a share of A's value, or the metric's own unit"
    )
    margin: float = Field(
        0.02, ge=0, allow_inf_nan=False, description="how far beyond it uncertainty may reach for a pass"
    )
    benchmark: str | None = Field(None, min_length=1, description="only on this one")
    policy: str | None = Field(None, min_length=1, description="only under this one of B's")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Rule":
        if (self.max_loss is None) == (self.min is None):
            raise ValueError(f"rule for {self.metric!r}: give one of max_loss and min, like max_loss: 0.02.")
        if self.min is not None and self.metric == ERRORS:
            raise ValueError("rule for 'errors': fewer are better, so that they have no min; give max_loss.")
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
    value: Estimate  #: of max_loss the loss (a gain is below 0), of min the figure itself; at the gate's confidence
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
    from cluster.comparing.judging import verdicts

    rules = verdicts(gate, comparison)
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


def _summary(rules: list[RuleVerdict]) -> str:
    first = rules[0]
    counts = {outcome: sum(one.outcome is outcome for one in rules) for outcome in Outcome}
    if first.outcome is Outcome.PASS:
        return f"All {len(rules)} rules hold." if len(rules) > 1 else first.sentence
    others = counts[first.outcome] - 1
    return first.sentence + (f" And {others} more like it." if others else "")
