"""What Shortstop does for whoever asks: the one seam between its users and where the work is done.

`cluster.local.Local` does it on a database, `cluster.client.Client` asks a server, which does it on its own through the
former. The command line knows no other way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from db.records import DeadTask, JobRow, JobState, Progress, RunRow

if TYPE_CHECKING:
    from cluster.comparing.model import Comparison
    from cluster.gates import Gate, Verdict
    from cluster.known import Known, KnownPolicy, ShownBenchmark
    from cluster.labels import Item, Judgement, LabelsImported
    from cluster.prepare import Validation
    from cluster.reports.model import JobReport
    from cluster.schedules.service import Schedules
    from cluster.spec import JobSpec
    from cluster.status import Status
    from db.events import Event
    from db.listing import JobSummary


@dataclass(frozen=True)
class JobDetails:
    """All that `shortstop show` tells of a job."""

    job: JobRow
    progress: Progress
    runs: list[RunRow]  #: in the report's order
    dead: list[DeadTask]


@dataclass(frozen=True)
class Retried:
    """A job that goes on."""

    job: JobRow
    tasks: int  #: dead tasks that are ready again


class Answer(Protocol):
    """The rows of a query. Iterate once; closing lets go of the database, or the line, before the last row."""

    columns: list[str]

    def __iter__(self) -> Iterator[tuple[Any, ...]]: ...

    def __enter__(self) -> "Answer": ...

    def __exit__(self, *_: Any) -> None: ...


class Service(ABC):
    """Every method raises `BadInput` (of engine or db): one sentence, and nothing was changed."""

    @abstractmethod
    def submit(self, spec: "JobSpec", folder: Path | None = None, *, key: str | None = None) -> int:
        """Write a job and return its number at once.

        folder: what relative paths start from; the current one when absent. key: the same again with the same spec is
        the same job; with another spec `db.errors.Conflict`.
        """

    @abstractmethod
    def validate(self, spec: "JobSpec", folder: Path | None = None) -> "Validation":
        """What the job would do; nothing is written."""

    @abstractmethod
    def done_before(self, spec: "JobSpec", folder: Path | None = None) -> int | None:
        """A finished job that found what this spec's would find; None where something changed."""

    @abstractmethod
    def jobs(self) -> "list[JobSummary]":
        """All jobs, newest first."""

    @abstractmethod
    def job(self, job_id: int) -> JobDetails: ...

    @abstractmethod
    def cancel(self, job_id: int) -> JobRow:
        """End a job before its time. Raises `db.errors.Conflict` where it has ended."""

    @abstractmethod
    def pause(self, job_id: int) -> JobRow:
        """Let no more shards begin. Raises `db.errors.Conflict` where the job has ended."""

    @abstractmethod
    def retry(self, job_id: int) -> Retried:
        """Give dead tasks fresh attempts. Raises `db.errors.Conflict` where there is none."""

    @abstractmethod
    def resume(self, job_id: int) -> Retried:
        """Let a job go on, whatever keeps it."""

    @abstractmethod
    def add_policy(self, job_id: int, policy: Any) -> str:
        """Give a job that is done one more policy, in any form that a spec takes. Returns its label."""

    @abstractmethod
    def work(
        self, job_id: int, *, inline: bool = False, on_progress: Callable[[Progress], None] = lambda progress: None
    ) -> JobState:
        """See a job through to its end. Returns the state that it ended in."""

    @abstractmethod
    def status(self, job_id: int | None = None) -> "Status":
        """Jobs, workers, nodes, throughput and time left: of one job, or of all that are open."""

    @abstractmethod
    def events(self, job_id: int, *, follow: bool = False) -> "Iterator[Event]":
        """What happened to the job, in order; follow: and what happens, until the job has ended."""

    @abstractmethod
    def report(self, job_id: int, *, with_tokens: bool = True) -> "JobReport":
        """What the job found by now. with_tokens: examples token by token, where the tokenizer is at hand."""

    @property
    @abstractmethod
    def schedules(self) -> "Schedules":
        """Jobs that recur."""

    @abstractmethod
    def compare(
        self,
        a: str,
        b: str | None = None,
        *,
        confidence: float = 0.95,
        metrics: Sequence[str] | None = None,
        levels: Sequence[str] = (),
        without: int | None = None,
    ) -> "Comparison":
        """Hold B against A: jobs (`12`), policies (`12:full`), runs (`run:34`); see `comparing.build`."""

    @abstractmethod
    def judge(self, gate: "Gate", a: str, b: str | None = None) -> "Verdict":
        """What a gate says of the two; nothing is run for it. See `cluster.gates.judge`."""

    @abstractmethod
    def labels(self, job_id: int, *, samples: int | None = None, seed: int = 0) -> "Iterator[Item]":
        """What there is to judge of a job that has ended, see `cluster.labels.items`."""

    @abstractmethod
    def import_labels(self, job_id: int, judge: str, judgements: "Sequence[Judgement]") -> "LabelsImported":
        """Take in what a judge said of a job's items; the same again changes nothing."""

    @abstractmethod
    def query(self, sql: str, *, timeout_s: float = 30, limit: int | None = None) -> Answer:
        """Ask one SELECT over the documented views."""

    @abstractmethod
    def models(self) -> "Sequence[Known]": ...

    @abstractmethod
    def benchmarks(self) -> "Sequence[Known]": ...

    @abstractmethod
    def benchmark(self, name: str) -> "ShownBenchmark":
        """One of these, with three of its samples."""

    @abstractmethod
    def policies(self) -> "Sequence[KnownPolicy]": ...

    @abstractmethod
    def close(self) -> None: ...
