"""What a caller may ask of training. No torch here."""

from typing import Literal

from pydantic import Field

from engine.spec import Device, HeadKind, Spec


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
    controller: bool = True
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
