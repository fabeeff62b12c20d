"""What workers hand to the record and get back from it: plain frozen data, arrays for tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenArrays:
    """Parallel arrays, one place per generated token; a stop is the last place, with token id -1 (NULL in the view)."""

    token_ids: npt.NDArray[np.int32]  # [n]
    exit_layers: npt.NDArray[np.int16]  # [n]
    layers_run: npt.NDArray[np.int16]  # [n]
    decisions: npt.NDArray[np.int16]  # [n] 0 full, 1 exit, 2 stop
    confidences: npt.NDArray[np.float32]  # [n]
    #: [n] 0: never a draft; L: drafted after layer L, and full depth agreed; -L: it did not, and this is its own choice
    drafts: npt.NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))

    def __post_init__(self) -> None:
        """Left out, `drafts` are zeros."""
        if len(self.drafts) == 0:
            object.__setattr__(self, "drafts", np.zeros(len(self), np.int16))

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class SampleRow:
    """One sample of a benchmark as the record keeps it."""

    id: int  #: the record's own key (`sample.id`)
    position: int  #: place in the benchmark's order, from 0
    name: str  #: the sample's stable id
    prompt: str
    reference: str
    language: str
    source_group: str
    test: str | None = None  #: the program that passes behind prompt and completion, where there is one


@dataclass(frozen=True)
class OutcomeRow:
    """What one sample ended with under one policy: a completion or an error, never both."""

    run_id: int
    sample_id: int
    text: str | None
    error: str | None
    finish: str | None  #: eos, length, line, stop; None for an error, and for a completion made elsewhere
    n_tokens: int  #: tokens written, a stop not counted
    prompt_tokens: int
    cut_tokens: int
    shown: bool  #: offered to the user (a stopped completion may be suppressed)
    tokens: TokenArrays | None
    isolated: bool = False


@dataclass(frozen=True)
class ScoreRow:
    run_id: int
    sample_id: int
    metric: str
    version: str  #: of the metric's implementation, such as "es@rapidfuzz-3"
    value: float


@dataclass(frozen=True)
class TimingRow:
    """One (batch, policy): the timed unit."""

    run_id: int
    batch: int  #: index of the batch in the benchmark's order
    rows: int  #: samples in the batch
    prefill_ns: int  #: of the batch; the same for every policy on the same weights
    decode_ns: int
    decode_tokens: int  #: tokens written by decode steps; the first token of a row comes out of prefill
    flops: int
    ideal_ns: int
    device_class: str
    timed: bool  #: False where the worker was not alone on its device: kept, never used for a speedup
    drafted: int = 0  #: tokens that were drafted, those included that were undone because one before them was wrong
    drafts_kept: int = 0  #: drafts that full depth agreed with
    #: of full depth on the same batch, done beside a run that was added later; None: `full` has a row of its own
    full_decode_ns: int | None = None


@dataclass(frozen=True)
class TraceArrays:
    """What p exit points, the last of them full depth, predicted for each of the n tokens of a target."""

    targets: npt.NDArray[np.int32]  # [n] the right token
    tokens: npt.NDArray[np.int32]  # [p, n] the most likely one
    probabilities: npt.NDArray[np.float32]  # [p, n] of the most likely one
    margins: npt.NDArray[np.float32]  # [p, n] to the second best probability
    entropies: npt.NDArray[np.float32]  # [p, n] nats
    similarities: npt.NDArray[np.float32]  # [p, n] cosine of the state to the one a layer before
    controller: npt.NDArray[
        np.float32
    ]  # [p, 3, n] probabilities of continue, exit, stop; nan where no controller is asked
    ranks: npt.NDArray[np.int32]  # [p, n] tokens more likely than the right one; -1 where the head cannot predict it

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class TraceRow:
    """The trace of one sample."""

    run_id: int
    sample_id: int
    prompt_tokens: int
    prompt_key: int  #: a number for the prompt's token ids, which the policy `random` draws from
    arrays: TraceArrays


@dataclass(frozen=True)
class TracedSample:
    """A sample of a benchmark with its trace."""

    sample_id: int
    position: int  #: in the benchmark's order
    name: str
    source_group: str
    language: str
    prompt_tokens: int
    prompt_key: int
    arrays: TraceArrays


@dataclass(frozen=True)
class ShardResults:
    """Everything a shard leaves behind, committed in one transaction with its completion."""

    outcomes: list[OutcomeRow] = field(default_factory=list)
    scores: list[ScoreRow] = field(default_factory=list)
    timings: list[TimingRow] = field(default_factory=list)
    traces: list[TraceRow] = field(default_factory=list)


class JobState(StrEnum):
    """Where a job stands."""

    PREPARING = "preparing"  #: submitted; its prepare task is not done
    READY = "ready"  #: runs and shards exist; no shard was claimed yet
    RUNNING = "running"  #: at least one shard was claimed
    DONE = "done"  #: every shard is done, every run has its summary
    FAILED = "failed"  #: preparing failed, or a shard died after its last attempt
    CANCELLED = "cancelled"  #: somebody cancelled it

    @property
    def ended(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class TaskState(StrEnum):
    """Where a task (preparing a job, or one shard) stands."""

    READY = "ready"  #: may be claimed
    LEASED = "leased"  #: a worker holds it
    DONE = "done"  #: its results are committed
    SPLIT = "split"  #: its batches went to two children
    DEAD = "dead"  #: its last attempt failed
    CANCELLED = "cancelled"  #: its job ended


@dataclass(frozen=True)
class PlannedBenchmark:
    """A benchmark as the prepare task resolved it."""

    name: str
    version: str
    content_hash: str
    ends: str  #: where a completion ends: line, statement, block, function, text
    samples: Sequence[tuple[str, str, str, str, str]]  #: (name, prompt, reference, language, source_group), in order
    left_out: Sequence[str] = ()  #: a sentence for each input that was skipped
    tests: Sequence[str | None] = ()  #: of each sample, see `SampleRow.test`; none where there are no tests at all


@dataclass(frozen=True)
class PlannedPolicy:
    """One policy of a job; together with a benchmark it becomes a run."""

    label: str  #: the run's name in reports
    kind: str  #: "full", "confidence", ...
    spec: dict[str, Any]  #: as `engine.spec.parse_policy` reads it back


@dataclass(frozen=True)
class JobRow:
    """One submitted job. Times are seconds since 1970 by the database's clock."""

    id: int
    name: str
    state: JobState
    priority: int
    spec: dict[str, Any]
    pinned: dict[str, Any] | None  #: what preparing resolved; None while it has not
    error: str | None
    created_at: float
    started_at: float | None  #: when the first shard was claimed
    finished_at: float | None
    principal: str  #: who asked for it
    paused: bool  #: none of its tasks is claimed while it is


