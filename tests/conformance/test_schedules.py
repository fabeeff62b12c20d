"""Schedules in the record: each firing once, by the rules of its schedule, whoever looks and whoever dies."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from multiprocessing.context import ForkProcess
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import func, select

from cluster.schedules.ticking import fire, tick
from db import firings, incidents, jobs, schedules
from db.errors import BadInput, Conflict, Missing
from db.pruning import prune
from db.schedule_tables import firing, firing_job, schedule
from db.schedules import FiringState, Overlap, ScheduleRow, Verdict, Wish
from db.session import Database, open_database
from db.tables import job as job_table

HOUR, DAY = 3600.0, 86_400.0
#: a Monday, 00:00 UTC
START = datetime(2026, 1, 5, tzinfo=UTC).timestamp()
JOB = {"model": "smollm2-135m", "benchmarks": ["humaneval-lines"], "policies": ["full"]}


def spec_of(name: str, cron: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "cron": cron, "zone": "UTC", "catch_up": "12h", "job": JOB} | changes


def added(db: Database, name: str = "nightly", cron: str = "0 2 * * *", **changes: Any) -> ScheduleRow:
    """A schedule that exists from START on, without the checks that need a model."""
    from cluster.schedules.cron import next_moment
    from cluster.schedules.spec import parse_schedule

    webhooks = changes.pop("secrets", ())
    spec = parse_schedule(spec_of(name, cron, **changes))
    following = next_moment(spec.cron, spec.zone, START, spec.end)
    return schedules.add(
        db,
        name,
        spec.dump(),
        overlap=spec.overlap,
        next_at=following,
        principal="alice",
        at=START,
        baseline_job=spec.baseline.job,
        webhooks=webhooks,
    )


def look(db: Database, at: float) -> list[tuple[float, str]]:
    """One look at this moment; the firings that there are then, oldest first: (hours since START, state)."""
    tick(db, lambda: at)
    [row] = schedules.schedules(db)
    found = firings.firings(db, row.id, limit=1000)
    return [((one.fire_at - START) / HOUR, one.state.value) for one in reversed(found)]


def end_job(db: Database, fire_hour: float, error: str | None = None) -> None:
    [row] = schedules.schedules(db)
    [one] = [one for one in firings.firings(db, row.id, limit=1000) if one.fire_at == START + fire_hour * HOUR]
    if error is None:
        assert jobs.cancel_job(db, one.jobs["run"])
    else:
        assert jobs.fail_job(db, one.jobs["run"], error)


# --- once -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A schedule of the simulated year, and which moments it should have, worked out without cron."""

    name: str
    cron: str
    zone: str
    catch_up: str
    window: float
    times: tuple[tuple[int, int], ...]  #: (hour, minute) of a day

    def moments(self, end: float) -> list[float]:
        zone, found = ZoneInfo(self.zone), []
        day = datetime.fromtimestamp(START, zone).date() - timedelta(days=1)
        while day <= datetime.fromtimestamp(end, zone).date():
            found += [self._moment(day, hour, minute, zone) for hour, minute in self.times]
            day += timedelta(days=1)
        return sorted(moment for moment in found if START < moment <= end)

    def _moment(self, day: date, hour: int, minute: int, zone: ZoneInfo) -> float:
        """A time that the clocks leave out is made up for when they have."""
        local = datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone)
        back = datetime.fromtimestamp(local.timestamp(), zone)
        if (back.hour, back.minute) != (hour, minute):
            return datetime(day.year, day.month, day.day, hour + 1, 0, tzinfo=zone).timestamp()
        return local.timestamp()


KINDS = (
    Kind("berlin", "30 2 * * *", "Europe/Berlin", "12h", 12 * HOUR, ((2, 30),)),
    Kind("new-york", "30 1,2 * * *", "America/New_York", "1h", HOUR, ((1, 30), (2, 30))),
    Kind("strict", "0 */6 * * *", "UTC", "0s", 2.0, ((0, 0), (6, 0), (12, 0), (18, 0))),
)


