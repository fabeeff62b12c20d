"""JobReport: what a job found, read from the record once. Every number that a report shows stands here."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import pandas as pd

DecisionName = Literal["full", "exit", "stop"]


class Part(BaseModel):
    """Frozen; infinite and undefined numbers become null in JSON."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


class Estimate(Part):
    """A measured value with its 95 % interval; an end is None where there was too little to estimate it from."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


class RunSummary(Part):
    """The summary of one run as `workers/estimates.py` stores it; of a job under way the sums so far, no intervals."""

    samples: int = 0
    errors: int = 0
    tokens: int = 0  #: stops not counted
    stops: int = 0
    cut_prompts: int = 0
    isolated: int = 0  #: samples done alone, or in a batch that was halved for memory
    shown: float | None = None  #: share of the completions that were offered
    n_layers: int | None = None
    mean_exit_layer: float | None = None
    mean_layers_run: float | None = None
    layers_skipped: float | None = None  #: share 0..1
    speedup_token: Estimate = Estimate()
    speedup_ideal: float | None = None
    efficiency: float | None = None
    full_timed_again: bool = False  #: of a policy that was added later: full depth's time is one beside it
    speedup_request: Estimate = Estimate()
    prefill_ms_p50: float | None = None  #: this and the next two: per batch
    decode_ms_p50: float | None = None
    decode_ms_p95: float | None = None
    tokens_per_second: float | None = None
    flops: int = 0
    untimed_batches: int = 0
    drafted: int = 0  #: tokens that an exit head proposed to full depth, those included that were undone unseen
    drafts_kept: int = 0  #: drafts that full depth agreed with
    drafts_kept_share: float | None = None  #: of all drafts, 0..1; None where there were none
    metrics: dict[str, Estimate] = {}
    change: dict[str, Estimate] = {}  #: against full depth on the same samples; `rouge_l_relative` is a share
    change_from_original: dict[str, Estimate] = {}  #: the same against the model as it came, where the exits tune it
    exit_histogram: dict[str, int] = {}  #: exit layer -> tokens
    stop_histogram: dict[str, int] = {}  #: exit layer -> stops
    decisions: dict[DecisionName, int] = {}

    def metric(self, name: str) -> Estimate:
        return self.metrics.get(name, Estimate())

    def changed(self, name: str) -> Estimate:
        return self.change.get(name, Estimate())

    def changed_from_original(self, name: str) -> Estimate:
        return self.change_from_original.get(name, Estimate())


class RunLabels(Part):
    """What judges said of a run's completions; several judges of one count as one drawn among them at random."""

    judged: int  #: completions that were offered, and judged by somebody
    acceptance_rate: Estimate  #: share of them that judges accept
    #: against full depth, on the samples of both that were judged
    acceptance_change: Estimate = Estimate()
    proxy: Estimate = Estimate()  #: share of the same completions that the offline proxy `accepted` accepts
    precision: Estimate = Estimate()  #: of what the proxy accepts, the share that judges accept
    recall: Estimate = Estimate()  #: of what judges accept, the share that the proxy accepts
    agreement: Estimate = Estimate()  #: share of which proxy and judges say the same


class Judges(Part):
    """Who judged on a benchmark, and how much they agree."""

    names: list[str]
    texts: int  #: that were judged, each counted once, whatever number of policies wrote it
    shared: int  #: those among them that several judged
    alpha: float | None  #: Krippendorff's, nominal; None where there is nothing to agree about


class RunReport(Part):
    """One policy on one benchmark."""

    run_id: int
    mark: str  #: A, B, C...: the policy's letter throughout a report
    policy: str  #: its label
    kind: str
    options: dict[str, Any]
    summary: RunSummary
    labels: RunLabels | None = None  #: None where nobody judged

    @property
    def is_imported(self) -> bool:
        """Whether its completions were made elsewhere: they have scores, and neither tokens nor times."""
        return self.kind == "imported"

    @property
    def is_slower(self) -> bool:
        """Whether the policy took longer per token than full depth, to the two digits that reports show."""
        return is_slowdown(self.summary.speedup_token)


class ExampleToken(Part):
    """One place of a completion; a stop is the last and has no text."""

    text: str
    exit_layer: int
    layers_run: int
    decision: DecisionName
    probability: float | None  #: that the predicting head gave to its token; for a stop, the controller's for stopping
    draft_layer: int | None = None  #: after which the place was drafted; None where it never was
    draft_kept: bool | None = None  #: False: full depth disagreed, and this is its own choice


