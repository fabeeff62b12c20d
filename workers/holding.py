"""Holding a lease while its work goes on, and holding on when the database is away for a moment."""

import threading
import time
from collections.abc import Callable, Collection
from typing import TypeVar

from db import queue, results
from db.errors import LeaseLost, Unavailable
from db.queue import Lease
from db.results import ClaimedShard
from db.session import Database

T = TypeVar("T")

#: how long a worker waits for a database that is away; a restart takes less
PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.5


def patiently(act: Callable[[], T], *, seconds: float = PATIENCE_SECONDS) -> T:
    """Repeat what is safe to repeat while the database is away. Raises `Unavailable` when it stays away."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return act()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def claim_patiently(
    db: Database, worker: str, *, kind: str, lease_seconds: float, job_id: int | Collection[int] | None = None
) -> Lease | None:
    """`queue.claim` by a worker that holds nothing. A claim whose answer was lost is taken up by the next."""
    asked = 0

    def ask() -> Lease | None:
        nonlocal asked
        asked += 1
        return queue.claim(db, worker, kind=kind, lease_seconds=lease_seconds, job_id=job_id, again=asked > 1)

    return patiently(ask)


def claim_shard_patiently(
    db: Database, worker: str, *, lease_seconds: float, job_id: int | Collection[int]
) -> ClaimedShard | None:
    """`results.claim_shard`, as `claim_patiently`."""
    asked = 0

    def ask() -> ClaimedShard | None:
        nonlocal asked
        asked += 1
        return results.claim_shard(db, worker, lease_seconds=lease_seconds, job_id=job_id, again=asked > 1)

    return patiently(ask)


class Holding:
    """A lease held for the length of a `with` block: renewed from a thread three times per lease, and on `progress`.

    Leave the block before the commit: no renewal then waits for the transaction that ends the lease.
    """

    def __init__(self, db: Database, lease: Lease) -> None:
        self.db = db
        self.lease = lease
        self.hungry = 0  #: workers that wait for what is left of the shard
        self._lost: str | None = None
        self._done_batches = 0
        self._alone: int | None = None
        self._renewing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_over, name="renewal", daemon=True)

    def __enter__(self) -> "Holding":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Raises `LeaseLost` once a renewal has learnt that the work is not wanted any more."""
        if self._lost:
            raise LeaseLost(self._lost)

    def progress(self, done_batches: int) -> None:
        """Renew now, with so many batches done. A database that is away is left to the thread. Raises `LeaseLost`."""
        self._done_batches, self._alone = done_batches, None
        try:
            self._renew()
        except Unavailable:
            return
        self.check()

    def alone(self, position: int) -> None:
        """Record that the sample at this position is about to run alone. Raises `LeaseLost`, `Unavailable`."""
        self._alone = position
        patiently(self._renew)
        self.check()

    def _renew(self) -> None:
        with self._renewing:
            try:
                renewal = queue.renew(self.db, self.lease, self._done_batches, alone=self._alone)
            except LeaseLost as error:
                self._lost = str(error)
                return
        self.hungry = renewal.hungry
        if renewal.cancelled:
            self._lost = f"job {self.lease.job_id} was cancelled"

    def _renew_until_over(self) -> None:
        while not self._over.wait(self.lease.lease_seconds / 3) and not self._lost:
            try:
                self._renew()
            except Unavailable:
                continue  # what is lost by then shows at the next renewal or at the commit
