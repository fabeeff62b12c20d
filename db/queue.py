"""The queue: who works on what. Every change of hands is fenced by an epoch; all times are the database's."""

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, RowMapping, Update, and_, insert, or_, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from db import events, schema
from db.claims import LEASED, Lease, claim, forget_idle, hungry, take
from db.clock import now
from db.errors import BadInput, LeaseLost
from db.events import What
from db.records import JobState, TaskState
from db.session import Database
from db.tables import job, task

__all__ = [
    "MAX_ATTEMPTS",
    "NEW_TASK",
    "OPEN",
    "SUSPECT_DEATHS",
    "Lease",
    "Reaped",
    "Renewal",
    "back_off_seconds",
    "cancel_open_tasks",
    "claim",
    "close_tasks",
    "complete",
    "end_job",
    "fail",
    "give_back",
    "reap",
    "refund",
    "renew",
    "reopen_job",
    "split",
    "storable",
    "take",
]

MAX_ATTEMPTS = 4
#: deaths of the process on one shard that make it a suspect
SUSPECT_DEATHS = 2
#: the longest pause before a failed attempt is followed by another
MOST_BACK_OFF_SECONDS = 300.0

OPEN = (TaskState.READY, TaskState.LEASED)
#: what a task begins with
NEW_TASK: dict[str, Any] = {
    "state": TaskState.READY,
    "epoch": 0,
    "attempt": 0,
    "run_after": 0.0,
    "first_batch": 0,
    "end_batch": 0,
    "done_batches": 0,
    "cost": 0,
    "deaths": 0,
    "guilty": [],
}


@dataclass(frozen=True)
class Renewal:
    cancelled: bool  #: the job is over: drop the work
    hungry: int = 0  #: workers that wait for what is left of this shard: split it after this batch


@dataclass(frozen=True)
class Reaped:
    """A task taken from a worker that went silent."""

    task_id: int
    job_id: int
    epoch: int
    attempt: int
    worker: str
    dead: bool  #: it was the last attempt


def renew(db: Database, lease: Lease, done_batches: int, *, alone: int | None = None) -> Renewal:
    """Hold the lease for another `lease_seconds` and report progress. Never waits for the commit of its own shard.

    alone: position in the benchmark of the sample that is about to run alone (see `Lease.isolated_from`).
    Raises `LeaseLost`.
    """
    unlocked = select(task.c.id).where(*_held(lease)).with_for_update(skip_locked=True).scalar_subquery()
    extend = (
        update(task)
        .where(task.c.id == unlocked)
        .values(lease_until=now() + lease.lease_seconds, done_batches=done_batches, alone=alone)
        .returning(task.c.worker)
    )
    with db.write() as connection:
        row = connection.execute(extend).one_or_none()
        if row is not None:
            waiting = hungry(connection, lease, row.worker) if lease.kind == "shard" else 0
            return Renewal(cancelled=False, hungry=waiting)
        return _not_renewed(connection, lease)


def _not_renewed(connection: Connection, lease: Lease) -> Renewal:
    """Why a lease was not renewed: its own commit holds the row or is through, its job was cancelled, or it is lost."""
    now_there = select(task.c.state, task.c.epoch, task.c.worker).where(task.c.id == lease.task_id)
    row = connection.execute(now_there).one_or_none()
    if row is None or row.worker != lease.worker:  # pruned, and on SQLite perhaps another's by now
        raise _lost(lease)
    if row.state == TaskState.CANCELLED:
        return Renewal(cancelled=True)
    if row.epoch == lease.epoch and row.state in (TaskState.LEASED, TaskState.DONE, TaskState.SPLIT):
        return Renewal(cancelled=False)
    raise _lost(lease)


def complete(connection: Connection, lease: Lease) -> bool:
    """The fence: first statement of the transaction that commits a task's results.

    True: the task is done by this transaction. False: it was done before under this very lease (a COMMIT whose answer
    was lost); write nothing more. Raises `LeaseLost`, and `OlderSchema` or `NewerSchema` where the database is not this
    version's any more: roll back.
    """
    return _fence(connection, lease, TaskState.DONE) is not None


def give_back(db: Database, lease: Lease) -> bool:
    """Make the task ready again, its attempt refunded. False when the lease had been lost: nothing changed."""
    back = update(task).where(*_held(lease)).values(**_READY_AGAIN, attempt=task.c.attempt - 1)
    with db.write() as connection:
        return connection.execute(back).rowcount == 1


def fail(db: Database, lease: Lease, error: str, *, refund: bool = False) -> bool:
    """Report an attempt that failed: ready again after a pause, dead after `MAX_ATTEMPTS`.

    A dead prepare task fails its job at once, a dead shard when the job is finalised. refund: the attempt was lost to
    the node or the database, not to the work. False when the lease had been lost: nothing changed.
    """
    with db.write() as connection:
        row = connection.execute(select(task).where(*_held(lease)).with_for_update()).mappings().one_or_none()
        if row is None:
            return False
        attempt = row["attempt"] - refund
        if attempt >= MAX_ATTEMPTS + len(row["guilty"]):
            _bury(connection, row, error)
        else:
            later = now() + back_off_seconds(row["attempt"])
            connection.execute(
                _change(row).values(**_READY_AGAIN, attempt=attempt, error=storable(error), run_after=later)
            )
        return True


