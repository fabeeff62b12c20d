"""What 1,000 schedules cost whoever looks after them: `python -m tests.bench.schedules`, a part of `make bench-stats`.

A look a second, by a clock that is wound on: an hour in which about one schedule in twenty-four fires, then the moment
at which all of them do. Wall time, so that what the database does is in it.
"""

import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from cluster.schedules.cron import next_moment
from cluster.schedules.spec import parse_schedule
from cluster.schedules.ticking import TICK_SECONDS, Ticked, tick
from db import jobs, schedules
from db.records import JobState
from db.schedule_tables import schedule
from db.session import Database, open_database
from tests.bench import postgresql
from tests.bench.measure import Row, printed, seconds, summarise, write

COUNT = 1000
HOUR = 3600
#: looks whose time is one value of the interval
_STRETCH = 300
START = datetime(2026, 1, 5, 9, 0, 30, tzinfo=UTC).timestamp()
JOB = {"model": "smollm2-135m", "benchmarks": ["humaneval-lines"], "policies": ["full"]}


@dataclass
class Clock:
    """One that is wound on."""

    at: float

    def __call__(self) -> float:
        return self.at


def add_schedules(db: Database) -> None:
    """Each at a minute of its own, once a day, in one of five zones."""
    chance = random.Random(10)
    zones = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Tokyo", "Australia/Adelaide")
    for number in range(COUNT):
        cron = f"{chance.randrange(60)} {chance.randrange(24)} * * *"
        spec = parse_schedule({"name": f"s{number}", "cron": cron, "zone": zones[number % len(zones)], "job": JOB})
        following = next_moment(spec.cron, spec.zone, START)
        schedules.add(db, spec.name, spec.dump(), overlap="skip", next_at=following, principal="bench", at=START)


def an_hour(db: Database, where: str) -> Iterator[Row]:
    """The share of a core that looking every second takes; judging by a gate comes on top, once a job."""
    clock, done, shares = Clock(START), Ticked(), []

    def stretch() -> None:
        for _ in range(int(_STRETCH / TICK_SECONDS)):
            clock.at += TICK_SECONDS
            seen = tick(db, clock)
            done.fired += seen.fired
            done.judged += seen.judged

    for _ in range(HOUR // _STRETCH):
        shares.append(100 * seconds(stretch) / _STRETCH)
        end_jobs(db)
    assert COUNT / 48 < done.fired < COUNT / 12, done
    assert done.judged >= done.fired - 20, done
    yield summarise(f"{COUNT:,} schedules, {where}: of a core", shares, "%", at_most=1.0)


def end_jobs(db: Database) -> None:
    """Somebody works on them; what that takes is not looking."""
    for row in jobs.list_jobs(db):
        if not row.state.ended:
            jobs.cancel_job(db, row.id)


def all_at_once(db: Database, where: str) -> Iterator[Row]:
    """Until every one of them has fired."""
    clock = Clock(START + 2 * HOUR)
    with db.write() as connection:
        connection.execute(schedule.update().values(next_at=clock.at))
    before = len(jobs.list_jobs(db))
    took = seconds(lambda: tick(db, clock))
    made = jobs.list_jobs(db)[: -before or None]
    assert len(made) == COUNT
    assert all(row.state is JobState.PREPARING for row in made)
    yield Row(f"{COUNT:,} schedules, {where}: all fire at once", took, took, took, "s")


def measured(open_one: Callable[[], Database], where: str) -> Iterator[Row]:
    """Both figures on one database."""
    with closing(open_one()) as db:
        add_schedules(db)
        yield from an_hour(db, where)
        yield from all_at_once(db, where)


def rows() -> Iterator[Row]:
    """On SQLite, then on PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="shortstop-bench-") as kept:
        yield from measured(lambda: open_database(f"sqlite:///{Path(kept) / 'record.db'}"), "SQLite")
    with postgresql.server() as server, postgresql.database(server) as url:
        yield from measured(lambda: open_database(url), "PostgreSQL")


def main() -> None:
    """Print the table and write it to build/bench/schedules.json."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print(f"load before: {os.getloadavg()[0]:.2f}")
    write("schedules", printed(rows()))


if __name__ == "__main__":
    main()
