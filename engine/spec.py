"""What a caller may ask of the engine. No torch here, so that the command line answers at once."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import BadInput
from engine.registry import Registry

Probability = Annotated[float, Field(ge=0, le=1, strict=True)]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["float32", "bfloat16", "float16"]
HeadKind = Literal["tied", "lens", "untied"]
Compile = Literal["auto", "on", "off"]
#: `sec`: one matrix for all exit points (Sun et al., ICSE 2024). `calibrated`: one an exit point, its probabilities
#: those that were observed
ControllerKind = Literal["sec", "calibrated"]


class Spec(BaseModel):
    """Closed and frozen: an unknown field is an error, and a spec never changes under a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicySpec(Spec):
    """What every policy has. A subclass adds its thresholds and names the rule that reads them."""

    kind: ClassVar[str]
    #: "module:Class" of the decision rule, imported only where a model runs
    rule: ClassVar[str]
    #: what an exit bundle must have for this policy
    needs: ClassVar[Literal["nothing", "heads", "controller", "tuning"]] = "heads"
    #: the kind of controller that it is about; None: whichever the bundle has
    asks: ClassVar[ControllerKind | None] = None
    #: whether it runs the model as it came, where the exits tune it
    untuned: ClassVar[bool] = False

    name: str | None = Field(
        None, min_length=1, description="the run's name in reports; derived from the options when absent"
    )
    kv: Literal["copy", "recompute", "mask"] = Field("copy", description="how skipped layers get their keys and values")
    verify: bool = Field(
        False, description="recompute: tokens that left are drafts, which full depth confirms or undoes"
    )
    max_debt: int = Field(8, ge=1, description="recompute: tokens of one row that may wait at once")
    on_stop: Literal["show", "suppress"] = Field("show", description="whether what came before a stop is offered")
    min_layer: int | None = Field(None, ge=1, description="exit points before this layer are not asked")
    max_exits_in_row: int | None = Field(None, ge=1, description="after so many, the next token runs at full depth")
    full_first: int = Field(1, ge=1, description="a completion's first tokens that run at full depth; one always does")
    preview: int | None = Field(
        None,
        ge=1,
        description="behind the last layer the logits of at least so many tokens are computed, those that the bundle's "
        "preview finds likeliest; absent: of all tokens",
    )

    @model_validator(mode="after")
    def _legal_pair(self) -> "PolicySpec":
        if self.verify and self.kv != "recompute":
            raise ValueError(
                f"policy {self.kind!r}: kv is {self.kv!r} and verify is true, but only keys that are recomputed can be "
                "verified; give kv: recompute, or leave verify out."
            )
        if self.verify and self.preview is not None:
            raise ValueError(
                f"policy {self.kind!r}: preview is {self.preview} and verify is true, but only the whole vocabulary "
                "verifies; leave one of them out."
            )
        return self

    @property
    def asks_controller(self) -> bool:
        """Whether the bundle must have a controller."""
        return self.needs == "controller" or getattr(self, "ask_above", None) is not None

    @property
    def label(self) -> str:
        """The run's name: `name`, or the kind with the options that differ from their defaults."""
        if self.name:
            return self.name
        options = [f"{field}={_plain(value)}" for field, value in self.options().items()]
        return " ".join([self.kind, *options])

    def options(self) -> dict[str, Any]:
        """The options that were given or that have no default."""
        return {k: v for k, v in self.model_dump(exclude_defaults=True).items() if k != "name"}

    def dump(self) -> dict[str, Any]:
        """The spec as `parse_policy` reads it back."""
        return {self.kind: self.model_dump(mode="json", exclude_defaults=True)}


class Full(PolicySpec):
    """Every layer for every token: the baseline."""

    kind = "full"
    rule = "engine.policies:FullDepth"
    needs = "nothing"

    preview: None = None


class Original(PolicySpec):
    """The model as it came, at full depth: the second reference, where exits tune the model. Jobs add it themselves."""

    kind = "original"
    rule = "engine.policies:FullDepth"
    needs = "tuning"
    untuned = True

    preview: None = None


class Fixed(PolicySpec):
    """Every token leaves at one exit point."""

    kind = "fixed"
    rule = "engine.policies:FixedExit"

    exit_layer: int = Field(ge=1)


class HeadPolicy(PolicySpec):
    """Leave by what the head predicts."""

    ask_above: Probability | None = Field(
        None,
        description="the head is asked only where the controller gives leaving more than this probability; absent: "
        "everywhere",
    )


class Confidence(HeadPolicy):
    """Leave where the head's top probability exceeds the threshold (CALM, Schuster et al. 2022, softmax response)."""

    kind = "confidence"
    rule = "engine.policies:ConfidentExit"

    threshold: Probability
    decay: float | None = Field(
        None, gt=0, description="CALM's temperature: the threshold of token t is 0.9 threshold + 0.1 exp(-decay t / n)"
    )


class Margin(HeadPolicy):
    """Leave where the head's two best probabilities are further apart than the threshold (CALM)."""

    kind = "margin"
    rule = "engine.policies:MarginExit"

    threshold: Probability


class Entropy(HeadPolicy):
    """Leave where the entropy of the head's distribution is below the threshold, in nats (BranchyNet, 2016)."""

    kind = "entropy"
    rule = "engine.policies:EntropyExit"

    threshold: float = Field(ge=0)


