"""A worker: claim a shard, evaluate it, commit it, again. A plain class: the fleet wraps it, `--inline` does not."""

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, NamedTuple

import structlog

from db import devices, jobs, queue, results
from db.errors import LeaseLost, Unavailable
from db.queue import Lease
from db.records import RunRow, SampleRow, ShardResults
from db.results import ClaimedShard
from db.session import Database
from engine.errors import BadInput, DeviceLost, EngineError
from engine.loading import cache_folder
from engine.spec import parse_policy
from workers.benchmarks.ends import parse_ends
from workers.context import at_work
from workers.evaluate import Evaluation, Run, joined
from workers.holding import Holding, claim_shard_patiently, patiently
from workers.pinned import Pinned
from workers.rereading import Texts
from workers.shelf import EngineShelf
from workers.tracing import TraceEvaluation

if TYPE_CHECKING:
    from engine.engine import Engine

log = structlog.get_logger()

#: how long a worker that found nothing to claim waits before it looks again
IDLE_SECONDS = 0.25


class Drained(Exception):
    """The worker was asked to stop; what it holds goes back."""


class Unfit(Exception):
    """This machine cannot do what a job pins: it has other weights under the model's name, or no such model.

    The message says what is wrong here. The shard was given back, and no attempt was counted.
    """


class GpuMemory(NamedTuple):
    """Memory of one GPU, in bytes; that of other processes is in it."""

    gpu: str  #: its UUID: processes number GPUs each in their own way
    used: int
    total: int


@dataclass(frozen=True)
class Pulse:
    """What a worker says of itself."""

    name: str
    pid: int
    task_id: int | None = None  #: the shard in hand
    batch: int | None = None  #: the batch in hand, in the benchmark's order
    job_id: int | None = None  #: whose shard it is
    done: int = 0  #: shards committed
    still_seconds: float = 0.0  #: since the work in hand last moved on by a policy or a batch
    gpus: Sequence[GpuMemory] = ()  #: that it computes on


