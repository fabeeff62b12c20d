"""What every log line of a worker carries while it is at a task."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from structlog.contextvars import bound_contextvars

from db.queue import Lease


@contextmanager
def at_work(worker: str, lease: Lease) -> Iterator[None]:
    """Lines logged in this thread meanwhile have job, shard (or task), epoch, worker and node."""
    task = {"shard" if lease.kind == "shard" else "task": lease.task_id}
    with bound_contextvars(job=lease.job_id, **task, epoch=lease.epoch, worker=worker, node=socket.gethostname()):
        yield
