"""Comparison: what changed from A to B. Every number that a comparison shows stands here."""

from typing import Any, Literal

from cluster.reports.model import Estimate, Part

Kind = Literal["quality", "speed"]


class McNemar(Part):
    """Of a metric that is 0 or 1: samples that changed sides, and how likely so uneven a split is by chance.

    Exact, and as if samples were independent; `Difference.p_value` is the one that minds source groups.
    """

    lost: int  #: 1 under A, 0 under B
    gained: int
    p_value: float


class Floor(Part):
    """How far two runs of the same spec differ in speed, on this benchmark, policy and device class."""

    pairs: int  #: of runs of the same spec; each run is in one pair
    share: float | None  #: a slowdown below this share of A's speed is no news; None: no pair is known


class Difference(Part):
    """One metric under A and under B, over what both have."""

    metric: str  #: a metric, `errors`, or `speedup_token`, `speedup_request`
    kind: Kind
    version: str | None = None  #: of the metric's implementation
    more_is_better: bool = True
    device_class: str | None = None  #: of a speed
    a: float | None = None  #: quality: the mean; speed: milliseconds a token, or a batch for `speedup_request`
    b: float | None = None
    change: Estimate = Estimate()  #: b - a; of a speed nothing
    relative: Estimate = Estimate()  #: quality: b / a - 1; speed: A's time over B's - 1, so that a slowdown is below 0
    paced: bool = False  #: of a speed: for `relative` each time is a multiple of full depth's in its own job
    p_value: float | None = None  #: two-sided: A and B swapped at random in whole source groups
    p_holm: float | None = None  #: the same, corrected for all differences of the comparison
    p_worse: float | None = None  #: one-sided: that B is no worse
    mcnemar: McNemar | None = None
    detectable: float | None = None  #: the change that would be found with 80 % at 5 %, in the unit of `change`
    detectable_relative: float | None = None
    units: int = 0  #: samples, or batches, that both have
    groups: int = 0  #: source groups that they come from
    floor: Floor | None = None  #: of a speed

    @property
    def is_worse(self) -> bool:
        """Whether B is worse in what was seen, however sure that is."""
        value = self.relative.value if self.kind == "speed" else self.change.value
        return value is not None and (value < 0 if self.more_is_better else value > 0)


class Flip(Part):
    """A sample that changed."""

    sample_id: int  #: the record's own key
    sample: str
    source_group: str


class Flips(Part):
    """Samples whose metric of 0 or 1 changed; the lists may be shorter than the counts."""

    metric: str
    n_lost: int
    n_gained: int
    lost: list[Flip]  #: 1 under A, 0 under B
    gained: list[Flip]


class Moved(Part):
    """A sample whose score changed much."""

    sample_id: int
    sample: str
    source_group: str
    a: float
    b: float


class Agreement(Part):
    """How far the completions themselves are the same."""

    exact: float | None  #: share of samples with the same tokens
    tokens: float | None  #: mean share of B's tokens that stand at their place in A's
    diverging: int  #: samples whose tokens differ
    median_divergence: float | None  #: of those: index of the first token that differs
    first_divergence: dict[str, int]  #: index of the first token that differs -> samples


class PairComparison(Part):
    """One run of A and one of B on the same benchmark."""

    benchmark: str
    content_hash: str
    benchmark_id: int
    job_a: int
    job_b: int
    run_a: int
    run_b: int
    policy_a: str
    policy_b: str
    same_spec: bool  #: both were computed from the same weights, exits, policy, versions and settings
    samples: int  #: that ended under both, errors included
    unpaired: int  #: that ended under one of them only
    errors_a: int
    errors_b: int
    agreement: Agreement
    differences: list[Difference]
    #: what B alone comes to: metrics, and speedups over `full` of its own job
    levels: dict[str, Estimate]
    flips: list[Flips]
    diverged: list[Flip] = []  #: samples with other tokens, those first whose tokens part first
    moved: list[
        Moved
    ]  #: by `rouge_l`, or the first metric that changed: those that lost most, then those that gained most
    moved_metric: str | None
    notes: list[str]

    def difference(self, metric: str) -> list[Difference]:
        """Of this metric: one; of a speed one a device class; none where it was not measured."""
        return [one for one in self.differences if one.metric == metric]


class Changed(Part):
    """A part of the provenance in which the two sides differ."""

    what: str
    a: Any
    b: Any


class Side(Part):
    """What was compared."""

    asked: str  #: as it was asked for
    job_id: int
    name: str
    finished_at: float | None


class Comparison(Part):
    """All pairs of runs of two sides."""

    a: Side
    b: Side
    confidence: float  #: of all intervals, two-sided
    pairs: list[PairComparison]
    changed: list[Changed]
    notes: list[str]  #: what was left out, and why

    @property
    def differences(self) -> list[Difference]:
        return [one for pair in self.pairs for one in pair.differences]
