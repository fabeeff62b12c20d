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
from typing import Any

import structlog

from cluster.prepare import Validation, cores, metrics_of_workers, prepare, validate
from cluster.ray_environment import set_up_ray
from cluster.reaping import ALONE, take_back
from cluster.spec import JobSpec
from db import errors as record_errors
from db import jobs, queue
from db.errors import LeaseLost, Unavailable
from db.events import LOCAL
from db.queue import Lease
from db.records import JobState, Progress
from db.session import Database
from engine.errors import BadInput
from engine.exits import TIED, find_bundle, known_exits
from engine.loading import find_model, models
from engine.spec import Spec
from workers.benchmarks.catalogue import entry
from workers.benchmarks.spec import CatalogueBenchmark, DatasetBenchmark, JsonlBenchmark, SourceBenchmark
from workers.holding import claim_patiently
from workers.pinned import Pinned
from workers.worker import IDLE_SECONDS, Worker

__all__ = ["JobState", "Validation", "anchored", "cores", "prepare", "submit", "validate", "work"]

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
    same key and spec again gets the job that is there; with another spec `BadInput` (of db).
    """
    spec = anchored(spec, spec_folder or Path.cwd())
    _check_names(spec)
    body = _dump(spec)
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
    ray_address: str | None = None,
    lease_seconds: float = 30,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> JobState:
    """Prepare the job if nobody has, and work on it until it has ended. Returns the state it ended in.

    workers: processes that Ray keeps at work; inline: one worker in this process instead, without Ray. ray_address: a
    running Ray cluster; a local one is started when absent. Ctrl-C and SIGTERM give all leases back and come out as
    `KeyboardInterrupt`; the job stays and can be worked on again. A paused job is waited for, and a log line says so.
    Raises `BadInput` (of engine or db) found while
    preparing, when the job has failed with the same sentence, and `FleetError` when workers keep dying.
    """
    pauses = _Pauses(db, job_id)
    with _sigterm_interrupts():
        _see_prepared(db, job_id, 1 if inline else workers, lease_seconds, pauses)
    state = jobs.job(db, job_id).state
    if state.ended:
        return state
    report = partial(_report_progress, db, job_id, on_progress, pauses)
    report()
    if inline:
        _work_inline(db, job_id, lease_seconds, report)
    else:
        _work_with_fleet(db, job_id, workers, ray_address, lease_seconds, report)
    report()
    return jobs.job(db, job_id).state


def anchored(spec: JobSpec, folder: Path) -> JobSpec:
    """The spec with every relative path that means something in `folder` made absolute."""

    def path(name: str) -> str:
        return str((folder / Path(name).expanduser()).absolute())

    def benchmark(asked: Spec) -> Spec:
        if isinstance(asked, JsonlBenchmark):
            return asked.model_copy(update={"jsonl": path(asked.jsonl)})
        if isinstance(asked, CatalogueBenchmark) and asked.benchmark.endswith((".yaml", ".yml")):
            return asked.model_copy(update={"benchmark": path(asked.benchmark)})
        if isinstance(asked, DatasetBenchmark) and Path(path(asked.dataset)).is_dir():
            return asked.model_copy(update={"dataset": path(asked.dataset)})
        if isinstance(asked, SourceBenchmark) and Path(path(asked.source)).is_dir():
            return asked.model_copy(update={"source": path(asked.source)})
        return asked

    changes: dict[str, Any] = {"benchmarks": [benchmark(asked) for asked in spec.benchmarks]}
    if spec.model not in models and Path(path(spec.model)).is_dir():
        changes["model"] = path(spec.model)
    if spec.exits is not None and spec.exits not in known_exits() and Path(path(spec.exits)).is_dir():
        changes["exits"] = path(spec.exits)
    return spec.model_copy(update=changes)


def _check_names(spec: JobSpec) -> None:
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


def _dump(spec: JobSpec) -> dict[str, Any]:
    """The spec as JSON that JobSpec reads back."""
    return spec.model_dump(mode="json", exclude={"benchmarks", "policies"}) | {
        "benchmarks": [asked.model_dump(mode="json", exclude_defaults=True) for asked in spec.benchmarks],
        "policies": [policy.dump() for policy in spec.policies],
    }


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
    name = _own_name()
    while jobs.job(db, job_id).state is JobState.PREPARING:
        lease = claim_patiently(db, name, kind="prepare", lease_seconds=lease_seconds, job_id=job_id)
        if lease is not None:
            _try_prepare(db, lease, workers)
        else:
            pauses.tell()
            take_back(db, name)
            time.sleep(IDLE_SECONDS)


def _try_prepare(db: Database, lease: Lease, workers: int) -> None:
    try:
        prepare(db, lease, workers=workers)
    except (BadInput, record_errors.BadInput):
        raise
    except LeaseLost as error:
        log.warning("lease lost while preparing", job=lease.job_id, reason=str(error))
    except KeyboardInterrupt:
        queue.give_back(db, lease)
        raise
    except Exception as error:
        log.error("preparing failed", job=lease.job_id, attempt=lease.attempt, exc_info=True)
        queue.fail(db, lease, f"{type(error).__name__}: {error}")


# --- working -------------------------------------------------------------------------------------------------


def _work_inline(db: Database, job_id: int, lease_seconds: float, report: Callable[[], None]) -> None:
    name = _own_name()

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
    with _sigterm_interrupts():
        worker.work(job_id)


def _work_with_fleet(
    db: Database,
    job_id: int,
    workers: int,
    ray_address: str | None,
    lease_seconds: float,
    report: Callable[[], None],
) -> None:
    set_up_ray(ray_address)
    from cluster.fleet import Fleet

    pinned = _pinned(db, job_id)
    fleet = Fleet(
        db,
        job_id,
        workers=workers,
        threads=pinned.threads,
        gpu=pinned.device == "cuda",
        ray_address=ray_address,
        lease_seconds=lease_seconds,
    )
    with fleet, _sigterm_interrupts():  # in this order: Ray brings a handler of its own
        fleet.run(report)


def _own_name() -> str:
    return f"{socket.gethostname()}{ALONE}{os.getpid()}-{secrets.token_hex(3)}"


def _pinned(db: Database, job_id: int) -> Pinned:
    return Pinned.model_validate(jobs.job(db, job_id).pinned)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
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
