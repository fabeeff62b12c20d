"""Taking leases back from workers that are gone, and charging the loss to whoever caused it."""

from collections.abc import Collection

import structlog

from db import queue
from db.session import Database
from workers.holding import patiently

log = structlog.get_logger()

#: in the name of a worker whose process is the run itself: when it died, the work may have killed it
ALONE = "-alone-"


def take_back(
    db: Database, fleet: str, *, gone: Collection[str] = (), refund: bool = False, lost: Collection[str] = ()
) -> None:
    """Make ready again what expired, and what the workers `gone` held.

    fleet: how the names of one's own workers begin. refund: the workers `gone` were lost to their node, or ended by us,
    not by the work. lost: workers that cannot be reached; had one died by itself, its node would have said so. An
    expired lease of another fleet's worker is refunded too: had the worker died by itself, its fleet would have taken
    the lease back long ago, so the fleet must have gone with it.
    """
    for task in patiently(lambda: queue.reap(db, dead_workers=gone)):
        log.warning("lease taken back", task=task.task_id, worker=task.worker, attempt=task.attempt)
        by_itself = task.worker.startswith(fleet) or ALONE in task.worker
        if not by_itself or task.worker in lost or (refund and task.worker in gone):
            _refund(db, task)


def _refund(db: Database, task: queue.Reaped) -> None:
    patiently(lambda: queue.refund(db, task.task_id, task.epoch))
