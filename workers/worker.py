"""A worker: claim a shard, evaluate it, commit it, again. A plain class: the fleet wraps it, `--inline` does not."""

import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from filelock import FileLock

from db import devices, jobs, queue, results
from db.errors import LeaseLost, Unavailable
from db.queue import Lease
from db.records import SampleRow, ShardResults
from db.session import Database
from engine.errors import EngineError, WeightsMismatch
from engine.loading import cache_folder
from engine.spec import parse_policy
from workers.benchmarks.ends import parse_ends
from workers.bundle import unpack
from workers.evaluate import Evaluation, Run, joined
from workers.holding import Holding, claim_patiently, patiently
from workers.pinned import Pinned

if TYPE_CHECKING:
    from engine.engine import Engine

log = structlog.get_logger()

#: how long a worker that found nothing to claim waits before it looks again
IDLE_SECONDS = 0.25


class Drained(Exception):
    """The worker was asked to stop; what it holds goes back."""


@dataclass(frozen=True)
class Pulse:
    """What a worker says of itself."""

    name: str
    pid: int
    task_id: int | None  #: the shard in hand
    batch: int | None  #: the batch in hand, in the benchmark's order


class Worker:
    """Works on the shards of a job, one at a time. `work` belongs to one thread; the rest may be called from any."""

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
        self._engines = EngineShelf(db, self.cache)
        self._task_id: int | None = None
        self._batch: int | None = None

    def work(self, job_id: int) -> None:
        """Work until the job has ended or `drain` was called. Raises `Unavailable` when the database stays away."""
        while not self._draining.is_set():
            lease = claim_patiently(self.db, self.name, kind="shard", lease_seconds=self.lease_seconds, job_id=job_id)
            if lease is not None:
                self._do(lease)
                self.after_shard()
            elif patiently(lambda: self._ended(job_id)):
                return
            else:
                self.when_idle()
                self._draining.wait(IDLE_SECONDS)

    def drain(self) -> None:
        """Stop soon: finished batches are committed, the rest is given back."""
        self._draining.set()

    def pulse(self) -> Pulse:
        return Pulse(self.name, os.getpid(), self._task_id, self._batch)

    def _ended(self, job_id: int) -> bool:
        if jobs.finished(self.db, job_id):
            finalise(self.db, job_id)
        return jobs.job(self.db, job_id).state.ended

    def _do(self, lease: Lease) -> None:
        """Evaluate and commit a shard; whatever happens, the lease is not kept."""
        done: list[ShardResults] = []
        self._task_id = lease.task_id
        try:
            with Holding(self.db, lease) as holding:
                self._evaluate(lease, holding, done)
            self._hand_in(lease, done)
        except LeaseLost as error:
            log.warning("lease lost", worker=self.name, task=lease.task_id, reason=str(error))
        except Drained:
            self._hand_in(lease, done)
        except KeyboardInterrupt:
            self._hand_in(lease, done)
            raise
        except Unavailable as error:
            self._fail(lease, str(error), refund=True)
        except Exception as error:
            log.error("shard failed", worker=self.name, task=lease.task_id, attempt=lease.attempt, exc_info=True)
            self._fail(lease, str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}")
        finally:
            self._task_id = self._batch = None

    def _fail(self, lease: Lease, sentence: str, *, refund: bool = False) -> None:
        patiently(lambda: queue.fail(self.db, lease, sentence, refund=refund))

    def _evaluate(self, lease: Lease, holding: Holding, done: list[ShardResults]) -> None:
        """Add the results of batch after batch to `done`; ends early where another worker waits for work."""

        def proceed() -> None:
            holding.check()
            if self._draining.is_set():
                raise Drained

        proceed()
        shard = self._open(lease, proceed)
        for batch in range(lease.first_batch, lease.end_batch):
            self._batch = batch
            samples = shard.samples(batch)
            if lease.isolated_from is not None and batch >= lease.isolated_from:
                part = shard.evaluation.alone(
                    batch, samples, guilty=lease.guilty, announce=lambda sample: holding.alone(sample.position)
                )
            else:
                part = shard.evaluation.together(batch, samples)
            done.append(part)
            holding.progress(len(done))
            if holding.hungry:
                return

    def _open(self, lease: Lease, proceed: Callable[[], None]) -> "_Shard":
        assert lease.benchmark_id is not None
        pinned = Pinned.model_validate(jobs.job(self.db, lease.job_id).pinned)
        benchmark = jobs.benchmark(self.db, lease.benchmark_id)
        engine = self._engines.take(pinned)
        patiently(lambda: devices.keep_kernels(self.db, lease.job_id, engine.device_class, engine.kernels))
        runs = self._runs(lease)
        compiled_ns = engine.compile_ns
        engine.warm_up([run.policy for run in runs])
        if engine.compile_ns > compiled_ns:
            log.info("layers compiled", worker=self.name, seconds=round((engine.compile_ns - compiled_ns) / 1e9, 1))
        evaluation = Evaluation(
            engine=engine,
            runs=runs,
            content_hash=benchmark.content_hash,
            ends=parse_ends(benchmark.ends),
            max_new_tokens=pinned.max_new_tokens,
            metrics=pinned.metrics,
            seed=pinned.seed,
            # Figures of another device class are never mixed with the job's own.
            timed=self.timed and engine.device_class == pinned.device_class,
            proceed=proceed,
        )
        return _Shard(self.db, lease.benchmark_id, pinned.batch_size, evaluation)

    def _runs(self, lease: Lease) -> list[Run]:
        """The shard's runs; `full` beside them where they were added to a job that was done without them."""
        wanted = results.runs_of_shard(self.db, lease)
        done = [
            run
            for run in jobs.runs(self.db, lease.job_id)
            if run.benchmark_id == lease.benchmark_id and run.policy_kind == "full" and run not in wanted
        ]
        return [Run(run.id, parse_policy(run.policy_spec), run in done) for run in [*done[:1], *wanted]]

    def _hand_in(self, lease: Lease, done: list[ShardResults]) -> None:
        """Commit the batches that are done and leave the rest to others; safe to repeat."""
        reached = lease.first_batch + len(done)
        try:
            if not done:
                patiently(lambda: queue.give_back(self.db, lease))
                return
            split_at = reached if reached < lease.end_batch else None
            whole = joined(done)
            patiently(lambda: results.commit_shard(self.db, lease, whole, split_at=split_at))
        except LeaseLost as error:
            log.warning("lease lost at the commit", worker=self.name, task=lease.task_id, reason=str(error))
        else:
            log.info("shard committed", worker=self.name, task=lease.task_id, batches=len(done), split_at=split_at)


