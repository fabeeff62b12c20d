"""`shortstop train` on the command line: benchmarks are looked up and kept out, models are fine-tuned."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_world import World
from typer.testing import CliRunner, Result

from cluster.cli import app
from engine.training.trainer import Trainer
from workers.benchmarks.catalogue import entry


def call(*arguments: object, stdin: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def fields(world: World, tmp_path: Path) -> dict[str, Any]:
    """A corpus of four files, one of which is the solution of HumanEval's first problem among other code."""
    solved = max((sample for sample in entry("humaneval-lines").load().samples[:8]), key=lambda one: len(one.prompt))
    for name in ("learned", "kept"):
        (tmp_path / name).mkdir()
        for file in range(4):
            code = "\n".join(f"def {name}_{file}_{i}(x):\n    return x + {i}" for i in range(20))
            (tmp_path / name / f"m{file}.py").write_text(code)
    (tmp_path / "learned" / "solved.py").write_text(code + "\n" + solved.prompt + solved.reference)
    return {
        "model": str(world.model),
        "corpus": [str(tmp_path / "learned")],
        "holdout": [str(tmp_path / "kept")],
        "tokens": 1000,
        "holdout_tokens": 500,
        "context": 32,
        "device": "cpu",
        "threads": 1,
    }


def test_a_tuned_bundle_says_what_of_a_benchmark_was_kept_out(fields: dict[str, Any], tmp_path: Path) -> None:
    tuning = {"rank": 2, "steps": 2, "windows": 1}
    spec = fields | {"exit_points": [2, 4], "rank": 4, "shortlist": 64, "epochs": 1, "tuning": tuning}
    result = call("train", "-", "--out", tmp_path / "bundle", "--json", stdin=yaml.safe_dump(spec))
    assert result.exit_code == 0, result.stderr
    manifest = json.loads(result.stdout)
    assert manifest["tuned_weights_hash"]
    [[file, why]] = manifest["corpus"][0]["removed"]
    assert file == "solved.py"
    assert why.startswith("overlaps humaneval-lines HumanEval/")
    assert "tuning: 64 of 64 tokens, loss" in result.stderr


def test_a_model_is_fine_tuned_and_exits_are_trained_for_it(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    told = call("train", "-", "--finetune", "--out", model, stdin=yaml.safe_dump(fields | {"steps": 3, "windows": 1}))
    assert told.exit_code == 0, told.stderr
    assert "name this folder as `model`" in told.stderr
    spec = fields | {"model": str(model), "exit_points": [2], "rank": 2, "epochs": 1}
    told = call("train", "-", "--out", tmp_path / "exits", stdin=yaml.safe_dump(spec))
    assert told.exit_code == 0, told.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"benchmarks": ["humaneval-line"]}, "humaneval-lines"),
        ({"tuning": {"steps": 0}, "shortlist": 8}, "tuning.steps"),
        ({"languages": ["pyton"]}, "python"),
        ({"start": "smolm2"}, "smolm2"),
    ],
)
def test_a_spec_that_asks_for_what_is_not_there_is_refused(
    fields: dict[str, Any], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    spec = fields | {"exit_points": [2], "shortlist": None} | changes
    result = call("train", "-", "--out", tmp_path / "bundle", stdin=yaml.safe_dump(spec))
    assert result.exit_code == 2, result.stderr
    [line] = result.stderr.splitlines()
    assert says in line
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "bundle.work").exists()


def test_a_loss_that_is_no_number_ends_with_1_and_names_the_step(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "take_step", lambda self: self._check("loss", float("inf")))
    spec = fields | {"exit_points": [2], "rank": 2}
    result = call("train", "-", "--out", tmp_path / "bundle", stdin=yaml.safe_dump(spec))
    assert result.exit_code == 1, result.stderr
    assert "heads: the loss is inf at step 0; the last good checkpoint is kept in" in result.stderr
