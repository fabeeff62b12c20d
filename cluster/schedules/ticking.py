"""Looking what is due: any number of processes may look, at any time; the database sees that each thing is done once.

`shortstop serve` and `shortstop fleet` look every second beside their work, `shortstop schedule run` does nothing else,
and `shortstop schedule tick` looks once, for a machine that has a cron of its own.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import structlog

from cluster import jobs
from cluster.schedules.cron import moments
from cluster.schedules.judging import judge_ended
from cluster.schedules.latest import resolved
from cluster.schedules.spec import ScheduleSpec, parse_schedule
from cluster.schedules.webhooks import Receivers, send_due
from cluster.settings import Settings
from db import firings
from db.errors import RecordError
from db.schedules import Clock, FiringState, Moment, ScheduleRow, Wish, database_clock
from db.session import Database, open_database
from engine.errors import BadInput
from workers.holding import patiently

log = structlog.get_logger()

TICK_SECONDS = 1.0
#: moments of one schedule that are written in one transaction
MOST_MOMENTS = 500
#: of one tick; the next goes on
_MOST_ROUNDS = 1000


@dataclass
class Ticked:
    """What one look did."""

    fired: int = 0  #: jobs submitted
    left_out: int = 0  #: firings that were missed, skipped or refused, or wait
    judged: int = 0  #: firings that ended, or that are being confirmed
    delivered: int = 0  #: messages


def tick(db: Database, clock: Clock) -> Ticked:
    """Fire what is due and judge what ended. Raises `RecordError` where the database is away; then look again."""
    done, found = Ticked(), firings.to_do(db, clock())
    if found.due:
        _fire_due(db, clock(), done)
    if found.ended:
        done.judged += judge_ended(db, clock)
    if found.queued:
        _submit_queued(db, clock, done)
    return done


def _fire_due(db: Database, at: float, done: Ticked) -> None:
    for _ in range(_MOST_ROUNDS):
        rows = firings.due(db, at)
        if not rows:
            return
        for row in rows:
            for state in fire(db, row, at):
                is_fired = state is FiringState.SUBMITTED
                done.fired += is_fired
                done.left_out += not is_fired


def fire(db: Database, row: ScheduleRow, at: float) -> list[FiringState]:
    """Write the moments of a schedule that have come; what was too late by its rule as missed."""
    assert row.next_at is not None
    spec = _spec(row)
    due, following = [row.next_at], None
    for moment in moments(row.spec["cron"], row.spec["zone"], row.next_at):
        if moment > at or len(due) == MOST_MOMENTS:
            following = moment
            break
        due.append(moment)
    if spec is not None and spec.end is not None:
        due = [moment for moment in due if moment <= spec.end] or due[:1]
        following = None if following is None or following > spec.end else following
    # a look comes up to a tick after the moment, and that is not late
    window = float("inf") if spec is None else max(spec.catch_up_s, 2 * TICK_SECONDS)
    found = [Moment(moment, is_late=at - moment > window) for moment in due]
    states = firings.fire(db, row, found, following, wish_of(row), at)
    for one, state in zip(found, states, strict=False):
        log.info("schedule fired", schedule=row.name, fire_at=one.at, state=state.value)
    return states


def _spec(row: ScheduleRow) -> ScheduleSpec | None:
    """None where this version reads it no more: then every firing is refused, with the reason."""
    try:
        return parse_schedule(row.spec)
    except BadInput:
        return None


def wish_of(row: ScheduleRow) -> Wish:
    """The job that a schedule asks for now, with what `latest` is; or why there can be none."""
    try:
        spec = parse_schedule(row.spec)
        job, found = resolved(spec.job)
        jobs.check_names(job)
    except ValueError as error:  # BadInput of engine and record
        return Wish(row.name, {}, refusal=str(error))
    name = job.name if "name" in job.model_fields_set and job.name != "unnamed" else row.name
    job = job.model_copy(update={"name": name})
    return Wish(name, job.dump(), job.priority, found)


def _submit_queued(db: Database, clock: Clock, done: Ticked) -> None:
    for row, one in firings.queued(db):
        if firings.submit_queued(db, row, one, wish_of(row), clock()):
            log.info("schedule fired", schedule=row.name, fire_at=one.fire_at, state="submitted", waited=True)
            done.fired += 1


def look(db: Database, settings: Settings) -> Ticked:
    """All that is due, once: fire, judge, tell."""
    clock, receivers = database_clock(db), Receivers(settings.webhook_allow)
    done = tick(db, clock)
    done.delivered = send_due(db, clock, receivers)
    return done


class Ticker:
    """Looks every second until the event is set. `run` belongs to one thread."""

    def __init__(self, look: Callable[[], object], stopping: threading.Event) -> None:
        self._look, self._stopping = look, stopping
        self._was_away = False

    def run(self) -> None:
        """Look again and again; a database that is away is waited for."""
        while not self._stopping.is_set():
            try:
                self._look()
                self._was_away = False
            except RecordError as error:
                if not self._was_away:
                    log.warning("schedules cannot be looked at", reason=str(error))
                self._was_away = True
            except Exception:
                log.error("looking at the schedules failed", exc_info=True)
            self._stopping.wait(TICK_SECONDS)


@contextmanager
def ticking(settings: Settings) -> Iterator[None]:
    """Look for as long as the context lasts: for firings in one thread, for messages in another that may wait long."""
    receivers, stopping = Receivers(settings.webhook_allow), threading.Event()
    with closing(patiently(lambda: open_database(settings.database_url))) as db:
        clock = database_clock(db)
        looks = (partial(tick, db, clock), partial(send_due, db, clock, receivers, lambda: not stopping.is_set()))
        threads = [threading.Thread(target=Ticker(look, stopping).run, name="schedules") for look in looks]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
