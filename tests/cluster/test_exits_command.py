"""`shortstop exits`: bundles listed, shown, checked, drawn and imported."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_world import World
from tiny_models import HIDDEN, own_cache
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.reports.reliability import render_reliability
from engine.exits import TENSORS, find_bundle, read_manifest, shipped_exits, write_bundle


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["exits", *arguments])


def test_shipped_bundles_are_listed() -> None:
    assert set(json.loads(call("list", "--json").stdout)) == set(shipped_exits())
    assert "smollm2-135m" in call("list").stdout


def test_a_bundle_is_shown_with_what_it_learned_from_and_how_well() -> None:
    text = call("show", "smollm2-135m").stdout
    manifest = read_manifest(find_bundle("smollm2-135m"))
    assert manifest.weights_hash[:12] in text
    assert all(entry["source"] in text for entry in manifest.corpus)
    assert f"{manifest.scores['24']['agrees']:.3f}" in text
    assert json.loads(call("show", "smollm2-135m", "--json").stdout)["exit_points"] == list(manifest.exit_points)


def test_verify_ends_with_1_where_something_does_not_hold(world: World, tmp_path: Path) -> None:
    with own_cache(tmp_path / "cache"):
        whole = call("verify", str(world.exits))
        assert (whole.exit_code, "FAULT" in whole.stdout) == (0, False)
        (damaged := tmp_path / "damaged").mkdir()
        for file in world.exits.iterdir():
            if file.is_file():
                (damaged / file.name).write_bytes(file.read_bytes())
        (damaged / TENSORS).write_bytes(b"nothing")
        broken = call("verify", str(damaged))
        assert broken.exit_code == 1
        assert "is damaged" in broken.stdout
        assert [check["holds"] for check in json.loads(call("verify", str(damaged), "--json").stdout)] == [False]


def test_an_unknown_bundle_is_bad_input() -> None:
    for command in ("show", "verify"):
        result = call(command, "smollm2-153m")
        assert result.exit_code == 2
        assert "did you mean 'smollm2-135m'" in result.stderr


def test_a_layerskip_checkpoint_is_imported(world: World, tmp_path: Path) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(world.model)
    with torch.no_grad():
        tuned.get_parameter("model.norm.weight").add_(torch.ones(HIDDEN))
    torch.save({"model_state_dict": tuned.state_dict()}, tmp_path / "checkpoint_5.pt")
    arguments = ["layerskip", str(tmp_path / "checkpoint_5.pt"), "--model", str(world.model), "--out"]
    with own_cache(tmp_path / "cache"):
        refused = call("import", *arguments, str(tmp_path / "made"), "--exit-points", "2,9")
        assert (refused.exit_code, "9 is outside the model" in refused.stderr) == (2, True)
        refused = call("import", *arguments, str(tmp_path / "made"), "--exit-points", "2;4")
        assert (refused.exit_code, "give layers with commas" in refused.stderr) == (2, True)
        assert not (tmp_path / "made").exists()
        done = call("import", *arguments, str(tmp_path / "made"), "--exit-points", "2,4")
        assert done.exit_code == 0, done.stderr
        assert call("verify", str(tmp_path / "made")).exit_code == 0
    assert read_manifest(tmp_path / "made").tunes


def test_reliability_is_drawn_as_one_file(tmp_path: Path) -> None:
    """A diagram an exit point, the scores in a table, nothing loaded; what has no record of it says so."""
    plain = read_manifest(find_bundle("smollm2-135m"))
    bins = {"exit": [(0.05, 0.1, 40), (0.95, 0.9, 160)], "stop": [(0.2, 0.25, 200)]}
    manifest = plain.model_copy(update={"reliability": {"12": bins, "24": bins}})
    page = render_reliability(manifest, "<b>mine</b>")
    assert "<b>mine</b>" not in page
    charts = json.loads(page.split('id="charts">')[1].split("</script>")[0])
    assert set(charts) == {"point-12", "point-24"}
    diagonal, leave, stop = charts["point-12"]["data"]
    assert (leave["name"], leave["x"], leave["y"]) == ("exit", [0.05, 0.95], [0.1, 0.9])
    assert stop["x"] == [0.2]
    assert diagonal["x"] == diagonal["y"] == [0, 1]
    assert f"{plain.scores['12']['exit_precision']:.3f}" in page


def test_what_was_not_recorded_cannot_be_drawn(tmp_path: Path) -> None:
    shipped = find_bundle("smollm2-135m")
    older = read_manifest(shipped).model_copy(update={"reliability": {}})
    write_bundle(tmp_path / "older", older, load_file(shipped / TENSORS))
    result = call("show", str(tmp_path / "older"), "--html", str(tmp_path / "page.html"))
    assert result.exit_code == 2
    assert "no reliability was recorded" in result.stderr
    assert not (tmp_path / "page.html").exists()
