"""Workers that freeze, come twice, meet, or tell the wrong time; and an upgrade that is killed."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import Any

import faults
import psutil
import pytest
from alembic import command
from faults import (
    answer,
    assert_as_undisturbed,
    at_once,
    commit,
    contents,
    extents,
    planned,
    reaching,
    work_off,
)
from made import claimed, summarise
from sqlalchemy import func, make_url, select, update
from waiting import wait_for

from db import jobs, queue, results, schema, session
from db.clock import now
from db.errors import BadInput, LeaseLost, Unavailable
from db.queue import Lease
from db.records import ShardResults
from db.session import Database, open_database, upgrade
from db.tables import task

# --- frozen ----------------------------------------------------------------------------------------------------


def freeze_before_the_commit(url: str, pipe: Pipe) -> None:
    """Runs in a process of its own: claims, is frozen while it waits for a word, then tries all that a holder may."""
    db = open_database(url)
    lease = claimed(db, "frozen", lease_seconds=0.5)
    whole, half = faults.results_by_batch(db, lease, seed=1), faults.results_by_batch(db, lease, end_batch=2, seed=1)
    pipe.send("claimed")
    pipe.recv()
    doors = (
        lambda: queue.renew(db, lease, 1),
        lambda: results.commit_shard(db, lease, whole),
        lambda: results.commit_shard(db, lease, half, split_at=2),
        lambda: queue.give_back(db, lease),
        lambda: queue.fail(db, lease, "woke up late"),
    )
    pipe.send([answer(door) for door in doors])


@pytest.mark.parametrize("done", [False, True], ids=["while the next one works", "when the next one is done"])
def test_a_worker_frozen_past_its_lease_writes_nothing(db: Database, url: str, done: bool) -> None:
    """SIGSTOP, and SIGCONT when the shard is somebody else's: every door is closed, and nothing has changed."""
    job_id = planned(db)
    here, there = faults.context.Pipe()
    with faults.process(freeze_before_the_commit, url, there) as frozen:
        assert received(here) == "claimed"
        freeze(frozen.pid)
        [reaped] = wait_for("the lease ends", lambda: queue.reap(db))
        assert reaped.worker == "frozen"
        successor = claimed(db, "successor")
        assert successor.task_id == reaped.task_id
        if done:
            commit(db, successor)
        before = contents(db)
        here.send("go on")
        os.kill(frozen.pid, signal.SIGCONT)
        renewed, whole, split, given_back, failed = received(here)
        assert [type(one) for one in (renewed, whole, split)] == [LeaseLost] * 3
        assert (given_back, failed) == (False, False)
        assert contents(db) == before
    if not done:
        commit(db, successor)
    work_off(db, job_id)
    assert_as_undisturbed(db, job_id)


def freeze_in_the_commit(url: str, pipe: Pipe) -> None:
    """Runs in a process of its own: stops itself with the transaction open, and repeats what it then hears."""
    session.FROZEN_SECONDS = 1
    db = open_database(url)
    lease = claimed(db, "frozen", lease_seconds=0.5)
    made = faults.results_by_batch(db, lease)
    with reaching("after UPDATE task", lambda: os.kill(os.getpid(), signal.SIGSTOP)):
        first = answer(lambda: results.commit_shard(db, lease, made))
    pipe.send((first, answer(lambda: results.commit_shard(db, lease, made))))


def test_a_worker_frozen_in_its_commit_is_let_go_by_postgresql(postgresql_db: Database, postgresql_url: str) -> None:
    """The server ends its transaction: nobody else could have the shard, for as long as it sleeps."""
    db, job_id = postgresql_db, planned(postgresql_db)
    here, there = faults.context.Pipe()
    with faults.process(freeze_in_the_commit, postgresql_url, there) as frozen:
        wait_until_stopped(frozen.pid)
        wait_for("the shard is let go", lambda: queue.reap(db))
        work_off(db, job_id)
        before = contents(db)
        os.kill(frozen.pid, signal.SIGCONT)
        first, second = received(here)
        assert (type(first), type(second)) == (Unavailable, LeaseLost)
        assert contents(db) == before
    assert_as_undisturbed(db, job_id)


