"""What the supervisor does with its workers: places, models, moves, cancels, hangs, drains. Real Ray, no engine."""

import socket
import time
from functools import partial

import pytest
import ray
from sleeping import GPU, SleepingFleet, gpu_ids, is_timed, running, sleeping_job
from small_world import World, columns, rows
from small_world import wait_for as wait_long_for
from structlog.testing import capture_logs

from cluster import jobs
from cluster.errors import FleetError
from cluster.fleet import crew, supervisor
from db import jobs as record
from db.errors import BadInput
from db.session import Database

pytestmark = pytest.mark.usefixtures("ray_here")


wait_for = partial(wait_long_for, seconds=60.0)


def ended(db: Database, *job_ids: int) -> bool:
    return all(record.job(db, job_id).state.ended for job_id in job_ids)


def workers_of(db: Database, job_id: int) -> set[str]:
    return {name for (name,) in rows(db, f"select worker from task where kind = 'shard' and job_id = {job_id}")}


def test_models_stand_side_by_side_and_a_worker_keeps_the_one_it_holds(db: Database) -> None:
    """Two jobs of two models at once; a third of the first model comes later and starts no process."""
    a, b = sleeping_job(db, 10, 0.5, model="a"), sleeping_job(db, 10, 0.5, model="b")
    with running(SleepingFleet(db, workers=2)) as fleet:
        wait_for("both jobs", lambda: ended(db, a, b))
        assert len(workers_of(db, a)) == len(workers_of(db, b)) == 1
        assert workers_of(db, a) != workers_of(db, b)
        [(last,)] = rows(db, f"select min(finished_at) from job where id in ({a}, {b})")
        [(begun,)] = rows(db, f"select max(started_at) from job where id in ({a}, {b})")
        assert begun < last, "one after the other"
        before = {pulse.pid for pulse in fleet.pulses()}
        c = sleeping_job(db, 1, 0.1, model="a")
        wait_for("the third", lambda: ended(db, c))
        assert workers_of(db, c) == workers_of(db, a)
        assert {pulse.pid for pulse in fleet.pulses()} == before


def test_a_worker_moves_to_another_model_where_no_place_is_left(db: Database) -> None:
    a, b = sleeping_job(db, 2, 0.1, model="a"), sleeping_job(db, 2, 0.1, model="b")
    with running(SleepingFleet(db, workers=1)) as fleet:
        wait_for("both", lambda: ended(db, a, b))
        assert len(fleet.pulses()) == 1
    assert workers_of(db, a) == workers_of(db, b)


def test_the_memory_of_a_gpu_is_told_once_however_many_workers_it_has(db: Database) -> None:
    job_id = sleeping_job(db, 4, 1.0)
    with running(SleepingFleet(db, workers=2)) as fleet:
        wait_for("pulses", lambda: len(fleet.gpus()) == 1)
        assert fleet.gpus() == [(socket.gethostname(), GPU)]
        wait_for("the job", lambda: ended(db, job_id))


def test_a_warm_fleet_begins_within_a_second(db: Database) -> None:
    """Asserted generously: the machine is shared. `make bench-cluster` measures it."""
    first = sleeping_job(db, 1, 0.1)
    with running(SleepingFleet(db, workers=1)) as fleet:
        wait_for("the first", lambda: ended(db, first))
        pids = [pulse.pid for pulse in fleet.pulses()]
        second = sleeping_job(db, 1, 0.1)
        wait_for("the second", lambda: ended(db, second))
        assert [pulse.pid for pulse in fleet.pulses()] == pids


def test_idle_workers_leave(db: Database) -> None:
    job_id = sleeping_job(db, 2, 0.1)
    with running(SleepingFleet(db, workers=2, idle_seconds=0.5)) as fleet:
        wait_for("the job", lambda: ended(db, job_id))
        wait_for("an empty fleet", lambda: not fleet._crew.members)
        again = sleeping_job(db, 1, 0.1)
        wait_for("another job", lambda: ended(db, again))


def test_a_fleet_of_one_job_leaves_the_others_alone(db: Database) -> None:
    mine, other = sleeping_job(db, 3, 0.1), sleeping_job(db, 3, 0.1)
    with SleepingFleet(db, [mine], workers=2) as fleet:
        fleet.run()
    assert ended(db, mine)
    assert rows(db, f"select count(*) from task where job_id = {other} and epoch > 0 and kind = 'shard'") == [(0,)]


