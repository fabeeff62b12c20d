"""Events: what happened to a job stands in its record, in order, and nobody changes it afterwards."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from made import claimed, planned_job, summarise, work

from db import jobs, queue, results
from db.errors import BadInput, RecordError
from db.events import Event, What, events, record
from db.session import Database


def told(db: Database, job_id: int, after: int = 0) -> list[tuple[str, str]]:
    return [(event.who, event.what) for event in events(db, job_id, after)]


def test_a_jobs_way_is_told_from_its_submission_to_its_end(db: Database) -> None:
    job_id = planned_job(db, 8)
    other = planned_job(db, 8)
    work(db, "busy")
    results.finalise(db, job_id, summarise)
    assert told(db, job_id) == [
        ("local", "submitted"),
        ("preparer", "planned"),
        ("busy", "started"),
        ("local", "done"),
    ]
    assert told(db, other) == [("local", "submitted"), ("preparer", "planned"), ("busy", "started")]
    first, *rest = events(db, job_id)
    assert isinstance(first, Event)
    assert first.job_id == job_id
    assert first.at == pytest.approx(jobs.job(db, job_id).created_at, abs=5)
    assert events(db, job_id, first.id) == rest
    assert events(db, job_id, rest[-1].id) == []


def test_who_asked_is_told(db: Database) -> None:
    """Only what changed something is an event."""
    job_id = jobs.create_job(db, name="made", spec={}, principal="ada")
    jobs.unpause_job(db, job_id)
    jobs.pause_job(db, job_id, who="bob")
    jobs.pause_job(db, job_id, who="bob")
    jobs.resume_job(db, job_id, who="eve")
    jobs.cancel_job(db, job_id, who="bob")
    jobs.cancel_job(db, job_id, who="bob")
    assert told(db, job_id) == [("ada", "submitted"), ("bob", "paused"), ("eve", "resumed"), ("bob", "cancelled")]


def test_deaths_are_told_with_their_reasons(db: Database) -> None:
    """Twice silent makes a suspect; the last attempt kills the shard, and the shard the job."""
    job_id = planned_job(db, 4)
    for worker in ("a", "b", "c"):
        lease = claimed(db, worker)
        queue.renew(db, lease, 1)
        queue.reap(db, dead_workers=[worker])
    queue.fail(db, claimed(db, "d"), "no\x00 memory")
    results.finalise(db, job_id, summarise)
    jobs.retry_job(db, job_id)
    assert told(db, job_id)[2:] == [
        ("a", "started"),
        ("a", "reaped"),
        ("b", "reaped"),
        ("b", "suspect"),
        ("c", "reaped"),
        ("d", "shard dead"),
        ("local", "failed"),
        ("local", "retried"),
    ]
    details = {event.what: event.detail for event in events(db, job_id)}
    assert details["reaped"] == {"task": lease.task_id, "attempt": 3}
    assert details["suspect"] == {"task": lease.task_id, "isolated_from": 1}
    assert details["shard dead"] == {"task": lease.task_id, "error": "no\ufffd memory"}
    assert "1 of 1 shards died" in details["failed"]["error"]
    assert details["retried"] == {"tasks": 1}


def test_a_failure_before_there_are_shards_is_told(db: Database) -> None:
    """By whoever found it, or by the prepare task's last attempt; a refund is told too."""
    job_id = jobs.create_job(db, name="made", spec={})
    jobs.fail_job(db, job_id, "no such model", who="w")
    assert told(db, job_id)[1:] == [("w", "failed")]
    assert events(db, job_id)[-1].detail == {"error": "no such model"}

    job_id = jobs.create_job(db, name="made", spec={})
    for _ in range(queue.MAX_ATTEMPTS):
        queue.claim(db, "w", kind="prepare")
        [reaped] = queue.reap(db, dead_workers=["w"])
    queue.refund(db, reaped.task_id, reaped.epoch)
    assert told(db, job_id)[-3:] == [("w", "reaped"), ("w", "failed"), ("w", "refunded")]


def test_what_is_rolled_back_never_happened(db: Database) -> None:
    job_id = planned_job(db, 2)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "w")
        queue.reap(db, dead_workers=["w"])
    jobs.cancel_job(db, job_id)
    before = events(db, job_id)
    with pytest.raises(BadInput, match="was cancelled"):
        jobs.retry_job(db, job_id)
    assert events(db, job_id) == before


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ("UPDATE job_event SET who = 'nobody'", "an event is never changed"),
        ("DELETE FROM job_event", "an event stays as long as its job"),
    ],
)
def test_events_are_written_once(db: Database, change: str, refusal: str) -> None:
    """Append-only, whoever writes the SQL. Red without the triggers of migration 0003."""
    job_id = planned_job(db, 2)
    before = events(db, job_id)
    with pytest.raises(RecordError, match=refusal), db.write() as connection:
        connection.exec_driver_sql(change)
    assert events(db, job_id) == before


def test_events_go_after_their_job(db: Database) -> None:
    job_id = jobs.create_job(db, name="made", spec={})
    with db.write() as connection:
        connection.exec_driver_sql("DELETE FROM task")
        connection.exec_driver_sql("DELETE FROM job")
        connection.exec_driver_sql("DELETE FROM job_event")
    assert events(db, job_id) == []


def test_a_reader_that_goes_on_after_the_last_event_misses_none(postgresql_db: Database) -> None:
    """Of two at once the one that commits later gets the higher number. Red without the lock in `record`."""
    job_id = planned_job(postgresql_db, 2)

    def another() -> None:
        with postgresql_db.write() as connection:
            record(connection, job_id, "fast", What.PAUSED)

    with ThreadPoolExecutor(1) as pool:
        with postgresql_db.write() as connection:
            record(connection, job_id, "slow", What.RESUMED)
            writing = pool.submit(another)
            with pytest.raises(TimeoutError):
                writing.result(timeout=0.5)
            seen = events(postgresql_db, job_id)[-1].id
        writing.result(timeout=10)
    assert told(postgresql_db, job_id, seen) == [("slow", "resumed"), ("fast", "paused")]
