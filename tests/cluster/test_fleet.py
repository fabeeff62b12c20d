"""Where the fleet gets its workers, and what it says when it gets none."""

import socket

import pytest
from small_world import World

from cluster import jobs
from cluster.errors import FleetError
from cluster.fleet.supervisor import Fleet
from db import queue
from db.errors import BadInput
from db.session import Database


def prepared(db: Database, world: World, **changes: object) -> int:
    job_id = jobs.submit(db, world.spec(**changes))
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    return job_id


def test_workers_that_get_no_place_are_not_waited_for_for_ever(ray_here: None, world: World, db: Database) -> None:
    job_id = prepared(db, world, threads=64)
    sentence = "each asks for 64 CPU, and no node has more than 4"
    with Fleet(db, [job_id], workers=1, ready_seconds=1) as fleet, pytest.raises(FleetError, match=sentence):
        fleet.run()


def test_sqlite_is_refused_where_workers_are_elsewhere(
    ray_here: None, world: World, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's nodes are compared with this machine's name; here this machine pretends to be another one."""
    job_id = prepared(db, world)
    monkeypatch.setattr(socket, "gethostname", lambda: "the-submitters-laptop")
    with pytest.raises(BadInput, match="use a PostgreSQL database"), Fleet(db, [job_id], workers=1):
        pass