@dataclass(frozen=True)
class _Shard:
    db: Database
    benchmark_id: int
    batch_size: int
    evaluation: Evaluation

    def samples(self, batch: int) -> list[SampleRow]:
        first = batch * self.batch_size
        return patiently(lambda: results.samples_of(self.db, self.benchmark_id, first, first + self.batch_size))


class EngineShelf:
    """The one engine that a worker keeps; another job may need another."""

    def __init__(self, db: Database, cache: Path) -> None:
        self.db = db
        self.cache = cache
        self._key: tuple[object, ...] | None = None
        self._engine: Engine | None = None

    def take(self, pinned: Pinned) -> "Engine":
        """The engine that a job pins. Raises `BadInput`, `WeightsMismatch`."""
        key = (
            pinned.model, pinned.weights_hash, pinned.exits_hash, pinned.device, pinned.dtype, pinned.threads,
            pinned.compile,
        )  # fmt: skip
        if self._engine is None or key != self._key:
            self._engine = None  # two models may not fit into memory
            self._engine, self._key = self._load(pinned), key
        return self._engine

    def _load(self, pinned: Pinned) -> "Engine":
        from engine.engine import Engine

        exits = None
        if pinned.exits_hash is not None:
            exits = unpack(jobs.artifact(self.db, pinned.exits_hash), pinned.exits_hash, self.cache)
        engine = Engine(
            pinned.model,
            exits,
            device=pinned.device,
            dtype=pinned.dtype,
            threads=pinned.threads,
            compile=pinned.compile,
        )
        if engine.weights_hash != pinned.weights_hash:
            raise WeightsMismatch(
                f"model {pinned.model!r} has weights {engine.weights_hash[:12]}… on this machine, but the job was "
                f"prepared with {pinned.weights_hash[:12]}…; bring those back, or submit the job again."
            )
        if engine.facts.tokenizer_hash != pinned.tokenizer_hash:
            raise WeightsMismatch(
                f"model {pinned.model!r} has another tokenizer on this machine than the job was prepared with; bring "
                "that one back, or submit the job again."
            )
        self._measure(engine)
        return engine

    def _measure(self, engine: "Engine") -> None:
        """Kernels and machine, once per device class: neither a result nor an ideal time depends on who did a batch."""
        from engine.cost import Machine

        name, db = engine.device_class, self.db
        self.cache.mkdir(parents=True, exist_ok=True)
        # Workers of one machine that start together would disturb each other's measurement.
        with FileLock(self.cache / "measuring.lock"):
            engine.kernels = devices.kernel_plan(db, name, engine.matrix_shapes, engine.measure_kernels)
            engine.machine = Machine(**devices.device_plan(db, name, lambda: asdict(engine.machine)))


def finalise(db: Database, job_id: int) -> bool:
    """End the job once all its shards have ended. True for the call that did."""
    from workers.estimates import summarise

    return results.finalise(db, job_id, summarise)