def back_off_seconds(attempt: int) -> float:
    """How long to wait after a failed attempt: twice as long each time, and not all at the same moment."""
    return min(2.0**attempt * random.uniform(0.5, 1.5), MOST_BACK_OFF_SECONDS)


def split(connection: Connection, lease: Lease, at_batch: int, pieces: int = 1) -> Lease | None:
    """Cut the shard at `at_batch`: the one primitive that changes an extent; a fence like `complete`.

    The parent becomes `split`; a `done` child takes `[first_batch, at_batch)`, whose results the same transaction
    writes; a `ready` child the rest, or as many of them as there are `pieces`, each of a batch at least. Returns the
    done child, or None where this very split was made before. Raises `LeaseLost`, and `BadInput` where the cut is not
    inside.
    """
    if not lease.first_batch < at_batch < lease.end_batch:
        raise BadInput(
            f"shard {lease.task_id} cannot be split at batch {at_batch}; "
            f"cut after {lease.first_batch} and before {lease.end_batch}."
        )
    parent = _fence(connection, lease, TaskState.SPLIT)
    if parent is None:
        return None
    child = NEW_TASK | {name: parent[name] for name in ("job_id", "kind", "priority", "benchmark_id", "guilty")}
    child |= {"parent_id": parent["id"]}
    rest = [child | extent for extent in _rest(parent, at_batch, pieces)]
    finished = child | {
        "state": TaskState.DONE,
        "first_batch": lease.first_batch,
        "end_batch": at_batch,
        "done_batches": at_batch - lease.first_batch,
        "cost": parent["cost"] - sum(part["cost"] for part in rest),
        "epoch": lease.epoch,
        "attempt": lease.attempt,
        "worker": parent["worker"],
    }
    connection.execute(insert(task), rest)
    done_id = connection.execute(insert(task).values(finished).returning(task.c.id)).scalar_one()
    return replace(lease, task_id=done_id, end_batch=at_batch)


