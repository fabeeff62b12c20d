"""The same code on a GPU: parity, policies, drafts and clocks. No GPU has run these yet."""

from pathlib import Path

import pytest
import torch
from test_parity import differences, generate, write
from tiny_models import CONFIGS, facts_of, make_bundle, own_cache, random_model, random_prompts, save

from engine.engine import Engine
from engine.spec import policy
from engine.stopwatch import Stopwatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")]

NEW = 10
PROMPTS = random_prompts(8, seed=4, longest=30)
KV = ({"kv": "copy"}, {"kv": "mask"}, {"kv": "recompute"}, {"kv": "recompute", "verify": True})
POLICIES = [
    *(policy("confidence", threshold=0.15, **kv) for kv in KV),
    *(policy("controller", exit=0.4, stop=0.9, **kv) for kv in KV),
    policy("confidence", threshold=0.15, ask_above=0.3, preview=4),
    policy("controller", exit=0.4, stop=0.9, preview=20),
    policy("patience", patience=1),
    policy("entropy", threshold=3.5),
    policy("margin", threshold=0.1),
    policy("state-similarity", threshold=0.8),
    policy("position", deepest=6, shallowest=2, over=5),
    policy("random", exit_layers=[2, 4], shares=[0.3, 0.3]),
    policy("static", layers=[3]),
    policy("self-speculative", exit_layer=5, threshold=0.1),
]


def on_gpu(folder: Path, exits: Path | None = None, dtype: str = "float32") -> Engine:
    with own_cache(folder / "cache"):
        return Engine(str(folder), exits, device="cuda", dtype=dtype)


@pytest.mark.parametrize("kind", CONFIGS)
def test_parity(kind: str, tmp_path: Path) -> None:
    """Protects full depth on a GPU: the tokens are those of `transformers` on the CPU, but for float ties."""
    peer = random_model(kind)
    engine = on_gpu(save(random_model(kind), tmp_path / "model"))
    for batch_size in (8, 1):
        theirs = generate(peer, PROMPTS, NEW, batch_size)
        differences(peer, PROMPTS, write(engine, PROMPTS, NEW, batch_size), theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", POLICIES, ids=lambda spec: spec.label)
def test_every_policy(spec: object, dtype: str, tmp_path: Path) -> None:
    """Protects what rules, debts and records do with tensors of a GPU; verified tokens are full depth's."""
    folder = save(random_model("llama"), tmp_path / "model")
    engine = on_gpu(folder, make_bundle(tmp_path / "exits", facts_of(folder), head="lens", shortlist=100), dtype)
    start = engine.prefill(PROMPTS, NEW)
    done = engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False)
    assert done.decode_ns > 0
    assert all(completion.n_tokens for completion in done.completions)
    if spec.verify and dtype == "float32":
        full = engine.decode(start, policy("full"), max_new_tokens=NEW, ends_with_line=False)
        for one, other in zip(done.completions, full.completions, strict=True):
            assert one.token_ids == other.token_ids[: one.n_tokens]


def test_events_measure_the_gpu() -> None:
    """Protects timing: a clock that did not wait would see only the launches of these products."""
    device, square = torch.device("cuda"), torch.ones(8192, 8192, device="cuda")
    with Stopwatch(device):
        square @ square
    with Stopwatch(device) as one:
        square @ square
    with Stopwatch(device) as ten:
        for _ in range(10):
            square @ square
    assert 5 < ten.ns / one.ns < 20
