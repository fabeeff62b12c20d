"""Jobs from the command line, without working on them: submitted once, paused, retried, cancelled."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from made import claimed, planned_job, planned_policy, summarise, work
from small_world import World, wait_for
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

import cluster.jobs
from cluster.cli import app
from db import jobs, planning, queue, results
from db.jobs import JobState
from db.session import Database
from workers.worker import IDLE_SECONDS


def call(db: Database, *arguments: object) -> Result:
    return CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--database", db.url])


def answered(db: Database, *arguments: object) -> Any:
    result = call(db, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(db: Database, *arguments: object) -> str:
    result = call(db, *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    [line] = result.stderr.splitlines()
    return line


def killed(db: Database, kind: str = "shard") -> None:
    for _ in range(queue.MAX_ATTEMPTS):
        assert queue.claim(db, "doomed", kind=kind) is not None
        queue.reap(db, dead_workers=["doomed"])


def test_submit_prints_a_number_and_leaves_the_work(world: World, db: Database, tmp_path: Path) -> None:
    spec = world.spec_file(tmp_path / "spec.yaml")
    done = call(db, "submit", spec, "-O", "name=mine")
    assert (done.exit_code, done.stdout) == (0, "1\n")
    assert answered(db, "submit", spec) == {"job": 2}
    assert (jobs.job(db, 1).name, jobs.job(db, 1).state) == ("mine", JobState.PREPARING)
    assert "did you mean" in refusal(db, "submit", spec, "-O", "model=smolm2-135m")
    assert len(jobs.list_jobs(db)) == 2


def test_a_script_may_submit_again_under_its_key(world: World, db: Database, tmp_path: Path) -> None:
    """The same key and spec are the same job; another spec is refused and changes nothing."""
    spec = world.spec_file(tmp_path / "spec.yaml")
    numbers = [call(db, "submit", spec, "--key", "nightly").stdout for _ in range(2)]
    assert numbers == ["1\n", "1\n"]
    told = refusal(db, "submit", spec, "--key", "nightly", "-O", "shard_batches=3")
    assert told == "shortstop: key 'nightly' belongs to job 1, which was submitted with another spec; take another key."
    for empty in ("", " "):
        told = refusal(db, "submit", spec, "--key", empty)
        assert told == f"shortstop: key {empty!r} is empty; give the job a name of its own, or leave the key out."
    assert len(jobs.list_jobs(db)) == 1


def test_a_job_is_paused_and_says_so(db: Database) -> None:
    job_id = planned_job(db)
    assert call(db, "pause", job_id).stdout == f"job {job_id}: paused\n"
    assert call(db, "pause", job_id).stdout == f"job {job_id}: was paused already\n"
    assert answered(db, "pause", job_id)["paused"] is True
    for command in (("list",), ("show", job_id)):
        assert "ready, paused" in call(db, *command).stdout
    jobs.cancel_job(db, job_id)
    assert "paused" not in call(db, "list").stdout
    assert "only a job that has not ended can be paused" in refusal(db, "pause", job_id)


def test_cancel_ends_a_job_once(db: Database) -> None:
    job_id = planned_job(db)
    assert call(db, "cancel", job_id).stdout == f"job {job_id}: cancelled\n"
    assert jobs.job(db, job_id).state is JobState.CANCELLED
    told = refusal(db, "cancel", job_id)
    assert told == f"shortstop: job {job_id} is cancelled; only a job that has not ended can be cancelled."
    assert "job 99 does not exist" in refusal(db, "cancel", 99)


def test_a_cancelled_job_is_not_resumed(db: Database) -> None:
    """One sentence instead of half a report. Red without the look at the state in `resume_job`."""
    job_id = planned_job(db)
    jobs.cancel_job(db, job_id)
    told = refusal(db, "resume", job_id, "--inline")
    assert told == f"shortstop: job {job_id} was cancelled, and what was left of it is gone; submit it again."
    assert "job 99 does not exist" in refusal(db, "resume", 99)


def test_a_cancel_takes_an_added_policy_back(db: Database) -> None:
    job_id = planned_job(db)
    work(db)
    results.finalise(db, job_id, summarise)
    planning.add_policy(db, job_id, planned_policy("patience patience=2"))
    told = f"job {job_id}: the policy that was added is taken back, it is done as before\n"
    assert call(db, "cancel", job_id).stdout == told
    assert "only a job that has not ended can be cancelled" in refusal(db, "cancel", job_id)


def test_dead_tasks_are_shown_and_retried(db: Database) -> None:
    """`retry` makes them ready and works on nothing."""
    job_id = planned_job(db, 8)
    assert "has no dead task to retry" in refusal(db, "retry", job_id)
    killed(db)
    shown = call(db, "show", job_id).stdout
    assert f"dead, until `shortstop retry {job_id}` or `shortstop resume {job_id}`" in shown
    assert "worker doomed went silent during attempt 4" in shown
    [dead] = answered(db, "show", job_id)["dead"]
    assert (dead["kind"], dead["first_batch"], dead["end_batch"], dead["attempt"]) == ("shard", 0, 2, 4)
    assert call(db, "retry", job_id).stdout == f"job {job_id}: dead tasks that are ready again: 1\n"
    assert "dead, until" not in call(db, "show", job_id).stdout
    assert claimed(db).task_id == dead["id"]


def test_a_dead_prepare_task_is_shown(db: Database) -> None:
    job_id = jobs.create_job(db, name="made", spec={"model": "none"})
    killed(db, "prepare")
    assert "prepare" in call(db, "show", job_id).stdout
    assert call(db, "retry", job_id).exit_code == 0
    assert jobs.job(db, job_id).state is JobState.PREPARING


@pytest.mark.parametrize("prepared", [False, True])
def test_work_on_a_paused_job_says_so_and_waits(world: World, db: Database, prepared: bool) -> None:
    """One sentence a pause, and the work goes on when the pause ends. Red without `_Pauses.tell`."""
    job_id = cluster.jobs.submit(db, world.spec(policies=["full"], benchmarks=[short(world)]))
    if prepared:
        cluster.jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    jobs.pause_job(db, job_id)
    with capture_logs() as logs:

        def told() -> list[str]:
            return [entry["event"] for entry in logs if "paused" in entry["event"]]

        def resume_when_told() -> None:
            wait_for("the pause is told", told)
            time.sleep(4 * IDLE_SECONDS)  # rounds in which it is not said again
            jobs.resume_job(db, job_id)

        resuming = threading.Thread(target=resume_when_told)
        resuming.start()
        assert cluster.jobs.work(db, job_id, inline=True) is JobState.DONE
        resuming.join()
    assert told() == [f"job {job_id} is paused and waits; `shortstop resume {job_id}` lets it go on"]


def short(world: World) -> dict[str, object]:
    """Few of the world's prompts."""
    return {"jsonl": str(world.prompts), "id": "id", "group": "file", "ends": "text", "samples": 4}
