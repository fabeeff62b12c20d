"""Exits that tune the model have two references in every job: the model as it came, and the tuned one at full depth."""

import json
from pathlib import Path

import pytest
import torch
from invented import around, benchmark, report, run
from small_world import World, columns, rows
from test_reports_views import Page, printed
from tiny_models import facts_of, write_bundle

from cluster import jobs
from cluster.cli import app  # noqa: F401 - the command line must load with them
from cluster.reports.build import build_report
from cluster.reports.figures import scatter
from cluster.reports.notes import benchmark_notes, headline
from cluster.reports.page import render_page
from db import jobs as record
from db.session import Database
from engine.deltas import tuned_weights_hash
from engine.exits import read_manifest

POLICIES = ["full", {"confidence": {"threshold": 0.2}}]


def tuned_exits(folder: Path, model: Path, scale: float = 0.3) -> Path:
    facts = facts_of(model)
    torch.manual_seed(3)
    tensors = {
        "deltas.model.layers.3.mlp.up_proj.a": torch.randn(2, 48) * scale,
        "deltas.model.layers.3.mlp.up_proj.b": torch.randn(80, 2) * scale,
    }
    return write_bundle(
        folder, facts, tensors, head="tied", exit_points=(2, 4), shortlist=None, controller=None,
        tuned_weights_hash=tuned_weights_hash(facts.weights_hash, tensors),
    )  # fmt: skip


@pytest.fixture
def job_id(world: World, db: Database, tmp_path: Path) -> int:
    exits = tuned_exits(tmp_path / "exits", world.model)
    job_id = jobs.submit(db, world.spec(exits=str(exits), policies=POLICIES, metrics=["rouge_l", "token_agreement"]))
    assert jobs.work(db, job_id, inline=True) is jobs.JobState.DONE
    return job_id


def test_the_original_runs_beside_the_tuned_model(world: World, db: Database, job_id: int) -> None:
    """Its completions are those of a job without exits, and a prefill of its own stands behind them."""
    plain = jobs.submit(db, world.spec(exits=None, policies=["full"], metrics=["rouge_l", "token_agreement"]))
    jobs.work(db, plain, inline=True)
    mine, theirs = columns(db, job_id), columns(db, plain)
    samples = [sample for policy, sample in theirs if policy == "full"]
    assert [run.policy for run in record.runs(db, job_id)] == ["full", "original", "confidence threshold=0.2"]
    assert [mine["original", one] for one in samples] == [theirs["full", one] for one in samples]
    assert any(mine["full", one] != theirs["full", one] for one in samples)
    prefills = rows(
        db,
        "select count(distinct t.prefill_ns) from timing t join run r on r.id = t.run_id "
        f"where r.job_id = {job_id} group by t.batch",
    )
    assert prefills == [(2,)] * 12, "one prefill for the tuned weights, one for the others"


def test_every_run_is_held_against_both(db: Database, job_id: int) -> None:
    found = build_report(db, job_id).benchmarks[0]
    full, original, confidence = (one.summary for one in found.runs)
    assert [one.kind for one in found.challengers] == ["confidence"]
    against = full.changed_from_original("rouge_l").value
    assert against == pytest.approx(full.metric("rouge_l").value - original.metric("rouge_l").value)  # type: ignore[operator]
    assert original.changed("rouge_l").value == pytest.approx(-against)  # type: ignore[operator]
    assert original.change_from_original == {}
    expected = confidence.metric("rouge_l").value - original.metric("rouge_l").value  # type: ignore[operator]
    assert confidence.changed_from_original("rouge_l").value == pytest.approx(expected)
    assert "change_from_original_rouge_l" in build_report(db, job_id).table().columns


def test_provenance_names_both_weights(db: Database, job_id: int, tmp_path: Path) -> None:
    pinned, manifest = record.job(db, job_id).pinned, read_manifest(tmp_path / "exits")
    assert pinned["weights_hash"] == manifest.weights_hash
    assert pinned["tuned_weights_hash"] == manifest.tuned_weights_hash
    page = render_page(build_report(db, job_id))
    assert manifest.weights_hash in page
    assert str(manifest.tuned_weights_hash) in page


def test_a_spec_that_names_the_original_gets_it_once(world: World, tmp_path: Path) -> None:
    exits = tuned_exits(tmp_path / "exits", world.model)
    spec = world.spec(exits=str(exits), policies=[{"confidence": {"threshold": 0.2}}, "original"])
    assert jobs.validate(spec).policies == ["full", "confidence threshold=0.2", "original"]


def test_exits_that_tune_nothing_have_one_reference(world: World) -> None:
    assert "original" not in jobs.validate(world.spec()).policies


def both() -> dict[str, object]:
    """A benchmark whose tuned model lost a little."""
    from_original = {"rouge_l": around(-0.004, 0.003), "rouge_l_relative": around(-0.0061, 0.005)}
    return {
        "runs": [
            run("A", "full", 1.0, 0.6, change_from_original=from_original),
            run("B", "original", 1.3, 0.604),
            run("C", "confidence threshold=0.95", 1.2, 0.59, change_from_original={"rouge_l": around(-0.0140)}),
        ]
    }


def test_reports_show_both_references() -> None:
    found = benchmark(**both())
    assert headline(found).startswith("confidence threshold=0.95 is the fastest"), "a reference is no policy"
    assert [note.text for note in benchmark_notes(found) if "two references" in note.text] == [
        "The exits tune the model, so there are two references: original is the model as it came, full the tuned one "
        "at full depth, whose ROUGE-L is −0.6% away from it (−1.1% to −0.1%). Speedups are against the tuned one."
    ]
    text = printed(report(benchmarks=[found]), width=160)
    assert "original" in text
    assert "−0.014" in text
    page = Page(render_page(report(benchmarks=[found])))
    assert "from the original" in page.text
    assert "−0.014" in page.text
    figure = scatter(found, "token")
    assert figure is not None
    assert [trace["name"] for trace in figure["data"]][1:] == ["full depth", "as it came", "faster"]
    assert "from the original" not in Page(render_page(report())).text
    assert json.loads(report(benchmarks=[found]).model_dump_json())