class ExampleCompletion(Part):
    """What one policy wrote for an example."""

    mark: str
    policy: str
    text: str | None
    error: str | None
    finish: str | None
    shown: bool
    n_tokens: int
    tokens: list[ExampleToken]  #: empty where no tokenizer was at hand
    first_divergence: int | None  #: index of the first token that differs from full depth; None where none does
    scores: dict[str, float]


class Example(Part):
    """One sample under all policies."""

    sample: str
    source_group: str
    language: str
    why: str  #: what it was picked for
    prompt: str  #: its end only
    prompt_cut: bool  #: whether more of it stands before
    reference: str
    completions: list[ExampleCompletion]


class Apart(Part):
    """One policy's scores on the samples that stand in a corpus, and on the others."""

    mark: str
    policy: str
    flagged: dict[str, Estimate]  #: by metric
    others: dict[str, Estimate]


class Overlapping(Part):
    """What is known of a benchmark's overlap with corpora."""

    corpora: list[str]  #: in which it was looked for
    judged: int  #: samples of which something can be said: those with twelve tokens
    flagged: int  #: samples that stand in any of the corpora, in part
    runs: list[Apart]  #: none while the job is under way, or where no sample is flagged


class BenchmarkReport(Part):
    """One benchmark under all policies of the job."""

    name: str
    version: str
    content_hash: str
    samples: int
    left_out: list[str]  #: a sentence for each input that was passed over
    texts_kept: bool = True  #: False: the record has hashes for prompts, references and completions
    overlap: Overlapping | None = None  #: None: nobody has looked
    runs: list[RunReport]
    examples: list[Example]
    judges: Judges | None = None  #: None where nobody judged

    @property
    def baseline(self) -> RunReport | None:
        """The full-depth run that the others are held against."""
        return next((run for run in self.runs if run.kind == "full"), None)

    @property
    def challengers(self) -> list[RunReport]:
        """All runs but the references."""
        return [run for run in self.runs if run not in (self.baseline, self.original)]

    @property
    def original(self) -> RunReport | None:
        """The model as it came, where the exits tune it: the second reference."""
        return next((run for run in self.runs if run.kind == "original"), None)

    @property
    def drafting(self) -> list[RunReport]:
        """The runs whose policy drafted tokens for full depth to check."""
        return [run for run in self.runs if run.summary.drafted]


class JobReport(Part):
    """What a job found. Times are seconds since 1970. `model_dump_json` and `model_validate_json` are inverse."""

    schema_version: Literal[1] = 1
    job_id: int
    name: str
    state: str
    error: str | None
    created_at: float
    started_at: float | None  #: when the first shard was claimed
    finished_at: float | None
    partial: bool  #: not every run has its final summary
    batches_done: int
    batches_total: int
    model: str
    exits: str | None
    #: what the job pinned; and as `kernels`, by device class and shape of matrix, what its results were computed with
    provenance: dict[str, Any]
    benchmarks: list[BenchmarkReport]

    @property
    def runs(self) -> list[RunReport]:
        return [run for benchmark in self.benchmarks for run in benchmark.runs]

    def table(self) -> "pd.DataFrame":
        """A row a run; intervals in `<name>_low` and `<name>_high`, changes against full depth in `change_<metric>`,
        against the model as it came in `change_from_original_<metric>`.
        """
        import pandas as pd

        return pd.DataFrame(_row(benchmark.name, run) for benchmark in self.benchmarks for run in benchmark.runs)


def is_slowdown(speedup: Estimate) -> bool:
    """Whether a speedup reads as less than 1 to the two digits that reports show."""
    return speedup.value is not None and round(speedup.value, 2) < 1


def _row(benchmark: str, run: RunReport) -> dict[str, Any]:
    summary = run.summary
    row: dict[str, Any] = {"benchmark": benchmark, "policy": run.policy, "kind": run.kind, "run_id": run.run_id}
    row |= {name: value for name, value in summary if not isinstance(value, Estimate | dict)}
    estimates = {name: value for name, value in summary if isinstance(value, Estimate)} | summary.metrics
    estimates |= {f"change_{name}": estimate for name, estimate in summary.change.items()}
    estimates |= {f"change_from_original_{name}": one for name, one in summary.change_from_original.items()}
    if run.labels is not None:
        estimates |= {name: value for name, value in run.labels if isinstance(value, Estimate)}
        row["judged"] = run.labels.judged
    for name, estimate in estimates.items():
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row
