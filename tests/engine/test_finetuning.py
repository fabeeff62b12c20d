"""Fine-tuning: a model learns a language, goes on where it was interrupted, and is then a model like any other."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.engine import Engine
from engine.errors import BadInput
from engine.training.finetune import NOTE, finetune
from engine.training.spec import FineTuneSpec
from engine.training.workplace import Progress


class PowerCut(Exception):
    """Ends a training from outside, wherever it is."""


@pytest.fixture
def spec(tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> FineTuneSpec:
    monkeypatch.setenv("SHORTSTOP_CACHE", str(tmp_path / "cache"))
    for name in ("one", "kept"):
        for file in range(6):
            path = tmp_path / name / f"m{file}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(f"def {name}_{file}_{i}(x):\n    return x + {i}" for i in range(12)))
    return FineTuneSpec(
        model=str(tiny_folder("gpt2")),
        corpus=[str(tmp_path / "one")],
        holdout=[str(tmp_path / "kept")],
        tokens=1000,
        holdout_tokens=500,
        context=32,
        steps=30,
        windows=4,
        learning_rate=3e-3,
        warm_up=2,
        evaluate_every=10,
        save_every=0,
        device="cpu",
        threads=1,
    )


def test_a_model_learns_a_language_and_is_a_model_like_any_other(spec: FineTuneSpec, tmp_path: Path) -> None:
    folder = finetune(spec, tmp_path / "python-gpt2")
    looks = [json.loads(line) for line in (tmp_path / "python-gpt2.log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in looks if entry.get("held_out")]
    assert losses[-1] < 0.8 * losses[0]
    engine = Engine(str(folder), device="cpu")
    assert engine.weights_hash != Engine(spec.model, device="cpu").weights_hash
    [completion] = engine.complete(["def one_1_"], max_new_tokens=4)
    assert len(completion.token_ids) == 4
    how = json.loads((folder / NOTE).read_text())
    assert how["training"] == spec.model_dump(mode="json")
    assert [(entry["source"], entry.get("held_out", False)) for entry in how["corpus"]] == [
        ("one", False), ("kept", True),
    ]  # fmt: skip


def test_an_interrupted_fine_tuning_ends_as_an_unbroken_one(spec: FineTuneSpec, tmp_path: Path) -> None:
    def cut(now: Progress) -> None:
        if now.done >= 17 * 128:
            raise PowerCut

    unbroken = finetune(spec, tmp_path / "unbroken")
    with pytest.raises(PowerCut):
        finetune(spec, tmp_path / "broken", cut)
    assert not (tmp_path / "broken").exists()
    broken = finetune(spec, tmp_path / "broken")
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (unbroken, broken))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "broken.work").exists()


def test_a_full_disk_at_the_very_end_loses_nothing(spec: FineTuneSpec, tmp_path: Path) -> None:
    """The model that would be written has no room: one sentence, no half of it, and the command goes on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(now: Progress) -> None:
        if now.done == now.total:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))

    try:
        with pytest.raises(BadInput, match=r"^out: .*model cannot be written .* make room"):
            finetune(spec, tmp_path / "model", fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.log.jsonl", "model.work"]
    assert (finetune(spec, tmp_path / "model") / NOTE).exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"context": 1000, "holdout_tokens": 2000}, "nothing is left"),
        ({"model": "no-such"}, "no-such"),
        ({"corpus": ["no_such"]}, "no_such"),
    ],
)
def test_a_fine_tuning_that_cannot_be_is_refused(
    spec: FineTuneSpec, tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        finetune(FineTuneSpec.model_validate(spec.model_dump() | fields), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.work").exists()
