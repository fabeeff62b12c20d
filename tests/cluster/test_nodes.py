"""Machines that kill their workers, have other weights, are called back, or are gone. Several raylets, no engine."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from sleeping import sleeping_job
from small_world import rows
from small_world import wait_for as wait_long_for

from db import jobs as record
from db.records import JobState
from db.session import Database

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
wait_for = partial(wait_long_for, seconds=90.0)


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head without cores, to which nodes are added."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@contextmanager
def fleet(db: Database, nodes: Any, log: Path, workers: int, *job_ids: int) -> Iterator[subprocess.Popen[str]]:
    """In a process of its own, joined through the head; what it says of itself lies in `log`."""
    command = [sys.executable, "-m", "sleeping", db.url, nodes.address, str(workers), *map(str, job_ids)]
    with log.open("w") as said, subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=said) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n", log.read_text()
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str], db: Database, job_id: int, log: Path) -> None:
    assert process.wait(timeout=150) == 0, log.read_text()
    assert record.job(db, job_id).state is JobState.DONE
    [(outcomes, samples)] = rows(db, "select count(*), count(distinct sample_id) from outcome")
    assert outcomes == samples > 0


def test_a_node_that_keeps_killing_workers_is_avoided_and_named(nodes: Any, db: Database, tmp_path: Path) -> None:
    """Its shards are done elsewhere."""
    job_id = sleeping_job(db, 40, 0.5)
    nodes.add_node(num_cpus=1, env_vars={"SLEEPING_DEADLY": "1"})
    nodes.add_node(num_cpus=1)
    with fleet(db, nodes, tmp_path / "log", 2, job_id) as process:
        wait_for("the verdict", lambda: "node avoided" in (tmp_path / "log").read_text() or process.poll() is not None)
        finish(process, db, job_id, tmp_path / "log")
    [(deaths,)] = rows(db, "select sum(deaths) from task where kind = 'shard'")
    assert 1 <= deaths <= 4


def test_a_node_with_other_weights_is_passed_over_and_named(nodes: Any, db: Database, tmp_path: Path) -> None:
    """The worker refuses, its shard goes back without an attempt counted, and the job goes on elsewhere."""
    job_id = sleeping_job(db, 16, 0.5, only_on="right")
    nodes.add_node(num_cpus=1)
    nodes.add_node(num_cpus=1, env_vars={"SLEEPING_WEIGHTS": "right"})
    with fleet(db, nodes, tmp_path / "log", 2, job_id) as process:
        wait_for("the refusal", lambda: "node cannot do the job" in (tmp_path / "log").read_text())
        finish(process, db, job_id, tmp_path / "log")
    assert rows(db, "select max(attempt), max(deaths) from task where kind = 'shard'") == [(1, 0)]


def test_a_gpu_that_disappears_is_replaced(nodes: Any, db: Database, tmp_path: Path) -> None:
    """With its node. What it had done is kept, and the attempt is given back."""
    job_id = sleeping_job(db, 10, 0.5, device="cuda")
    doomed = nodes.add_node(num_cpus=0, num_gpus=1)
    with fleet(db, nodes, tmp_path / "log", 1, job_id) as process:
        wait_for("two shards", lambda: rows(db, "select 1 from task where kind = 'shard' and state = 'done'")[1:])
        doomed.kill_raylet()
        nodes.add_node(num_cpus=0, num_gpus=1)
        finish(process, db, job_id, tmp_path / "log")
    assert rows(db, "select max(deaths) from task where kind = 'shard'") == [(0,)]


def test_a_node_that_is_called_back_gives_its_work_on_at_a_batch(nodes: Any, db: Database, tmp_path: Path) -> None:
    """The spot notice: the shard is split, its finished batches are kept, and no attempt is counted."""
    job_id = sleeping_job(db, 40, 0.3, shard_batches=40, step=0.05)
    spot = nodes.add_node(num_cpus=1)
    with fleet(db, nodes, tmp_path / "log", 1, job_id) as process:
        wait_for("three batches", lambda: rows(db, "select 1 from task where state = 'leased' and done_batches >= 3"))
        nodes.add_node(num_cpus=1)
        called = subprocess.run(
            [
                str(Path(sys.executable).parent / "ray"), "drain-node", "--address", nodes.address, "--node-id",
                spot.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                "--deadline-remaining-seconds", "60",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        assert called.returncode == 0, called.stderr
        wait_for("the split", lambda: rows(db, "select 1 from task where state = 'split'"))
        finish(process, db, job_id, tmp_path / "log")
    done = "select count(distinct worker), max(attempt), max(deaths) from task where kind = 'shard' and state = 'done'"
    assert rows(db, done) == [(2, 1, 0)]


def test_a_zombie_that_commits_late_is_refused(nodes: Any, db: Database, tmp_path: Path) -> None:
    """Ray has given its node up, and another worker has done its shard; but the process lives, wakes and commits."""
    job_id = sleeping_job(db, 1, 1.0, step=1.0)
    doomed = nodes.add_node(num_cpus=1)
    raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
    with fleet(db, nodes, tmp_path / "log", 1, job_id) as process:
        [(name,)] = wait_for("the shard in hand", lambda: rows(db, "select worker from task where state = 'leased'"))
        [zombie] = [child for child in raylet.children() if "SleepingRemote" in " ".join(child.cmdline())]
        zombie.suspend()
        raylet.suspend()
        try:
            nodes.add_node(num_cpus=1)
            finish(process, db, job_id, tmp_path / "log")
            assert zombie.status() == psutil.STATUS_STOPPED
            zombie.resume()
            logs = Path(nodes.head_node.get_logs_dir_path())
            wait_for("its refusal", lambda: any("lease lost" in one.read_text() for one in logs.glob("worker-*")))
        finally:
            raylet.resume()
    [(worker, epoch)] = rows(db, f"select worker, epoch from task where job_id = {job_id} and kind = 'shard'")
    assert (worker != name, epoch) == (True, 2)
    assert rows(db, "select count(*) from outcome") == [(1,)]
