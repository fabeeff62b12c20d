"""Every policy against a second implementation: ids, exit layers, decisions and confidences, token by token."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import (
    CONTINUE,
    EXIT,
    STOP,
    TIE,
    Bundle,
    as_written,
    best,
    complete_all,
    first_difference,
    sec_rule,
    softmax,
)
from tiny_models import EOS, HIDDEN, N_LAYERS, POINTS, random_model, random_prompts

from engine.engine import Engine
from engine.heads import Heads
from engine.policies import Batch, View, build_rule
from engine.spec import PolicySpec, policy

PROMPTS = random_prompts(4, seed=3)
NEW = 8
COPY, RECOMPUTE, MASK = {"kv": "copy"}, {"kv": "recompute"}, {"kv": "mask"}

POLICIES = [
    policy("full"),
    *(policy("fixed", exit_layer=2, **kv) for kv in (COPY, RECOMPUTE)),
    *(policy("confidence", threshold=0.2, **kv) for kv in (COPY, RECOMPUTE)),
    *(policy("patience", patience=1, **kv) for kv in (COPY, RECOMPUTE)),
    policy("patience", patience=2),
    *(policy("controller", exit=0.4, stop=0.9, **kv) for kv in (COPY, RECOMPUTE)),
    policy("sec", exit=0.45, stop=0.7),
    policy("fixed", exit_layer=1, kv="recompute", max_debt=2),
    policy("confidence", threshold=0.15, kv="recompute", max_debt=1),
    *(policy("margin", threshold=0.1, **kv) for kv in (COPY, RECOMPUTE)),
    *(policy("entropy", threshold=3.5, **kv) for kv in (COPY, MASK)),
    *(policy("state-similarity", threshold=0.8, **kv) for kv in (COPY, MASK)),
    policy("state-similarity", threshold=0.7, kv="recompute", max_debt=3),
    *(policy("position", deepest=6, shallowest=2, over=5, **kv) for kv in (COPY, RECOMPUTE)),
    policy("fixed", exit_layer=2, kv="mask"),
    policy("confidence", threshold=0.2, kv="mask", decay=3.0),
    policy("confidence", threshold=0.3, decay=1.0),
    policy("static", layers=[3, 5]),
    policy("static", layers=[1]),
    policy("controller", exit=0.4, stop=0.9, full_first=3, max_exits_in_row=1),
    policy("confidence", threshold=0.1, min_layer=3, max_exits_in_row=2, kv="recompute"),
    policy("patience", patience=1, full_first=4, kv="mask", max_exits_in_row=3),
]
#: heads asked here and there, and behind the last layer few logits computed
SAVING = [
    *(policy("confidence", threshold=0.1, ask_above=0.3, **kv) for kv in (COPY, RECOMPUTE)),
    policy("margin", threshold=0.02, ask_above=0.35, preview=3),
    policy("entropy", threshold=4.2, ask_above=0.3, kv="mask"),
    policy("confidence", threshold=0.2, preview=20),
    policy("controller", exit=0.4, stop=0.9, preview=5, full_first=2),
    policy("fixed", exit_layer=2, kv="recompute", max_debt=2, preview=2, max_exits_in_row=1),
]
#: where layers look back over a window, the naive decoder cannot leave holes in it
UNMASKED = [spec for spec in POLICIES if spec.kv != "mask"]
BUNDLES = [
    ("llama", {"head": "tied"}, POLICIES[::2]),
    ("llama rope llama3", {"head": "lens", "shortlist": 100}, POLICIES + SAVING),
    ("llama attention bias", {"head": "untied"}, POLICIES[1::2]),
    ("gpt2", {"head": "lens"}, POLICIES[1::2] + SAVING[1::2]),
    ("gpt2 scaled by layer", {"head": "untied", "shortlist": 60}, POLICIES[::2]),
    ("qwen2", {"head": "tied"}, POLICIES[2::3]),
    ("qwen3 untied, with a window", {"head": "lens", "shortlist": 100}, UNMASKED[::2]),
    ("codegen", {"head": "tied", "shortlist": 100}, POLICIES[::3] + SAVING[2::2]),
    ("codegen tied", {"head": "lens"}, POLICIES[2::3]),
    ("gpt_bigcode", {"head": "untied"}, POLICIES[1::3]),
    ("starcoder2 window", {"head": "tied"}, UNMASKED[1::2]),
]


@pytest.mark.parametrize(("kind", "bundle", "policies"), BUNDLES, ids=[kind for kind, _, _ in BUNDLES])
def test_policies_do_what_the_design_says(
    kind: str,
    bundle: dict[str, object],
    policies: list[PolicySpec],
    tiny_engine: Callable[..., Engine],
    tiny_bundle: Callable[..., Path],
) -> None:
    """Protects the loop, compaction, heads, both ways of paying debts and every rule at once."""
    engine, peer = tiny_engine(kind, **bundle), random_model(kind)
    read = Bundle(engine.manifest, tiny_bundle(kind, **bundle))
    start = engine.prefill(PROMPTS, NEW)
    seen: Counter[str] = Counter()
    ties = tokens = 0
    for spec in policies:
        theirs = complete_all(peer, read, spec, PROMPTS, NEW, EOS)
        mine = engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False).completions
        for completion, naive in zip(mine, theirs, strict=True):
            written = as_written(completion)
            place = first_difference(written, naive)
            if place is not None:
                assert naive.margins[place] < TIE, f"{spec.label}, token {place}: {written} against {naive}"
                ties += 1
            same = len(written.token_ids) if place is None else place
            assert written.confidences[:same] == pytest.approx(naive.confidences[:same], abs=1e-4), spec.label
            tokens += same
            seen.update(written.decisions)
    print(f"{kind}, {bundle}: {tokens} tokens under {len(policies)} policies, {ties} float ties, {dict(seen)}")
    assert min(seen[decision] for decision in ("full", "exit", "stop")) >= 2, "the test would not see a wrong decision"


@settings(max_examples=25, deadline=None)
@given(
    exit=st.floats(0, 1),
    stop=st.floats(0, 1),
    sharpness=st.sampled_from([0.02, 0.1, 1.0]),
    seed=st.integers(0, 2**31),
    point=st.sampled_from(POINTS),
)
def test_sec_rule_on_random_states(
    exit: float, stop: float, sharpness: float, seed: int, point: int, tiny_engine: Callable[..., Engine]
) -> None:
    """Protects SEC's rule, decision by decision: argmax and a strict threshold; after the last layer only stop."""
    heads = tiny_engine("llama", head="tied").heads
    states = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(seed)) * sharpness * 10
    verdict = _verdict(heads, policy("controller", exit=exit, stop=stop), point, states)
    controller = heads.controller.weights[point].tolist()
    for state, decision in zip(states.tolist(), verdict, strict=True):
        probabilities = softmax([sum(w * x for w, x in zip(row, state, strict=True)) for row in controller])
        narrow = min(best(probabilities)[1], abs(probabilities[1] - exit), abs(probabilities[2] - stop)) < 1e-6
        naive = sec_rule(state, controller, exit, stop, last=point == N_LAYERS)
        assert decision == naive or narrow, (probabilities, exit, stop)


