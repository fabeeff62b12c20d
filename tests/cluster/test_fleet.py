"""Where the fleet gets its workers, and what it says when it gets none."""

import pytest
from small_world import World

from cluster import jobs
from cluster.errors import FleetError
from cluster.fleet import Fleet
from db import queue
from db.errors import BadInput
from db.session import Database


@pytest.fixture
def job_id(world: World, db: Database) -> int:
    job_id = jobs.submit(db, world.spec())
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    return job_id


def test_workers_that_get_no_place_are_not_waited_for_for_ever(ray_here: None, db: Database, job_id: int) -> None:
    sentence = "each asks for 64 CPU, and Ray has 4 CPU, 0 GPU"
    with Fleet(db, job_id, workers=1, threads=64, ready_seconds=1) as fleet, pytest.raises(FleetError, match=sentence):
        fleet.run()


def test_sqlite_is_refused_where_workers_are_elsewhere(
    ray_here: None, db: Database, job_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's nodes are compared with this machine's name; here this machine pretends to be another one."""
    monkeypatch.setattr("socket.gethostname", lambda: "the-submitters-laptop")
    with pytest.raises(BadInput, match="use a PostgreSQL database"), Fleet(db, job_id, workers=1, threads=1):
        pass


def test_only_workers_with_cores_of_their_own_are_timed(db: Database, job_id: int) -> None:
    assert Fleet(db, job_id, workers=1, threads=1).timed
    assert not Fleet(db, job_id, workers=1000, threads=1).timed