class Patience(PolicySpec):
    """Leave once this many exit points after the first agree with the one before (PABEE, Zhou et al. 2020)."""

    kind = "patience"
    rule = "engine.policies:PatientExit"

    patience: int = Field(ge=1)


class StateSimilarity(PolicySpec):
    """Leave where the last layer hardly turned the state: cosine of the two above the threshold (CALM)."""

    kind = "state-similarity"
    rule = "engine.policies:SimilarExit"

    threshold: Probability


class Position(PolicySpec):
    """Depth falls along a completion, from `deepest` at its first token to `shallowest` (SkipDecode, 2023).

    A token leaves at the first exit point that is as deep as its place asks for.
    """

    kind = "position"
    rule = "engine.policies:PositionExit"

    deepest: int = Field(ge=1)
    shallowest: int = Field(ge=1)
    over: int = Field(ge=1, description="tokens over which the depth falls")

    @model_validator(mode="after")
    def _falls(self) -> "Position":
        if self.shallowest > self.deepest:
            raise ValueError(
                f"policy 'position': shallowest is {self.shallowest} and deepest {self.deepest}; depth falls along a "
                "completion, so exchange them."
            )
        return self


class Static(PolicySpec):
    """Layers that no generated token runs: the pruning baseline. Prompts are read at full depth, as everywhere."""

    kind = "static"
    rule = "engine.policies:Pruned"
    needs = "nothing"

    kv: Literal["copy"] = "copy"
    # Nobody leaves: there is nothing that these could hold back.
    min_layer: None = None
    max_exits_in_row: None = None
    full_first: Literal[1] = 1
    preview: None = None
    layers: tuple[int, ...] = Field(min_length=1, description="which layers are left out, counted from 1")


class Random(PolicySpec):
    """Leave by chance: the control. Give it the shares of the exit layers of the policy that it is held against."""

    kind = "random"
    rule = "engine.policies:RandomExit"

    exit_layers: tuple[int, ...] = Field(min_length=1)
    shares: tuple[Probability, ...] = Field(description="share of tokens that leave at each; the rest runs all layers")
    seed: int = 0

    @model_validator(mode="after")
    def _shares_fit(self) -> "Random":
        if len(self.shares) != len(self.exit_layers) or sum(self.shares) > 1 + 1e-9:
            raise ValueError(
                f"policy 'random': shares is {list(self.shares)} for exit_layers {list(self.exit_layers)}; give one "
                "share a layer, together at most 1."
            )
        return self


class SelfSpeculative(PolicySpec):
    """Draft at one exit point and let full depth verify: the tokens are those of `full` (LayerSkip, 2024).

    A draft ends where the head is unsure, or after as many tokens as the drafts before it justified.
    """

    kind = "self-speculative"
    rule = "engine.policies:Drafting"

    kv: Literal["recompute"] = "recompute"
    verify: Literal[True] = True
    preview: None = None
    exit_layer: int = Field(ge=1)
    threshold: Probability = Field(0.5, description="a token of less confidence is not drafted")


class Controller(PolicySpec):
    """Ask the trained controller at every exit point (SEC, Sun et al., ICSE 2024). A threshold of 1 is off."""

    kind = "controller"
    rule = "engine.policies:ControlledExit"
    needs = "controller"

    exit: Probability
    stop: Probability


class Sec(Controller):
    """The paper's method: its controller, its thresholds, keys and values by `copy`."""

    kind = "sec"
    asks = "sec"

    kv: Literal["copy"] = "copy"
    preview: None = None


policies: Registry[type[PolicySpec]] = Registry(
    "policy",
    "policies",
    {
        spec.kind: spec
        for spec in (
            Full,
            Original,
            Fixed,
            Confidence,
            Margin,
            Entropy,
            Patience,
            StateSimilarity,
            Position,
            Static,
            Random,
            SelfSpeculative,
            Controller,
            Sec,
        )
    },
)


def parse_policy(value: str | dict[str, Any] | PolicySpec) -> PolicySpec:
    """Read `full`, `{confidence: {threshold: 0.95}}` or a spec. Raises `BadInput`."""
    if isinstance(value, PolicySpec):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not (isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value)), str)):
        raise BadInput(
            f"policy {value!r}: give a name, or one name with its options, like {{confidence: {{threshold: 0.95}}}}"
        )
    [(kind, options)] = value.items()
    try:
        return policies[kind].model_validate(options or {})
    except ValidationError as error:
        raise BadInput(f"policy {kind!r}: {first_complaint(error)}") from None


def policy(kind: str, **options: Any) -> PolicySpec:
    """`policy("sec", exit=0.9, stop=0.7)`. Raises `BadInput`."""
    return parse_policy({kind: options})


def first_complaint(error: ValidationError) -> str:
    """The first fault that pydantic found, as one sentence with field, value and remedy."""
    fault = error.errors()[0]
    field = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "value_error":  # raised by a validator of ours, whose message is whole
        return str(fault["ctx"]["error"])
    if fault["type"] == "missing":
        return f"field {field!r} is missing; add it."
    if fault["type"] == "extra_forbidden":
        return f"field {field!r} is not known here; remove it or correct its name."
    complaint = fault["msg"][:1].lower() + fault["msg"][1:]
    return f"field {field!r} is {fault['input']!r}; {complaint}." if field else f"{complaint}."


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
