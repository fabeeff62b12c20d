"""A worker that joins by itself: no Ray, no fleet, the same queue. For a machine that nobody places workers on."""

import time
from collections.abc import Callable

import structlog

from cluster.prepare import cores
from cluster.preparing import prepare_next
from cluster.reaping import take_back
from db import demand
from db import errors as record_errors
from db.records import JobState, OpenJob
from db.session import Database
from engine.errors import BadInput
from workers.holding import patiently
from workers.pinned import EngineKey
from workers.worker import Unfit, Worker

log = structlog.get_logger()

#: between two looks at the queue where there is nothing to do
IDLE_SECONDS = 0.5
#: after which a job that this machine cannot do is looked at again
UNFIT_SECONDS = 600.0


class Joined:
    """Works on every open job that this machine can do; on those first whose model it holds."""

    def __init__(self, db: Database, name: str, *, workers: int, lease_seconds: float) -> None:
        """workers: that share this machine, this one among them."""
        self.db = db
        self.workers = workers
        # every worker of a machine leaves its cores to the others
        self.threads = max(1, cores() // workers)
        self.worker = Worker(db, name, timed=True, lease_seconds=lease_seconds)
        self._engine: EngineKey | None = None
        self._unfit: dict[EngineKey, float] = {}

    def work(self, *, until_idle: float | None = None, on_idle: Callable[[], None] = lambda: None) -> None:
        """Work until `worker.drain`, or until there was nothing to do for `until_idle` seconds.

        Raises `Unavailable` when the database stays away.
        """
        idle_since = time.monotonic()
        while not self.worker.draining:
            if self._step():
                idle_since = time.monotonic()
                continue
            take_back(self.db, self.worker.name)
            on_idle()
            if until_idle is not None and time.monotonic() - idle_since >= until_idle:
                return
            time.sleep(IDLE_SECONDS)

    def _step(self) -> bool:
        """Prepare a job or do a shard. False where there was nothing that this machine can do."""
        found = patiently(lambda: demand.open_jobs(self.db))
        preparing = [job.id for job in found if job.state is JobState.PREPARING and job.ready and self._suits(job)]
        if preparing and self._prepare(preparing):
            return True
        engines = {EngineKey.of(job.pinned): None for job in found if job.pinned and self._suits(job)}
        # the engine that is loaded first; then in the order in which jobs have their turns
        for engine in sorted(engines, key=lambda engine: engine != self._engine):
            if self._unfit.get(engine, 0) < time.monotonic() and self._do(engine, found):
                return True
        return False

    def _suits(self, job: OpenJob) -> bool:
        """Whether this machine has the device and the threads that a job pins or asks for."""
        asked = job.pinned or job.spec
        device, threads = asked.get("device", "auto"), asked.get("threads") or 1
        return threads <= self.threads and (device != "cuda" or _has_gpu())

    def _prepare(self, job_ids: list[int]) -> bool:
        try:
            return prepare_next(
                self.db, self.worker.name, job_ids, workers=self.workers, lease_seconds=self.worker.lease_seconds
            )
        except (BadInput, record_errors.BadInput) as error:  # the job has failed with this sentence
            log.warning("job refused", reason=str(error))
            return True

    def _do(self, engine: EngineKey, found: list[OpenJob]) -> bool:
        mine = [job.id for job in found if job.pinned and EngineKey.of(job.pinned) == engine]
        try:
            done = self.worker.step(mine)
        except Unfit as error:
            log.warning("this machine cannot do the job", reason=str(error))
            self._unfit[engine] = time.monotonic() + UNFIT_SECONDS
            return False
        if done:
            self._engine = engine
        return done


def _has_gpu() -> bool:
    from engine.device import count_gpus

    return count_gpus() > 0
