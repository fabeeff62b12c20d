"""The cost model: counted by hand, held against what was really run, and in the right order."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from tiny_models import HIDDEN, N_LAYERS, RANK, VOCABULARY, random_prompts
from torch import Tensor

from engine.cache import Span
from engine.cost import Machine, Shape, Work, cost
from engine.decode import Decoding, Ends
from engine.engine import Engine, Prompt
from engine.machine import measure_machine
from engine.policies import build_rule
from engine.record import Decoded, TokenRecords
from engine.spec import PolicySpec, policy

NEW = 6
PROMPTS = random_prompts(5, seed=8, longest=20)
#: operations of one tiny layer for one token, without attention: 2 for each weight it multiplies with
LLAMA_LAYER = 2 * (HIDDEN * HIDDEN + 2 * HIDDEN * 16 + HIDDEN * HIDDEN + 3 * HIDDEN * 80)
GPT2_LAYER = 2 * (3 * HIDDEN * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN * 4 * HIDDEN)
UNEMBEDDING = 2 * HIDDEN * VOCABULARY


def decoded(engine: Engine, spec: PolicySpec, prompts: list[Prompt] = PROMPTS) -> Decoded:
    return engine.decode(engine.prefill(prompts, NEW), spec, max_new_tokens=NEW, ends_with_line=False)


@pytest.mark.parametrize(("kind", "layer"), [("llama", LLAMA_LAYER), ("gpt2", GPT2_LAYER)])
def test_flops_of_full_depth_by_hand(kind: str, layer: int, tiny_engine: Callable[..., Engine]) -> None:
    """Protects the formula: two operations a weight, four a head element and position looked at."""
    done = decoded(tiny_engine(kind), policy("full"))
    by_hand = 0
    for prompt, row in zip(PROMPTS, done.completions, strict=True):
        for token in range(1, len(row.records)):
            positions = len(prompt.token_ids) + token
            by_hand += N_LAYERS * (layer + 4 * HIDDEN * positions) + UNEMBEDDING
    assert done.flops == by_hand


def test_flops_of_a_fixed_exit_by_hand(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the price of leaving: two layers, a shortlisted lens, keys and values of four more."""
    done = decoded(tiny_engine("llama", head="lens", shortlist=100), policy("fixed", exit_layer=2), PROMPTS[:1])
    [row] = done.completions
    by_hand = 0
    for token in range(1, len(row.records)):
        positions = len(PROMPTS[0].token_ids) + token
        head = 2 * (4 * HIDDEN + HIDDEN * 4 + 100 * HIDDEN)
        by_hand += 2 * (LLAMA_LAYER + 4 * HIDDEN * positions) + head + 4 * 2 * HIDDEN * 2 * 16
    assert row.exit_layers[1:] == [2] * (NEW - 1)
    assert done.flops == by_hand


def test_ideal_by_hand() -> None:
    """Protects the roofline: each piece takes the longer of reading its weights and multiplying with them."""

    shape = Shape(
        n_layers=3, n_heads=2, n_kv_heads=1, head_size=2, hidden_size=4, layer_parameters=1000, element_size=4
    )
    work = Work()
    work.run(layers=3, tokens=2, context=99, cached=50)
    reads = 3 * 4 * (1000 + 2 * 1 * 2 * 50)  # float32; keys and values of 50 positions, which two tokens share
    operations = 3 * (2 * 1000 * 2 + 4 * 2 * 2 * 99)
    assert cost(work, shape, Machine(bandwidth=1e9, peak=1e15)).ideal_ns == reads
    assert cost(work, shape, Machine(bandwidth=1e15, peak=1e9)).ideal_ns == operations
    work.head(parameters=40, states=7)  # one piece bound by reading, one by multiplying: 4 * 40 against 2 * 40 * 7
    both = cost(work, shape, Machine(bandwidth=1e9, peak=1e9))
    assert both.ideal_ns == max(reads, operations) + 2 * 40 * 7
    assert both.flops == operations + 2 * 40 * 7


