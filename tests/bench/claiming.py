"""Workers that claim and complete, each in a process of its own."""

import multiprocessing
import time
from dataclasses import dataclass
from typing import Any

from db import queue
from db.session import open_database

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Share:
    """What one worker did, on the clock that all processes of a machine share."""

    began: float
    ended: float
    task_ids: list[int]


def claim_and_complete(url: str, job_id: int, workers: int) -> list[Share]:
    """So many processes at once until nothing is left of the job."""
    start, found = _context.Barrier(workers), _context.Queue()
    processes = [
        _context.Process(target=_work, args=(url, job_id, f"worker {i}", start, found)) for i in range(workers)
    ]
    for process in processes:
        process.start()
    shares = [found.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return shares


def _work(url: str, job_id: int, worker: str, start: Any, found: Any) -> None:
    """Runs in a process of its own."""
    db = open_database(url)
    start.wait(timeout=120)
    began, task_ids = time.perf_counter(), []
    while lease := queue.claim(db, worker, kind="shard", job_id=job_id):
        with db.write() as connection:
            queue.complete(connection, lease)
        task_ids.append(lease.task_id)
    found.put(Share(began, time.perf_counter(), task_ids))
    db.close()
