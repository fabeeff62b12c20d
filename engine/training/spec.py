"""What a caller may ask of training. No torch here."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.spec import ControllerKind, Device, HeadKind, Probability, Spec

Labels = Literal["sec", "agrees"]
Target = Literal["full", "choice", "reference", "mix"]


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


class CorpusSpec(Spec):
    """What is learned from, and what is measured on."""

    model: str = Field(min_length=1)
    corpus: list[str] = Field(
        min_length=1,
        description="folders, installed packages, source archives, JSONL files, datasets:<hub id or folder>, stdlib",
    )
    holdout: list[str] = Field(
        [], description="the same, kept apart: what the scores are measured on; absent: `holdout_share` of the projects"
    )
    holdout_share: Probability = 0.1
    benchmarks: list[str] = Field(["humaneval-lines"], description="whatever overlaps these is taken out of the corpus")
    languages: list[str] = Field(["python"], min_length=1)
    tokens: int = Field(150_000, ge=1_000)
    holdout_tokens: int = Field(20_000, ge=500)
    context: int = Field(512, ge=16, description="tokens in a window of source code")
    windows_per_file: int = Field(2, ge=1, description="so that long files do not drown the others")
    seed: int = 0
    device: Device = "auto"
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _hold_a_window(self) -> "CorpusSpec":
        for name in ("tokens", "holdout_tokens"):
            if getattr(self, name) < self.context:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, less than one window of context {self.context}; raise it, or "
                    "lower context."
                )
        return self


class Pace(Spec):
    """How training goes, whatever is trained."""

    warm_up: int = Field(0, ge=0, description="steps over which the rates rise; a cosine takes them down again")
    clip: float = Field(1.0, gt=0, description="norm that gradients are cut to")
    evaluate_every: int = Field(200, ge=1, description="steps between looks at held-out code; the best one is kept")
    patience: int = Field(5, ge=1, description="so many looks in a row without a better one end the training")
    save_every: float = Field(60.0, ge=0, description="seconds between checkpoints")


class TuningSpec(Pace):
    """How the backbone is tuned for its exits: low-rank deltas on every matrix of every layer, all losses at once."""

    rank: int = Field(40, ge=1)
    steps: int = Field(400, ge=1)
    windows: int = Field(2, ge=1, description="windows of `context` tokens in one step")
    learning_rate: float = Field(1e-3, gt=0, description="of the deltas")
    heads_rate: float = Field(5e-4, gt=0, description="of the lenses")
    warm_up: int = Field(20, ge=0, description="steps over which the rates rise; a cosine takes them down again")
    exits: Literal["together", "rotational"] = Field(
        "together", description="all exit points in every step, or one after the other in turn (LayerSkip)"
    )
    exit_weight: float = Field(0.5, ge=0, description="an exit point's loss against that of the last layer")
    weighted: Literal["alike", "by-depth"] = Field(
        "alike", description="whether deeper exit points count more, by their layer's number (LayerSkip)"
    )
    layer_dropout: Probability = Field(
        0.0, description="what the probability of leaving a layer out grows to, exponentially with depth (LayerSkip)"
    )
    evaluate_every: int = Field(100, ge=1, description="steps between looks at held-out code; the best one is kept")
    save_every: float = Field(120.0, ge=0, description="seconds between checkpoints")


class FineTuneSpec(CorpusSpec, Pace):
    """A model that was not trained on code learns a language: all its weights, next-token loss."""

    steps: int = Field(1000, ge=1)
    windows: int = Field(4, ge=1, description="windows of `context` tokens in one step")
    learning_rate: float = Field(5e-5, gt=0)
    warm_up: int = Field(50, ge=0, description="steps over which the rate rises; a cosine takes it down again")
    evaluate_every: int = Field(100, ge=1, description="steps between looks at held-out code; the best one is kept")
    save_every: float = Field(300.0, ge=0, description="seconds between checkpoints")


class TrainSpec(CorpusSpec, Pace):
    """An exit bundle to be trained, on the model as it is or on one that is tuned for its exits.

    The pace is that of heads on cached states; tuning has one of its own.
    """

    start: str | None = Field(None, description="a bundle whose heads and deltas training goes on from")
    exit_points: tuple[int, ...] = Field(min_length=1)
    head: HeadKind = "lens"
    rank: int = Field(128, ge=1, description="of a lens")
    shortlist: int | None = Field(None, ge=2, description="let heads choose among the most frequent tokens only")
    preview: int | None = Field(
        64, ge=1, description="rank of the look at all tokens behind the last layer, for policies with `preview`"
    )
    controller: ControllerSpec | None = Field(ControllerSpec(), description="true: SEC's; false: none")
    target: Target = Field(
        "full", description="heads learn full depth's distribution, its choice, the source's next token, or a mix"
    )
    mix: Probability = Field(0.5, description="share of the source's next token in a mix; the rest is the distribution")
    candidates: int = Field(1024, ge=1, description="tokens that one step's loss compares, the others being estimated")
    cached_tokens: int | None = Field(
        None, ge=1_000, description="of `tokens` so many have their states cached for heads and controller; absent: all"
    )
    epochs: int = Field(2, ge=1, description="how often heads see the cached states")
    batch_tokens: int = Field(512, ge=1, description="states that heads learn from in one step")
    learning_rate: float = Field(2e-3, gt=0, description="of heads on cached states; a cosine takes it down")
    tuning: TuningSpec | None = Field(None, description="tune the backbone too; absent: it stays as it is")

    @model_validator(mode="after")
    def _lenses_are_tuned(self) -> "TrainSpec":
        if self.tuning is not None and self.head != "lens":
            raise ValueError(f"head is {self.head!r}, but only lenses are tuned together with the model; give lens.")
        if self.tuning is not None and self.shortlist is None:
            raise ValueError("shortlist is missing, and tuning compares its tokens in every step; give some thousands.")
        return self

    @field_validator("controller", mode="before")
    @classmethod
    def _by_a_word(cls, value: Any) -> Any:
        """`true`, `false`, or a kind alone."""
        if isinstance(value, bool):
            return ControllerSpec() if value else None
        return {"kind": value} if isinstance(value, str) else value
