"""Preparing jobs: a task like any other, done by whoever claims it."""

from collections.abc import Collection

import structlog

from cluster.prepare import prepare
from db import errors as record_errors
from db import queue
from db.errors import LeaseLost
from db.queue import Lease
from db.session import Database
from engine.errors import BadInput
from workers.holding import claim_patiently

log = structlog.get_logger()


def prepare_next(db: Database, name: str, job_id: int | Collection[int], *, workers: int, lease_seconds: float) -> bool:
    """Prepare one of these jobs, where that is to be done and nobody does it. False: there was none to claim.

    workers: how many are to share this machine. Bad input has failed the job when it is raised.
    """
    lease = claim_patiently(db, name, kind="prepare", lease_seconds=lease_seconds, job_id=job_id)
    if lease is None:
        return False
    _try(db, lease, workers)
    return True


def _try(db: Database, lease: Lease, workers: int) -> None:
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
