"""PostgreSQL is killed and started again in the middle of a job, and the job does not show it."""

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import faults
import psycopg
import pytest
from faults import answer, assert_as_undisturbed, extents, planned, reaching, work_off
from made import claimed
from own_server import Server
from sqlalchemy import make_url
from waiting import wait_for

from db import jobs, results
from db.errors import Unavailable
from db.session import Database, open_database
from workers.holding import patiently


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of its own: others would not like what is done to it."""
    with tempfile.TemporaryDirectory(prefix="shortstop-restarts-", ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder))
        server.start()
        yield server
        server.kill()


_names = (f"record_{i}" for i in count())


@pytest.fixture
def db(server: Server) -> Iterator[Database]:
    """A fresh record on it."""
    name = next(_names)
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = make_url(server.url).set(database=name).render_as_string()
    with closing(open_database(url)) as database:
        yield database


@contextmanager
def two_working(url: str, job_id: int, pause_seconds: float) -> Iterator[None]:
    """Processes that go on through everything; when the block is left they have ended the job."""
    arguments = (job_id, pause_seconds, 3)
    with (
        faults.process(faults.work_until_ended, url, "one", *arguments) as one,
        faults.process(faults.work_until_ended, url, "two", *arguments) as two,
    ):
        yield
        for process in (one, two):
            process.join(2 * faults.DEADLINE_SECONDS)
            assert process.exitcode == 0


@pytest.mark.parametrize("point", ["before INSERT INTO rollup", "before COMMIT", "after COMMIT"])
def test_the_server_is_killed_in_a_commit(server: Server, db: Database, point: str) -> None:
    """What it has confirmed is there when it is back, and of the rest nothing."""
    job_id = planned(db)
    lease = claimed(db)
    made = faults.results_by_batch(db, lease)
    with reaching(point, server.kill):
        said = answer(lambda: results.commit_shard(db, lease, made))
    assert isinstance(said, Unavailable) == (point != "after COMMIT")
    assert isinstance(answer(lambda: jobs.job(db, job_id)), Unavailable), "it is away"
    server.start()
    assert extents(db, job_id, "done") == ([(0, 4)] if point == "after COMMIT" else [])
    results.commit_shard(db, lease, made)
    work_off(db, job_id)
    assert_as_undisturbed(db, job_id)


def test_a_restart_between_two_calls_does_not_show(server: Server, db: Database) -> None:
    """A connection that was kept is tried before it is used: red without `pool_pre_ping` in db/session.py."""
    job_id = planned(db)
    server.kill()
    server.start()
    assert jobs.job(db, job_id).state is jobs.JobState.READY


def test_the_server_is_killed_once_in_a_job(server: Server, db: Database) -> None:
    """Two processes work on, with nobody's help."""
    job_id = planned(db, 120, shard_batches=2)
    with two_working(db.url, job_id, pause_seconds=0.1):
        wait_for("some shards are done", lambda: len(extents(db, job_id, "done")) >= 4)
        server.kill()
        server.start()
        assert not patiently(lambda: jobs.job(db, job_id)).state.ended, "it was in the middle"
    assert_as_undisturbed(db, job_id, 120)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_server_is_killed_every_few_seconds_for_a_minute(server: Server, db: Database) -> None:
    job_id = planned(db, 600, shard_batches=2)
    rng, kills, end = random.Random(9), 0, time.monotonic() + 60
    with two_working(db.url, job_id, pause_seconds=0.5):
        while time.monotonic() < end and not patiently(lambda: jobs.job(db, job_id)).state.ended:
            time.sleep(rng.uniform(1, 5))  # some kills find it recovering, some in the middle of its work
            server.kill()
            server.start()
            kills += 1
    assert kills >= 5
    assert_as_undisturbed(db, job_id, 600)
