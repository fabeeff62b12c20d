"""A machine goes, and with it its workers: the work is not to blame."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from small_world import World, columns, rows, wait_for

from cluster import jobs
from db import jobs as record
from db import queue
from db.session import Database

_FLEET = """
import sys
from cluster.fleet.supervisor import Fleet
from cluster.logs import configure_logs
from db.session import open_database
configure_logs("info")
with Fleet(open_database(sys.argv[1]), [1], workers=1, ray_address=sys.argv[2]) as fleet:
    print("joined", flush=True)
    fleet.run()
"""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def ray_cluster() -> Iterator[object]:
    """A head without cores, to which nodes are added."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield nodes
    nodes.shutdown()


@pytest.mark.slow
def test_a_shard_lost_with_its_node_gets_its_attempt_back(
    ray_cluster, world: World, db: Database, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    jobs.submit(db, world.spec(shard_batches=12))
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    process = subprocess.Popen(
        [sys.executable, "-c", _FLEET, db.url, ray_cluster.address], text=True, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == "joined\n"  # through the head, whose death would be another test
        doomed = ray_cluster.add_node(num_cpus=1)
        held = "select id, worker from task where kind = 'shard' and state = 'leased' and done_batches >= 1"
        [(task_id, first_worker)] = wait_for("a shard in hand", lambda: rows(db, held))
        doomed.kill_raylet()
        ray_cluster.add_node(num_cpus=1)
        assert process.wait(timeout=200) == 0
    finally:
        process.kill()
        process.communicate()
    assert record.job(db, 1).state is jobs.JobState.DONE
    assert rows(db, f"select worker from task where id = {task_id}") != [(first_worker,)], "the node died too late"
    assert rows(db, "select max(deaths), max(attempt) from task") == [(0, 1)]
    assert columns(db, 1) == undisturbed
