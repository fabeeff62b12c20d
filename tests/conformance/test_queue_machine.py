"""The queue against a model of plain Python: whatever happens in whatever order, both say the same.

The model knows no transactions, no locks and no clock; it is what the queue promises. Beside it hold, of the record
alone: epochs only rise, no shard is held by two, live and done shards cover each batch of their job once, and once more
for a policy that was added; a stale lease writes nothing, and a job that has ended has no open task.
"""

import time
from dataclasses import dataclass

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from made import planned_job, planned_policy, summarise
from sqlalchemy import select

from db import jobs, planning, queue, results
from db.errors import BadInput, LeaseLost
from db.queue import Lease, Reaped
from db.session import Database
from db.tables import task

N_BATCHES = 12
MOST_JOBS = 3
OPEN = ("ready", "leased")

leases, reaped, job_ids = Bundle("leases"), Bundle("reaped"), Bundle("job_ids")
workers = st.sampled_from(["a", "b", "c"])
#: whether a lease is taken as it was drawn: most are lost by then; else one that is held, where there is one
as_drawn = st.sampled_from([False, False, False, True])


@dataclass
class Job:
    """What the model knows of a job."""

    id: int
    priority: int
    state: str = "ready"
    paused: bool = False
    policies: int = 0  #: that were added
    first_added: int | None = None  #: the first shard of the policy that it goes on with, having been done before

    @property
    def open(self) -> bool:
        return self.state in ("ready", "running")


@dataclass
class Shard:
    """What the model knows of a shard."""

    id: int
    job_id: int
    first: int
    end: int
    cost: int = 0
    state: str = "ready"
    epoch: int = 0
    attempt: int = 0
    worker: str | None = None
    done: int = 0
    deaths: int = 0
    isolated_from: int | None = None
    waits: bool = False  #: after a failed attempt

    def again(self, *, waits: bool = False) -> None:
        self.state, self.waits = "ready", waits