def test_a_worker_frozen_in_its_commit_keeps_sqlite_waiting(
    sqlite_db: Database, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the one write lock: others are told to try again, and read meanwhile; awake, it is the holder."""
    job_id = planned(sqlite_db)
    monkeypatch.setattr(session, "BUSY_SECONDS", 0.1)
    here, there = faults.context.Pipe()
    with (
        closing(open_database(sqlite_url)) as hurried,
        faults.process(freeze_in_the_commit, sqlite_url, there) as frozen,
    ):
        wait_until_stopped(frozen.pid)
        with pytest.raises(Unavailable, match="database is locked"):
            queue.reap(hurried)
        assert jobs.progress(hurried, job_id).shards == {"leased": 1, "ready": 2}
        os.kill(frozen.pid, signal.SIGCONT)
        assert received(here) == (None, None)
    assert extents(sqlite_db, job_id, "done") == [(0, 4)]
    work_off(sqlite_db, job_id)
    assert_as_undisturbed(sqlite_db, job_id)


def freeze(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    wait_until_stopped(pid)


def wait_until_stopped(pid: int | None) -> None:
    process = psutil.Process(pid)
    wait_for("the process is stopped", lambda: process.status() == psutil.STATUS_STOPPED)


def received(pipe: Pipe) -> Any:
    assert pipe.poll(faults.DEADLINE_SECONDS), "the process says nothing"
    return pipe.recv()


# --- doubled ---------------------------------------------------------------------------------------------------


def test_two_workers_with_one_shard(db: Database) -> None:
    """Taken back while the first one still works: of two that commit at once the holder wins, always."""
    job_id = planned(db, shard_batches=1)
    for _ in range(6):
        first = claimed(db, "first")
        queue.reap(db, dead_workers=["first"])
        second = claimed(db, "second")
        assert second.task_id == first.task_id
        made = [faults.results_by_batch(db, lease, seed=seed) for lease, seed in ((first, 1), (second, 0))]
        of_first, of_second = at_once(
            partial(results.commit_shard, db, first, made[0]), partial(results.commit_shard, db, second, made[1])
        )
        assert (type(of_first), of_second) == (LeaseLost, None)
    work_off(db, job_id)
    assert_as_undisturbed(db, job_id)


def test_a_split_and_a_completion_at_the_same_moment(db: Database) -> None:
    """Two that hold the same lease: one wins, the other has lost it, and the extents are the winner's."""
    for _ in range(4):
        job_id = planned(db, shard_batches=12)
        lease = claimed(db, job_id=job_id)
        whole, half = faults.results_by_batch(db, lease), faults.results_by_batch(db, lease, end_batch=7)
        split, completed = at_once(
            partial(results.commit_shard, db, lease, half, split_at=7), partial(results.commit_shard, db, lease, whole)
        )
        if split is None:
            assert isinstance(completed, LeaseLost)
            assert [extents(db, job_id, state) for state in ("done", "ready")] == [[(0, 7)], [(7, 12)]]
        else:
            assert (type(split), completed) == (LeaseLost, None)
            assert [extents(db, job_id, state) for state in ("done", "ready")] == [[(0, 12)], []]
        work_off(db, job_id)
        assert_as_undisturbed(db, job_id)


def test_the_last_two_shards_committed_at_once_still_end_the_job(db: Database) -> None:
    """Each looks for open shards after its own commit: one of the two at least sees none, and one call ends the job."""
    for _ in range(4):
        job_id = planned(db, shard_batches=6)
        leases = [claimed(db, f"worker {i}", job_id=job_id) for i in range(2)]
        made = [faults.results_by_batch(db, lease) for lease in leases]
        ended = at_once(*(partial(commit_and_finalise, db, *one) for one in zip(leases, made, strict=True)))
        assert sorted(ended) == [False, True]
        assert_as_undisturbed(db, job_id)


def commit_and_finalise(db: Database, lease: Lease, made: ShardResults) -> bool:
    results.commit_shard(db, lease, made)
    return results.finalise(db, lease.job_id, summarise)


def test_the_last_two_shards_in_open_transactions_still_end_the_job(postgresql_db: Database) -> None:
    """Neither sees the other's shard done while it commits (on SQLite one waits for the other): red where a commit
    looks for open shards inside its own transaction.
    """
    db = postgresql_db
    job_id = planned(db, shard_batches=4)
    commit(db, claimed(db, "first"))  # the names of the metrics are there: whoever brings new ones is waited for
    leases = [claimed(db, f"worker {i}") for i in range(2)]
    made = [faults.results_by_batch(db, lease) for lease in leases]
    both, open_inside = threading.Barrier(2), []

    def look_and_meet() -> None:
        open_inside.append(extents(db, job_id, "leased"))
        both.wait(timeout=faults.DEADLINE_SECONDS)

    with reaching("after INSERT INTO rollup", look_and_meet):
        ended = at_once(*(partial(commit_and_finalise, db, *one) for one in zip(leases, made, strict=True)))
    assert open_inside == [[(4, 8), (8, 12)]] * 2
    assert sorted(ended) == [False, True]
    assert_as_undisturbed(db, job_id)


def test_twenty_processes_on_one_record(db: Database, url: str) -> None:
    """They claim, commit and finalise together; on SQLite there is one writer at a time and nobody is turned away."""
    job_id = planned(db, 80, shard_batches=1)
    start = faults.context.Barrier(20)
    workers = [
        faults.context.Process(target=faults.work_until_ended, args=(url, f"worker {i}", job_id, 0, 30, start))
        for i in range(20)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(faults.DEADLINE_SECONDS)
    assert [worker.exitcode for worker in workers] == [0] * 20
    assert_as_undisturbed(db, job_id, 80)
    with db.read() as connection:
        shards = task.c.kind == "shard"
        assert connection.execute(select(func.max(task.c.attempt)).where(shards)).scalar_one() == 1
        assert connection.execute(select(func.count(task.c.worker.distinct())).where(shards)).scalar_one() > 1


def submit(db: Database, body: str, principal: str = "ci") -> int:
    return jobs.create_job(
        db,
        name="made",
        spec={"body": body},
        principal=principal,
        idempotency_key="build 7",
        body_hash=f"hash of {body}",
    )


def test_the_same_submit_eight_times_at_once_is_one_job(db: Database) -> None:
    """One key, one body: one job with one task to prepare it, and everybody learns its id."""
    ids = at_once(*[partial(submit, db, "a")] * 8)
    assert len(set(ids)) == 1
    assert [one.id for one in jobs.list_jobs(db)] == ids[:1]
    assert len(contents(db)["task"]) == 1
    before = contents(db)
    assert submit(db, "a") == ids[0]
    assert contents(db) == before
    assert submit(db, "a", principal="somebody else") != ids[0]


def test_two_bodies_under_one_key_at_the_same_moment(db: Database) -> None:
    """The first one gets the key; the others are told, and write nothing."""
    bodies = ["a", "b"] * 4
    answers = at_once(*(partial(submit, db, body) for body in bodies))
    [job] = jobs.list_jobs(db)
    for body, said in zip(bodies, answers, strict=True):
        if body == job.spec["body"]:
            assert said == job.id
        else:
            assert isinstance(said, BadInput)
            assert "build 7" in str(said)
    assert len(contents(db)["task"]) == 1


# --- the wrong time --------------------------------------------------------------------------------------------


@contextmanager
def clock_off_by(hours: int) -> Iterator[None]:
    """This process tells the wrong time."""
    right, right_ns = time.time, time.time_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: right() + hours * 3600)
        patch.setattr(time, "time_ns", lambda: right_ns() + hours * 3600 * 10**9)
        yield


@pytest.mark.parametrize("hours", [-26, 26], ids=["late", "early"])
def test_a_worker_whose_clock_is_a_day_off(db: Database, hours: int) -> None:
    """Leases, pauses and times are the database's, whoever writes and whoever looks."""
    job_id = planned(db)
    with clock_off_by(hours):
        skewed = claimed(db, "skewed")
        assert 0 < seconds_left(db, skewed, "lease_until") <= 30
        queue.renew(db, skewed, 1)
    assert 0 < seconds_left(db, skewed, "lease_until") <= 30
    right = claimed(db, "right")
    assert queue.reap(db) == []
    claimed(db, "silent", lease_seconds=-1)
    with clock_off_by(hours):
        assert [one.worker for one in queue.reap(db)] == ["silent"]
        commit(db, skewed)
        failed = claimed(db, "skewed")
        queue.fail(db, failed, "it broke")
        assert 0 < seconds_left(db, failed, "run_after") <= queue.MOST_BACK_OFF_SECONDS
    commit(db, right)
    with db.write() as connection:  # the pause ends
        connection.execute(update(task).where(task.c.id == failed.task_id).values(run_after=0))
    with clock_off_by(hours):
        work_off(db, job_id)
    ended = jobs.job(db, job_id)
    assert ended.created_at <= ended.started_at <= ended.finished_at <= ended.created_at + 600
    assert_as_undisturbed(db, job_id)


def seconds_left(db: Database, lease: Lease, column: str) -> float:
    with db.read() as connection:
        left = select(task.c[column] - now()).where(task.c.id == lease.task_id)
        return float(connection.execute(left).scalar_one())


# --- an upgrade that is killed ---------------------------------------------------------------------------------

SCHEMA = {
    "sqlite": "SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2",
    "postgresql": """
SELECT 'column', table_name, column_name, data_type, is_nullable, column_default
  FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL SELECT 'view', viewname, definition, '', '', '' FROM pg_views WHERE schemaname = 'public'
UNION ALL SELECT 'index', tablename, indexdef, '', '', '' FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT 'routine', routine_name, '', '', '', ''
  FROM information_schema.routines WHERE routine_schema = 'public'
UNION ALL SELECT 'trigger', trigger_name, event_object_table, '', '', '' FROM information_schema.triggers
ORDER BY 1, 2, 3""",
}
OLD_JOB = """
INSERT INTO job (name, spec, state, priority, created_at) VALUES ('old', '{}', 'cancelled', 0, 1.5)
"""


@pytest.fixture
def old(empty_url: str) -> Iterator[Database]:
    """A record of version 0001, as it is, with a job in it."""
    with closing(Database(make_url(empty_url))) as db:
        with db.write() as connection:
            config = schema._config()
            config.attributes["connection"] = connection
            command.upgrade(config, "0001")
            connection.exec_driver_sql(OLD_JOB)
        yield db


def upgrade_and_die(url: str, point: str) -> None:
    """Runs in a process of its own."""
    with reaching(point, faults.die):
        upgrade(url)


@pytest.mark.parametrize(
    "point",
    [
        "after CREATE TABLE kernel_plan",
        "after UPDATE alembic_version",
        "before CREATE TABLE job_event",
        "before DROP TABLE score",
        "before COMMIT",
    ],
)
def test_an_upgrade_that_is_killed_leaves_the_old_version_whole(old: Database, point: str) -> None:
    """Nothing of any migration is kept, those that were through included, and the upgrade can be run again."""
    before = schema_and_jobs(old)
    assert faults.exit_code(upgrade_and_die, old.url, point) == 9
    assert schema_and_jobs(old) == before
    assert upgrade(old.url) == ("0001", schema.head())
    with closing(open_database(old.url)) as db:
        assert [one.name for one in jobs.list_jobs(db)] == ["old"]
        job_id = planned(db)
        work_off(db, job_id)
        assert_as_undisturbed(db, job_id)


def schema_and_jobs(db: Database) -> list[list[tuple[Any, ...]]]:
    asked = (SCHEMA[db.dialect], "SELECT * FROM job", "SELECT * FROM alembic_version")
    with db.read() as connection:
        return [[tuple(row) for row in connection.exec_driver_sql(sql)] for sql in asked]
