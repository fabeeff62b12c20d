"""What a caller may ask of training. No torch here."""

from typing import Any, Literal

from pydantic import Field, field_validator

from engine.spec import ControllerKind, Device, HeadKind, Spec

Labels = Literal["sec", "agrees"]


class ControllerSpec(Spec):
    """A controller on top of the heads."""

    kind: ControllerKind = Field(
        "sec", description="sec: one matrix for all exit points; calibrated: one each, its probabilities those observed"
    )
    labels: Labels = Field(
        "sec", description="sec: exit from the first right layer on; agrees: exit where full depth says the same"
    )
    epochs: int = Field(4, ge=1)
    learning_rate: float = Field(2e-3, gt=0)


class TrainSpec(Spec):
    """An exit bundle to be trained on a frozen model."""

    model: str = Field(min_length=1)
    corpus: list[str] = Field(min_length=1, description="folders, or names of installed packages")
    holdout: list[str] = Field(
        min_length=1, description="folders or packages kept apart: what the scores are measured on"
    )
    exit_points: tuple[int, ...] = Field(min_length=1)
    head: HeadKind = "lens"
    rank: int = Field(128, ge=1, description="of a lens")
    shortlist: int | None = Field(None, ge=2, description="let heads choose among the most frequent tokens only")
    controller: ControllerSpec | None = Field(ControllerSpec(), description="true: SEC's; false: none")
    target: Literal["full", "reference"] = Field(
        "full", description="heads learn the distribution of full depth, or the token that the source has"
    )
    tokens: int = Field(150_000, ge=1_000)
    holdout_tokens: int = Field(20_000, ge=500)
    context: int = Field(512, ge=16, description="tokens in a window of source code")
    windows_per_file: int = Field(2, ge=1, description="so that long files do not drown the others")
    epochs: int = Field(2, ge=1)
    batch_tokens: int = Field(512, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    seed: int = 0
    device: Device = "auto"
    threads: int | None = Field(None, ge=1)

    @field_validator("controller", mode="before")
    @classmethod
    def _by_a_word(cls, value: Any) -> Any:
        """`true`, `false`, or a kind alone."""
        if isinstance(value, bool):
            return ControllerSpec() if value else None
        return {"kind": value} if isinstance(value, str) else value