def _rest(parent: RowMapping, at_batch: int, pieces: int) -> list[dict[str, int]]:
    """What is left from a batch on, in parts as equal as whole batches allow; each with its share of the cost."""
    first, end = parent["first_batch"], parent["end_batch"]
    pieces = max(1, min(pieces, end - at_batch))
    cuts = [at_batch + (end - at_batch) * place // pieces for place in range(pieces + 1)]
    return [
        {"first_batch": a, "end_batch": b, "cost": parent["cost"] * (b - a) // (end - first)} for a, b in pairwise(cuts)
    ]


def reap(db: Database, *, dead_workers: Iterable[str] = ()) -> list[Reaped]:
    """Take tasks from workers whose lease expired, or whose process is known to be dead.

    Counts as a death of the process; two on one shard make it a suspect. Where the node went and not the process,
    call `refund` for what this returns.
    """
    silent = or_(task.c.lease_until < now(), task.c.worker.in_(list(dead_workers)))
    expired = select(task).where(LEASED, silent).with_for_update(skip_locked=True)
    with db.write() as connection:
        forget_idle(connection)
        rows = connection.execute(expired).mappings().all()
        # by job: each is held from its first event on, and two reapers shall not wait for each other. Sorted here, or
        # SQLite goes through the tasks of all jobs in that order instead of the few that are leased.
        return [_reap_one(connection, row) for row in sorted(rows, key=lambda row: (row["job_id"], row["id"]))]


def _reap_one(connection: Connection, row: RowMapping) -> Reaped:
    """A sample that ran alone is guilty; otherwise the second death makes a suspect of all that was not yet done."""
    error = f"worker {row['worker']} went silent during attempt {row['attempt']}"
    guilty, isolated_from, deaths = list(row["guilty"]), row["isolated_from"], row["deaths"] + 1
    events.record(connection, row["job_id"], row["worker"], What.REAPED, task=row["id"], attempt=row["attempt"])
    if row["alone"] is not None:
        guilty.append(row["alone"])
    elif row["kind"] == "shard" and deaths >= SUSPECT_DEATHS and isolated_from is None:
        isolated_from = min(row["first_batch"] + row["done_batches"], row["end_batch"] - 1)
        events.record(
            connection, row["job_id"], row["worker"], What.SUSPECT, task=row["id"], isolated_from=isolated_from
        )
    dead = row["attempt"] >= MAX_ATTEMPTS + len(guilty)
    connection.execute(_change(row).values(deaths=deaths, guilty=guilty, isolated_from=isolated_from))
    if dead:
        _bury(connection, row, error)
    else:
        connection.execute(_change(row).values(**_READY_AGAIN, error=error))
    return Reaped(row["id"], row["job_id"], row["epoch"], row["attempt"], row["worker"], dead)


def refund(db: Database, task_id: int, epoch: int) -> bool:
    """Undo the attempt and the death that `reap` counted at this epoch, and the failure of the job that this caused.

    False when the task has moved on, or was refunded before.
    """
    reaped = and_(
        task.c.id == task_id,
        task.c.epoch == epoch,
        task.c.state.in_([TaskState.READY, TaskState.DEAD]),
        task.c.worker.is_not(None),
        task.c.deaths > 0,
    )
    with db.write() as connection:
        row = connection.execute(select(task).where(reaped).with_for_update()).mappings().one_or_none()
        if row is None or (row["state"] == TaskState.DEAD and not reopen_job(connection, row["job_id"], [row["kind"]])):
            return False
        events.record(connection, row["job_id"], row["worker"], What.REFUNDED, task=row["id"])
        deaths = row["deaths"] - 1
        connection.execute(
            _change(row).values(
                state=TaskState.READY,
                attempt=row["attempt"] - 1,
                worker=None,
                deaths=deaths,
                guilty=[place for place in row["guilty"] if place != row["alone"]],
                isolated_from=row["isolated_from"] if deaths >= SUSPECT_DEATHS else None,
                alone=None,
            )
        )
        return True


def end_job(connection: Connection, job_id: int, state: JobState, error: str | None, who: str) -> bool:
    """End a job before its time: open tasks are cancelled, their epochs move on. False when it had ended before."""
    reason = {} if error is None else {"error": storable(error)}
    cancel_open_tasks(connection, job_id)
    ended = (
        update(job)
        .where(job.c.id == job_id, job.c.state.in_([s for s in JobState if not s.ended]))
        .values(state=state, error=reason.get("error"), finished_at=now())
    )
    done = connection.execute(ended).rowcount == 1
    if done:
        what = What.CANCELLED if state is JobState.CANCELLED else What.FAILED
        events.record(connection, job_id, who, what, **reason)
    close_tasks(connection, job_id)  # the first statement may have waited for a prepare task that planned the shards
    return done


def reopen_job(connection: Connection, job_id: int, kinds: Collection[str]) -> bool:
    """Let a job go on whose dead tasks, of these kinds, become ready again. False when it was cancelled."""
    state = JobState.PREPARING if "prepare" in kinds else JobState.RUNNING
    again = (
        update(job)
        .where(job.c.id == job_id, job.c.state != JobState.CANCELLED)
        .values(state=state, error=None, finished_at=None)
    )
    return connection.execute(again).rowcount == 1


def close_tasks(connection: Connection, job_id: int) -> None:
    """Cancel the job's open tasks until none is left: who splits a shard meanwhile is waited for, and leaves one."""
    still = select(task.c.id).where(task.c.job_id == job_id, task.c.state.in_(OPEN)).limit(1)
    while connection.execute(still).first() is not None:
        cancel_open_tasks(connection, job_id)


def cancel_open_tasks(connection: Connection, job_id: int) -> None:
    """Those that this statement sees; their epochs move on."""
    connection.execute(
        update(task)
        .where(task.c.job_id == job_id, task.c.state.in_(OPEN))
        .values(state=TaskState.CANCELLED, epoch=task.c.epoch + 1, lease_until=None)
    )


_READY_AGAIN: dict[str, Any] = {"state": TaskState.READY, "lease_until": None}


def storable(text: str) -> str:
    """PostgreSQL keeps neither NUL nor half a surrogate pair; the record replaces both on every database."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _held(lease: Lease) -> list[Any]:
    # The worker too: SQLite gives the number of a pruned task to a new one, whose epochs begin anew.
    return [task.c.id == lease.task_id, task.c.epoch == lease.epoch, task.c.worker == lease.worker, LEASED]


def _change(row: RowMapping) -> Update:
    return update(task).where(task.c.id == row["id"])


def _fence(connection: Connection, lease: Lease, state: TaskState) -> RowMapping | None:
    """Move a held task to its final state. None: it is there already, moved under this very lease."""
    schema.hold(connection)
    move: ReturningUpdate[Any] = (
        update(task).where(*_held(lease)).values(state=state, lease_until=None).returning(*task.c)
    )
    row = connection.execute(move).mappings().one_or_none()
    if row is not None:
        return row
    now_there = select(task.c.state, task.c.epoch, task.c.worker).where(task.c.id == lease.task_id)
    seen = connection.execute(now_there).one_or_none()
    if seen is None or tuple(seen) != (state, lease.epoch, lease.worker):
        raise _lost(lease)
    return None


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"task {lease.task_id} is no longer held at epoch {lease.epoch}; nothing was written.")


def _bury(connection: Connection, row: RowMapping, error: str) -> None:
    connection.execute(_change(row).values(state=TaskState.DEAD, lease_until=None, error=storable(error)))
    if row["kind"] == "prepare":
        end_job(connection, row["job_id"], JobState.FAILED, error, row["worker"])
    else:
        events.record(connection, row["job_id"], row["worker"], What.SHARD_DEAD, task=row["id"], error=storable(error))
