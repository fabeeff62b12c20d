"""Demand: what there is to do, over all jobs; what a fleet decides by."""

from collections.abc import Collection

from sqlalchemy import ColumnElement, ScalarSelect, func, select

from db.claims import CLAIMABLE, LEASED, READY
from db.records import JobState, OpenJob
from db.session import Database
from db.tables import job, task


def open_jobs(db: Database, job_ids: Collection[int] | None = None) -> list[OpenJob]:
    """The jobs that workers may work on, in the order of claims: by priority, then the oldest. job_ids: only these."""
    columns = [job.c[name] for name in ("id", "priority", "state", "spec", "pinned")]
    chosen = select(*columns, _counted(READY).label("ready"), _counted(LEASED).label("leased"))
    chosen = chosen.where(CLAIMABLE).order_by(job.c.priority.desc(), job.c.id)
    if job_ids is not None:
        chosen = chosen.where(job.c.id.in_(job_ids))
    with db.read() as connection:
        rows = connection.execute(chosen).mappings()
        return [OpenJob(**dict(row) | {"state": JobState(row["state"])}) for row in rows]


def _counted(state: ColumnElement[bool]) -> ScalarSelect[int]:
    """Tasks of the job in a state."""
    return select(func.count()).where(state, task.c.job_id == job.c.id).correlate(job).scalar_subquery()
