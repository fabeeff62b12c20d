"""Each firing exactly once, however many processes look; and what came of it.

A moment of a schedule becomes a row of `firing` in the transaction that moves `schedule.next_at` on, and that writes
the job. Of several processes one moves it; the others find it moved. `UNIQUE (schedule_id, fire_at)` is the second
guard. Times come from the caller's clock (`db.schedules.database_clock`, or a test's own).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, exists, func, insert, or_, select, update

from db.errors import Conflict, Missing
from db.incidents import note_verdict
from db.jobs import insert_job
from db.records import JobState
from db.schedule_tables import firing, firing_job, schedule
from db.schedules import (
    COLUMNS,
    RUN,
    FiringRow,
    FiringState,
    Moment,
    Overlap,
    ScheduleRow,
    Verdict,
    Wish,
    hold,
    schedule_row,
)
from db.session import Database
from db.tables import insert_new, job

_FIRING = [firing.c[name] for name in FiringRow.__dataclass_fields__ if name != "jobs"]


# --- what there is to do -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToDo:
    """Whether there is anything to do now: one question, asked every second."""

    due: bool
    queued: bool
    ended: bool  #: firings whose jobs have all ended, and that are to be judged


def to_do(db: Database, at: float) -> ToDo:
    """What a look at this moment would find."""
    due = exists().where(~schedule.c.paused, schedule.c.next_at <= at)
    queued = exists().where(firing.c.settled_at.is_(None), firing.c.state == FiringState.QUEUED)
    ended = exists().where(*_ENDED)
    with db.read() as connection:
        return ToDo(*map(bool, connection.execute(select(due, queued, ended)).one()))


def _runs_on(one: FromClause) -> ColumnElement[bool]:
    """Whether a job of the firing, or one that confirms it, has not ended; one that was pruned has."""
    open_states = [state for state in JobState if not state.ended]
    its = (firing_job.c.firing_id == one.c.id, job.c.id == firing_job.c.job_id)
    return exists().where(*its, job.c.state.in_(open_states))


#: firings to be judged
_ENDED: tuple[ColumnElement[bool], ...] = (
    firing.c.settled_at.is_(None),
    firing.c.state == FiringState.SUBMITTED,
    ~_runs_on(firing),
)


def due(db: Database, at: float, limit: int = 100) -> list[ScheduleRow]:
    """The schedules that are to fire, those first that have waited longest."""
    chosen = select(*COLUMNS).where(~schedule.c.paused, schedule.c.next_at <= at).order_by(schedule.c.next_at)
    with db.read() as connection:
        return [schedule_row(row) for row in connection.execute(chosen.limit(limit))]


def queued(db: Database) -> list[tuple[ScheduleRow, FiringRow]]:
    """Firings that wait and have nothing to wait for any more."""
    other = firing.alias()
    before = exists().where(
        other.c.schedule_id == firing.c.schedule_id,
        other.c.state == FiringState.SUBMITTED,
        other.c.settled_at.is_(None),
        _runs_on(other),
    )
    waits = (firing.c.settled_at.is_(None), firing.c.state == FiringState.QUEUED, ~schedule.c.paused, ~before)
    return _with_schedules(db, *waits)


def ended(db: Database, limit: int = 50) -> list[tuple[ScheduleRow, FiringRow]]:
    """Firings whose jobs have all ended, and that nobody has judged; oldest first."""
    return _with_schedules(db, *_ENDED, limit=limit)


def _with_schedules(
    db: Database, *which: ColumnElement[bool], limit: int | None = None
) -> list[tuple[ScheduleRow, FiringRow]]:
    chosen = select(*COLUMNS, *_FIRING).join(firing, firing.c.schedule_id == schedule.c.id).where(*which)
    with db.read() as connection:
        rows = connection.execute(chosen.order_by(firing.c.id).limit(limit)).all()
        found = _with_jobs(connection, [row[len(COLUMNS) :] for row in rows])
    return [(schedule_row(row[: len(COLUMNS)]), one) for row, one in zip(rows, found, strict=True)]


# --- firing --------------------------------------------------------------------------------------------------


def fire(
    db: Database, row: ScheduleRow, moments: Sequence[Moment], following: float | None, wish: Wish, at: float
) -> list[FiringState]:
    """Write what comes of these moments, the first of which is the schedule's `next_at`; it fires next at `following`.

    Returns the state of each, those left out that have a firing already (the second guard; one by hand may stand at
    that very moment); nothing where another process has done it, or the schedule was paused or removed.
    """
    moved = update(schedule).where(schedule.c.id == row.id, ~schedule.c.paused, schedule.c.next_at == moments[0].at)
    with db.write() as connection:
        if connection.execute(moved.values(next_at=following)).rowcount == 0:
            return []
        written = [_fire(connection, row, moment, "cron", wish, at) for moment in moments]
        return [state for state in written if state is not None]


def trigger(db: Database, row: ScheduleRow, wish: Wish, at: float) -> FiringRow:
    """Fire now, paused or not. Raises `Conflict` where one before it has not ended and the schedule skips."""
    with db.write() as connection:
        if not hold(connection, row.id):
            raise Missing(f"schedule {row.name!r} is gone; `shortstop schedule list` shows those that are there.")
        state, reason = _by_overlap(connection, row)
        if state is FiringState.SKIPPED:
            raise Conflict(f"schedule {row.name!r}: {reason}; wait for its end, or `shortstop cancel` that job.")
        newest = select(func.max(firing.c.fire_at)).where(firing.c.schedule_id == row.id)
        last = connection.execute(newest).scalar_one_or_none()
        moment = Moment(at if last is None or last < at else last + 0.001)  # twice at one moment is two firings
        _fire(connection, row, moment, "trigger", wish, at)
        chosen = select(*_FIRING).where(firing.c.schedule_id == row.id, firing.c.fire_at == moment.at)
        return _with_jobs(connection, [connection.execute(chosen).one()])[0]


def _fire(
    connection: Connection, row: ScheduleRow, moment: Moment, cause: str, wish: Wish, at: float
) -> FiringState | None:
    """None where the moment has its firing."""
    state, reason = _by_overlap(connection, row)
    if moment.is_late:
        state, reason = FiringState.MISSED, "nobody looked before its window was over"
    if state is FiringState.SUBMITTED and wish.refusal is not None:
        state, reason = FiringState.REFUSED, wish.refusal
    new = {"schedule_id": row.id, "fire_at": moment.at, "cause": cause, "state": state, "reason": reason}
    new |= {"resolved": {}, "made_at": at, "figures": [], "provenance": {}, "changed": []}
    if state in (FiringState.SKIPPED, FiringState.MISSED, FiringState.REFUSED):
        new["settled_at"] = at
    if not insert_new(connection, firing, new):
        return None
    its = select(firing.c.id).where(firing.c.schedule_id == row.id, firing.c.fire_at == moment.at)
    id = connection.execute(its).scalar_one()
    if state is FiringState.SUBMITTED:
        _submit(connection, row, id, wish)
    if state is FiringState.REFUSED:
        _refuse(connection, row, id, wish, at)
    return state


def _by_overlap(connection: Connection, row: ScheduleRow) -> tuple[FiringState, str | None]:
    if row.overlap is Overlap.ALLOW:
        return FiringState.SUBMITTED, None
    still = select(firing.c.id, firing.c.state).where(
        firing.c.schedule_id == row.id,
        firing.c.settled_at.is_(None),
        or_(firing.c.state == FiringState.QUEUED, _runs_on(firing)),
    )
    before = connection.execute(still.order_by(firing.c.id.desc())).all()
    if not before:
        return FiringState.SUBMITTED, None
    if row.overlap is Overlap.SKIP:
        its = select(func.max(firing_job.c.job_id)).where(firing_job.c.firing_id == before[0].id)
        return FiringState.SKIPPED, f"job {connection.execute(its).scalar_one()} of it has not ended"
    if any(one.state == FiringState.QUEUED for one in before):
        return FiringState.SKIPPED, "another firing waits already"
    return FiringState.QUEUED, None


def _submit(connection: Connection, row: ScheduleRow, firing_id: int, wish: Wish, role: str = RUN) -> int:
    job_id = insert_job(
        connection, name=wish.name, spec=wish.spec, priority=wish.priority, principal=row.principal, schedule=row.name
    )
    connection.execute(insert(firing_job).values(firing_id=firing_id, role=role, job_id=job_id))
    if role == RUN:
        connection.execute(update(firing).where(firing.c.id == firing_id).values(resolved=wish.resolved))
    return job_id


def _refuse(connection: Connection, row: ScheduleRow, firing_id: int, wish: Wish, at: float) -> None:
    sentence = f"the job could not be submitted: {wish.refusal}"
    connection.execute(
        update(firing).where(firing.c.id == firing_id).values(verdict=Verdict.FAIL, sentence=sentence, settled_at=at)
    )
    note_verdict(connection, row.id, firing_id, at)


def submit_queued(db: Database, row: ScheduleRow, one: FiringRow, wish: Wish, at: float) -> bool:
    """Submit what has waited. False where another process has done it, or it has something to wait for again."""
    with db.write() as connection:
        hold(connection, row.id)
        waits = select(firing.c.id).where(firing.c.id == one.id, firing.c.state == FiringState.QUEUED)
        before = select(firing.c.id).where(
            firing.c.schedule_id == row.id, firing.c.settled_at.is_(None), _runs_on(firing)
        )
        if connection.execute(waits).first() is None or connection.execute(before).first() is not None:
            return False
        state = FiringState.SUBMITTED if wish.refusal is None else FiringState.REFUSED
        change = update(firing).where(firing.c.id == one.id).values(state=state, reason=wish.refusal)
        connection.execute(change)
        if wish.refusal is None:
            _submit(connection, row, one.id, wish)
        else:
            _refuse(connection, row, one.id, wish, at)
        return True


# --- verdicts ------------------------------------------------------------------------------------------------


def confirm(db: Database, row: ScheduleRow, one: FiringRow, wishes: dict[str, Wish], judged: dict[str, Any]) -> bool:
    """Submit the jobs that are to confirm a failure, by role. False where another process has gone on with it."""
    with db.write() as connection:
        if not _is_unjudged(connection, row, one):
            return False
        connection.execute(update(firing).where(firing.c.id == one.id).values(judged=judged))
        for role, wish in wishes.items():
            _submit(connection, row, one.id, wish, role)
        return True


def settle(
    db: Database,
    row: ScheduleRow,
    one: FiringRow,
    verdict: Verdict | None,
    sentence: str | None,
    *,
    at: float,
    judged: dict[str, Any] | None = None,
    figures: Sequence[dict[str, Any]] = (),
    provenance: dict[str, Any] | None = None,
    changed: Sequence[dict[str, Any]] = (),
) -> bool:
    """Write what a firing came to, and what its webhooks are told of it. False where another process has done it."""
    values = {"verdict": verdict, "sentence": sentence, "settled_at": at, "judged": judged, "figures": list(figures)}
    values |= {"provenance": provenance or {}, "changed": list(changed)}
    with db.write() as connection:
        if not _is_unjudged(connection, row, one):
            return False
        connection.execute(update(firing).where(firing.c.id == one.id).values(values))
        note_verdict(connection, row.id, one.id, at)
        return True


def _is_unjudged(connection: Connection, row: ScheduleRow, one: FiringRow) -> bool:
    """Whether the firing is as it was read: not settled, and no further job confirms it."""
    if not hold(connection, row.id):
        return False
    open_one = select(firing.c.id).where(firing.c.id == one.id, firing.c.settled_at.is_(None))
    its_jobs = select(func.count()).where(firing_job.c.firing_id == one.id)
    return connection.execute(open_one).first() is not None and connection.execute(its_jobs).scalar_one() == len(
        one.jobs
    )


# --- history -------------------------------------------------------------------------------------------------


def firings(
    db: Database,
    schedule_id: int,
    *,
    before: float | None = None,
    limit: int = 50,
    judged: bool = False,
    verdicts: Collection[Verdict] | None = None,
) -> list[FiringRow]:
    """Newest first. before: only those that were to fire earlier; judged: only those that left figures; verdicts: only
    those that came to one of these.
    """
    chosen = select(*_FIRING).where(firing.c.schedule_id == schedule_id)
    if before is not None:
        chosen = chosen.where(firing.c.fire_at < before)
    if judged:
        chosen = chosen.where(firing.c.settled_at.is_not(None), firing.c.state == FiringState.SUBMITTED)
    if verdicts is not None:
        chosen = chosen.where(firing.c.verdict.in_(verdicts))
    with db.read() as connection:
        rows = connection.execute(chosen.order_by(firing.c.fire_at.desc()).limit(limit)).all()
        return _with_jobs(connection, rows)


def last_firings(db: Database) -> dict[int, FiringRow]:
    """By schedule, the newest firing that has a job or was refused."""
    newest = (
        select(firing.c.schedule_id, func.max(firing.c.fire_at).label("fire_at"))
        .where(firing.c.state.in_([FiringState.SUBMITTED, FiringState.REFUSED]))
        .group_by(firing.c.schedule_id)
        .subquery()
    )
    is_newest = (firing.c.schedule_id == newest.c.schedule_id) & (firing.c.fire_at == newest.c.fire_at)
    chosen = select(*_FIRING).join(newest, is_newest)
    with db.read() as connection:
        return {one.schedule_id: one for one in _with_jobs(connection, connection.execute(chosen).all())}


def _with_jobs(connection: Connection, rows: Sequence[Any]) -> list[FiringRow]:
    ids = [row[0] for row in rows]
    named: dict[int, dict[str, int]] = {id: {} for id in ids}
    chosen = select(firing_job).where(firing_job.c.firing_id.in_(ids)).order_by(firing_job.c.job_id)
    for firing_id, role, job_id in connection.execute(chosen) if ids else ():
        named[firing_id][role] = job_id
    names = [name for name in FiringRow.__dataclass_fields__ if name != "jobs"]
    made = []
    for row in rows:
        fields = dict(zip(names, row, strict=True)) | {"jobs": named[row[0]]}
        fields |= {"state": FiringState(fields["state"])}
        fields |= {"verdict": None if fields["verdict"] is None else Verdict(fields["verdict"])}
        made.append(FiringRow(**fields))
    return made
