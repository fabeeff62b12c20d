"""What a calibration promises of a policy, with its evidence: a part of a spec. No torch, no database."""

from typing import Annotated, Any, Literal

from pydantic import Field

from engine.spec import Spec

Share = Annotated[float, Field(gt=0, lt=1)]


class HeldOut(Spec):
    """What groups say that had no part in the choice."""

    groups: int
    loss: float
    low: float | None = None  #: 95 % over source groups
    high: float | None = None


class Promise(Spec):
    """With this confidence the loss of a sample of another source group is at most `bound` in the mean.

    agreement: loss 1 where a completion is not that of full depth. quality: by how much the metric is below full
    depth's. It holds for the policy, the weights, the exits, the benchmark's kind of samples and the length named here.
    """

    kind: Literal["agreement", "quality"]
    metric: str | None = None
    bound: Annotated[float, Field(gt=0)]  #: of the metric as it is, so above 1 where that reaches 100
    confidence: Share
    policy: dict[str, Any]
    loss: float = Field(description="mean over source groups, of those that were tested")
    p_value: float
    level: float = Field(description="that the p-value had to reach, after its share for all that were tested")
    test: str
    tested: int = Field(description="policies that were tested before and with this one, or chains of them")
    groups: int
    samples: int
    model: str
    weights_hash: str
    exits_hash: str | None = None
    benchmark: str
    content_hash: str | None = None
    max_new_tokens: int
    trace_job: int
    live_job: int | None = None
    speedup_ideal: float | None = None
    speedup_token: float | None = Field(None, description="measured, of the live run")
    held_out: HeldOut | None = None
