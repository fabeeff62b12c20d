"""What the supervisor does about workers that do not end, jobs that nobody ended, and what it tells an autoscaler."""

import json
import os
import signal
import socket
from contextlib import closing
from functools import partial

import pytest
from made import results_of
from ray.experimental.internal_kv import _internal_kv_get
from sleeping import SleepingFleet, running, sleeping_job
from small_world import rows
from small_world import wait_for as wait_long_for

from cluster.errors import FleetError
from cluster.fleet import crew
from cluster.fleet.demand import Need, Place
from cluster.fleet.keeper import Keeper, Orders
from cluster.fleet.placement import Node
from db import jobs as record
from db import queue, results
from db.exclusive import Exclusive
from db.session import Database, open_database
from workers.pinned import EngineKey

wait_for = partial(wait_long_for, seconds=90.0)


def ended(db: Database, *job_ids: int) -> bool:
    return all(record.job(db, job_id).state.ended for job_id in job_ids)


def test_a_job_that_nobody_ended_is_ended(ray_here: None, db: Database) -> None:
    """Whoever commits a job's last shard ends the job; here he died in between, and there is nothing left to claim."""
    job_id = sleeping_job(db, 1, 0.0)
    lease = queue.claim(db, "doomed", kind="shard")
    assert lease is not None
    results.commit_shard(db, lease, results_of(db, lease))
    with running(SleepingFleet(db, workers=1)):
        wait_for("its end", lambda: ended(db, job_id))
    assert record.job(db, job_id).state is record.JobState.DONE


def test_a_worker_that_does_not_stop_is_ended_and_its_attempt_given_back(
    ray_here: None, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is needed for an urgent job, and it hears nothing. Red where a drain is waited for for ever."""
    monkeypatch.setattr(crew, "DRAIN_SECONDS", 1.0)
    monkeypatch.setattr(crew, "PULSE_SECONDS", 0.5)
    deaf = sleeping_job(db, 1, 600)
    with running(SleepingFleet(db, workers=1)) as fleet:
        wait_for("the shard in hand", lambda: any(pulse.task_id for pulse in fleet.pulses()))
        urgent = sleeping_job(db, 1, 0.1, priority=1, threads=2, model="urgent")
        wait_for("the urgent job", lambda: ended(db, urgent))
        record.cancel_job(db, deaf)
    found = f"select max(deaths) from task where job_id = {deaf} and kind = 'shard'"
    assert rows(db, found) == [(0,)], "it was ended by us, not by the work"


def test_a_worker_that_is_frozen_is_replaced(ray_here: None, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers nothing. Its lease ends by itself, but its place would be held by it for ever."""
    monkeypatch.setattr(crew, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(crew, "PULSE_SECONDS", 0.5)
    job_id = sleeping_job(db, 2, 1.0, step=0.1)
    with running(SleepingFleet(db, workers=1, lease_seconds=6)) as fleet:
        [pulse] = wait_for("the shard in hand", lambda: [one for one in fleet.pulses() if one.task_id])
        os.kill(pulse.pid, signal.SIGSTOP)
        try:
            wait_for("the job", lambda: ended(db, job_id))
        finally:
            os.kill(pulse.pid, signal.SIGCONT) if _lives(pulse.pid) else None
    assert rows(db, "select count(*), count(distinct sample_id) from outcome") == [(2, 2)]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_autoscaler_is_asked_for_what_there_is_work_for_and_for_nothing_in_the_end(
    ray_here: None, db: Database
) -> None:
    """Ray keeps a request until the next one: a fleet that forgot it would keep a cluster alive for ever."""

    def asked() -> list[dict[str, float]] | None:
        kept = _internal_kv_get("autoscaler_resource_request")
        return None if kept is None else json.loads(kept)

    job_id = sleeping_job(db, 8, 0.4)
    urgent = sleeping_job(db, 1, 0.4, threads=2, model="b", priority=1)
    with running(SleepingFleet(db, workers=3, ray_address="this one")):
        wait_for("the request", lambda: asked() == [{"CPU": 2.0}, {"CPU": 1.0}, {"CPU": 1.0}])
        wait_for("the jobs", lambda: ended(db, job_id, urgent))
        wait_for("nothing to be asked for", lambda: asked() == [])
        sleeping_job(db, 8, 600, step=0.1)
        wait_for("the next request", lambda: asked() == [{"CPU": 1.0}] * 3)
    assert asked() == []


# --- without Ray ---------------------------------------------------------------------------------------------------


def test_nodes_that_are_called_back_or_out_of_the_databases_reach_get_no_worker(db: Database) -> None:
    """A machine that joined later, too: SQLite's file is not there."""
    fleet, here = SleepingFleet(db), socket.gethostname()
    need = Need(Place("cpu", 1), EngineKey("a", "a", None, "cpu", "float32", 1, "off"))
    fleet.placement.nodes = [Node(name, host, {"CPU": 2.0}) for name, host in (("a", here), ("b", "elsewhere"))]
    assert fleet._avoided(need) == {"b"}
    fleet.placement.leaving = {"a"}
    assert fleet._avoided(need) == {"a", "b"}


def test_a_fleet_whose_place_is_taken_over_ends(postgresql_url: str) -> None:
    """Its connection was cut and another fleet was quicker: two would hire for the same work."""
    keeper = Keeper(Orders(database_url=postgresql_url), "the first")
    with closing(open_database(postgresql_url)) as db:
        first, second = Exclusive(db, "the first"), Exclusive(db, "the second")
        assert first.take()
        keeper._check(first)
        first.release()
        assert second.take()
        with pytest.raises(FleetError, match=r"another fleet has taken over \(the second\); this one ends"):
            keeper._check(first)
        second.release()
