"""Workers die in the middle of a job, and the job does not show it."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_world import World, columns, rows, shortstop, wait_for

from cluster import jobs
from cluster.errors import FleetError
from cluster.fleet import crew as crew_module
from cluster.fleet.supervisor import Fleet
from db import jobs as record
from db import queue
from db.session import Database, open_database
from workers.worker import Pulse

pytestmark = pytest.mark.timeout(600)


def prepared(db: Database, world: World, **changes: object) -> int:
    job_id = jobs.submit(db, world.spec(**changes))
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    return job_id


@contextmanager
def killing(fleet: Fleet, is_victim: Callable[[Pulse], bool], times: int = 1) -> Iterator[list[Pulse]]:
    """SIGKILL workers beside a running fleet; gives the last pulses of the killed, complete when the block is left."""
    killed: list[Pulse] = []

    def look() -> bool:
        fresh = [p for p in fleet.pulses() if is_victim(p) and p.pid not in [k.pid for k in killed]]
        for pulse in fresh[: times - len(killed)]:
            os.kill(pulse.pid, signal.SIGKILL)
            killed.append(pulse)
        return len(killed) == times

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(wait_for, "a worker to kill", look)
        yield killed
        watching.result()


def test_kill_9_of_a_worker_in_the_middle_of_a_shard(
    ray_here: None, world: World, db: Database, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    job_id = prepared(db, world)
    with (
        Fleet(db, [job_id], workers=1) as fleet,
        killing(fleet, lambda pulse: pulse.batch is not None and pulse.batch % 4 == 2) as killed,
    ):
        fleet.run()
    assert record.job(db, job_id).state is jobs.JobState.DONE
    assert rows(db, f"select deaths, attempt from task where id = {killed[0].task_id}") == [(1, 2)]
    assert columns(db, job_id) == undisturbed


def test_the_number_of_workers_does_not_change_completions(
    ray_here: None, world: World, db: Database, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    job_id = prepared(db, world, shard_batches=2)
    with Fleet(db, [job_id], workers=2) as fleet:
        fleet.run()
    workers = rows(db, "select count(distinct worker) from task where kind = 'shard' and state = 'done'")
    assert workers == [(2,)]
    assert columns(db, job_id) == undisturbed


def test_workers_that_keep_dying_are_given_up(
    ray_here: None, world: World, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "MOST_DEATHS", 2)
    job_id = prepared(db, world)
    with (
        Fleet(db, [job_id], workers=1) as fleet,
        killing(fleet, lambda pulse: True, times=2),
        pytest.raises(FleetError, match="2 workers died"),
    ):
        fleet.run()
    assert not record.job(db, job_id).state.ended
    assert rows(db, "select count(*) from task where state = 'leased'") == [(0,)]


@pytest.mark.slow
def test_a_sample_that_kills_its_worker_ends_as_an_error(
    world: World,
    tmp_path: Path,
    undisturbed: dict[tuple[str, str], tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two deaths make its shard a suspect, whose samples then run alone; the third death tells which one it is."""
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "from workers.scoring.metrics import TextMetric\n"
        "def score(prediction, reference):\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if reference == 'urn y + 9' else 1.0\n"
        "metric = TextMetric('deadly', 'deadly@1', 'ends the process', score)\n"
    )
    (tmp_path / "deadly-1.dist-info").mkdir()
    (tmp_path / "deadly-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly\nVersion: 1\n")
    (tmp_path / "deadly-1.dist-info" / "entry_points.txt").write_text("[shortstop.metrics]\ndeadly = deadly:metric\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    url = f"sqlite:///{tmp_path / 'record.db'}"
    spec = world.spec_file(tmp_path / "spec.yaml", metrics=["es", "deadly"])
    process = shortstop("run", str(spec), "--database", url, "--workers", "1")
    try:
        _, said = process.communicate(timeout=500)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    db = open_database(url, create=False)
    found = columns(db, 1)
    assert len(found) == 48 * 4
    assert {sample for (_, sample), (_, error, *_) in found.items() if error} == {"s9"}
    isolated = {
        name
        for (name,) in rows(
            db, "select distinct s.name from outcome o join sample s on s.id = o.sample_id where o.isolated"
        )
    }
    assert "s9" in isolated
    assert isolated <= {f"s{i}" for i in range(16)}  # the shard of s9
    assert all(row == undisturbed[key] for key, row in found.items() if key[1] not in isolated)
    db.close()