@dataclass(frozen=True)
class RunRow:
    """One policy on one benchmark within a job."""

    id: int
    job_id: int
    position: int  #: place in the report, from 0
    benchmark_id: int
    benchmark: str  #: the name under which this job asked for the benchmark
    policy: str  #: the policy's label
    policy_kind: str
    policy_spec: dict[str, Any]
    summary: dict[str, Any] | None  #: None until the job is finalised


@dataclass(frozen=True)
class OpenJob:
    """A job that has not ended and is not paused, and what there is to do for it."""

    id: int
    priority: int
    state: JobState
    spec: dict[str, Any]
    pinned: dict[str, Any] | None
    ready: int  #: tasks that may be claimed now or after their pause
    leased: int


@dataclass(frozen=True)
class BenchmarkRow:
    """A benchmark's content, shared by every job that asks for the same content hash."""

    id: int
    name: str  #: the name under which it was first written
    version: str
    content_hash: str
    ends: str  #: where a completion ends: line, statement, block, function, text
    n_samples: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """How far a job is. Shards that were split count through their children."""

    batches_done: int
    batches_total: int
    shards: dict[str, int]  #: number of shards by state: ready, leased, done, dead, cancelled
    errors: int  #: outcomes that are errors, over all runs
    last_error: str | None  #: of a task that failed


@dataclass(frozen=True)
class DeadTask:
    """A task whose last attempt failed; `db.jobs.retry_job` gives it fresh ones."""

    id: int
    kind: str  #: "prepare" or "shard"
    benchmark_id: int | None  #: of a shard, as the next two
    first_batch: int
    end_batch: int  #: one past the last
    attempt: int  #: the last one
    worker: str | None  #: who made it
    error: str | None


@dataclass(frozen=True)
class CompletionRow:
    """An outcome together with its run and its sample: what reports and exports read."""

    run_id: int
    policy: str
    benchmark: str
    sample: SampleRow
    outcome: OutcomeRow
    scores: dict[str, float]  #: by metric


