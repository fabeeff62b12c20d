"""A commit that is cut off, wherever it is: the shard is done once, by whoever repeats it or comes next."""

import itertools
import os
import random
import socket
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import faults
import pytest
from faults import assert_as_undisturbed, commit, contents, planned, reaching, work_off
from made import claimed, summarise
from sqlalchemy import text
from waiting import wait_for
from wire import Fault, Wire

from db import jobs, queue, results
from db.errors import LeaseLost, RecordError, Unavailable
from db.session import Database, open_database
from db.tables import task
from workers import holding

POINTS = (
    "before UPDATE task",  # the fence
    "after UPDATE task",
    "before INSERT INTO rollup",  # the outcomes and scores are written
    "before COMMIT",
    "after COMMIT",
)
WHOLE_OR_SPLIT = pytest.mark.parametrize("split_at", [None, 2], ids=["whole", "split"])


@pytest.mark.parametrize(
    ("point", "split_at"), [*((point, None) for point in POINTS), ("before COMMIT", 2), ("after COMMIT", 2)]
)
def test_a_process_dies_at_any_point_of_its_commit(db: Database, url: str, point: str, split_at: int | None) -> None:
    """All of it or nothing: the shard is done, or somebody else's."""
    job_id = planned(db)
    assert faults.exit_code(faults.commit_and_die, url, point, split_at) == 9
    if point == "after COMMIT":
        assert faults.extents(db, job_id, "done") == [(0, split_at or 4)]
        assert queue.reap(db, dead_workers=["victim"]) == []
    else:
        assert list(results.completions(db, job_id=job_id)) == []
        # PostgreSQL needs a moment to see that the client is gone, and holds the shard until then
        [reaped] = wait_for("the shard is taken back", lambda: queue.reap(db, dead_workers=["victim"]))
        assert not reaped.dead
    work_off(db, job_id)
    assert_as_undisturbed(db, job_id)


@WHOLE_OR_SPLIT
def test_a_commit_that_is_said_to_have_failed_may_be_repeated(db: Database, split_at: int | None) -> None:
    """It went through, and all that the worker sees is an error: the repeat sees that it is done. Red without `seen`
    in `_fence`, db/queue.py.
    """
    job_id = planned(db)
    lease = claimed(db)

    def get_lost() -> None:
        raise Unavailable("the answer got lost")

    made = faults.results_by_batch(db, lease, end_batch=split_at)
    with reaching("after COMMIT", get_lost), pytest.raises(Unavailable):
        results.commit_shard(db, lease, made, split_at=split_at)
    before = contents(db)
    commit(db, lease, split_at=split_at, seed=1)
    assert contents(db) == before
    work_off(db, job_id)
    assert_as_undisturbed(db, job_id)


@pytest.fixture
def wire(postgresql_url: str) -> Iterator[Wire]:
    with Wire(postgresql_url) as wire:
        yield wire


@pytest.fixture
def far(wire: Wire) -> Iterator[Database]:
    """The record at the other end of the wire."""
    with closing(open_database(wire.url)) as database:
        yield database


@WHOLE_OR_SPLIT
@pytest.mark.parametrize("answered", [True, False], ids=["answer lost", "question lost"])
def test_the_connection_is_cut_at_the_commit(
    wire: Wire, far: Database, postgresql_db: Database, answered: bool, split_at: int | None
) -> None:
    """Nobody at this end knows whether it was committed; repeating it is right either way."""
    job_id = planned(far)
    lease = claimed(far)
    made = faults.results_by_batch(far, lease, end_batch=split_at)
    wire.breaks(Fault(b"COMMIT", answered))
    with pytest.raises(Unavailable, match=r"is busy or out of reach .*; try again") as caught:
        results.commit_shard(far, lease, made, split_at=split_at)
    assert caught.value.retryable
    assert wire.cuts == 1
    assert faults.extents(postgresql_db, job_id, "done") == ([(0, split_at or 4)] if answered else [])
    before = contents(postgresql_db)

    results.commit_shard(far, lease, made, split_at=split_at)
    assert (contents(postgresql_db) == before) == answered
    work_off(far, job_id)
    assert_as_undisturbed(far, job_id)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(b"COPY outcome", after_bytes=3000),
        Fault(b"COPY outcome", answered=False),
        Fault(b"COPY score_row", after_bytes=200),
    ],
    ids=["among the outcomes", "at their first", "among the scores"],
)
def test_the_connection_is_cut_in_the_middle_of_a_copy(
    wire: Wire, far: Database, postgresql_db: Database, fault: Fault
) -> None:
    """Rows that had arrived are not kept, the connection is not used again, and the repeat writes all."""
    job_id = planned(far)
    lease = claimed(far)
    made = faults.results_by_batch(far, lease)
    before = contents(postgresql_db)
    wire.breaks(fault)
    with pytest.raises(Unavailable, match="try again") as caught:
        results.commit_shard(far, lease, made)
    assert caught.value.retryable
    assert wire.cuts == 1
    assert contents(postgresql_db) == before
    results.commit_shard(far, lease, made)
    work_off(far, job_id)
    assert_as_undisturbed(far, job_id)


