"""Skipped layers owe keys and values: `recompute` pays exactly, and waits no longer than allowed."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from naive import forward_keys_values, relative
from tiny_models import EOS, N_LAYERS, random_model, random_prompts

from engine.debts import Deferred
from engine.decode import Decoding, Ends
from engine.engine import Engine
from engine.policies import build_rule
from engine.record import Finish, TokenRecords
from engine.spec import PolicySpec, policy

NEW = 12
PROMPTS = random_prompts(8, seed=9, longest=30)
KINDS = [
    ("llama", {"head": "lens", "shortlist": 100}),
    ("llama rope llama3", {"head": "tied"}),
    ("gpt2 scaled by layer", {"head": "lens"}),
    ("qwen3", {"head": "lens"}),
    ("codegen", {"head": "lens"}),
    ("gpt_bigcode", {"head": "tied"}),
    ("starcoder2", {"head": "lens"}),
]
POLICIES = [
    policy("fixed", exit_layer=1, kv="recompute", max_debt=4),
    policy("fixed", exit_layer=4, kv="recompute", max_debt=99),
    policy("confidence", threshold=0.2, kv="recompute"),
    policy("patience", patience=1, kv="recompute", max_debt=2),
    policy("controller", exit=0.4, stop=0.9, kv="recompute"),
]


@torch.inference_mode()
def run(engine: Engine, spec: PolicySpec) -> tuple[list[TokenRecords], list[Finish], Deferred]:
    """Records, finishes, and the debts as the decode left them."""
    rule = build_rule(spec, engine.exit_points, engine.n_layers)
    start = engine.prefill(PROMPTS, NEW).start
    decoding = Decoding(engine.stack, engine.heads, rule, spec, start.copy(), Ends(NEW, {EOS: Finish.EOS}))
    decoding.run()
    assert isinstance(decoding.debts, Deferred)
    return decoding.records, decoding.finishes, decoding.debts


def pay(debts: Deferred, row: int, last: int) -> None:
    """Take all tokens of the row that still wait, up to its step `last`, to full depth, as its next token would."""
    depth = int(debts.layers_run[row, last])
    while depth < N_LAYERS:
        deeper = min(int(d) for d in [*debts.layers_run[row, : last + 1], N_LAYERS] if d > depth)
        span, states = debts.join([row], [last], depth, debts.states[row, last][None].clone())
        debts.advance(span, debts.stack.run(states, span, debts.cache, depth, deeper), deeper)
        depth = deeper


@pytest.mark.parametrize("spec", POLICIES, ids=lambda spec: spec.label)
@pytest.mark.parametrize(("kind", "bundle"), KINDS, ids=[kind for kind, _ in KINDS])
def test_paid_debts_leave_the_keys_of_a_forward_pass(
    kind: str, bundle: dict[str, object], spec: PolicySpec, tiny_engine: Callable[..., Engine]
) -> None:
    """Protects the promise of `recompute`: all keys and values are those of the emitted tokens, not estimates."""
    engine, peer = tiny_engine(kind, **bundle), random_model(kind)
    records, _, debts = run(engine, spec)
    unpaid = [record.layers_run.copy() for record in records]
    assert any((layers < N_LAYERS).any() for layers in unpaid), "nothing was owed, nothing was tested"
    with torch.inference_mode():
        for row, record in enumerate(records):
            pay(debts, row, len(record) - 1)
    worst = 0.0
    for row, (prompt, record) in enumerate(zip(PROMPTS, records, strict=True)):
        assert set(record.layers_run.tolist()) == {N_LAYERS}
        text = prompt.token_ids + record.token_ids[:-1].tolist()
        for mine, theirs in zip((debts.cache.keys, debts.cache.values), forward_keys_values(peer, text), strict=True):
            worst = max(worst, relative(mine[:, row, :, : len(text)], theirs))
    print(f"{kind}, {spec.label}: relative difference of keys and values {worst:.1e}")
    assert worst < 1e-4


def test_copied_keys_are_only_an_estimate(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the test above: with `copy` the same comparison sees a difference."""
    engine, peer = tiny_engine("llama", head="tied"), random_model("llama")
    spec = policy("fixed", exit_layer=2)
    start = engine.prefill(PROMPTS[:1], NEW).start
    rule = build_rule(spec, engine.exit_points, engine.n_layers)
    with torch.inference_mode():
        decoding = Decoding(engine.stack, engine.heads, rule, spec, start, Ends(NEW, {}))
        decoding.run()
    [record] = decoding.records
    text = PROMPTS[0].token_ids + record.token_ids[:-1].tolist()
    keys, _ = forward_keys_values(peer, text)
    assert relative(start.cache.keys[:, 0, :, : len(text)], keys) > 0.1
    assert relative(start.cache.keys[:2, 0, :, : len(text)], keys[:2]) < 1e-4, "layers that were run are exact"


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # an example takes a second: shrinking one would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)
@given(threshold=st.floats(0, 0.6), max_debt=st.integers(1, 12))
def test_debts_stay_in_bounds(threshold: float, max_debt: int, tiny_engine: Callable[..., Engine]) -> None:
    """Protects `max_debt`, and the order of waiting: depths never rise along a row."""
    engine = tiny_engine("llama", head="lens", shortlist=100)
    spec = policy("confidence", threshold=threshold, kv="recompute", max_debt=max_debt)
    for record, _ in zip(*run(engine, spec)[:2], strict=True):
        waiting = 0
        depths: list[int] = []
        for exit_layer in record.exit_layers[1:].tolist():
            depths = [max(depth, exit_layer) for depth in depths] + [exit_layer]
            waiting = max(waiting, sum(depth < N_LAYERS for depth in depths))
        assert waiting <= max_debt
        assert record.layers_run[1:].tolist() == depths, "a token that goes deeper takes along exactly those that wait"
        assert (record.layers_run >= record.exit_layers).all()
        assert (record.layers_run[1:][:-1] >= record.layers_run[1:][1:]).all()