@pytest.mark.parametrize(
    ("logits", "exit", "stop", "point", "expected"),
    [
        ((0, 8, 0), 0.9, 0.9, 2, EXIT),
        ((0, 0, 8), 0.9, 0.9, 2, STOP),
        ((8, 0, 0), 0.0, 0.0, 2, CONTINUE),
        ((0, 8, 0), 1.0, 0.0, 2, CONTINUE),
        ((0, 200, 0), 1.0, 1.0, 2, CONTINUE),  # the probability is 1, which does not exceed 1: off
        ((0, 0, 200), 1.0, 1.0, 2, CONTINUE),
        ((0, 0, -200), 0.5, 0.0, 2, CONTINUE),  # continue and exit tie at 0.5: nobody exceeds
        ((-200, 0, 0), 0.5, 0.5, 2, CONTINUE),  # exit and stop tie at exactly 0.5: strict
        ((-200, 0, 0), 0.49, 0.49, 2, EXIT),  # and just below, the first of equals wins
        ((0, 0, 8), 0.0, 1.0, 2, CONTINUE),  # stop wins but may not: exit does not inherit
        ((0, 8, 0), 0.0, 0.0, N_LAYERS, CONTINUE),  # after the last layer there is nothing to leave
        ((0, 0, 8), 0.0, 0.9, N_LAYERS, STOP),
    ],
)
def test_sec_rule_at_its_edges(
    logits: tuple[float, ...], exit: float, stop: float, point: int, expected: int, tiny_engine: Callable[..., Engine]
) -> None:
    """Protects strictness, ties, `1 is off`, and the exit point after the last layer."""
    heads = tiny_engine("llama", head="tied").heads
    wanted = torch.tensor(logits, dtype=torch.float32)
    eye = torch.eye(3, HIDDEN)  # logits are the state's first three places, to the bit
    plain = Heads(heads.stack, "tied", POINTS, {"controller": eye}, "sec")
    state = torch.zeros(HIDDEN).index_copy(0, torch.arange(3), wanted)
    assert _verdict(plain, policy("sec", exit=exit, stop=stop), point, state[None]) == [expected]
    assert sec_rule(state.tolist(), eye.tolist(), exit, stop, last=point == N_LAYERS) == expected


def _verdict(heads: Heads, spec: PolicySpec, point: int, states: torch.Tensor) -> list[int]:
    rule = build_rule(spec, POINTS, N_LAYERS)
    rows = list(range(len(states)))
    rule.begin(Batch(rows, NEW, states.device))
    with torch.inference_mode():
        decided = rule.decide(View(heads, point, rows, states, [1] * len(rows))).decisions
        return decided.tolist() if isinstance(decided, torch.Tensor) else list(decided)


def test_confidence_is_strict(tiny_engine: Callable[..., Engine]) -> None:
    """Protects `exceeds`: a token whose confidence is the threshold goes on, and a threshold of 1 is off."""
    heads = tiny_engine("llama", head="lens").heads
    states = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1)) * 5
    with torch.inference_mode():
        confidences = heads.predict(2, states).confidences
    middle = confidences.sort().values[9].item()
    verdict = _verdict(heads, policy("confidence", threshold=middle), 2, states)
    assert verdict == [EXIT if confidence > middle else CONTINUE for confidence in confidences.tolist()]
    assert verdict.count(EXIT) == 10
    assert _verdict(heads, policy("confidence", threshold=1), 2, states * 100) == [CONTINUE] * 20


def test_policies_of_states_run_no_head(tiny_engine: Callable[..., Engine]) -> None:
    """Protects `what a policy needs decides what it costs`: a rule that reads states runs no head."""
    heads = tiny_engine("llama", head="tied").heads
    states = torch.randn(5, HIDDEN)
    predicted = {}
    for spec in (
        policy("controller", exit=0.5, stop=0.5),
        policy("fixed", exit_layer=2),
        policy("confidence", threshold=0),
    ):
        view = View(heads, 2, list(range(5)), states, [1] * 5)
        rule = build_rule(spec, POINTS, N_LAYERS)
        rule.begin(Batch([0] * 5, NEW, states.device))
        rule.decide(view)
        predicted[spec.kind] = view.predicted
    assert predicted == {"controller": False, "fixed": False, "confidence": True}
