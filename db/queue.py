"""The queue: who works on what. Every change of hands is fenced by an epoch; all times are the database's."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    RowMapping,
    Update,
    and_,
    bindparam,
    delete,
    exists,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from db.clock import now
from db.errors import BadInput, LeaseLost
from db.records import JobState, TaskState
from db.session import Database
from db.tables import idle_worker, job, task

MAX_ATTEMPTS = 4
#: deaths of the process on one shard that make it a suspect
SUSPECT_DEATHS = 2
#: a worker that asked in vain within this time counts as waiting; workers ask more often
IDLE_SECONDS = 5

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
    "deaths": 0,
    "guilty": [],
}
#: spelled out, not bound: so that SQLite uses the partial indices
READY = task.c.state == literal_column("'ready'")
LEASED = task.c.state == literal_column("'leased'")


@dataclass(frozen=True)
class Lease:
    """A task held by one worker until the lease ends or the epoch moves on."""

    task_id: int
    job_id: int
    kind: str  #: "prepare" or "shard"
    epoch: int
    attempt: int  #: from 1
    lease_seconds: float
    benchmark_id: int | None = None  #: of a shard
    first_batch: int = 0  #: of a shard
    end_batch: int = 0  #: of a shard; one past the last
    #: the shard is a suspect: from this batch on samples run alone, announced by `renew(alone=...)`; None: it is not
    isolated_from: int | None = None
    #: positions of samples (in the benchmark) that ended the process when they ran alone: they get an error outcome
    guilty: tuple[int, ...] = ()


@dataclass(frozen=True)
class Renewal:
    cancelled: bool  #: the job is over: drop the work
    hungry: bool  #: no shard is ready and another worker waits: split what is left after this batch


@dataclass(frozen=True)
class Reaped:
    """A task taken from a worker that went silent."""

    task_id: int
    job_id: int
    epoch: int
    attempt: int
    worker: str
    dead: bool  #: it was the last attempt


def _claim(*of_job: ColumnElement[bool]) -> ReturningUpdate[Any]:
    """Built once: building takes longer than running. Parameters: of_kind, by_worker, for_seconds (and of_job)."""
    chosen = (
        select(task.c.id)
        .where(READY, task.c.kind == bindparam("of_kind"), task.c.run_after <= now(), *of_job)
        .order_by(task.c.priority.desc(), task.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return (
        update(task)
        .where(task.c.id == chosen)
        .values(
            state=TaskState.LEASED,
            epoch=task.c.epoch + 1,
            attempt=task.c.attempt + 1,
            worker=bindparam("by_worker"),
            lease_until=now() + bindparam("for_seconds", type_=Double),
            done_batches=0,
            alone=None,
        )
        .returning(*task.c)
    )


_CLAIM = _claim()
_CLAIM_OF_JOB = _claim(task.c.job_id == bindparam("of_job"))


def claim(
    db: Database, worker: str, *, kind: str, lease_seconds: float = 30, job_id: int | None = None
) -> Lease | None:
    """Take the next ready task of this kind, by priority and age; None when there is none."""
    asked: dict[str, Any] = {"of_kind": kind, "by_worker": worker, "for_seconds": lease_seconds}
    take = _CLAIM
    if job_id is not None:
        take, asked["of_job"] = _CLAIM_OF_JOB, job_id
    with db.write() as connection:
        row = connection.execute(take, asked).mappings().one_or_none()
        if row is None:
            _remember_idle(connection, worker)
            return None
        if kind == "shard":
            connection.execute(
                update(job)
                .where(job.c.id == row["job_id"], job.c.state == JobState.READY)
                .values(state=JobState.RUNNING, started_at=now())
            )
        return _lease(row, lease_seconds)


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
            return Renewal(cancelled=False, hungry=lease.kind == "shard" and _hungry(connection, row.worker))
        return _not_renewed(connection, lease)


def _not_renewed(connection: Connection, lease: Lease) -> Renewal:
    """Why a lease was not renewed: its own commit holds the row or is through, its job was cancelled, or it is lost."""
    row = connection.execute(select(task.c.state, task.c.epoch).where(task.c.id == lease.task_id)).one()
    if row.state == TaskState.CANCELLED:
        return Renewal(cancelled=True, hungry=False)
    if row.epoch == lease.epoch and row.state in (TaskState.LEASED, TaskState.DONE, TaskState.SPLIT):
        return Renewal(cancelled=False, hungry=False)
    raise _lost(lease)


def complete(connection: Connection, lease: Lease) -> bool:
    """The fence: first statement of the transaction that commits a task's results.

    True: the task is done by this transaction. False: it was done before under this very lease (a COMMIT whose answer
    was lost); write nothing more. Raises `LeaseLost`: roll back.
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
            connection.execute(
                _change(row).values(
                    **_READY_AGAIN, attempt=attempt, error=storable(error), run_after=now() + 2.0 ** row["attempt"]
                )
            )
        return True


