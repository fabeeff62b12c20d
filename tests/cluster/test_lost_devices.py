"""A GPU that answers no more in a process that lives: the process ends, and another one goes on."""

import os
from pathlib import Path

import pytest
from sleeping import SleepingFleet, SleepingWorker, sleeping_job
from small_world import World, rows
from structlog.testing import capture_logs

import engine.device
from cluster import jobs
from cluster.joining import Joined
from db import jobs as record
from db.session import Database
from engine.device import is_lost
from engine.errors import DeviceLost
from engine.memory import is_out_of_memory
from workers.worker import Worker

#: as torch says it
LOST = [
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
]
FULL = ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]


def test_a_gpu_without_memory_is_not_one_that_is_lost() -> None:
    assert [(is_lost(RuntimeError(said)), is_out_of_memory(RuntimeError(said))) for said in LOST] == [(True, False)] * 3
    assert [(is_lost(RuntimeError(said)), is_out_of_memory(RuntimeError(said))) for said in FULL] == [(False, True)] * 2
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost(ValueError("CUDA error: of a file's name"))


def test_a_worker_whose_gpu_is_lost_takes_no_other_shard(db: Database, tmp_path: Path) -> None:
    """It would fail every shard of the job in a second. The attempt counts: the shard may be what broke the GPU."""
    job_id = sleeping_job(db, 3, 0.0, loses_gpu=True)
    worker = SleepingWorker(db, "a", timed=False, cache=tmp_path)
    with (
        capture_logs(),
        pytest.raises(DeviceLost, match=r"the GPU on \S+ does not answer any more \(CUDA error: un"),
    ):
        worker.work(job_id)
    found = rows(db, "select state, attempt from task where kind = 'shard' order by attempt desc")
    assert found == [("ready", 1), ("ready", 0), ("ready", 0)]
    assert worker.pulse().task_id is None


def test_a_worker_that_joined_by_itself_ends(db: Database) -> None:
    sleeping_job(db, 2, 0.0, loses_gpu=True)
    joined = Joined(db, "alone", workers=1, lease_seconds=30)
    joined.worker = SleepingWorker(db, "alone", timed=False)
    with capture_logs(), pytest.raises(DeviceLost):
        joined.work(until_idle=0)


def test_a_pulse_is_answered_whatever_the_gpu_does(
    world: World, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that hangs on a lost GPU is known by its pulse only."""
    jobs.submit(db, world.spec())
    assert jobs.work(db, 1, inline=True) is record.JobState.DONE  # torch is loaded

    def lost() -> list[tuple[str, int, int]]:
        raise RuntimeError(LOST[0])

    monkeypatch.setattr(engine.device, "gpu_memory", lost)
    pulse = Worker(db, "a", timed=False, cache=tmp_path).pulse()
    assert (pulse.pid, pulse.gpus) == (os.getpid(), ())


def test_a_fleet_replaces_a_worker_whose_gpu_is_lost(ray_here: None, db: Database) -> None:
    job_id = sleeping_job(db, 2, 0.2, loses_gpu=True)
    with capture_logs() as logs, SleepingFleet(db, [job_id], workers=1) as fleet:
        fleet.run()
    assert record.job(db, job_id).state is record.JobState.DONE
    died = [entry["reason"] for entry in logs if entry["event"] == "worker died"]
    assert died
    assert all("does not answer any more" in reason for reason in died)
    workers = rows(db, "select count(distinct worker), max(deaths) from task where kind = 'shard' and state = 'done'")
    assert workers[0][0] >= 1
    assert workers[0][1] == 0, "the process said so itself: no lease was left to expire"
