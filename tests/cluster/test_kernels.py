"""Kernels on their way through a worker: read from the record, noted with the job, found in its report."""

from pathlib import Path

import pytest
from small_world import World, rows

from cluster import jobs
from cluster.reports.build import build_report
from db import devices, queue
from db import jobs as record
from db.session import Database
from engine.engine import Engine
from engine.kernels import COUNTS
from workers.pinned import Pinned
from workers.shelf import EngineShelf


def test_a_worker_takes_the_plan_that_the_record_has(
    world: World, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others of its device class measured, and nothing is measured again; another class's plan is not read."""
    jobs.submit(db, world.spec())
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    pinned = Pinned.model_validate(record.job(db, 1).pinned)
    shapes = Engine(pinned.model, world.exits, device="cpu", threads=1).matrix_shapes
    for device_class, kernel in [("another", "packed"), (pinned.device_class, "columns")]:
        devices.kernel_plan(db, device_class, shapes, lambda _, k=kernel: dict.fromkeys(shapes, [k] * len(COUNTS)))
    monkeypatch.setattr(Engine, "measure_kernels", lambda *_: pytest.fail("measured again"))
    engine = EngineShelf(db, tmp_path).take(pinned)
    assert engine.kernels == dict.fromkeys(shapes, ["columns"] * len(COUNTS))


def test_a_report_has_the_kernels_and_drafts_of_its_workers(world: World, db: Database) -> None:
    """From the engine to the report, every number on the way the same."""
    job_id = jobs.submit(db, world.spec(policies=["full", {"self-speculative": {"exit_layer": 4, "threshold": 0}}]))
    assert jobs.work(db, job_id, inline=True) is jobs.JobState.DONE
    report = build_report(db, job_id)
    pinned = record.job(db, job_id).pinned
    [(device_class, kernels)] = report.provenance["kernels"].items()
    assert device_class == pinned["device_class"]
    assert set(kernels) == set(Engine(pinned["model"], world.exits, device="cpu", threads=1).matrix_shapes)
    assert devices.kernel_plan(db, device_class, list(kernels), lambda _: pytest.fail("not in the record")) == kernels

    full, drafting = (run.summary for run in report.runs)
    assert (full.drafted, full.drafts_kept_share) == (0, None)
    assert drafting.drafted >= drafting.drafts_kept > 0
    [(drafted, kept)] = rows(db, "select sum(drafted), sum(drafts_kept) from batch where policy <> 'full'")
    assert (drafting.drafted, drafting.drafts_kept) == (drafted, kept)
    of_policy = (
        "select count(draft_layer), sum(draft_kept) from token group by policy = 'full' order by policy = 'full'"
    )
    [(looked_at, token_kept), nothing] = rows(db, of_policy)
    assert (token_kept, nothing) == (kept, (0, None))
    assert kept < looked_at <= drafted, "random heads are wrong now and then"