def split(connection: Connection, lease: Lease, at_batch: int) -> Lease | None:
    """Cut the shard at `at_batch`: the one primitive that changes an extent; a fence like `complete`.

    The parent becomes `split`; a `done` child takes `[first_batch, at_batch)`, whose results the same transaction
    writes; a `ready` child the rest. Returns the done child, or None where this very split was made before. Raises
    `LeaseLost`, and `BadInput` where the cut is not inside.
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
    rest = child | {"first_batch": at_batch, "end_batch": lease.end_batch}
    finished = child | {
        "state": TaskState.DONE,
        "first_batch": lease.first_batch,
        "end_batch": at_batch,
        "done_batches": at_batch - lease.first_batch,
        "epoch": lease.epoch,
        "attempt": lease.attempt,
        "worker": parent["worker"],
    }
    connection.execute(insert(task).values(rest))
    done_id = connection.execute(insert(task).values(finished).returning(task.c.id)).scalar_one()
    return replace(lease, task_id=done_id, end_batch=at_batch)


def reap(db: Database, *, dead_workers: Iterable[str] = ()) -> list[Reaped]:
    """Take tasks from workers whose lease expired, or whose process is known to be dead.

    Counts as a death of the process; two on one shard make it a suspect. Where the node went and not the process,
    call `refund` for what this returns.
    """
    silent = or_(task.c.lease_until < now(), task.c.worker.in_(list(dead_workers)))
    with db.write() as connection:
        rows = connection.execute(select(task).where(LEASED, silent).with_for_update(skip_locked=True))
        return [_reap_one(connection, row) for row in rows.mappings().all()]


def _reap_one(connection: Connection, row: RowMapping) -> Reaped:
    """A sample that ran alone is guilty; otherwise the second death makes a suspect of all that was not yet done."""
    error = f"worker {row['worker']} went silent during attempt {row['attempt']}"
    guilty, isolated_from, deaths = list(row["guilty"]), row["isolated_from"], row["deaths"] + 1
    if row["alone"] is not None:
        guilty.append(row["alone"])
    elif row["kind"] == "shard" and deaths >= SUSPECT_DEATHS and isolated_from is None:
        isolated_from = min(row["first_batch"] + row["done_batches"], row["end_batch"] - 1)
    dead = row["attempt"] >= MAX_ATTEMPTS + len(guilty)
    connection.execute(_change(row).values(deaths=deaths, guilty=guilty, isolated_from=isolated_from))
    if dead:
        _bury(connection, row, error)
    else:
        connection.execute(_change(row).values(**_READY_AGAIN, error=error))
    return Reaped(row["id"], row["job_id"], row["epoch"], row["attempt"], row["worker"], dead)


def refund(db: Database, task_id: int, epoch: int) -> bool:
    """Undo the attempt and the death that `reap` counted at this epoch. False when the task has moved on."""
    reaped = and_(
        task.c.id == task_id,
        task.c.epoch == epoch,
        task.c.state.in_([TaskState.READY, TaskState.DEAD]),
        task.c.deaths > 0,
    )
    with db.write() as connection:
        row = connection.execute(select(task).where(reaped).with_for_update()).mappings().one_or_none()
        if row is None:
            return False
        deaths = row["deaths"] - 1
        connection.execute(
            _change(row).values(
                state=TaskState.READY,
                attempt=row["attempt"] - 1,
                deaths=deaths,
                guilty=[place for place in row["guilty"] if place != row["alone"]],
                isolated_from=row["isolated_from"] if deaths >= SUSPECT_DEATHS else None,
                alone=None,
            )
        )
        return True


def end_job(connection: Connection, job_id: int, state: JobState, error: str | None) -> bool:
    """End a job before its time: open tasks are cancelled, their epochs move on. False when it had ended before."""
    _cancel_open_tasks(connection, job_id)
    ended = (
        update(job)
        .where(job.c.id == job_id, job.c.state.in_([s for s in JobState if not s.ended]))
        .values(state=state, error=error and storable(error), finished_at=now())
    )
    done = connection.execute(ended).rowcount == 1
    # once more: the first statement may have waited for a prepare task that was just planning the shards
    _cancel_open_tasks(connection, job_id)
    return done


def _cancel_open_tasks(connection: Connection, job_id: int) -> None:
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
    return [task.c.id == lease.task_id, task.c.epoch == lease.epoch, LEASED]


def _change(row: RowMapping) -> Update:
    return update(task).where(task.c.id == row["id"])


def _fence(connection: Connection, lease: Lease, state: TaskState) -> RowMapping | None:
    """Move a held task to its final state. None: it is there already, moved under this very lease."""
    move: ReturningUpdate[Any] = (
        update(task).where(*_held(lease)).values(state=state, lease_until=None).returning(*task.c)
    )
    row = connection.execute(move).mappings().one_or_none()
    if row is not None:
        return row
    seen = connection.execute(select(task.c.state, task.c.epoch).where(task.c.id == lease.task_id)).one_or_none()
    if seen is None or (seen.state, seen.epoch) != (state, lease.epoch):
        raise _lost(lease)
    return None


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"task {lease.task_id} is no longer held at epoch {lease.epoch}; nothing was written.")


def _bury(connection: Connection, row: RowMapping, error: str) -> None:
    connection.execute(_change(row).values(state=TaskState.DEAD, lease_until=None, error=storable(error)))
    if row["kind"] == "prepare":
        end_job(connection, row["job_id"], JobState.FAILED, error)


def _remember_idle(connection: Connection, worker: str) -> None:
    connection.execute(delete(idle_worker).where(idle_worker.c.worker == worker))
    connection.execute(insert(idle_worker).values(worker=worker, asked_at=now()))


def _hungry(connection: Connection, worker: str) -> bool:
    """Whether nothing is ready while another worker, which holds nothing, asked in vain a moment ago."""
    busy = exists().where(LEASED, task.c.worker == idle_worker.c.worker)
    waiting = exists().where(idle_worker.c.worker != worker, idle_worker.c.asked_at > now() - IDLE_SECONDS, ~busy)
    ready = exists().where(READY, task.c.kind == "shard")
    return bool(connection.execute(select(and_(waiting, ~ready))).scalar_one())


def _lease(row: RowMapping, lease_seconds: float) -> Lease:
    return Lease(
        task_id=row["id"],
        job_id=row["job_id"],
        kind=row["kind"],
        epoch=row["epoch"],
        attempt=row["attempt"],
        lease_seconds=lease_seconds,
        benchmark_id=row["benchmark_id"],
        first_batch=row["first_batch"],
        end_batch=row["end_batch"],
        isolated_from=row["isolated_from"],
        guilty=tuple(row["guilty"]),
    )
