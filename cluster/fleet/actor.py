"""A worker as Ray runs it: `serve` in one thread, control calls answered beside it while a shard runs."""

import random
import socket
import threading
from collections.abc import Collection
from typing import Any, ClassVar

import ray
import structlog

from cluster.fleet.demand import Duty
from cluster.logs import configure_logs
from cluster.preparing import prepare_next
from db import errors as record_errors
from db.session import open_database
from engine.errors import BadInput
from workers.holding import patiently
from workers.worker import Pulse, Worker

log = structlog.get_logger()

#: how long a worker that has jobs but found no shard waits before it looks again
IDLE_SECONDS = 0.5
#: control calls that are answered at once
CONTROL_THREADS = 4


class RemoteWorker:
    """A worker in a process of its own."""

    #: what does the shards
    worker_class: ClassVar[type[Worker]] = Worker

    def __init__(
        self, url: str, name: str, timed: bool, lease_seconds: float, workers_a_node: int, log_level: str
    ) -> None:
        """The worker's name is `name@host`, so that whoever reads it knows the machine."""
        configure_logs(log_level)
        self._db = patiently(lambda: open_database(url, create=False, patient=True))
        self._worker = self.worker_class(
            self._db, f"{name}@{socket.gethostname()}", timed=timed, lease_seconds=lease_seconds
        )
        self._workers_a_node = workers_a_node
        self._duty = Duty()
        self._told = threading.Event()

    @ray.method(concurrency_group="work")
    def serve(self) -> None:
        """Do what `assign` says until `drain`. Raises `Unfit`; `Unavailable` when the database stays away."""
        while True:
            self._told.clear()
            if self._worker.draining:
                return
            duty = self._duty
            if duty.prepare and self._prepare(duty.prepare):
                continue
            if duty.shards and self._worker.step(duty.shards):
                continue
            # nothing to do is no reason to ask the database: the supervisor tells when there is
            pause = IDLE_SECONDS * random.uniform(0.5, 1.5) if duty.shards or duty.prepare else None
            self._told.wait(pause)

    @ray.method(concurrency_group="control")
    def assign(self, duty: Duty) -> None:
        """What to do from the next shard on."""
        self._worker.remember(duty.shards)
        self._duty = duty
        self._told.set()

    @ray.method(concurrency_group="control")
    def forget(self, job_id: int) -> None:
        """The job was cancelled: drop what is in hand of it."""
        self._worker.forget(job_id)

    @ray.method(concurrency_group="control")
    def pulse(self) -> tuple[Pulse, str]:
        """What the worker is at, and the id of its node."""
        return self._worker.pulse(), ray.get_runtime_context().get_node_id()

    @ray.method(concurrency_group="control")
    def drain(self) -> None:
        """Stop soon: finished batches are committed, the rest goes back without an attempt counted."""
        self._worker.drain()
        self._told.set()

    def _prepare(self, job_ids: Collection[int]) -> bool:
        try:
            return prepare_next(
                self._db,
                self._worker.name,
                job_ids,
                workers=self._workers_a_node,
                lease_seconds=self._worker.lease_seconds,
            )
        except (BadInput, record_errors.BadInput) as error:  # the job has failed with this sentence
            log.warning("job refused", worker=self._worker.name, reason=str(error))
            return True


def as_actor(of: type[RemoteWorker]) -> Any:
    """The class as Ray starts it. An actor that died is replaced by another one, never restarted under its name."""
    groups = {"work": 1, "control": CONTROL_THREADS}
    return ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups=groups)(of)