def test_a_claim_whose_answer_is_lost_costs_a_lease_and_no_shard(wire: Wire, far: Database) -> None:
    """The shard is held by a worker that does not know it, until the lease ends."""
    job_id = planned(far)
    wire.breaks(Fault(b"COMMIT", answered=True))
    with pytest.raises(Unavailable):
        queue.claim(far, "worker", kind="shard", lease_seconds=0.5)
    other = claimed(far)
    assert other.first_batch == 4, "the first shard is leased"
    commit(far, other)
    [reaped] = wait_for("the lease ends", lambda: queue.reap(far))
    assert queue.refund(far, reaped.task_id, reaped.epoch)
    work_off(far, job_id)
    assert_as_undisturbed(far, job_id)


def test_a_worker_takes_up_the_claim_whose_answer_was_lost(wire: Wire, far: Database) -> None:
    """Protects healthy shards: a broken line is no death of a process, and two of them make no suspect."""
    job_id = planned(far)
    wire.breaks(Fault(b"COMMIT", answered=True))
    lease = holding.claim_patiently(far, "worker", kind="shard", lease_seconds=30, job_id=job_id)
    assert wire.cuts == 1
    assert lease is not None
    assert (lease.attempt, lease.epoch) == (1, 1)
    held = "SELECT count(*) FROM task WHERE state = 'leased' AND kind = 'shard'"
    with far.read() as connection:
        assert connection.exec_driver_sql(held).scalar_one() == 1
    other = holding.claim_patiently(far, "another", kind="shard", lease_seconds=30, job_id=job_id)
    assert other is None or other.task_id != lease.task_id


def test_the_end_of_a_job_whose_answer_is_lost(wire: Wire, far: Database) -> None:
    """The job has ended, its summaries are there, and finalising again changes nothing."""
    job_id = planned(far)
    while lease := queue.claim(far, "worker", kind="shard"):
        commit(far, lease)
    with (
        reaching("before UPDATE run", lambda: wire.breaks(Fault(b"COMMIT", answered=True))),
        pytest.raises(Unavailable),
    ):
        results.finalise(far, job_id, summarise)
    assert not results.finalise(far, job_id, summarise)
    assert_as_undisturbed(far, job_id)


def test_a_submit_whose_answer_is_lost(wire: Wire, far: Database) -> None:
    """With a key it may be repeated like everything else."""
    submit = partial(jobs.create_job, far, name="made", spec={}, idempotency_key="build 7", body_hash="hash")
    wire.breaks(Fault(b"COMMIT", answered=True))
    with pytest.raises(Unavailable):
        submit()
    assert [submit(), submit()] == [one.id for one in jobs.list_jobs(far)] * 2


def test_a_job_over_a_wire_that_keeps_breaking(
    wire: Wire, far: Database, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transactions are lost at their beginning, in the middle and at their COMMIT, before and after it was done."""
    monkeypatch.setattr(holding, "_PAUSE_SECONDS", 0.01)
    job_id = planned(far, shard_batches=1)
    rng = random.Random(4)

    def faults_to_come() -> Iterator[Fault]:
        for words in itertools.cycle([b"COMMIT", b"COPY outcome", b"BEGIN"]):
            answered = words == b"COMMIT" and rng.random() < 0.5
            yield Fault(words, answered, spared=rng.randrange(1, 4))

    wire.keeps_breaking(faults_to_come())
    faults.work_until_ended(wire.url, "worker", job_id, lease_seconds=0.5)
    assert wire.cuts > 10
    with closing(open_database(postgresql_url)) as near:
        assert_as_undisturbed(near, job_id)


def test_what_no_repeat_mends_is_not_called_away(postgresql_db: Database) -> None:
    """Guards `_away`, db/session.py: a value that the driver refuses has no code either, and stays wrong."""
    with pytest.raises(RecordError, match=r"refused: .*NUL") as caught, postgresql_db.read() as connection:
        connection.execute(text("SELECT :value"), {"value": "a\x00b"})
    assert not caught.value.retryable


def test_a_server_that_is_gone_without_a_word_is_noticed(far: Database) -> None:
    """A machine without power says no goodbye: the system asks after a silence, and gives up within a minute or so."""
    with far.read() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        with socket.socket(fileno=os.dup(driver.fileno())) as ours:
            idle, interval, count = (
                ours.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 60
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 60_000


def test_a_reaper_and_a_commit_at_the_same_moment(db: Database) -> None:
    """Whoever comes first wins: the results are there, or the shard is ready; never both."""
    job_id = planned(db, shard_batches=1)
    for _ in range(8):
        lease = claimed(db, "late", lease_seconds=-1)
        made = faults.results_by_batch(db, lease)
        committed, reaped = faults.at_once(
            lambda lease=lease, made=made: results.commit_shard(db, lease, made), lambda: queue.reap(db)
        )
        assert isinstance(committed, LeaseLost) == (len(reaped) == 1)
        assert len(faults.extents(db, job_id, "leased")) == 0
        for one in reaped:
            queue.refund(db, one.task_id, one.epoch)
    work_off(db, job_id)
    assert_as_undisturbed(db, job_id)


def test_without_the_fence_a_late_worker_would_write(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the fence away, and sees that these tests notice; then only what is there already stands guard."""
    job_id = planned(db)
    late = claimed(db, "late")
    queue.reap(db, dead_workers=["late"])
    successor = claimed(db, "successor")
    monkeypatch.setattr(queue, "_held", lambda lease: [task.c.id == lease.task_id])
    commit(db, late, seed=1)
    with pytest.raises(RecordError, match=r"refused: |needs an outcome"):
        commit(db, successor)
    work_off(db, job_id)
    assert faults.account(db, job_id).completions.keys() == faults.undisturbed().completions.keys()
    assert faults.account(db, job_id) != faults.undisturbed()
