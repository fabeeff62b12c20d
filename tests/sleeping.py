"""Jobs whose batches take a known time and no processor: for what a fleet does, where the engine is not what is tested.

The worker is the real one but for its evaluation, which sleeps for the time that the job pins and makes results up.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import ray
from made import N_LAYERS, outcome, planned_benchmark, planned_policy

from cluster.fleet.actor import RemoteWorker
from cluster.fleet.supervisor import Fleet
from db import jobs, queue
from db.records import RunRow, SampleRow, ShardResults, TimingRow
from db.results import ClaimedShard
from db.session import Database
from workers.worker import GpuMemory, Unfit, Worker

#: that all these workers say they compute on
GPU = GpuMemory("GPU-of-nobody", 3 << 30, 80 << 30)


class _Sleep:
    """What `workers.evaluate.Evaluation` is to a worker."""

    def __init__(self, shard: ClaimedShard, proceed: Callable[[], None]) -> None:
        self.runs = shard.runs
        self.seconds = float(shard.pinned["sleep"])
        self.step = float(shard.pinned.get("step") or self.seconds)  #: between two looks whether to go on
        self.proceed = proceed

    def together(self, batch: int, samples: Sequence[SampleRow]) -> ShardResults:
        until = time.monotonic() + self.seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, self.step))
            self.proceed()
        return made(self.runs, batch, samples)

    def alone(self, batch: int, samples: Sequence[SampleRow], **_: Any) -> ShardResults:
        return self.together(batch, samples)


def made(runs: Sequence[RunRow], batch: int, samples: Sequence[SampleRow]) -> ShardResults:
    """The same for a batch whoever makes it, and in whatever shard."""
    results = ShardResults()
    for run in runs:
        rng = np.random.default_rng([batch, run.position])
        results.outcomes.extend(outcome(rng, run.id, sample.id) for sample in samples)
        figures = (int(n) for n in rng.integers(1, 10**9, 5))
        results.timings.append(TimingRow(run.id, batch, len(samples), *figures, "cpu-test", True))
    return results


class SleepingWorker(Worker):
    """Refuses a job that pins another machine's weights, as the real one does; on a bad machine it dies."""

    def evaluation(self, shard: ClaimedShard, proceed: Callable[[], None]) -> Any:
        if os.environ.get("SLEEPING_DEADLY"):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.pinned.get("only_on", "") != os.environ.get("SLEEPING_WEIGHTS", ""):
            raise Unfit(f"model {shard.pinned['model']!r} has other weights than the job was prepared with.")
        if shard.pinned.get("eats") and shard.lease.attempt == 1:
            bytearray(2**55)  # more than any machine has
        if shard.pinned.get("loses_gpu") and shard.lease.attempt == 1:
            import torch  # noqa: F401 - where no torch is, no GPU can be lost

            raise RuntimeError("CUDA error: unspecified launch failure\nand pages of advice")
        return _Sleep(shard, proceed)

    def gpus(self) -> Sequence[GpuMemory]:
        return [GPU]


class SleepingRemote(RemoteWorker):
    worker_class: ClassVar[type[Worker]] = SleepingWorker


class SleepingFleet(Fleet):
    remote_worker: ClassVar[type[RemoteWorker]] = SleepingRemote


def gpu_ids(_: RemoteWorker) -> list[str]:
    """For `__ray_call__`: the GPUs that Ray lent to the worker."""
    return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])


def is_timed(remote: RemoteWorker) -> bool:
    """For `__ray_call__`."""
    return remote._worker.timed


def sleeping_job(
    db: Database,
    n_batches: int,
    seconds: float,
    *,
    batch_size: int = 1,
    shard_batches: int = 1,
    model: str = "sleeper",
    priority: int = 0,
    **pinned: Any,
) -> int:
    """A job that is prepared: so many batches, each of which takes so many seconds."""
    job_id = jobs.create_job(db, name="sleeping", spec={"model": model}, priority=priority)
    lease = queue.claim(db, "preparer", kind="prepare", job_id=job_id)
    assert lease is not None
    n_samples = n_batches * batch_size
    jobs.plan_job(
        db,
        lease,
        pinned={
            "batch_size": batch_size,
            "shard_batches": shard_batches,
            "n_layers": N_LAYERS,
            "sleep": seconds,
            "model": model,
            "weights_hash": model,
            "device": "cpu",
            "threads": 1,
            "dtype": "float32",
            "compile": "off",
        }
        | pinned,
        benchmarks=[planned_benchmark(n_samples, f"lines {n_samples}")],
        artifacts=[],
        policies=[planned_policy("full")],
    )
    return job_id


@contextmanager
def running(fleet: Fleet) -> Iterator[Fleet]:
    """A fleet that runs beside the block, and is asked to stop at its end."""
    over, failed = threading.Event(), []

    def stop_at_the_end() -> None:
        if over.is_set():
            raise KeyboardInterrupt

    def run() -> None:
        try:
            fleet.run(stop_at_the_end)
        except KeyboardInterrupt:
            pass
        except Exception as error:
            failed.append(error)

    with fleet:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield fleet
        finally:
            over.set()
            thread.join()
    if failed:
        raise failed[0]


def main() -> None:
    """A fleet in a process of its own: database, Ray address, most workers, and the only job, where there is one."""
    from cluster.logs import configure_logs
    from db.session import open_database

    url, address, workers, *job_ids = sys.argv[1:]
    configure_logs("info")
    fleet = SleepingFleet(
        open_database(url), [int(one) for one in job_ids] or None, workers=int(workers), ray_address=address,
        lease_seconds=6, log_level="info",
    )  # fmt: skip
    with fleet:
        print("joined", flush=True)
        fleet.run()


if __name__ == "__main__":
    from sleeping import main as its_own_main  # Ray finds the actor's class by the module's name

    its_own_main()
