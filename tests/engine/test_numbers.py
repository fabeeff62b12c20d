"""Weights that have gone bad stop the work with a message; numbers at the rim of their type do not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import N_LAYERS, facts_of, make_bundle, open_engine, random_model, random_prompts, save, write_bundle

from engine.decode import Decoding, Ends
from engine.engine import Engine, Prompt
from engine.errors import NumericalError
from engine.heads import choose
from engine.policies import CONTINUE, EXIT, Rule, Verdict, View
from engine.spec import PolicySpec, policy

PROMPTS = random_prompts(3, seed=4, shortest=5, longest=9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bad_weights_are_named(kind: str, bad: float, tmp_path: Path) -> None:
    """Protects results from NaN: the argmax of NaN is a token like any other."""
    model = random_model(kind)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights["lm_head.weight" if "lm_head.weight" in weights else _embedding(kind)][17, 3] = bad
        _last_layer(model, kind).fill_(bad)
    engine = open_engine(save(model, tmp_path / "model"))
    with pytest.raises(NumericalError, match=rf"after layer {N_LAYERS}, at position 5 are not finite; check"):
        engine.complete(["def f", "x"], max_new_tokens=3)


def _embedding(kind: str) -> str:
    return "model.embed_tokens.weight" if kind == "llama" else "transformer.wte.weight"


def _last_layer(model: torch.nn.Module, kind: str) -> torch.Tensor:
    return model.model.layers[-1].mlp.down_proj.weight if kind == "llama" else model.transformer.h[-1].mlp.c_proj.weight


def test_a_bad_head_is_named(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """Protects tokens that leave: their head's logits are looked at too, where they were made."""
    facts = facts_of(tiny_folder("llama"))
    weight = torch.full((facts.vocab_size, facts.hidden_size), float("nan"))
    folder = write_bundle(
        tmp_path / "bad", facts, {"heads.2.weight": weight}, head="untied", exit_points=(2,), controller=False
    )
    engine = open_engine(tiny_folder("llama"), folder)
    with pytest.raises(NumericalError, match=r"the logits after layer 2, at position 7 are not finite"):
        _only_row(1, engine)


@pytest.mark.parametrize(
    ("tensor", "spec"),
    [
        ("heads.2.weight", policy("confidence", threshold=0.5)),
        ("heads.2.weight", policy("entropy", threshold=0.5)),
        ("controller", policy("controller", exit=0.5, stop=0.5)),
    ],
    ids=["confidence", "entropy", "controller"],
)
def test_exits_of_nan_are_no_full_depth(
    tensor: str, spec: PolicySpec, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """Protects against broken exits that look like a policy which never leaves: NaN exceeds no threshold."""
    facts = facts_of(tiny_folder("llama"))
    tensors = {
        "heads.2.weight": torch.randn(facts.vocab_size, facts.hidden_size),
        "controller": torch.randn(3, facts.hidden_size),
    }
    tensors[tensor].fill_(float("nan"))
    folder = write_bundle(tmp_path / "bad", facts, tensors, head="untied", exit_points=(2,), controller=True)
    engine = open_engine(tiny_folder("llama"), folder)
    start = engine.prefill([Prompt([5, 6, 7])], 4)
    with pytest.raises(NumericalError, match=r"after layer 2, at position 4 are not finite"):
        engine.decode(start, spec, max_new_tokens=4, ends_with_line=False)


def _only_row(row: int, engine: Engine) -> None:
    """Leave at layer 2 with one row only, so that the message must find it."""
    prompts = [Prompt([5, 6, 7]), Prompt([5, 6, 7, 8, 9, 10]), Prompt([9])]
    start = engine.prefill(prompts, 4).start
    with torch.inference_mode():
        Decoding(engine.stack, engine.heads, _Leaves(row), policy("fixed", exit_layer=2), start, Ends(4, {})).run()


class _Leaves(Rule):
    """One row leaves after layer 2; the others go on."""

    def __init__(self, row: int) -> None:
        self.points, self.row = (2,), row

    def decide(self, view: View) -> Verdict:
        return Verdict(torch.tensor([EXIT if row == self.row else CONTINUE for row in view.rows]))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "codegen", "gpt_bigcode", "starcoder2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_run_every_policy(
    dtype: str, kind: str, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """Protects the types: states, heads, cache and copies stay in the model's, confidences in float32."""
    folder = tiny_folder(kind)
    bundle = make_bundle(tmp_path / "exits", facts_of(folder), head="lens", shortlist=100)
    engine = open_engine(folder, bundle, dtype=dtype)
    start = engine.prefill(PROMPTS, 5)
    for kind, options in (
        ("full", {}),
        ("fixed", {"exit_layer": 2}),
        ("confidence", {"threshold": 0.2, "kv": "recompute"}),
        ("patience", {"patience": 1}),
        ("controller", {"exit": 0.4, "stop": 0.9}),
    ):
        decoded = engine.decode(start, policy(kind, **options), max_new_tokens=5, ends_with_line=False)
        assert all(0 < p <= 1 for row in decoded.completions for p in row.confidences)


def test_probabilities_of_extreme_logits() -> None:
    """Protects confidences from overflow: they are probabilities whatever the logits' size, and NaN shows."""
    logits = torch.tensor([[90.0, -90.0, 0.0], [90.0, 90.0, 0.0], [-1e30, -2e30, -3e30], [float("-inf"), 0.0, 0.0]])
    chosen = choose(logits)
    assert chosen.confidences.tolist() == pytest.approx([1.0, 0.5, 1.0, 0.5], rel=1e-5)
    assert chosen.tokens.tolist() == [0, 0, 0, 1], "the first of equals wins"
    assert choose(torch.tensor([[float("nan"), 0.0]])).confidences.isnan().all()
    assert choose(torch.tensor([[float("inf"), 0.0]])).confidences.isnan().all()
