"""What a calibration came to."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from cluster.calibrate.promise import Promise

if TYPE_CHECKING:
    from cluster.traced import Trace


@dataclass(frozen=True)
class Candidate:
    """A policy that was tested, or was to be."""

    policy: str  #: its label
    spec: dict[str, Any]
    loss: float | None  #: mean over source groups; None: nothing was tested, for it is not faster
    p_value: float | None  #: None: not reached, for a safer one in its sequence did not keep the promise
    kept: bool
    speedup: float | None  #: ideal by replay, or measured where it ran live
    faster: bool  #: than full depth
    groups_that_would_do: int | None  #: if groups went on as these; None: no number would

    @property
    def sureness(self) -> tuple[float, float]:
        """The less the closer to a promise."""
        return (1.0 if self.p_value is None else self.p_value, 1.0 if self.loss is None else self.loss)


@dataclass(frozen=True)
class Calibrated:
    """All that was tested, and the fastest of what keeps the promise."""

    job_id: int  #: of the trace
    live_job: int | None
    benchmark: str
    kind: Literal["agreement", "quality"]
    bound: float
    confidence: float
    groups: int  #: that were tested on
    samples: int
    tried: list[Candidate]
    chosen: Candidate | None
    closest: Candidate | None  #: where nothing keeps the promise and is faster than full depth
    promise: Promise | None

    @property
    def undecided(self) -> bool:
        """Whether more groups may show what these do not."""
        closest = self.closest
        return closest is not None and closest.faster and closest.groups_that_would_do is not None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        kept = {name: value for name, value in vars(self).items() if name != "promise"}
        plain = {name: asdict(one) if isinstance(one, Candidate) else one for name, one in kept.items()}
        plain["tried"] = [asdict(one) for one in self.tried]
        return plain | {"promise": None if self.promise is None else self.promise.model_dump(mode="json")}


def is_faster(speedup: float) -> bool:
    """Than full depth, to the two digits that are shown: nobody wants to promise anything for 1.00×."""
    return round(speedup, 2) > 1


def fastest(tried: list[Candidate]) -> tuple[Candidate | None, Candidate | None]:
    """The fastest that keeps the promise; where there is none, of those faster than full depth the closest to it."""
    kept = [one for one in tried if one.kept and one.faster]
    if kept:
        return max(kept, key=lambda one: one.speedup or 0), None
    able = [one for one in tried if one.faster] or tried
    return None, min(able, key=lambda one: one.sureness, default=None)


def promised(made: Calibrated, trace: "Trace", **evidence: Any) -> Calibrated:
    """The same with the promise of what was chosen. evidence: what only who tested it knows."""
    chosen, pinned = made.chosen, trace.pinned
    assert chosen is not None
    assert chosen.p_value is not None
    assert chosen.loss is not None
    promise = Promise(
        kind=made.kind,
        bound=made.bound,
        confidence=made.confidence,
        policy=chosen.spec,
        loss=chosen.loss,
        p_value=chosen.p_value,
        groups=made.groups,
        samples=made.samples,
        model=pinned.model,
        weights_hash=pinned.weights_hash,
        exits_hash=pinned.exits_hash,
        benchmark=made.benchmark,
        content_hash=pinned.benchmarks.get(made.benchmark),
        max_new_tokens=pinned.max_new_tokens,
        trace_job=made.job_id,
        live_job=made.live_job,
        **evidence,
    )
    return replace(made, promise=promise)