def _look_for_ever(url: str, clock: Any, looked: Any) -> None:
    """A process that looks at the schedules all the time, by the common clock."""
    with closing(open_database(url)) as db:
        while True:
            at = clock.value
            try:
                tick(db, lambda: clock.value)
            except BadInput:
                raise
            except Exception as error:  # a lock of the one that was killed
                print(error)
                continue
            looked.value = at
            time.sleep(0.0005)


@contextmanager
def looking(url: str, clock: Any) -> Iterator[tuple[ForkProcess, Any]]:
    fork = multiprocessing.get_context("fork")
    looked = fork.Value("d", 0.0)
    process = fork.Process(target=_look_for_ever, args=(url, clock, looked), daemon=True)
    process.start()
    try:
        yield process, looked
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("days", [92, pytest.param(365, marks=pytest.mark.slow)])
def test_a_year_with_two_processes_one_of_which_is_killed_again_and_again(url: str, days: int) -> None:
    """Every moment has one firing; which were missed follows from when somebody was there to look."""
    chance = random.Random(10)
    fork = multiprocessing.get_context("fork")
    clock = fork.Value("d", START)
    with closing(open_database(url)) as db:
        for kind in KINDS:
            added(db, kind.name, kind.cron, zone=kind.zone, catch_up=kind.catch_up, overlap="allow")
    end, at, steps, kills = START + days * DAY, START, [START], 0
    with looking(url, clock) as (_, looked):
        while at < end:
            with looking(url, clock) as (victim, _):
                for _ in range(chance.randint(10, 40)):
                    # mostly minutes to hours, now and then a day
                    nobody_is_there = chance.random() < 0.05
                    at += chance.uniform(10 * HOUR, 40 * HOUR) if nobody_is_there else chance.uniform(1, 9 * HOUR)
                    at = min(at, end)
                    steps.append(at)
                    clock.value = at
                    if chance.random() < 0.02:
                        break
                    _wait_for(looked, at)
                assert victim.pid is not None
                time.sleep(chance.uniform(0, 0.01))
                os.kill(victim.pid, signal.SIGKILL)
                kills += 1
            _wait_for(looked, at)
    assert kills > days / 20
    with closing(open_database(url)) as db:
        _check_year(db, steps, end)


def _wait_for(looked: Any, at: float) -> None:
    deadline = time.monotonic() + 30
    while looked.value < at:
        assert time.monotonic() < deadline, "nobody looks"
        time.sleep(0.0005)


def _check_year(db: Database, steps: list[float], end: float) -> None:
    submitted = 0
    for kind in KINDS:
        row = schedules.find(db, kind.name)
        found = {one.fire_at: one for one in firings.firings(db, row.id, limit=100_000)}
        expected = kind.moments(end)
        assert sorted(found) == expected
        for moment in expected:
            seen = next(step for step in steps if step >= moment)
            state = FiringState.MISSED if seen - moment > kind.window else FiringState.SUBMITTED
            assert found[moment].state is state, (kind.name, moment, seen)
        states = [found[moment].state for moment in expected]
        assert FiringState.MISSED in states
        assert FiringState.SUBMITTED in states
        submitted += states.count(FiringState.SUBMITTED)
    with db.read() as connection:
        assert connection.execute(select(func.count()).select_from(job_table)).scalar_one() == submitted
        assert connection.execute(select(func.count()).select_from(firing_job)).scalar_one() == submitted


def test_who_comes_second_finds_it_done(db: Database) -> None:
    """Both read the schedule as due; the second writes nothing."""
    added(db)
    [row] = firings.due(db, START + 3 * HOUR)
    assert fire(db, row, START + 3 * HOUR) == [FiringState.SUBMITTED]
    assert fire(db, row, START + 3 * HOUR) == []
    assert look(db, START + 3 * HOUR) == [(2, "submitted")]


