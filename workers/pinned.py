"""What preparing a job pins, and every worker reads: nothing of it can change while the job lives."""

from typing import Any, Literal, NamedTuple

from engine.spec import Compile, Device, DType, Spec


class EngineKey(NamedTuple):
    """What tells one engine from another: jobs of the same key share it."""

    model: str
    weights_hash: str
    exits_hash: str | None
    device: str
    dtype: str
    threads: int
    compile: str
    only_on: str | None = None

    @classmethod
    def of(cls, pinned: dict[str, Any]) -> "EngineKey":
        """From what a job's row has."""
        return cls(*(pinned.get(name) for name in cls._fields))  # type: ignore[arg-type]


class Pinned(Spec):
    """Kept as JSON in the job's row; the provenance of every figure that the job reports."""

    model: str  #: the name under which a worker finds the model
    weights_hash: str
    tokenizer_hash: str
    n_layers: int
    vocab_size: int
    max_context: int
    exits: str | None = None  #: as the spec named them
    exits_hash: str | None = None  #: key of the artifact that holds the bundle, and the hash of its files
    tuned_weights_hash: str | None = None  #: of the model as the bundle's deltas make it; None: they change nothing
    head: str | None = None  #: tied, lens, untied
    exit_points: tuple[int, ...] = ()
    device: Device
    device_class: str  #: whose timings count
    only_on: str | None = None  #: the device class that may do the job; None: any, and those of another are not timed
    dtype: DType
    threads: int  #: per worker
    compile: Compile = "auto"  #: whether torch.compile may be used
    seed: int
    max_new_tokens: int
    batch_size: int
    shard_batches: int
    metrics: dict[str, str]  #: name -> version; scoring a job again renews them, and nothing else here
    benchmarks: dict[str, str]  #: name -> content hash
    #: content hash -> spec: the benchmarks whose texts the record does not have, and where a worker reads them again
    withheld: dict[str, dict[str, Any]] = {}
    versions: dict[str, str]  #: package -> version
    git_revision: str | None = None
    #: of a trace: what its tokens are
    trace: Literal["reference", "full"] | None = None
    controller: bool = False  #: whether the exits have one
    after_exit: tuple[float, ...] | None = None  #: see `engine.exits.after_exit`
    shape: dict[str, int] | None = None  #: the fields of `engine.cost.Shape`
    heads: tuple[int, ...] | None = None  #: parameters of the head at each point, full depth's unembedding the last

    @property
    def engine(self) -> EngineKey:
        """Which engine the job needs."""
        return EngineKey.of(dict(self))