def test_a_job_that_is_submitted_is_prepared_and_done_by_the_fleet(
    db: Database, world: World, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    """The whole way, the real engine; a job that cannot be prepared fails with its sentence and harms no other."""
    from cluster.fleet.supervisor import Fleet

    bad = jobs.submit(db, world.spec(generation={"max_new_tokens": 96}))
    good = jobs.submit(db, world.spec())
    with running(Fleet(db, workers=1)):
        wait_for("both", lambda: ended(db, bad, good))
    assert "max_new_tokens is 96" in str(record.job(db, bad).error)
    assert record.job(db, good).state is jobs.JobState.DONE
    assert columns(db, good) == undisturbed


# --- cancel, hang, drain


def test_a_cancelled_job_frees_its_workers_within_seconds(db: Database) -> None:
    """They learn it from the supervisor, not at the next renewal, which here would come after ten seconds."""
    long = sleeping_job(db, 1, 600, step=0.1)
    with running(SleepingFleet(db, workers=1, lease_seconds=30)) as fleet:
        wait_for("the shard in hand", lambda: any(pulse.task_id for pulse in fleet.pulses()))
        pids = [pulse.pid for pulse in fleet.pulses()]
        record.cancel_job(db, long)
        wait_for(
            "a free worker", lambda: [pulse.pid for pulse in fleet.pulses() if not pulse.task_id] == pids, seconds=5
        )
        next_job = sleeping_job(db, 1, 0.1)
        wait_for("another job", lambda: ended(db, next_job))
        assert {pulse.pid for pulse in fleet.pulses()} == set(pids), "the worker lives, and keeps its model"


def test_a_worker_that_does_not_let_go_of_a_cancelled_job_is_replaced(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "FREE_SECONDS", 0.5)
    monkeypatch.setattr(crew, "PULSE_SECONDS", 0.5)
    long = sleeping_job(db, 1, 600)
    with running(SleepingFleet(db, workers=1)) as fleet:
        wait_for("the shard in hand", lambda: any(pulse.task_id for pulse in fleet.pulses()))
        record.cancel_job(db, long)
        next_job = sleeping_job(db, 1, 0.1)
        wait_for("another job", lambda: ended(db, next_job))


def test_a_worker_that_hangs_is_replaced_although_its_lease_is_renewed(db: Database) -> None:
    """Progress stands still while the heartbeat goes on: only the pulse tells."""
    job_id = sleeping_job(db, 1, 600)
    with capture_logs() as logs, running(SleepingFleet(db, workers=1, lease_seconds=6, stall_seconds=1.5)):
        [(first,)] = wait_for("a worker", lambda: rows(db, "select worker from task where state = 'leased'"))
        held = f"select epoch from task where state = 'leased' and worker <> '{first}'"
        assert wait_for("another worker with the shard", lambda: rows(db, held)) == [(2,)]
        record.cancel_job(db, job_id)
    assert rows(db, f"select deaths from task where job_id = {job_id} and kind = 'shard'") == [(1,)]
    assert any("hangs: it has not moved on" in event.get("reason", "") for event in logs)


def test_a_worker_that_runs_out_of_memory_tries_again(db: Database) -> None:
    """The allocation fails, the attempt counts, and the worker lives. One that the kernel ends is a death like any."""
    job_id = sleeping_job(db, 2, 0.1, eats=True)
    with SleepingFleet(db, [job_id], workers=1) as fleet:
        fleet.run()
    assert record.job(db, job_id).state is jobs.JobState.DONE
    found = "select attempt, deaths, error from task where kind = 'shard'"
    assert [(attempt, deaths) for attempt, deaths, _ in rows(db, found)] == [(2, 0)] * 2
    assert all(error.startswith("MemoryError") for *_, error in rows(db, found))
    assert len(workers_of(db, job_id)) == 1


def test_drain_keeps_every_finished_batch_and_counts_no_attempt(db: Database) -> None:
    job_id = sleeping_job(db, 8, 0.4, shard_batches=8, step=0.05)
    with running(SleepingFleet(db, workers=1)) as fleet:
        wait_for("two batches", lambda: any((pulse.batch or 0) >= 2 for pulse in fleet.pulses()))
    found = "select state, first_batch, attempt, deaths from task where kind = 'shard' order by first_batch, id"
    [parent, *children] = rows(db, found)
    [done] = [child for child in children if child[0] == "done"] or [parent]
    [rest] = [child for child in [parent, *children] if child[0] == "ready"]
    assert (done[1], rest[2:]) == (0, (0, 0))
    assert rest[1] >= 2
    assert rows(db, "select count(*) from outcome") == [(rest[1],)]
    with SleepingFleet(db, [job_id], workers=1) as fleet:
        fleet.run()
    assert rows(db, "select count(*), count(distinct sample_id) from outcome") == [(8, 8)]


def test_the_last_shard_is_shared(db: Database) -> None:
    """A shard of twelve batches and one of two: who has done the small one gets its part of the large one."""
    job_id = sleeping_job(db, 14, 0.5, shard_batches=12)
    with SleepingFleet(db, [job_id], workers=2) as fleet:
        fleet.run()
    done = "select sum(end_batch - first_batch) from task where kind = 'shard' and state = 'done' group by worker"
    shares = [batches for (batches,) in rows(db, done)]
    assert (len(shares), sum(shares)) == (2, 14)
    assert min(shares) >= 4
    assert rows(db, "select count(*), count(distinct sample_id) from outcome") == [(14, 14)]


# --- GPUs, which are declared


def test_each_worker_has_a_gpu_of_its_own(db: Database) -> None:
    job_id = sleeping_job(db, 4, 2.0, device="cuda")
    with running(SleepingFleet(db, workers=None)) as fleet:
        wait_for("two at work", lambda: len([pulse for pulse in fleet.pulses() if pulse.task_id]) == 2)
        held = [m.actor.__ray_call__.remote(gpu_ids) for m in fleet._crew.members]
        assert sorted(ray.get(held)) == [["0"], ["1"]]
        assert ray.available_resources().get("CPU") == 4, "a GPU worker holds no core"
        wait_for("the job", lambda: ended(db, job_id))


def test_a_share_of_a_gpu_lets_more_workers_use_it_and_none_is_timed(db: Database) -> None:
    sleeping_job(db, 8, 600, step=0.1, device="cuda")
    with running(SleepingFleet(db, workers=None, gpus_per_worker=0.5)) as fleet:
        wait_for("four at work", lambda: len([pulse for pulse in fleet.pulses() if pulse.task_id]) == 4)
        timed = [m.actor.__ray_call__.remote(is_timed) for m in fleet._crew.members]
        assert ray.get(timed) == [False] * 4


def test_a_worker_without_a_place_says_who_has_it(db: Database) -> None:
    """The urgent job holds both GPUs, and the other one is told so."""
    urgent = sleeping_job(db, 2, 600, step=0.1, device="cuda", priority=1, model="a")
    sleeping_job(db, 1, 0.1, device="cuda", model="b")
    sentence = f"no node has a free GPU: 2 of 2 in use by job {urgent}"
    with capture_logs() as logs, running(SleepingFleet(db, workers=None, ready_seconds=12)):
        wait_for("the reason", lambda: any(sentence in event.get("reason", "") for event in logs))


def test_a_fleet_of_one_job_ends_where_all_places_are_taken(db: Database) -> None:
    sleeping_job(db, 2, 600, step=0.1, device="cuda", model="a")
    late = sleeping_job(db, 1, 0.1, device="cuda", model="b")
    with running(SleepingFleet(db, [1], workers=2)) as first:
        wait_for("both GPUs taken", lambda: len([pulse for pulse in first.pulses() if pulse.task_id]) == 2)
        second = SleepingFleet(db, [late], workers=1, ready_seconds=12)
        with second, pytest.raises(FleetError, match="no node has a free GPU: 2 of 2 in use by others"):
            second.run()
    assert not ended(db, late)


def test_more_gpus_than_any_node_has_are_refused(db: Database) -> None:
    job_id = sleeping_job(db, 1, 0.1, device="cuda")
    with pytest.raises(BadInput, match=r"gpus_per_worker is 3, but no node has more than 2 GPU"):
        SleepingFleet(db, [job_id], gpus_per_worker=3).__enter__()


def test_a_worker_that_has_its_place_may_take_longer_to_start(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many start at once on few cores, more time than for a place that does not exist. Red without the factor."""
    monkeypatch.setattr(supervisor, "SLOW_STARTS", 1000)
    job_id = sleeping_job(db, 1, 0.1)
    with SleepingFleet(db, [job_id], workers=1, ready_seconds=0.05) as fleet:
        fleet.run()
    assert ended(db, job_id)


# --- many


def test_two_hundred_jobs_at_once(db: Database) -> None:
    """Each is done once, whoever comes first; none is forgotten when a worker finalises another."""
    for number in range(200):
        sleeping_job(db, 1, 0.0, priority=number % 3 - 1)
    began = time.monotonic()
    with SleepingFleet(db, range(1, 201), workers=3) as fleet:
        fleet.run()
    assert time.monotonic() - began < 250
    assert rows(db, "select state, count(*) from job group by state") == [("done", 200)]
    assert rows(db, "select count(*) from outcome") == [(200,)]
    assert rows(db, "select max(attempt), max(deaths) from task where kind = 'shard'") == [(1, 0)]
