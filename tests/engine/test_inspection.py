"""`inspect` finds each fault that a bundle can have, and none in a whole one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import facts_of, make_bundle, own_cache

from engine.errors import BadInput
from engine.exits import MANIFEST, TENSORS, find_bundle, read_manifest
from engine.inspection import Check, inspect


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "exits", facts_of(tiny_folder("llama")), head="lens", shortlist=64)


def rewritten(folder: Path, **changed: torch.Tensor) -> None:
    """The same bundle with other tensors, and the hash that goes with them."""
    save_file(load_file(folder / TENSORS) | changed, folder / TENSORS)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["tensors_hash"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def faults(folder: Path, model: str | None = None) -> dict[str, str]:
    return {check.what: check.says for check in checks(folder, model) if not check.holds}


def checks(folder: Path, model: str | None = None) -> list[Check]:
    with own_cache(folder / "cache"):
        return list(inspect(folder, model))


def test_a_whole_bundle_has_no_fault(folder: Path) -> None:
    found = checks(folder)
    assert [check.what for check in found] == ["files", "tensors", "numbers", "shortlist", "deltas", "model"]
    assert all(check.holds for check in found)


def test_the_shipped_bundles_are_whole_and_small() -> None:
    """At most 30 MB together, read in under a second on any machine that is not busy."""
    from engine.exits import SHIPPED, shipped_exits

    for name in shipped_exits():
        assert {check.what: check.says for check in inspect(find_bundle(name), "smollm2-135m") if not check.holds} == {}
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 30e6


@pytest.mark.parametrize(
    ("changed", "what", "says"),
    [
        ({"heads.2.down": torch.ones(4, 5)}, "tensors", "'heads.2.down' is [4, 5]"),
        ({"heads.2.down": torch.full((4, 48), torch.nan)}, "numbers", "heads.2.down has NaN or infinity"),
        ({"shortlist": torch.arange(64).flip(0)}, "shortlist", "must rise"),
        ({"shortlist": torch.arange(64) * 10}, "shortlist", "within the vocabulary of 264"),
        ({"deltas.model.norm.full": torch.ones(48)}, "deltas", "tuned_weights_hash in exits.json is none"),
    ],
)
def test_each_fault_is_found(folder: Path, changed: dict[str, torch.Tensor], what: str, says: str) -> None:
    rewritten(folder, **changed)
    found = faults(folder)
    assert found.keys() == {what}
    assert says in found[what]


def test_a_damaged_file_ends_the_inspection(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
    assert [(check.what, check.holds) for check in checks(folder)] == [("files", False)]


def test_another_model_is_a_fault_and_an_absent_one_is_not(folder: Path, tiny_folder: Callable[[str], Path]) -> None:
    assert "trained for" in faults(folder, str(tiny_folder("llama untied")))["model"]
    manifest = json.loads((folder / MANIFEST).read_text()) | {"model": "/nowhere/at/all"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert faults(folder) == {}
    assert "not looked at" in checks(folder)[-1].says
    with pytest.raises(BadInput):
        checks(folder, "/nowhere/at/all")


def test_a_bundle_of_older_jobs_has_secs_controller(folder: Path) -> None:
    """Their `controller` is true or false."""
    assert json.loads((folder / MANIFEST).read_text())["controller"] is True
    assert read_manifest(folder).controller == "sec"