class Worker:
    """Works on shards, one at a time. `work` and `step` belong to one thread; the rest may be called from any."""

    def __init__(
        self,
        db: Database,
        name: str,
        *,
        timed: bool,
        lease_seconds: float = 30,
        cache: Path | None = None,
        after_shard: Callable[[], None] = lambda: None,
        when_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """timed: whether the worker is alone on its device. cache: for exits; the user's cache folder when absent."""
        self.db = db
        self.name = name
        self.timed = timed
        self.lease_seconds = lease_seconds
        self.cache = cache or cache_folder()
        self.after_shard = after_shard
        self.when_idle = when_idle
        self._draining = threading.Event()
        self._forgotten: set[int] = set()
        self._engines = EngineShelf(db, self.cache)
        self._texts = Texts()
        self._noted: set[tuple[int, str]] = set()  #: job and device class whose kernels are noted
        self._unfinished: set[int] = set()  #: jobs of which shards were committed, and which may have ended with them
        self._lease: Lease | None = None
        self._batch: int | None = None
        self._done = 0
        self._moved = time.monotonic()

    def work(self, job_id: int) -> None:
        """Work until the job has ended or `drain` was called. Raises `Unfit`, `DeviceLost`, and `Unavailable` where
        the database stays away.
        """
        while not self._draining.is_set():
            if self.step(job_id):
                continue
            if patiently(lambda: self._ended(job_id)):
                return
            self.when_idle()
            self._draining.wait(IDLE_SECONDS)

    def step(self, job_id: int | Collection[int]) -> bool:
        """Do a shard of these jobs. False where none could be claimed: jobs that ended with a shard of this worker are
        then finalised. Raises `Unfit`, `Unavailable`; `DeviceLost` where no shard can be done by this process any more.
        """
        shard = claim_shard_patiently(self.db, self.name, lease_seconds=self.lease_seconds, job_id=job_id)
        if shard is None:
            self._finalise_what_ended()
            return False
        with at_work(self.name, shard.lease):
            self._do(shard)
        self.after_shard()
        return True

    def drain(self) -> None:
        """Stop soon: finished batches are committed, the rest is given back, and no attempt is counted."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        return self._draining.is_set()

    def forget(self, job_id: int) -> None:
        """The job was cancelled: drop what is in hand of it at the next policy, without waiting for a renewal."""
        self._forgotten.add(job_id)

    def remember(self, job_ids: Collection[int]) -> None:
        """These jobs go on, whatever was said before: a job that was cancelled or failed may be retried."""
        self._forgotten.difference_update(job_ids)

    def pulse(self) -> Pulse:
        lease, gpus = self._lease, self.gpus()
        if lease is None:
            return Pulse(self.name, os.getpid(), done=self._done, gpus=gpus)
        still = time.monotonic() - self._moved
        return Pulse(self.name, os.getpid(), lease.task_id, self._batch, lease.job_id, self._done, still, gpus)

    def gpus(self) -> Sequence[GpuMemory]:
        """Memory of the GPUs that it computes on."""
        if "torch" not in sys.modules:  # nothing is loaded yet, and a pulse is no reason to
            return ()
        from engine.device import gpu_memory

        try:
            return [GpuMemory(*one) for one in gpu_memory()]
        except RuntimeError:  # it is lost, which the work in hand tells; the pulse has more to say
            return ()

    def _ended(self, job_id: int) -> bool:
        if jobs.finished(self.db, job_id):
            finalise(self.db, job_id)
        return jobs.job(self.db, job_id).state.ended

    def _finalise_what_ended(self) -> None:
        while self._unfinished:
            job_id = self._unfinished.pop()
            if patiently(lambda job_id=job_id: jobs.finished(self.db, job_id)):  # type: ignore[misc]
                patiently(lambda job_id=job_id: finalise(self.db, job_id))  # type: ignore[misc]

    def _do(self, shard: ClaimedShard) -> None:
        """Evaluate and commit a shard; whatever happens, the lease is not kept."""
        lease, done = shard.lease, list[ShardResults]()
        self._lease, self._moved = lease, time.monotonic()
        try:
            with Holding(self.db, lease) as holding:
                self._evaluate(shard, holding, done)
            self._hand_in(lease, done, holding.hungry)
        except LeaseLost as error:
            log.warning("lease lost", worker=self.name, job=lease.job_id, task=lease.task_id, reason=str(error))
        except Drained:
            self._hand_in(lease, done)
        except (KeyboardInterrupt, Unfit):
            self._hand_in(lease, done)
            raise
        except Unavailable as error:
            self._fail(lease, str(error), refund=True)
        except Exception as error:
            log.error("shard failed", worker=self.name, task=lease.task_id, attempt=lease.attempt, exc_info=True)
            sentence = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            self._fail(lease, sentence)
            if _is_device_lost(error):
                reason = str(error).split("\n", 1)[0]
                raise DeviceLost(f"the GPU on {gethostname()} does not answer any more ({reason}).") from None
        finally:
            self._lease = self._batch = None

    def _fail(self, lease: Lease, sentence: str, *, refund: bool = False) -> None:
        patiently(lambda: queue.fail(self.db, lease, sentence, refund=refund))
        self._unfinished.add(lease.job_id)  # it may have been the last attempt of the last shard

    def _evaluate(self, shard: ClaimedShard, holding: Holding, done: list[ShardResults]) -> None:
        """Add the results of batch after batch to `done`; ends early where other workers wait for work."""
        lease = shard.lease

        def proceed() -> None:
            self._moved = time.monotonic()
            holding.check()
            if lease.job_id in self._forgotten:
                raise LeaseLost(f"job {lease.job_id} was cancelled")
            if self._draining.is_set():
                raise Drained

        proceed()
        shard = self._with_texts(shard)
        evaluation = self.evaluation(shard, proceed)
        for batch in range(lease.first_batch, lease.end_batch):
            self._batch = batch
            samples = _samples_of(shard, batch)
            if lease.isolated_from is not None and batch >= lease.isolated_from:
                part = evaluation.alone(
                    batch, samples, guilty=lease.guilty, announce=lambda sample: holding.alone(sample.position)
                )
            else:
                part = evaluation.together(batch, samples)
            done.append(part)
            self._moved = time.monotonic()
            if batch + 1 == lease.end_batch:
                return  # the commit says so
            holding.progress(len(done))
            if holding.hungry:
                return

    def _with_texts(self, shard: ClaimedShard) -> ClaimedShard:
        """The shard with the texts of its samples, also where the record has none. Raises `Unfit`."""
        if not shard.pinned.get("withheld"):
            return shard
        try:
            pinned = Pinned.model_validate(shard.pinned)
            return replace(shard, samples=self._texts.restored(shard.samples, shard.benchmark.content_hash, pinned))
        except BadInput as error:
            raise Unfit(str(error)) from error

    def evaluation(self, shard: ClaimedShard, proceed: Callable[[], None]) -> Evaluation | TraceEvaluation:
        """How the batches of the shard are evaluated. Raises `Unfit`."""
        pinned = Pinned.model_validate(shard.pinned)
        try:
            engine = self._engines.take(pinned)
        except BadInput as error:
            raise Unfit(str(error)) from error
        self._note_kernels(shard.lease.job_id, engine)
        # Figures of another device class are never mixed with the job's own.
        timed = self.timed and engine.device_class == pinned.device_class
        ends = parse_ends(shard.benchmark.ends)
        if pinned.trace is not None:
            [run] = shard.runs
            engine.warm_up()
            return TraceEvaluation(engine, run.id, pinned.trace, ends, pinned.max_new_tokens, timed, proceed)
        runs = _runs(shard)
        compiled_ns = engine.compile_ns
        engine.warm_up([run.policy for run in runs])
        if engine.compile_ns > compiled_ns:
            log.info("layers compiled", worker=self.name, seconds=round((engine.compile_ns - compiled_ns) / 1e9, 1))
        return Evaluation(
            engine=engine,
            runs=runs,
            content_hash=shard.benchmark.content_hash,
            ends=ends,
            max_new_tokens=pinned.max_new_tokens,
            metrics=pinned.metrics,
            seed=pinned.seed,
            timed=timed,
            proceed=proceed,
            store_text=shard.benchmark.content_hash not in pinned.withheld,
        )

    def _note_kernels(self, job_id: int, engine: "Engine") -> None:
        if (job_id, engine.device_class) not in self._noted:
            patiently(lambda: devices.keep_kernels(self.db, job_id, engine.device_class, engine.kernels))
            self._noted.add((job_id, engine.device_class))

    def _hand_in(self, lease: Lease, done: list[ShardResults], waiting: int = 0) -> None:
        """Commit the batches that are done and leave the rest to others; safe to repeat.

        waiting: workers that have nothing to do; what is left is cut for them and for this one.
        """
        reached = lease.first_batch + len(done)
        try:
            if not done:
                patiently(lambda: queue.give_back(self.db, lease))
                return
            split_at = reached if reached < lease.end_batch else None
            whole = joined(done)
            patiently(lambda: results.commit_shard(self.db, lease, whole, split_at=split_at, pieces=waiting + 1))
        except LeaseLost as error:
            log.warning("lease lost at the commit", worker=self.name, task=lease.task_id, reason=str(error))
        else:
            self._done += 1
            self._unfinished.add(lease.job_id)
            log.info("shard committed", worker=self.name, task=lease.task_id, batches=len(done), split_at=split_at)


def _is_device_lost(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from engine.device import is_lost

    return is_lost(error)


def _samples_of(shard: ClaimedShard, batch: int) -> list[SampleRow]:
    size = int(shard.pinned["batch_size"])
    first = (batch - shard.lease.first_batch) * size
    return shard.samples[first : first + size]


def _runs(shard: ClaimedShard) -> list[Run]:
    """The shard's runs; `full` beside them where they were added to a job that was done without them."""
    full = [run for run in shard.done_runs if run.policy_kind == "full"][:1]
    return [_run(run, done=True) for run in full] + [_run(run, done=False) for run in shard.runs]


def _run(row: RunRow, *, done: bool) -> Run:
    return Run(row.id, parse_policy(row.policy_spec), done)


def finalise(db: Database, job_id: int) -> bool:
    """End the job once all its shards have ended. True for the call that did."""
    from workers.estimates import summarise

    return results.finalise(db, job_id, summarise)
