"""Schedules: what recurs. Added, found, paused, removed; `db/firings.py` has when they fire and what comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from db import clock as clocks
from db.errors import BadInput, Conflict, Missing
from db.records import JobState
from db.schedule_tables import firing, firing_job, incident, message, schedule, webhook
from db.session import Database
from db.tables import insert_new, job

Clock = Callable[[], float]

#: the role of a firing's own job in `firing_job`; those that confirm a failure have others
RUN = "run"


class Overlap(StrEnum):
    """What becomes of a firing while an earlier one of the schedule has not ended."""

    SKIP = "skip"  #: it is left out
    QUEUE = "queue"  #: it waits; one waits at most, a further one is left out
    ALLOW = "allow"  #: its job is submitted beside the other


class FiringState(StrEnum):
    """What came of a moment at which a schedule was to fire."""

    SUBMITTED = "submitted"  #: there is a job
    QUEUED = "queued"  #: it waits for the one before
    SKIPPED = "skipped"  #: left out because one before it had not ended
    MISSED = "missed"  #: nobody looked before its window was over
    REFUSED = "refused"  #: the job could not be submitted; the reason is the sentence


class Verdict(StrEnum):
    """What a gate says of a firing, or what stands in its place."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class ScheduleRow:
    """A schedule. Times are seconds since 1970."""

    id: int
    name: str
    principal: str  #: who added it, and submits its jobs
    spec: dict[str, Any]  #: as `cluster.schedules.spec.ScheduleSpec` reads it back
    overlap: Overlap
    created_at: float
    next_at: float | None  #: None: it has come to its end
    paused: bool


@dataclass(frozen=True)
class FiringRow:
    """A moment of a schedule, and what came of it. Times are seconds since 1970."""

    id: int
    schedule_id: int
    fire_at: float
    cause: str  #: "cron" or "trigger"
    state: FiringState
    reason: str | None
    resolved: dict[str, str]  #: what `latest` was, by field of the spec
    made_at: float
    settled_at: float | None  #: None: its job, or one that confirms it, has not ended
    verdict: Verdict | None
    sentence: str | None
    judged: dict[str, Any] | None  #: the rules of the gate and what they were held against
    figures: list[dict[str, Any]]  #: one a run of the job
    provenance: dict[str, Any]  #: what the job was computed with
    changed: list[dict[str, Any]]  #: what of that differs from the firing before
    jobs: dict[str, int] = field(default_factory=dict)  #: job numbers by role; `run` is its own


@dataclass(frozen=True)
class Wish:
    """The job that a firing asks for; with a refusal there is none, and that is why."""

    name: str
    spec: dict[str, Any]
    priority: int = 0
    resolved: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None


@dataclass(frozen=True)
class Moment:
    """A moment at which a schedule was to fire."""

    at: float
    is_late: bool = False  #: the window in which it could be caught up is over


def database_clock(db: Database) -> Clock:
    """Seconds since 1970 by the database's clock."""

    def now() -> float:
        with db.read() as connection:
            return float(connection.execute(select(clocks.now())).scalar_one())

    return now


COLUMNS = [schedule.c[name] for name in ScheduleRow.__dataclass_fields__]


def add(
    db: Database,
    name: str,
    spec: dict[str, Any],
    *,
    overlap: str,
    next_at: float | None,
    principal: str,
    at: float,
    baseline_job: int | None = None,
    webhooks: Sequence[tuple[str, str]] = (),
) -> ScheduleRow:
    """Write a schedule. webhooks: (URL, secret). Raises `Conflict` where there is one of that name."""
    new: dict[str, Any] = {
        "name": name,
        "principal": principal,
        "spec": spec,
        "overlap": overlap,
        "baseline_job": baseline_job,
    }
    new |= {"created_at": at, "next_at": next_at, "paused": False}
    with db.write() as connection:
        if not insert_new(connection, schedule, new):
            raise Conflict(
                f"schedule {name!r} is there already; take another name, or `shortstop schedule remove {name}` first."
            )
        row = connection.execute(select(*COLUMNS).where(schedule.c.name == name)).one()
        for url, secret in webhooks:
            connection.execute(insert(webhook).values(schedule_id=row.id, url=url, secret=secret))
    return schedule_row(row)


def schedules(db: Database) -> list[ScheduleRow]:
    """By name."""
    with db.read() as connection:
        return [schedule_row(row) for row in connection.execute(select(*COLUMNS).order_by(schedule.c.name))]


def find(db: Database, name: str) -> ScheduleRow:
    """Raises `Missing`, with the nearest name that there is."""
    with db.read() as connection:
        row = connection.execute(select(*COLUMNS).where(schedule.c.name == name)).one_or_none()
        if row is not None:
            return schedule_row(row)
        near = get_close_matches(name, connection.execute(select(schedule.c.name)).scalars().all(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`shortstop schedule list` shows those that do."
    raise Missing(f"schedule {name!r} does not exist; {hint}")


def set_paused(db: Database, schedule_id: int, paused: bool, next_at: float | None) -> bool:
    """next_at: when it fires next. False where it was so already."""
    change = update(schedule).where(schedule.c.id == schedule_id, schedule.c.paused.is_(not paused))
    with db.write() as connection:
        return connection.execute(change.values(paused=paused, next_at=next_at)).rowcount > 0


def remove(db: Database, schedule_id: int) -> None:
    """Remove a schedule with its history, and what its webhooks were still to be told. Its jobs stay."""
    firings = select(firing.c.id).where(firing.c.schedule_id == schedule_id)
    webhooks = select(webhook.c.id).where(webhook.c.schedule_id == schedule_id)
    with db.write() as connection:
        hold(connection, schedule_id)
        connection.execute(delete(message).where(message.c.webhook_id.in_(webhooks)))
        for table in (webhook, incident):
            connection.execute(delete(table).where(table.c.schedule_id == schedule_id))
        connection.execute(delete(firing_job).where(firing_job.c.firing_id.in_(firings)))
        connection.execute(delete(firing).where(firing.c.schedule_id == schedule_id))
        connection.execute(delete(schedule).where(schedule.c.id == schedule_id))


def hold(connection: Connection, schedule_id: int) -> bool:
    """Until the end of the transaction nobody else fires or judges this schedule. False where it is gone."""
    held = select(schedule.c.id).where(schedule.c.id == schedule_id).with_for_update()
    return connection.execute(held).first() is not None


def schedule_row(row: Any) -> ScheduleRow:
    """Of the values of `COLUMNS`."""
    fields = dict(zip(ScheduleRow.__dataclass_fields__, row, strict=True))
    return ScheduleRow(**fields | {"overlap": Overlap(fields["overlap"])})


def check_baseline_job(db: Database, job_id: int) -> None:
    """Raises `BadInput` where a job cannot be a baseline: it is not there, or not done."""
    with db.read() as connection:
        state = connection.execute(select(job.c.state).where(job.c.id == job_id)).scalar_one_or_none()
    if state is None:
        raise Missing(f"baseline: job {job_id} does not exist; `shortstop list` shows those that do.")
    if state != JobState.DONE:
        raise BadInput(f"baseline: job {job_id} is {state}; name one that is done.")
