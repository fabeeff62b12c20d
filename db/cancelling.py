"""Cancelling: a job ends before its time; one that was done and got another policy is done again without it."""

from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from db import events, pruning, schema
from db.clock import now
from db.events import LOCAL, What
from db.partial import PRUNED
from db.queue import cancel_open_tasks, close_tasks, end_job
from db.records import JobState
from db.session import Database
from db.tables import job, job_event, run, task

#: what makes a job that was done go on
_ADDED = (What.POLICY_ADDED, What.COMPLETIONS_IMPORTED)


def cancel_job(db: Database, job_id: int, *, who: str = LOCAL) -> bool:
    """End the job as cancelled; whoever works on it learns so at the next renewal. False when it had ended before.

    A job to which a policy was added is done again, as it was before: what the policy has brought by now is removed.
    """
    with db.write() as connection:
        schema.hold(connection)
        cancel_open_tasks(connection, job_id)  # before the job: so do all who hold both
        added = _added(connection, job_id)
        if added is None:
            return end_job(connection, job_id, JobState.CANCELLED, None, who)
        condemned = _part(connection, added)
        _finish_again(connection, added, who)
    pruning.remove_condemned(db, condemned)
    return True


def _added(connection: Connection, job_id: int) -> Row[Any] | None:
    """The job, held, with the event of what it goes on with; None where it never was done."""
    held = select(job).where(job.c.id == job_id, job.c.state == JobState.RUNNING).with_for_update(key_share=True)
    if connection.execute(held).one_or_none() is None:
        return None
    last = (
        select(job_event.c.id)
        .where(job_event.c.job_id == job_id, job_event.c.what.in_([What.DONE, *_ADDED]))
        .order_by(job_event.c.id.desc())
        .limit(1)
    )
    found = select(job, job_event.c.detail).join(job_event, job_event.c.job_id == job.c.id)
    chosen = found.where(job_event.c.id == last.scalar_subquery(), job_event.c.what.in_(_ADDED))
    return connection.execute(chosen).one_or_none()


def _part(connection: Connection, added: Row[Any]) -> int:
    """Move the policy's runs and shards to a job of their own, which only a prune knows. Returns its id."""
    close_tasks(connection, added.id)
    row = {name: getattr(added, name) for name in ("name", "spec", "priority", "created_at", "principal")}
    row |= {"state": JobState.CANCELLED, "error": PRUNED, "finished_at": now()}
    condemned: int = connection.execute(insert(job).values(row).returning(job.c.id)).scalar_one()
    its_runs = (run.c.job_id == added.id, run.c.policy == added.detail["label"])
    connection.execute(update(run).where(*its_runs).values(job_id=condemned))
    its_shards = (task.c.job_id == added.id, task.c.id >= added.detail["first_task"])
    connection.execute(update(task).where(*its_shards).values(job_id=condemned))
    return condemned


def _finish_again(connection: Connection, added: Row[Any], who: str) -> None:
    rest = select(run.c.id).where(run.c.job_id == added.id).order_by(run.c.position)
    for position, run_id in enumerate(connection.execute(rest).scalars().all()):
        connection.execute(update(run).where(run.c.id == run_id).values(position=position))
    policy = added.detail.get("policy")  # completions that were imported are no policy of the spec
    spec = added.spec if policy is None else added.spec | {"policies": added.spec["policies"][:-1]}
    before = {"state": JobState.DONE, "error": None, "finished_at": added.detail["finished_at"], "paused": False}
    connection.execute(update(job).where(job.c.id == added.id).values(before | {"spec": spec}))
    events.record(connection, added.id, who, What.POLICY_TAKEN_BACK, policy=policy or added.detail["label"])