class QueueMachine(RuleBasedStateMachine):
    """Every way in which a shard changes hands."""

    def __init__(self, db: Database) -> None:
        super().__init__()
        self.db = db
        self.jobs: dict[int, Job] = {}
        self.shards: dict[int, Shard] = {}
        self.claims: list[tuple[int, int]] = []
        self.newest: dict[int, Lease] = {}
        self.epochs: dict[int, int] = {}

    def teardown(self) -> None:
        for job_id in self.jobs:
            jobs.cancel_job(self.db, job_id)

    # --- what happens

    @precondition(lambda self: len(self.jobs) * 4 <= len(self.claims) and len(self.jobs) < MOST_JOBS)
    @rule(target=job_ids, priority=st.sampled_from([0, 0, 1]), before=st.sampled_from([(0, 0), (1, 1), (3, 1), (3, 2)]))
    def submit(self, priority: int, before: tuple[int, int]) -> int:
        """before: attempts and deaths that its shards have behind them, so that few steps lead to the last ones."""
        attempt, deaths = before
        job_id = planned_job(self.db, N_BATCHES, batch_size=1, shard_batches=3, priority=priority)
        self.jobs[job_id] = Job(job_id, priority)
        with self.db.write() as connection:
            its_shards = task.update().where(task.c.job_id == job_id, task.c.kind == "shard")
            connection.execute(its_shards.values(attempt=attempt, deaths=deaths, cost=task.c.first_batch % 2 * 7))
        for row in self.rows():
            if row.job_id == job_id:
                extent = (row.first_batch, row.end_batch, row.first_batch % 2 * 7)
                shard = Shard(row.id, job_id, *extent, attempt=attempt, deaths=deaths)
                self.shards[row.id] = shard
        return job_id

    @precondition(lambda self: self.next_shard(list(self.jobs.values())) or len(self.claims) % 3 == 2)
    @rule(target=leases, worker=workers)
    def claim(self, worker: str):
        return self.claim_expecting(worker, self.next_shard(list(self.jobs.values())), None)

    @precondition(lambda self: self.next_shard(list(self.jobs.values())) or len(self.claims) % 3 == 2)
    @rule(target=leases, worker=workers, job_id=job_ids)
    def claim_of_job(self, worker: str, job_id: int):
        return self.claim_expecting(worker, self.next_shard([self.jobs[job_id]]), job_id)

    def claim_expecting(self, worker: str, expected: Shard | None, job_id: int | None):
        lease = queue.claim(self.db, worker, kind="shard", job_id=job_id)
        if expected is None:
            assert lease is None
            return multiple()
        assert lease is not None
        expected.state, expected.worker, expected.done = "leased", worker, 0
        expected.epoch += 1
        expected.attempt += 1
        self.jobs[expected.job_id].state = "running"
        assert (lease.task_id, lease.job_id, lease.worker) == (expected.id, expected.job_id, worker)
        assert (lease.epoch, lease.attempt) == (expected.epoch, expected.attempt)
        assert (lease.first_batch, lease.end_batch) == (expected.first, expected.end)
        assert lease.isolated_from == expected.isolated_from
        self.claims.append((lease.task_id, lease.epoch))
        self.newest[lease.task_id] = lease
        return lease

    def chosen(self, lease: Lease, as_drawn: bool) -> Lease:
        # not by its number: numbers go on from example to example, and the same draws must do the same again
        held = [one for one in self.newest.values() if self.held(one)]
        return lease if as_drawn or not held else held[self.claims.index((lease.task_id, lease.epoch)) % len(held)]

    @precondition(lambda self: any(job.state == "done" for job in self.jobs.values()))
    @rule(job_id=job_ids)
    def add_policy(self, job_id: int) -> None:
        done = [job for job in self.jobs.values() if job.state == "done"]
        job = self.jobs[job_id] if list(self.jobs).index(job_id) % 3 == 2 else done[0]
        job_id = job.id
        policy = planned_policy(f"patience patience={job.policies + 2}")
        if job.state != "done":
            with pytest.raises(BadInput):
                planning.add_policy(self.db, job_id, policy)
            return
        planning.add_policy(self.db, job_id, policy)
        job.state, job.paused, job.policies = "running", False, job.policies + 1
        new = [row for row in self.rows() if row.job_id == job_id and row.id not in self.shards]
        for row in new:
            self.shards[row.id] = Shard(row.id, job_id, row.first_batch, row.end_batch, row.cost)
        job.first_added = new[0].id

    @rule(lease=leases, as_drawn=as_drawn, done=st.integers(0, 2))
    def renew(self, lease: Lease, as_drawn: bool, done: int) -> None:
        lease = self.chosen(lease, as_drawn)
        shard = self.shard(lease)
        if self.held(lease):
            assert not queue.renew(self.db, lease, done).cancelled
            shard.done = done
        elif shard.state == "cancelled":
            assert queue.renew(self.db, lease, done).cancelled
        elif shard.epoch == lease.epoch and shard.state in ("done", "split"):
            assert not queue.renew(self.db, lease, done).cancelled
        else:
            with pytest.raises(LeaseLost):
                queue.renew(self.db, lease, done)

    @rule(lease=leases, as_drawn=as_drawn)
    def complete(self, lease: Lease, as_drawn: bool) -> None:
        lease = self.chosen(lease, as_drawn)
        shard = self.shard(lease)
        with self.db.write() as connection:
            if self.held(lease):
                assert queue.complete(connection, lease)
                shard.state = "done"
            elif (shard.state, shard.epoch) == ("done", lease.epoch):
                assert not queue.complete(connection, lease)
            else:
                with pytest.raises(LeaseLost):
                    queue.complete(connection, lease)

    @rule(lease=leases, as_drawn=as_drawn, into=st.sampled_from([0, 1, 1, 2, 3]))
    def split(self, lease: Lease, as_drawn: bool, into: int) -> None:
        lease = self.chosen(lease, as_drawn)
        at_batch = lease.first_batch + into
        shard = self.shard(lease)
        with self.db.write() as connection:
            if not lease.first_batch < at_batch < lease.end_batch:
                with pytest.raises(BadInput):
                    queue.split(connection, lease, at_batch)
            elif self.held(lease):
                done = queue.split(connection, lease, at_batch)
                assert done is not None
                assert (done.first_batch, done.end_batch) == (lease.first_batch, at_batch)
                shard.state = "split"
            elif (shard.state, shard.epoch) == ("split", lease.epoch):
                assert queue.split(connection, lease, at_batch) is None
            else:
                with pytest.raises(LeaseLost):
                    queue.split(connection, lease, at_batch)
        self.learn_children(shard, at_batch)

    def learn_children(self, parent: Shard, at_batch: int) -> None:
        """Only their numbers are new to the model."""
        children = [row.id for row in self.rows() if row.parent_id == parent.id and row.id not in self.shards]
        if children:
            rest, done = children
            left = parent.cost * (parent.end - at_batch) // (parent.end - parent.first)
            self.shards[rest] = Shard(rest, parent.job_id, at_batch, parent.end, left)
            taken = (parent.first, at_batch, parent.cost - left)
            finished = Shard(done, parent.job_id, *taken, "done", parent.epoch, parent.attempt)
            finished.worker, finished.done = parent.worker, at_batch - parent.first
            self.shards[done] = finished

    @rule(lease=leases, as_drawn=as_drawn)
    def give_back(self, lease: Lease, as_drawn: bool) -> None:
        lease = self.chosen(lease, as_drawn)
        shard, held = self.shard(lease), self.held(lease)
        assert queue.give_back(self.db, lease) == held
        if held:
            shard.again()
            shard.attempt -= 1

    @rule(lease=leases, as_drawn=as_drawn, refund=st.sampled_from([False, False, True]))
    def fail(self, lease: Lease, as_drawn: bool, refund: bool) -> None:
        lease = self.chosen(lease, as_drawn)
        shard, held = self.shard(lease), self.held(lease)
        assert queue.fail(self.db, lease, "it broke", refund=refund) == held
        if not held:
            return
        if shard.attempt - refund >= queue.MAX_ATTEMPTS:
            shard.state = "dead"
        else:
            shard.again(waits=True)
            shard.attempt -= refund
            self.pause_longer(shard)

    def pause_longer(self, shard: Shard) -> None:
        """Until the model says that it is over, however slow the machine is."""
        with self.db.write() as connection:
            its_row = task.c.id == shard.id
            assert connection.scalar(select(task.c.run_after).where(its_row)) > 0
            connection.execute(task.update().where(its_row).values(run_after=time.time() + 3600))

    @precondition(lambda self: any(shard.waits for shard in self.shards.values()))
    @rule()
    def pauses_after_failures_end(self) -> None:
        with self.db.write() as connection:
            connection.execute(task.update().values(run_after=0))
        for shard in self.shards.values():
            shard.waits = False

    @rule(target=reaped, lease=leases, as_drawn=as_drawn, known=st.booleans())
    def die(self, lease: Lease, as_drawn: bool, known: bool):
        """A worker. known: that its process is dead; else its leases expire."""
        worker = self.chosen(lease, as_drawn).worker
        if not known:
            with self.db.write() as connection:
                leased = task.update().where(task.c.worker == worker, task.c.state == "leased")
                connection.execute(leased.values(lease_until=1))
        taken = queue.reap(self.db, dead_workers=[worker] if known else [])
        lost = [shard for shard in self.shards.values() if (shard.state, shard.worker) == ("leased", worker)]
        assert {one.task_id for one in taken} == {shard.id for shard in lost}
        for shard in lost:
            self.lose(shard)
        return multiple(*taken)

    def lose(self, shard: Shard) -> None:
        shard.deaths += 1
        if shard.deaths >= queue.SUSPECT_DEATHS and shard.isolated_from is None:
            shard.isolated_from = min(shard.first + shard.done, shard.end - 1)
        if shard.attempt >= queue.MAX_ATTEMPTS:
            shard.state = "dead"
        else:
            shard.again()

    @rule(one=reaped)
    def refund(self, one: Reaped) -> None:
        shard = self.shard(one)
        job = self.jobs[shard.job_id]
        there = shard.state in ("ready", "dead") and shard.epoch == one.epoch and shard.worker is not None
        expected = there and not (shard.state == "dead" and job.state == "cancelled")
        assert queue.refund(self.db, one.task_id, one.epoch) == expected
        if not expected:
            return
        if shard.state == "dead":
            job.state = "running"
        shard.again(waits=shard.waits)
        shard.attempt -= 1
        shard.deaths -= 1
        shard.worker = None
        if shard.deaths < queue.SUSPECT_DEATHS:
            shard.isolated_from = None

    @precondition(lambda self: len(self.claims) > 8 and len(self.claims) % 4 == 0)
    @rule(job_id=job_ids)
    def cancel(self, job_id: int) -> None:
        self.expect_cancel(self.jobs[job_id])

    @precondition(lambda self: any(job.open and job.first_added for job in self.jobs.values()))
    @rule(now=st.sampled_from([False, True]))
    def cancel_a_policy(self, now: bool) -> None:
        if now:
            self.expect_cancel(next(job for job in self.jobs.values() if job.open and job.first_added))

    def expect_cancel(self, job: Job) -> None:
        job_id = job.id
        # SQLite gives the highest numbers again once their rows are gone: let these not be the highest
        jobs.cancel_job(self.db, jobs.create_job(self.db, name="last", spec={}))
        assert jobs.cancel_job(self.db, job_id) == job.open
        if not job.open:
            return
        if job.first_added is not None:
            self.take_back(job, job.first_added)
            return
        job.state = "cancelled"
        for shard in self.of(job_id):
            if shard.state in OPEN:
                shard.state = "cancelled"
                shard.epoch += 1

    def take_back(self, job: Job, first_added: int) -> None:
        """The shards of the policy are gone; whoever holds one has lost it."""
        for number in [shard.id for shard in self.of(job.id) if shard.id >= first_added]:
            del self.shards[number]
            self.newest.pop(number, None)
        job.state, job.paused, job.first_added, job.policies = "done", False, None, job.policies - 1

    @precondition(lambda self: len(self.claims) % 5 == 4)
    @rule(job_id=job_ids)
    def pause(self, job_id: int) -> None:
        job = self.jobs[job_id]
        assert jobs.pause_job(self.db, job_id) == (job.open and not job.paused)
        job.paused = job.paused or job.open

    @precondition(lambda self: any(job.paused for job in self.jobs.values()))
    @rule(job_id=job_ids)
    def unpause(self, job_id: int) -> None:
        assert jobs.unpause_job(self.db, job_id) == self.jobs[job_id].paused
        self.jobs[job_id].paused = False

    @precondition(lambda self: any(shard.state == "dead" for shard in self.shards.values()))
    @rule(job_id=job_ids)
    def retry(self, job_id: int) -> None:
        job, dead = self.jobs[job_id], [shard for shard in self.of(job_id) if shard.state == "dead"]
        if dead and job.state == "cancelled":
            with pytest.raises(BadInput):
                jobs.retry_job(self.db, job_id)
            return
        assert jobs.retry_job(self.db, job_id) == len(dead)
        for shard in dead:
            shard.again()
            shard.attempt, shard.worker = 0, None
            job.state = "running"

    @precondition(lambda self: len(self.claims) % 4 == 3)
    @rule(job_id=job_ids)
    def work_off(self, job_id: int) -> None:
        """All that is held or ready: few jobs would be done otherwise, and none would get another policy."""
        held = [lease for lease in self.newest.values() if lease.job_id == job_id and self.held(lease)]
        while held or (shard := self.next_shard([self.jobs[job_id]])):
            lease = held.pop() if held else self.claim_expecting("a", shard, job_id)
            with self.db.write() as connection:
                assert queue.complete(connection, lease)
            self.shard(lease).state = "done"
        self.expect_end(job_id)

    @rule(job_id=job_ids)
    def finalise(self, job_id: int) -> None:
        self.expect_end(job_id)

    def expect_end(self, job_id: int) -> None:
        job, states = self.jobs[job_id], {shard.state for shard in self.of(job_id)}
        ends = job.open and not states & set(OPEN)
        assert results.finalise(self.db, job_id, summarise) == ends
        if ends:
            job.state = "failed" if "dead" in states else "done"
            job.first_added = job.first_added if "dead" in states else None

    # --- what the model knows

    def of(self, job_id: int) -> list[Shard]:
        return [shard for shard in self.shards.values() if shard.job_id == job_id]

    def shard(self, one: Lease | Reaped) -> Shard:
        """One that went with its policy is at no epoch."""
        return self.shards.get(one.task_id) or Shard(one.task_id, one.job_id, 0, 0, "gone", epoch=-1)

    def held(self, lease: Lease) -> bool:
        shard = self.shard(lease)
        return (shard.state, shard.epoch) == ("leased", lease.epoch)

    def next_shard(self, among: list[Job]) -> Shard | None:
        """Whose turn it is."""

        def claimable(job: Job) -> list[Shard]:
            return [shard for shard in self.of(job.id) if shard.state == "ready" and not shard.waits]

        def leased(job: Job) -> int:
            return sum(shard.state == "leased" for shard in self.of(job.id))

        able = [job for job in among if job.open and not job.paused and claimable(job)]
        if not able:
            return None
        turn = min(able, key=lambda job: (-job.priority, leased(job), job.id))
        return min(claimable(turn), key=lambda shard: (-shard.cost, shard.id))

    def rows(self) -> list:
        with self.db.read() as connection:
            mine = task.c.job_id.in_(list(self.jobs)) & (task.c.kind == "shard")
            return list(connection.execute(select(task).where(mine).order_by(task.c.id)))

    # --- what always holds

    @invariant()
    def the_record_says_what_the_model_says(self) -> None:
        found = {
            row.id: (
                row.job_id, row.first_batch, row.end_batch, row.state, row.epoch, row.attempt, row.worker,
                row.done_batches, row.cost, row.deaths, row.isolated_from,
            )
            for row in self.rows()
        }  # fmt: skip
        assert found == {
            one.id: (
                one.job_id, one.first, one.end, one.state, one.epoch, one.attempt, one.worker,
                one.done, one.cost, one.deaths, one.isolated_from,
            )
            for one in self.shards.values()
        }  # fmt: skip
        for job in self.jobs.values():
            kept = jobs.job(self.db, job.id)
            assert (kept.state, kept.paused) == (job.state, job.paused)
            assert (kept.finished_at is None) == job.open

    @invariant()
    def epochs_only_rise_and_no_shard_is_held_by_two(self) -> None:
        for row in self.rows():
            assert row.epoch >= self.epochs.get(row.id, 0)
            assert row.attempt >= 0
            self.epochs[row.id] = row.epoch
        assert len(self.claims) == len(set(self.claims)), "a lease was given out twice"

    @invariant()
    def shards_cover_each_batch_once_and_an_ended_job_has_none_open(self) -> None:
        rows = self.rows()
        for job_id, job in self.jobs.items():
            live = [row for row in rows if row.job_id == job_id and row.state != "split"]
            covered = sorted(batch for row in live for batch in range(row.first_batch, row.end_batch))
            assert covered == sorted([*range(N_BATCHES)] * (1 + job.policies))
            if jobs.job(self.db, job_id).state.ended:
                assert not {row.state for row in rows if row.job_id == job_id} & set(OPEN)


def test_the_queue_does_what_its_model_does(db: Database) -> None:
    """What it finds it tells as it was found: to look for the shortest way there takes minutes."""
    quick = settings(max_examples=20, stateful_step_count=50, phases=[Phase.generate])
    run_machine(lambda: QueueMachine(db), settings=quick)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_queue_does_what_its_model_does_for_long(db: Database) -> None:
    run_machine(lambda: QueueMachine(db), settings=settings(max_examples=400, stateful_step_count=60))