def test_tokens_of_a_row_read_its_keys_together(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the ideal of debts: what several waiting tokens look at is read once, not once for each."""
    spec = policy("fixed", exit_layer=2, kv="recompute", max_debt=2)
    _, work, _ = _watched(tiny_engine("llama", head="tied"), spec)
    together = [entry for entry in work.passes if entry[1] > len(PROMPTS)]
    assert together, "nobody waited, nothing was tested"
    assert all(cached < context for _, _, context, cached in together)
    alone = [entry for entry in work.passes if entry[1] <= len(PROMPTS) and entry not in together]
    assert any(cached == context for _, _, context, cached in alone)


@pytest.mark.parametrize("kv", ["copy", "recompute"])
def test_leaving_early_is_cheaper(kv: str, tiny_engine: Callable[..., Engine]) -> None:
    """Protects the direction: where every token leaves at layer 1, both figures fall, whatever way debts are paid."""
    engine = tiny_engine("llama", head="tied")
    full = decoded(engine, policy("full"), PROMPTS[:1])
    early = decoded(engine, policy("fixed", exit_layer=1, kv=kv, max_debt=99), PROMPTS[:1])
    assert len(early.completions[0].records) == len(full.completions[0].records)
    assert 0 < early.ideal_ns < full.ideal_ns
    assert 0 < early.flops < full.flops


def test_asking_heads_has_a_price(tiny_engine: Callable[..., Engine]) -> None:
    """Protects honesty: a policy that pays heads and never leaves is dearer than full depth."""
    engine = tiny_engine("llama", head="tied")
    full = decoded(engine, policy("full"))
    heads = decoded(engine, policy("confidence", threshold=1))
    steps = sum(len(row.records) - 1 for row in full.completions)
    assert heads.flops == full.flops + 4 * steps * UNEMBEDDING, "four exit points before full depth"
    assert heads.ideal_ns > full.ideal_ns
    states = decoded(engine, policy("controller", exit=1, stop=1))
    assert (states.flops, states.ideal_ns) == (full.flops, pytest.approx(full.ideal_ns, rel=0.2))


def test_a_preview_has_the_price_of_a_look_and_of_what_is_exact(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the price behind the last layer: of the whole vocabulary or of a preview, never of both."""
    engine = tiny_engine("llama", head="tied", shortlist=100)
    nobody_leaves = {"threshold": 1, "ask_above": 1}
    whole = decoded(engine, policy("confidence", **nobody_leaves))
    foreseen = decoded(engine, policy("confidence", **nobody_leaves, preview=3))
    steps = sum(len(row.records) - 1 for row in foreseen.completions)
    assert [len(row.records) for row in whole.completions] == [len(row.records) for row in foreseen.completions]
    assert whole.flops - foreseen.flops == UNEMBEDDING * steps - 2 * (RANK * VOCABULARY + (RANK + 3) * HIDDEN) * steps


def test_a_look_is_read_as_narrow_as_it_lies(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the ideal time behind the last layer: codes of a byte where a loop reads them."""
    shape = Shape(n_layers=1, n_heads=1, n_kv_heads=1, head_size=1, hidden_size=1, layer_parameters=1, element_size=4)
    work = Work()
    work.look(parameters=1_000, bytes_read=1_200, states=3)
    found = cost(work, shape, Machine(bandwidth=1e9, peak=1e15))
    assert (found.flops, found.ideal_ns) == (6_000, 1_200)
    preview = tiny_engine("llama", head="tied", shortlist=100).heads.preview
    assert preview is not None
    states = torch.zeros(1, HIDDEN)
    codes, down = preview.codes.numel(), preview.down.numel()
    with torch.inference_mode():
        assert preview.bytes_read(states) == codes + 4 * down
    assert preview.bytes_read(states) == 4 * (codes + down), "gradients are on: PyTorch's way"


@pytest.mark.parametrize(
    "spec",
    [
        policy("full"),
        policy("fixed", exit_layer=2, kv="recompute", max_debt=2),
        policy("confidence", threshold=0.2),
        policy("patience", patience=1, kv="recompute"),
        policy("controller", exit=0.4, stop=0.9),
    ],
    ids=lambda spec: spec.label,
)
def test_work_counted_is_work_done(spec: PolicySpec, tiny_engine: Callable[..., Engine]) -> None:
    """Protects the books: tokens through layers, keys filled and logits made are those that the model really saw."""
    engine = tiny_engine("llama", head="lens", shortlist=100)
    records, work, seen = _watched(engine, spec)
    assert sum(layers * tokens for layers, tokens, *_ in work.passes) == seen["layers"]
    assert sum(layers * tokens for layers, tokens in work.fills) == seen["fills"]
    assert sum(states for parameters, states in work.heads if parameters == HIDDEN * VOCABULARY) == seen["unembedded"]
    assert sum(states for parameters, states in work.heads if parameters != HIDDEN * VOCABULARY) == seen["heads"]
    assert sum(int(record.layers_run[1:].sum()) for record in records) == seen["layers"], "and the records say the same"


def _watched(engine: Engine, spec: PolicySpec) -> tuple[list[TokenRecords], Work, Counter[str]]:
    """Decode while counting what goes through the model's own functions."""
    stack, heads, seen = engine.stack, engine.heads, Counter[str]()
    start = engine.prefill(PROMPTS, NEW).start
    queries, keys_values, unembed, logits = stack.queries, stack.keys_values, stack.unembed, heads.logits

    def counted(name: str, function: Callable[..., object], states_at: int) -> Callable[..., object]:
        def call(*arguments: Tensor) -> object:
            seen[name] += len(arguments[states_at])
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(stack, "together", None)  # layer by layer, so that each can be watched
        patch.setattr(stack, "queries", counted("layers", queries, 1))
        patch.setattr(stack, "keys_values", counted("fills", keys_values, 1))
        patch.setattr(stack, "unembed", counted("unembedded", unembed, 0))
        patch.setattr(heads, "logits", counted("heads", logits, 1))
        rule = build_rule(spec, engine.exit_points, engine.n_layers)
        decoding = Decoding(stack, heads, rule, spec, start, Ends(NEW, {}))
        decoding.run()
    return decoding.records, decoding.work, seen


def test_machine_is_measured() -> None:
    """Protects `ideal_ns` from a nonsense machine: both figures are finite and of this planet."""
    machine = measure_machine(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.peak < 1e15


def test_span_counts_positions_looked_at() -> None:
    """Protects the attention's share: token i of a span that starts at s looks at s + i + 1 positions."""
    span = Span(rows=[4, 1], starts=[10, 0], counts=[3, 2])
    assert span.context == (11 + 12 + 13) + (1 + 2)
    assert (span.size, span.single, span.last, span.reach) == (5, False, [2, 4], [13, 2])
    assert span.flat == ([4, 4, 4, 1, 1], [10, 11, 12, 0, 1])
