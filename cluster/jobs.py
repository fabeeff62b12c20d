"""The way of a job: submitted, prepared, worked on until it has ended."""

import hashlib
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import structlog

from cluster.places import anchored
from cluster.prepare import Validation, cores, metrics_of_workers, prepare, validate
from cluster.preparing import prepare_next
from cluster.ray_environment import set_up_ray
from cluster.reaping import ALONE, take_back
from cluster.spec import JobSpec
from db import jobs
from db.errors import Unavailable
from db.events import LOCAL
from db.records import JobState, Progress
from db.session import Database
from engine.errors import BadInput
from engine.exits import TIED, find_bundle
from engine.loading import find_model, models
from workers.benchmarks.catalogue import entry
from workers.benchmarks.spec import CatalogueBenchmark, JsonlBenchmark
from workers.pinned import Pinned
from workers.worker import IDLE_SECONDS, Unfit, Worker

__all__ = [
    "JobState",
    "Validation",
    "anchored",
    "cores",
    "own_name",
    "prepare",
    "sigterm_interrupts",
    "submit",
    "validate",
    "work",
]

log = structlog.get_logger()


def submit(
    db: Database,
    spec: JobSpec,
    spec_folder: Path | None = None,
    *,
    principal: str = LOCAL,
    idempotency_key: str | None = None,
) -> int:
    """Write a job, state `preparing`, and return its id at once.

    spec_folder: what the spec's relative paths start from; the current folder when absent. Unknown names and missing
    folders are refused before anything is written: raises `BadInput`. idempotency_key: the same principal with the
    same key and spec again gets the job that is there; with another spec `db.errors.Conflict`.
    """
    spec = anchored(spec, spec_folder or Path.cwd())
    check_names(spec)
    body = spec.dump()
    return jobs.create_job(
        db,
        name=spec.name,
        spec=body,
        priority=spec.priority,
        principal=principal,
        idempotency_key=idempotency_key,
        body_hash=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(),
    )


def work(
    db: Database,
    job_id: int,
    *,
    workers: int = 1,
    inline: bool = False,
    gpus_per_worker: float = 1.0,
    ray_address: str | None = None,
    lease_seconds: float = 30,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> JobState:
    """Prepare the job if nobody has, and work on it until it has ended. Returns the state it ended in.

    workers: processes that Ray keeps at work; inline: one worker in this process instead, without Ray. ray_address: a
    running Ray cluster; a local one is started when absent. gpus_per_worker: what each holds where the job's device is
    a GPU; a share lets several use one, untimed. Ctrl-C and SIGTERM give all leases back and come out as
    `KeyboardInterrupt`; the job stays and can be worked on again. A paused job is waited for, and a log line says so.
    Raises `BadInput` (of engine or db) found while preparing, when the job has failed with the same sentence, or of a
    Ray that cannot be reached, and `FleetError` when workers keep dying or no machine can do the job.
    """
    pauses = _Pauses(db, job_id)
    with sigterm_interrupts():
        _see_prepared(db, job_id, 1 if inline else workers, lease_seconds, pauses)
    state = jobs.job(db, job_id).state
    if state.ended:
        return state
    report = partial(_report_progress, db, job_id, on_progress, pauses)
    report()
    if inline:
        _work_inline(db, job_id, lease_seconds, report)
    else:
        _work_with_fleet(db, job_id, workers, gpus_per_worker, ray_address, lease_seconds, report)
    report()
    return jobs.job(db, job_id).state


def check_names(spec: JobSpec) -> None:
    """All that can be refused without reading much. Raises `BadInput`."""
    is_hub_id = spec.model.count("/") == 1 and not Path(spec.model).is_absolute()
    if spec.model not in models and not is_hub_id:
        find_model(spec.model)
    if spec.exits not in (None, TIED):
        find_bundle(spec.exits)
    for policy in spec.policies:
        if policy.needs != "nothing" and spec.exits is None:
            raise BadInput(
                f"policy {policy.kind!r} needs exits, and none are given; name a bundle in the field `exits`."
            )
    for asked in spec.benchmarks:
        if isinstance(asked, CatalogueBenchmark):
            entry(asked.benchmark)
        if isinstance(asked, JsonlBenchmark) and not Path(asked.jsonl).is_file():
            raise BadInput(f"benchmark: there is no file {asked.jsonl!r}; correct the field jsonl.")
    metrics_of_workers(spec.metrics)


def _report_progress(db: Database, job_id: int, on_progress: Callable[[Progress], None], pauses: "_Pauses") -> None:
    try:
        on_progress(jobs.progress(db, job_id))
        pauses.tell()
    except Unavailable:
        return  # the next report shows it


class _Pauses:
    """Says so, once a pause, where a job is not worked on because it is paused."""

    def __init__(self, db: Database, job_id: int) -> None:
        self.db = db
        self.job_id = job_id
        self._told = False

    def tell(self) -> None:
        paused = jobs.job(self.db, self.job_id).paused
        if paused and not self._told:
            log.warning(f"job {self.job_id} is paused and waits; `shortstop resume {self.job_id}` lets it go on")
        self._told = paused


# --- preparing -----------------------------------------------------------------------------------------------


def _see_prepared(db: Database, job_id: int, workers: int, lease_seconds: float, pauses: _Pauses) -> None:
    """Prepare the job, or wait for whoever does."""
    name = own_name()
    while jobs.job(db, job_id).state is JobState.PREPARING:
        if not prepare_next(db, name, job_id, workers=workers, lease_seconds=lease_seconds):
            pauses.tell()
            take_back(db, name)
            time.sleep(IDLE_SECONDS)


# --- working -------------------------------------------------------------------------------------------------


def _work_inline(db: Database, job_id: int, lease_seconds: float, report: Callable[[], None]) -> None:
    name = own_name()

    def idle() -> None:
        take_back(db, name)
        report()

    threads = _pinned(db, job_id).threads
    worker = Worker(
        db,
        name,
        timed=threads <= cores(),
        lease_seconds=lease_seconds,
        after_shard=report,
        when_idle=idle,
    )
    with sigterm_interrupts():
        try:
            worker.work(job_id)
        except Unfit as error:
            raise BadInput(str(error)) from None


def _work_with_fleet(
    db: Database,
    job_id: int,
    workers: int,
    gpus_per_worker: float,
    ray_address: str | None,
    lease_seconds: float,
    report: Callable[[], None],
) -> None:
    set_up_ray(ray_address)
    from cluster.fleet.supervisor import Fleet

    fleet = Fleet(
        db,
        [job_id],
        workers=workers,
        workers_a_node=workers,
        gpus_per_worker=gpus_per_worker,
        ray_address=ray_address,
        lease_seconds=lease_seconds,
    )
    with fleet, sigterm_interrupts():  # in this order: Ray brings a handler of its own
        fleet.run(report)


def own_name() -> str:
    """Of a worker that is a process by itself, without a fleet that would notice its death."""
    host = socket.gethostname()
    return f"{host}{ALONE}{os.getpid()}-{secrets.token_hex(3)}@{host}"


def _pinned(db: Database, job_id: int) -> Pinned:
    return Pinned.model_validate(jobs.job(db, job_id).pinned)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM as Ctrl-C: leases go back either way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