def test_the_record_itself_refuses_a_second_firing(db: Database) -> None:
    """The second guard, should the first ever fail, and where one by hand stands at the very moment."""
    row = added(db)
    moment = schedules.Moment(START + 2 * HOUR)
    assert firings.fire(db, row, [moment], None, Wish("x", {}), START) == [FiringState.SUBMITTED]
    with db.write() as connection:
        connection.execute(schedule.update().values(next_at=START + 2 * HOUR))
    assert firings.fire(db, row, [moment], None, Wish("x", {}), START) == []
    with db.read() as connection:
        assert connection.execute(select(func.count()).select_from(firing)).scalar_one() == 1
        assert connection.execute(select(func.count()).select_from(job_table)).scalar_one() == 1


# --- by its rules ---------------------------------------------------------------------------------------------


def test_what_nobody_was_there_for_is_made_up_for_within_its_window(db: Database) -> None:
    added(db, cron="0 2 * * *", catch_up="30h", overlap="allow")
    assert look(db, START + 80 * HOUR) == [(2, "missed"), (26, "missed"), (50, "submitted"), (74, "submitted")]


def test_a_long_absence_is_written_in_pieces(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.schedules.ticking.MOST_MOMENTS", 7)
    added(db, cron="0 * * * *", catch_up="1m")
    found = look(db, START + 100 * HOUR)
    assert [hour for hour, _ in found] == list(range(1, 101))
    assert {state for _, state in found[:-1]} == {"missed"}
    assert found[-1][1] == "submitted"


def test_one_that_skips_leaves_out_while_another_runs(db: Database) -> None:
    added(db, cron="0 * * * *")
    assert look(db, START + HOUR) == [(1, "submitted")]
    assert look(db, START + 2 * HOUR)[-1] == (2, "skipped")
    end_job(db, 1)
    assert look(db, START + 3 * HOUR)[-1] == (3, "submitted")
    [row] = schedules.schedules(db)
    [_, skipped, _] = firings.firings(db, row.id)
    assert skipped.reason is not None
    assert "has not ended" in skipped.reason


def test_one_that_queues_keeps_one_waiting(db: Database) -> None:
    added(db, cron="0 * * * *", overlap="queue")
    look(db, START + HOUR)
    assert look(db, START + 3 * HOUR) == [(1, "submitted"), (2, "queued"), (3, "skipped")]
    end_job(db, 1)
    assert look(db, START + 3.5 * HOUR) == [(1, "submitted"), (2, "submitted"), (3, "skipped")]
    assert look(db, START + 4 * HOUR)[-1] == (4, "queued")


def test_one_that_is_paused_does_not_fire_and_makes_up_for_nothing(db: Database) -> None:
    row = added(db, cron="0 * * * *")
    assert schedules.set_paused(db, row.id, True, row.next_at)
    assert not schedules.set_paused(db, row.id, True, row.next_at)
    assert look(db, START + 5 * HOUR) == []
    assert schedules.set_paused(db, row.id, False, START + 6 * HOUR)
    assert look(db, START + 6 * HOUR) == [(6, "submitted")]


def test_a_firing_that_waits_goes_on_waiting_while_paused(db: Database) -> None:
    row = added(db, cron="0 * * * *", overlap="queue")
    look(db, START + HOUR)
    look(db, START + 2 * HOUR)
    schedules.set_paused(db, row.id, True, None)
    end_job(db, 1)
    assert look(db, START + 3 * HOUR) == [(1, "submitted"), (2, "queued")]
    schedules.set_paused(db, row.id, False, START + 9 * HOUR)
    assert look(db, START + 3 * HOUR) == [(1, "submitted"), (2, "submitted")]


def test_the_last_day_counts_to_its_end(db: Database) -> None:
    added(db, cron="30 23 * * *", zone="Europe/Berlin", ends="2026-01-06")
    found = look(db, START + 10 * DAY)
    assert [hour for hour, _ in found] == [22.5, 46.5]
    [row] = schedules.schedules(db)
    assert row.next_at is None
    assert firings.due(db, START + 1000 * DAY) == []


def test_triggered_by_hand(db: Database) -> None:
    """Also while paused; twice at one moment is two; one that skips refuses while another runs."""
    row = added(db, overlap="allow")
    schedules.set_paused(db, row.id, True, None)
    one, other = (firings.trigger(db, row, Wish("x", {}), START + 5.0) for _ in range(2))
    assert (one.cause, one.state, one.fire_at) == ("trigger", FiringState.SUBMITTED, START + 5.0)
    assert other.fire_at > one.fire_at
    assert other.jobs["run"] != one.jobs["run"]
    skips = added(db, "skips")
    firings.trigger(db, skips, Wish("x", {}), START)
    with pytest.raises(Conflict, match=r"schedule 'skips': job \d+ of it has not ended; wait for its end, or"):
        firings.trigger(db, skips, Wish("x", {}), START + 1)
    assert len(firings.firings(db, skips.id)) == 1


def test_a_job_that_cannot_be_submitted_is_a_failure_with_its_sentence(db: Database, tmp_path: Any) -> None:
    added(db, job=JOB | {"exits": f"{tmp_path}/latest"})
    assert look(db, START + 2 * HOUR) == [(2, "refused")]
    [row] = schedules.schedules(db)
    [one] = firings.firings(db, row.id)
    assert one.verdict is Verdict.FAIL
    assert one.sentence is not None
    assert one.sentence.startswith("the job could not be submitted: exits ")
    assert incidents.open_incidents(db)[row.id].firings == 1


def test_names(db: Database) -> None:
    added(db)
    with pytest.raises(Conflict, match="schedule 'nightly' is there already; take another name"):
        added(db)
    with pytest.raises(Missing, match=r"schedule 'nightl' does not exist; did you mean 'nightly'\?"):
        schedules.find(db, "nightl")
    assert schedules.find(db, "nightly").overlap is Overlap.SKIP


def test_a_schedule_goes_with_all_that_is_its_own_and_its_jobs_stay(db: Database) -> None:
    row = added(db, cron="0 * * * *", secrets=[("https://example.org/", incidents.new_secret())])
    look(db, START + HOUR)
    end_job(db, 1, "no disk")
    look(db, START + 1.5 * HOUR)
    assert incidents.messages(db, row.id)
    schedules.remove(db, row.id)
    assert schedules.schedules(db) == []
    assert len(jobs.list_jobs(db)) == 1
    assert added(db).name == "nightly"


# --- incidents ------------------------------------------------------------------------------------------------


def test_one_message_an_incident(db: Database) -> None:
    """Opened by the first failure, silent at the second, closed by the next pass; what is inconclusive says nothing."""
    row = added(db, cron="0 * * * *", secrets=[("https://example.org/", incidents.new_secret())])
    told = []
    ends: list[str | None] = [None, "no disk", "no disk", None, "no disk"]
    for hour, error in enumerate(ends, start=1):
        look(db, START + hour * HOUR)
        end_job(db, hour, error)
        look(db, START + (hour + 0.5) * HOUR)
        told.append(len(incidents.messages(db, row.id)))
    assert told == [0, 1, 1, 1, 1]
    assert incidents.open_incidents(db)[row.id].firings == 3
    [one] = firings.firings(db, row.id, limit=1)
    again = firings.trigger(db, row, Wish("x", {}), START + 6 * HOUR)
    assert firings.settle(db, row, again, Verdict.PASS, "All rules hold.", at=START + 7 * HOUR)
    assert not firings.settle(db, row, again, Verdict.FAIL, "twice", at=START + 8 * HOUR)
    assert incidents.open_incidents(db) == {}
    closed, opened = incidents.messages(db, row.id)
    assert '"incident.opened"' in opened.body
    assert '"incident.closed"' in closed.body
    assert f'"jobs": {{"run": {again.jobs["run"]}}}' in closed.body
    assert one.verdict is Verdict.FAIL


def test_a_failure_is_asked_again_once(db: Database) -> None:
    """Of two processes that judged it, the second submits nothing and writes no verdict."""
    row = added(db, overlap="allow")
    one = firings.trigger(db, row, Wish("x", {}), START)
    jobs.cancel_job(db, one.jobs["run"])
    wishes = {"fresh samples": Wish("x", {})}
    assert firings.confirm(db, row, one, wishes, {"parts": []})
    assert not firings.confirm(db, row, one, {"rerun": Wish("x", {})}, {"parts": []})
    assert not firings.settle(db, row, one, Verdict.FAIL, "x", at=START + HOUR)
    [still] = firings.firings(db, row.id)
    assert list(still.jobs) == ["run", "fresh samples"]
    assert (still.verdict, still.judged) == (None, {"parts": []})
    assert len(jobs.list_jobs(db)) == 2


def test_one_that_was_paused_or_removed_meanwhile_does_not_fire(db: Database) -> None:
    """Between the look that found it due and the writing of it."""
    added(db)
    [row] = firings.due(db, START + 3 * HOUR)
    schedules.set_paused(db, row.id, True, row.next_at)
    assert fire(db, row, START + 3 * HOUR) == []
    schedules.set_paused(db, row.id, False, START + 26 * HOUR)  # from now on: the pause is not made up for
    assert fire(db, row, START + 3 * HOUR) == []
    schedules.remove(db, row.id)
    assert fire(db, row, START + 3 * HOUR) == []
    with pytest.raises(Missing, match="schedule 'nightly' is gone"):
        firings.trigger(db, row, Wish("x", {}), START + 3 * HOUR)
    assert jobs.list_jobs(db) == []


def test_a_pinned_baseline_is_not_pruned(db: Database) -> None:
    kept, gone = (jobs.create_job(db, name="x", spec={}) for _ in range(2))
    for job_id in (kept, gone):
        jobs.cancel_job(db, job_id)
    row = added(db, baseline={"job": kept})
    assert prune(db, 0).jobs == [gone]
    schedules.remove(db, row.id)
    assert prune(db, 0).jobs == [kept]


def test_the_job_of_the_last_firing_that_passed_is_not_pruned(db: Database) -> None:
    """Or the next firing of a schedule that rarely fires, or long fails, would have nothing to be held against."""
    row = added(db, overlap="allow")
    verdicts = (Verdict.PASS, Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE)
    fired = [firings.trigger(db, row, Wish("x", {}), START + hour * HOUR) for hour in range(len(verdicts))]
    for one, verdict in zip(fired, verdicts, strict=True):
        jobs.cancel_job(db, one.jobs["run"])
        assert firings.settle(db, row, one, verdict, "x", at=START + DAY)
    before, passed, *after = (one.jobs["run"] for one in fired)
    assert prune(db, 0).jobs == [before, *after]
    again = firings.trigger(db, row, Wish("x", {}), START + 2 * DAY)
    jobs.cancel_job(db, again.jobs["run"])
    assert firings.settle(db, row, again, Verdict.PASS, "x", at=START + 2 * DAY)
    assert prune(db, 0).jobs == [passed]
    schedules.remove(db, row.id)
    assert prune(db, 0).jobs == [again.jobs["run"]]


def test_what_cannot_be_a_baseline(db: Database) -> None:
    job_id = jobs.create_job(db, name="x", spec={})
    with pytest.raises(BadInput, match=f"baseline: job {job_id} is preparing; name one that is done"):
        schedules.check_baseline_job(db, job_id)
    with pytest.raises(Missing, match="baseline: job 99 does not exist"):
        schedules.check_baseline_job(db, 99)