def test_a_full_debt_sends_the_row_to_the_bottom(tiny_engine: Callable[..., Engine]) -> None:
    """Protects `max_debt` where every token would leave: so many exits, then one at full depth that pays them all."""
    engine = tiny_engine("llama", head="tied")
    records, _, _ = run(engine, policy("fixed", exit_layer=2, kv="recompute", max_debt=3))
    assert records[0].exit_layers.tolist() == [N_LAYERS, *[2, 2, 2, N_LAYERS] * 2, 2, 2, 2]
    assert records[0].layers_run.tolist() == [N_LAYERS] * 9 + [2, 2, 2]


@pytest.mark.parametrize("kv", ["copy", "recompute"])
def test_tokens_are_full_depth_up_to_the_first_exit(kv: str, tiny_engine: Callable[..., Engine]) -> None:
    """Protects the tokens before anybody leaves: a policy that has not acted has changed nothing."""
    engine = tiny_engine("gpt2", head="lens")
    start = engine.prefill(PROMPTS, NEW)
    full = engine.decode(start, policy("full"), max_new_tokens=NEW, ends_with_line=False).completions
    spec = policy("confidence", threshold=0.45, kv=kv)
    early = engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False).completions
    firsts = [row.decisions.index("exit") for row in early if "exit" in row.decisions]
    assert max(firsts) > 2, "everybody left at once, nothing was tested"
    for one, other in zip(early, full, strict=True):
        first = one.decisions.index("exit") if "exit" in one.decisions else len(one.decisions)
        assert one.token_ids[:first] == other.token_ids[:first]


def test_layers_run_under_copy_are_the_exit_layers(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the second depth of a record: under `copy` nothing is computed later."""
    engine = tiny_engine("llama", head="tied")
    decoded = engine.decode(
        engine.prefill(PROMPTS, NEW), policy("sec", exit=0.4, stop=0.8), max_new_tokens=NEW, ends_with_line=False
    )
    assert all(completion.layers_run == completion.exit_layers for completion in decoded.completions)
