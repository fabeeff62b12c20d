"""The service on a database at hand."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.known import (
    Known,
    KnownPolicy,
    ShownBenchmark,
    known_benchmarks,
    known_models,
    known_policies,
    shown_benchmark,
)
from cluster.service import JobDetails, Retried, Service
from cluster.settings import Settings
from db.errors import Conflict, RecordError
from db.events import LOCAL
from db.records import JobRow, JobState, Progress
from db.session import Database, open_database

if TYPE_CHECKING:
    from cluster.comparing.model import Comparison
    from cluster.gates import Gate, Verdict
    from cluster.labels import Item, Judgement, LabelsImported
    from cluster.prepare import Validation
    from cluster.reports.model import JobReport
    from cluster.schedules.service import Schedules
    from cluster.spec import JobSpec
    from cluster.status import Status, Watcher
    from db.events import Event
    from db.listing import JobSummary
    from db.queries import Result

#: between two looks for what happens to a job
FOLLOW_SECONDS = 0.5


class Local(Service):
    """Opens the database when it is first needed; only `submit` makes a fresh one."""

    def __init__(self, settings: Settings, db: Database | None = None, *, who: str = LOCAL) -> None:
        """db: one that is open already, and is left to its owner. who: the principal of what is done."""
        self._settings, self._db, self._who = settings, db, who
        self._is_mine = db is None
        self._watcher: Watcher | None = None

    def _opened(self, *, create: bool = False) -> Database:
        if self._db is None:
            self._db = open_database(self._settings.database_url, create=create)
        return self._db

    def close(self) -> None:
        if self._is_mine and self._db is not None:
            self._db.close()
            self._db = None

    def submit(self, spec: "JobSpec", folder: Path | None = None, *, key: str | None = None) -> int:
        from cluster import jobs

        return jobs.submit(self._opened(create=True), spec, folder, principal=self._who, idempotency_key=key)

    def validate(self, spec: "JobSpec", folder: Path | None = None) -> "Validation":
        from cluster import jobs

        asked = jobs.anchored(spec, folder or Path.cwd())
        return jobs.validate(asked, workers=self._settings.workers, db=self._record())

    def _record(self) -> Database | None:
        """The database, where there is one to read."""
        try:
            return self._opened()
        except RecordError:
            return None

    def done_before(self, spec: "JobSpec", folder: Path | None = None) -> int | None:
        from cluster.unchanged import done_before

        return done_before(self._opened(create=True), spec, folder or Path.cwd(), workers=self._settings.workers)

    def jobs(self) -> "list[JobSummary]":
        from db.listing import summaries

        return summaries(self._opened())

    def job(self, job_id: int) -> JobDetails:
        from db import jobs

        db = self._opened()
        row = jobs.job(db, job_id)
        return JobDetails(row, jobs.progress(db, job_id), jobs.runs(db, job_id), jobs.dead_tasks(db, job_id))

    def cancel(self, job_id: int) -> JobRow:
        from db.jobs import cancel_job

        self._check_goes_on(job_id, "cancelled")
        if not cancel_job(self._opened(), job_id, who=self._who):
            self._check_goes_on(job_id, "cancelled")  # it ended meanwhile
        return self._row(job_id)

    def pause(self, job_id: int) -> JobRow:
        from db.jobs import pause_job

        self._check_goes_on(job_id, "paused")
        pause_job(self._opened(), job_id, who=self._who)
        return self._row(job_id)

    def _check_goes_on(self, job_id: int, wish: str) -> None:
        state = self._row(job_id).state
        if state.ended:
            raise Conflict(f"job {job_id} is {state}; only a job that has not ended can be {wish}.")

    def retry(self, job_id: int) -> Retried:
        from db.jobs import retry_job

        row = self._row(job_id)
        tasks = retry_job(self._opened(), job_id, who=self._who)
        if not tasks:
            raise Conflict(
                f"job {job_id} is {row.state} and has no dead task to retry; `shortstop show {job_id}` tells more."
            )
        return Retried(self._row(job_id), tasks)

    def resume(self, job_id: int) -> Retried:
        from db.jobs import resume_job

        self._row(job_id)
        tasks = resume_job(self._opened(), job_id, who=self._who)
        return Retried(self._row(job_id), tasks)

    def _row(self, job_id: int) -> JobRow:
        from db import jobs

        return jobs.job(self._opened(), job_id)

    def add_policy(self, job_id: int, policy: Any) -> str:
        from cluster import adding

        return adding.add_policy(self._opened(), job_id, policy, who=self._who)

    def work(
        self, job_id: int, *, inline: bool = False, on_progress: Callable[[Progress], None] = lambda progress: None
    ) -> JobState:
        from cluster import jobs

        return jobs.work(
            self._opened(),
            job_id,
            workers=self._settings.workers,
            inline=inline,
            gpus_per_worker=self._settings.gpus_per_worker,
            ray_address=self._settings.ray_address,
            lease_seconds=self._settings.lease_seconds,
            on_progress=on_progress,
        )

    def status(self, job_id: int | None = None) -> "Status":
        if self._watcher is None:
            from cluster.status import Watcher

            self._watcher = Watcher(self._opened())
        return self._watcher.look(job_id)

    def events(self, job_id: int, *, follow: bool = False) -> "Iterator[Event]":
        from db import events

        after, is_over = 0, False
        while not is_over:
            is_over = self._row(job_id).state.ended or not follow  # looked at first: its last event is then there
            for event in events.events(self._opened(), job_id, after):
                after = event.id
                yield event
            if not is_over:
                time.sleep(FOLLOW_SECONDS)

    def report(self, job_id: int, *, with_tokens: bool = True) -> "JobReport":
        from cluster.reports.build import build_report
        from cluster.reports.decoder import decoder

        db = self._opened()
        return build_report(db, job_id, decoder(db, job_id) if with_tokens else None)

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
        from cluster.comparing.build import compare
        from cluster.comparing.sides import parse_side

        sides = parse_side(a), None if b is None else parse_side(b)
        options: dict[str, Any] = {"metrics": metrics, "levels": levels, "without": without}
        return compare(self._opened(), *sides, confidence=confidence, **options)

    def judge(self, gate: "Gate", a: str, b: str | None = None) -> "Verdict":
        from cluster.comparing.sides import parse_side
        from cluster.gates import judge

        return judge(self._opened(), gate, parse_side(a), None if b is None else parse_side(b))

    @property
    def schedules(self) -> "Schedules":
        from cluster.schedules.keeping import LocalSchedules

        return LocalSchedules(lambda: self._opened(create=True), self._settings, self._who)

    def labels(self, job_id: int, *, samples: int | None = None, seed: int = 0) -> "Iterator[Item]":
        from cluster import labels

        return labels.items(self._opened(), job_id, samples=samples, seed=seed)

    def import_labels(self, job_id: int, judge: str, judgements: "Sequence[Judgement]") -> "LabelsImported":
        from cluster import labels

        return labels.import_labels(self._opened(), job_id, judge, judgements, who=self._who)

    def query(self, sql: str, *, timeout_s: float = 30, limit: int | None = None) -> "Result":
        from db.queries import query

        return query(self._opened(), sql, timeout_s=timeout_s, limit=limit)

    def models(self) -> Sequence[Known]:
        return known_models()

    def benchmarks(self) -> Sequence[Known]:
        return known_benchmarks()

    def benchmark(self, name: str) -> ShownBenchmark:
        return shown_benchmark(name)

    def policies(self) -> Sequence[KnownPolicy]:
        return known_policies()