@dataclass(frozen=True)
class TokenBatch:
    """Columns of the view `token`, one place a token, as parallel arrays."""

    run_id: npt.NDArray[np.int64]
    job_id: npt.NDArray[np.int64]
    policy: npt.NDArray[np.object_]  #: str
    outcome_id: npt.NDArray[np.int64]
    sample_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]  #: in the completion, from 1
    token_id: npt.NDArray[np.int32]  #: -1 for a stop
    exit_layer: npt.NDArray[np.int16]
    layers_run: npt.NDArray[np.int16]
    decision: npt.NDArray[np.object_]  #: "full", "exit", "stop"
    confidence: npt.NDArray[np.float32]
    draft_layer: npt.NDArray[np.int16]  #: 0 where the token was never a draft
    draft_kept: npt.NDArray[np.bool_]  #: False there

    def __len__(self) -> int:
        return len(self.run_id)


@dataclass(frozen=True)
class Rollup:
    """Sums over the outcomes and batches of a run: integers only, so that they merge exactly in any order."""

    samples: int = 0
    errors: int = 0
    shown: int = 0
    isolated: int = 0
    cut_prompts: int = 0
    tokens: int = 0  #: stops not counted
    full_tokens: int = 0
    exit_tokens: int = 0
    stops: int = 0
    exit_layer_sum: int = 0  #: over tokens; stops are in `stop_histogram`
    layers_run_sum: int = 0  #: over tokens
    stop_layers_run_sum: int = 0  #: over stops
    timed_batches: int = 0
    untimed_batches: int = 0
    prefill_ns: int = 0  #: this and the next three: timed batches only
    decode_ns: int = 0
    decode_tokens: int = 0
    ideal_ns: int = 0
    flops: int = 0  #: this and the next two: all batches
    drafted: int = 0
    drafts_kept: int = 0
    exit_histogram: dict[int, int] = field(default_factory=dict)  #: exit layer -> tokens
    stop_histogram: dict[int, int] = field(default_factory=dict)  #: exit layer -> stops
    score_counts: dict[str, int] = field(default_factory=dict)  #: metric -> completions scored
    score_sums: dict[str, int] = field(default_factory=dict)  #: metric -> sum in billionths


@dataclass(frozen=True)
class RunData:
    """All that a run's summary is made of, without its tokens.

    The first arrays have one place a sample in the benchmark's order, the second one place a batch in order. Samples
    without an outcome (their shard died) and their batches are absent, under every policy of the job alike.
    """

    run_id: int
    job_id: int
    policy: str
    policy_kind: str
    benchmark: str
    pinned: dict[str, Any]  #: of the job
    # one place a sample
    sample: npt.NDArray[np.int64]  #: position in the benchmark
    source_group: npt.NDArray[np.object_]  #: str
    n_tokens: npt.NDArray[np.int64]
    error: npt.NDArray[np.bool_]
    stopped: npt.NDArray[np.bool_]
    shown: npt.NDArray[np.bool_]
    cut: npt.NDArray[np.bool_]  #: the prompt was cut to fit the context
    isolated: npt.NDArray[np.bool_]
    scores: dict[str, npt.NDArray[np.float64]]  #: by metric; nan where the sample has none
    # one place a batch
    batch: npt.NDArray[np.int64]
    batch_group: npt.NDArray[np.object_]  #: source group of the batch's first sample
    prefill_ns: npt.NDArray[np.int64]
    decode_ns: npt.NDArray[np.int64]
    decode_tokens: npt.NDArray[np.int64]
    flops: npt.NDArray[np.int64]
    ideal_ns: npt.NDArray[np.int64]
    timed: npt.NDArray[np.bool_]
    # from the rollups
    exit_layer_sum: int  #: over tokens, stops excluded
    layers_run_sum: int  #: over tokens, stops excluded
    exit_histogram: dict[int, int]  #: exit layer -> tokens
    stop_histogram: dict[int, int]  #: exit layer -> stops
    decisions: dict[str, int]  #: "full", "exit", "stop"
    drafted: int = 0
    drafts_kept: int = 0
    #: one place a batch: of full depth, done again beside a run that was added later; None: the run was not
    full_decode_ns: npt.NDArray[np.int64] | None = None
    #: the `full` run of the same benchmark in the same job; None for that run itself
    full: "RunData | None" = None
    #: the same of the model as it came, where the job's exits tune it
    original: "RunData | None" = None
