"""A bundle that tunes the model: its deltas are in the weights, the model as it came stands beside it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import POINTS, facts_of, open_engine, random_prompts, save, write_bundle
from transformers import AutoModelForCausalLM

from engine.deltas import read_deltas, tuned_weights_hash
from engine.engine import Engine
from engine.errors import BadInput
from engine.exits import MANIFEST, TENSORS
from engine.memory import footprint
from engine.spec import policy

FULL, ORIGINAL = policy("full"), policy("original")
#: two matrices by family, one of them of another shape than its transpose
MODULES = {
    "llama": ("model.layers.1.self_attn.q_proj", "model.layers.4.mlp.down_proj"),
    "gpt2": ("transformer.h.1.attn.c_attn", "transformer.h.4.mlp.c_proj"),
}


def deltas_of(model: Path, family: str, seed: int = 5) -> dict[str, torch.Tensor]:
    """Low-rank ones of two matrices, in half precision, and a full one of the final norm."""
    torch.manual_seed(seed)
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    tensors = {}
    for module in MODULES[family]:
        shape = weights[f"{module}.weight"].shape
        outputs, inputs = shape if family == "llama" else reversed(shape)
        tensors[f"deltas.{module}.a"] = (torch.randn(3, inputs) * 0.3).half()
        tensors[f"deltas.{module}.b"] = (torch.randn(outputs, 3) * 0.3).half()
    norm = "model.norm" if family == "llama" else "transformer.ln_f"
    tensors[f"deltas.{norm}.full"] = torch.randn(weights[f"{norm}.weight"].shape) * 0.1
    return tensors


def tuned_bundle(folder: Path, model: Path, family: str, **fields: object) -> Path:
    tensors, facts = deltas_of(model, family), facts_of(model)
    made = {"head": "tied", "exit_points": POINTS, "shortlist": None, "controller": None} | fields
    made.setdefault("tuned_weights_hash", tuned_weights_hash(facts.weights_hash, tensors))
    return write_bundle(folder, facts, tensors, **made)


def tokens(engine: Engine, spec: object) -> list[list[int]]:
    start = engine.prefill(random_prompts(3, seed=1), 12, untuned=spec.untuned)  # type: ignore[attr-defined]
    decoded = engine.decode(start, spec, max_new_tokens=12, ends_with_line=False)  # type: ignore[arg-type]
    return [completion.token_ids for completion in decoded.completions]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_deltas_are_in_the_weights_and_the_original_is_beside_them(
    tiny_folder: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """Tokens of the tuned model are those of a model saved with W + b a; those of `original` are the plain model's."""
    model = tiny_folder(family)
    engine = open_engine(model, tuned_bundle(tmp_path / "exits", model, family))

    by_hand = AutoModelForCausalLM.from_pretrained(model)
    for module in MODULES[family]:
        a, b = (deltas_of(model, family)[f"deltas.{module}.{part}"].float() for part in "ab")
        weight = by_hand.get_parameter(f"{module}.weight")
        weight.data = weight + (b @ a if family == "llama" else (b @ a).T)
    norm = "model.norm" if family == "llama" else "transformer.ln_f"
    by_hand.get_parameter(f"{norm}.weight").data += deltas_of(model, family)[f"deltas.{norm}.full"]
    merged = open_engine(save(by_hand, tmp_path / "merged"))

    assert tokens(engine, FULL) == tokens(merged, FULL)
    assert tokens(engine, ORIGINAL) == tokens(open_engine(model), FULL)
    assert tokens(engine, FULL) != tokens(engine, ORIGINAL)


def test_neither_weights_complete_what_the_other_prefilled(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    engine = open_engine(tiny_folder("llama"), tuned_bundle(tmp_path / "exits", tiny_folder("llama"), "llama"))
    for spec, other in ((FULL, True), (ORIGINAL, False)):
        start = engine.prefill(random_prompts(1), 4, untuned=other)
        with pytest.raises(BadInput, match="completes what its own weights have prefilled"):
            engine.decode(start, spec, max_new_tokens=4, ends_with_line=False)


def test_original_is_refused_where_nothing_is_tuned(tiny_engine: Callable[..., Engine]) -> None:
    for engine in (tiny_engine("llama", head="tied"), tiny_engine("llama")):
        with pytest.raises(BadInput, match="here they change nothing"):
            engine.check(ORIGINAL)


def test_a_tuned_model_takes_the_memory_of_two(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, facts = tiny_folder("llama"), facts_of(tiny_folder("llama"))
    plain, tuned = (
        footprint(facts, "float32", folder) for folder in (None, tuned_bundle(tmp_path / "exits", model, "llama"))
    )
    assert tuned.weights > 2 * plain.weights
    cache = 4 * 50 * plain.position
    assert tuned.batch(4, 50) == plain.batch(4, 50) + cache


def test_other_deltas_than_those_that_are_told_of_are_refused(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_folder("llama")
    for name, told in (("another", "0" * 64), ("none", None)):
        with pytest.raises(BadInput, match=r"tuned_weights_hash in exits\.json is .* get the bundle again"):
            open_engine(model, tuned_bundle(tmp_path / name, model, "llama", tuned_weights_hash=told))


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("deltas.model.layers.9.mlp.up_proj.full", (80, 48), "which the model has not"),
        ("deltas.model.layers.1.mlp.up_proj.full", (48, 80), r"are \[48, 80\], but the model has \[80, 48\] there"),
        ("deltas.model.layers.1.mlp.up_proj.a", (3, 48), r"must have a \[rank, inputs\] and b"),
        ("deltas.model.norm.scale", (48,), "is no delta"),
    ],
)
def test_deltas_that_do_not_fit_are_refused(
    tiny_folder: Callable[[str], Path], tmp_path: Path, name: str, shape: tuple[int, ...], says: str
) -> None:
    facts, tensors = facts_of(tiny_folder("llama")), {name: torch.ones(shape)}
    folder = write_bundle(
        tmp_path / "exits", facts, tensors, head="tied", exit_points=POINTS, shortlist=None, controller=None,
        tuned_weights_hash=tuned_weights_hash(facts.weights_hash, tensors),
    )  # fmt: skip
    with pytest.raises(BadInput, match=says):
        open_engine(tiny_folder("llama"), folder)


def test_the_hash_of_tuned_weights_tells_every_change(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tuned_bundle(tmp_path / "exits", tiny_folder("llama"), "llama")
    deltas, told = read_deltas(folder), json.loads((folder / MANIFEST).read_text())
    assert deltas.keys() == load_file(folder / TENSORS).keys()
    known = told["tuned_weights_hash"]
    assert tuned_weights_hash(told["weights_hash"], deltas) == known
    name = min(deltas)
    changed = deltas | {name: deltas[name] + 0.01}
    renamed = {other.replace("layers.1", "layers.2"): tensor for other, tensor in deltas.items()}
    hashes = {tuned_weights_hash(told["weights_hash"], one) for one in (changed, renamed)}
    assert len({known, tuned_weights_hash("0" * 64, deltas), *hashes}) == 4
    assert tuned_weights_hash("0" * 64, {"shortlist": torch.ones(3)}) is None
