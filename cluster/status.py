"""How far the work is: jobs, workers, nodes, throughput, time left, from what the record says."""

import re
import time
from collections import deque
from dataclasses import dataclass, field
from threading import Lock

from db import figures, jobs
from db.figures import ShardFigures
from db.records import JobState
from db.session import Database

#: a rate is that of the last so many seconds: it forgets how it was before a node came
WINDOW_SECONDS = 60.0
_NUMBERS = re.compile(r"(-alone)?-\d+-[0-9a-f]{6}(-\d+)?$")


@dataclass(frozen=True)
class JobStatus:
    """How far one job is."""

    job: int
    name: str
    state: str
    paused: bool
    batches_done: int
    batches_total: int  #: 0 while it is being prepared
    errors: int
    workers: int
    batches_per_second: float | None  #: None where that is not known yet
    tokens_per_second: float | None
    seconds_left: float | None  #: at this rate

    @property
    def ended(self) -> bool:
        return JobState(self.state).ended


@dataclass(frozen=True)
class WorkerStatus:
    """What one worker is at."""

    worker: str
    node: str
    state: str  #: preparing, evaluating, silent (its lease has ended), idle
    job: int | None = None
    shard: int | None = None
    batches_done: int = 0
    batches: int = 0
    attempt: int = 0
    lease_seconds: float | None = None  #: until the lease ends


@dataclass(frozen=True)
class Status:
    """Everything at one moment."""

    jobs: list[JobStatus]
    workers: list[WorkerStatus]
    nodes: dict[str, int]  #: workers by node
    tokens_per_second: float | None


@dataclass
class _Course:
    """What a job had come to when."""

    points: deque[tuple[float, int, int]] = field(default_factory=deque)  #: seconds, batches, tokens
    batches: int = -1
    shards: ShardFigures = field(default_factory=ShardFigures)

    def add(self, at: float, batches: int, tokens: int) -> None:
        self.points.append((at, batches, tokens))
        while len(self.points) > 2 and self.points[1][0] < at - WINDOW_SECONDS:
            self.points.popleft()

    def rates(self) -> tuple[float | None, float | None]:
        """Batches and tokens a second, over the window."""
        (first, batches, tokens), (last, now_batches, now_tokens) = self.points[0], self.points[-1]
        if last <= first or now_batches < batches:  # one look only; or the job was given more to do
            return None, None
        return (now_batches - batches) / (last - first), (now_tokens - tokens) / (last - first)


class Watcher:
    """Looks at the record again and again: rates need two looks, or a job that began a while ago. For any thread."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._courses: dict[int, _Course] = {}
        self._looking = Lock()

    def look(self, job_id: int | None = None) -> Status:
        """job_id: this job only; all that are open where it is absent. Raises `Unavailable`, and `BadInput` where there
        is none such.
        """
        with self._looking:
            return self._look(job_id)

    def _look(self, job_id: int | None) -> Status:
        workers = [one for one in self._workers() if job_id is None or one.job == job_id]
        is_open = figures.open_jobs(self.db)
        ids = is_open if job_id is None else [job_id]
        self._courses = {one: course for one, course in self._courses.items() if one in is_open}
        found = [self._job(one, workers) for one in ids]
        rates = [one.tokens_per_second for one in found if one.tokens_per_second is not None]
        nodes: dict[str, int] = {}
        for one in workers:
            nodes[one.node] = nodes.get(one.node, 0) + 1
        return Status(found, workers, nodes, sum(rates) if rates else None)

    def _workers(self) -> list[WorkerStatus]:
        found = [
            WorkerStatus(
                worker=one.worker,
                node=node_of(one.worker),
                state="silent" if one.lease_seconds < 0 else "evaluating" if one.kind == "shard" else "preparing",
                job=one.job_id,
                shard=one.task_id if one.kind == "shard" else None,
                batches_done=one.done_batches,
                batches=one.end_batch - one.first_batch,
                attempt=one.attempt,
                lease_seconds=round(one.lease_seconds, 1),
            )
            for one in figures.holders(self.db)
        ]
        return found + [WorkerStatus(name, node_of(name), "idle") for name in figures.idle_workers(self.db)]

    def _job(self, job_id: int, workers: list[WorkerStatus]) -> JobStatus:
        row, (done, total) = jobs.job(self.db, job_id), jobs.batches(self.db, job_id)
        course = self._courses.setdefault(job_id, _Course())
        if done != course.batches:
            course.batches, course.shards = done, figures.shard_figures(self.db, job_id)
        course.add(time.monotonic(), done, course.shards.tokens)
        batch_rate, token_rate = course.rates()
        if batch_rate is None and row.started_at is not None and not row.state.ended:
            so_far = figures.clock(self.db) - row.started_at
            batch_rate, token_rate = (done / so_far, course.shards.tokens / so_far) if so_far > 0 else (None, None)
        moving = row.state is JobState.RUNNING and not row.paused
        return JobStatus(
            job=row.id,
            name=row.name,
            state=str(row.state),
            paused=row.paused and not row.state.ended,
            batches_done=done,
            batches_total=total,
            errors=course.shards.errors,
            workers=sum(one.job == job_id for one in workers),
            batches_per_second=batch_rate if moving else None,
            tokens_per_second=token_rate if moving else None,
            seconds_left=(total - done) / batch_rate if moving and batch_rate else None,
        )


def node_of(worker: str) -> str:
    """The machine in a worker's name: `name@machine`, or `machine-numbers`."""
    _, at, node = worker.rpartition("@")
    return node if at else _NUMBERS.sub("", worker)
