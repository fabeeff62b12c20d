"""Rows decide alone: what a prompt's completion is does not depend on who else is in the batch."""

import copy
from collections.abc import Callable
from pathlib import Path
from weakref import finalize

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from naive import Bundle, complete_all, count_ties
from tiny_models import EOS, make_bundle, random_model, random_prompts

from engine.cache import Span
from engine.engine import Engine, Prompt
from engine.exits import read_manifest
from engine.heads import Heads
from engine.record import Completion
from engine.spec import PolicySpec, policy

NEW = 8
PROMPTS = random_prompts(8, seed=5, longest=30)
TIES = {"rows": 0, "ties": 0}


def _policies() -> st.SearchStrategy[PolicySpec]:
    share = st.floats(0, 1)
    kv = st.sampled_from(["copy", "recompute"])
    max_debt = st.integers(1, 9)
    return st.one_of(
        st.just(policy("full")),
        st.builds(lambda **o: policy("fixed", **o), exit_layer=st.sampled_from([1, 2, 4, 5]), kv=kv, max_debt=max_debt),
        st.builds(lambda **o: policy("confidence", **o), threshold=share, kv=kv, max_debt=max_debt),
        st.builds(lambda **o: policy("patience", **o), patience=st.integers(1, 3), kv=kv, max_debt=max_debt),
        st.builds(lambda **o: policy("controller", **o), exit=share, stop=share, kv=kv, max_debt=max_debt),
        st.builds(lambda **o: policy("sec", **o), exit=share, stop=share),
        st.builds(lambda **o: policy("confidence", **o), threshold=st.floats(0, 0.4), ask_above=share, kv=kv),
    )


def test_rows_are_foreseen_each_for_itself(tiny_engine: Callable[..., Engine]) -> None:
    """Protects `preview` in a batch: the same tokens as alone, and not always full depth's own."""
    engine = tiny_engine("llama", head="lens", shortlist=100)
    foreseen, whole = (policy("confidence", threshold=0.3, ask_above=0.2, preview=count) for count in (2, None))
    start = engine.prefill(PROMPTS, NEW)
    together, full = (
        [one.records.token_ids.tolist() for one in decoded.completions]
        for decoded in (
            engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False) for spec in (foreseen, whole)
        )
    )
    for prompt, completion in zip(PROMPTS, together, strict=True):
        alone = engine.decode(engine.prefill([prompt], NEW), foreseen, max_new_tokens=NEW, ends_with_line=False)
        assert alone.completions[0].records.token_ids.tolist() == completion
    assert together != full, "the test would not see a preview that is not used"


@torch.inference_mode()
def test_threads_share_a_stack(tiny_engine: Callable[..., Engine]) -> None:
    """Protects what a stack keeps of a span: another thread's turn may come while that of the span before is freed."""
    stack = tiny_engine("llama", head="lens", shortlist=100).stack

    def passed(tokens: int, then: Callable[[], object] = lambda: None) -> torch.Tensor:
        span = Span([0], [0], [tokens])
        finalize(span, then)
        states = torch.linspace(-1, 1, tokens * stack.hidden_size).view(tokens, -1)
        return stack.run(states, span, stack.new_cache(1, tokens), 0, 1)

    alone = passed(20)
    passed(30, then=lambda: passed(40))
    assert torch.equal(passed(20), alone)


BUNDLES = [
    ("llama one key head", {"head": "tied"}),
    ("llama", {"head": "lens", "shortlist": 100}),
    ("gpt2", {"head": "untied", "shortlist": 60}),
]


@pytest.mark.parametrize(("kind", "bundle"), BUNDLES, ids=str)
@settings(
    max_examples=9,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # an example takes a second: shrinking one would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)
@given(spec=_policies())
def test_batch_8_equals_batch_1(
    kind: str,
    bundle: dict[str, object],
    spec: PolicySpec,
    tiny_engine: Callable[..., Engine],
    tiny_bundle: Callable[..., Path],
) -> None:
    """Protects masks under compaction, ragged debts and every rule's memory of its rows."""
    engine = tiny_engine(kind, **bundle)
    together, alone = _complete(engine, PROMPTS, spec, 8), _complete(engine, PROMPTS, spec, 1)
    TIES["rows"] += len(PROMPTS)
    if _columns(together) != _columns(alone):
        read = Bundle(engine.manifest, tiny_bundle(kind, **bundle))
        naive = complete_all(random_model(kind), read, spec, PROMPTS, NEW, EOS)
        TIES["ties"] += count_ties(together, alone, naive)


def test_ties_were_counted() -> None:
    print(f"batch 8 against batch 1: {TIES['rows']} completions of tiny models, {TIES['ties']} differ by a float tie")
    assert TIES["ties"] <= TIES["rows"] // 100


def test_order_and_neighbours_do_not_matter(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the bookkeeping by row: the same prompts in another order, and among others, end the same."""
    engine = tiny_engine("llama", head="lens", shortlist=100)
    spec = policy("controller", exit=0.4, stop=0.9, kv="recompute", max_debt=3)
    straight = _columns(_complete(engine, PROMPTS, spec, 8))
    assert _columns(_complete(engine, PROMPTS[::-1], spec, 8))[::-1] == straight
    assert _columns(_complete(engine, PROMPTS[2:5], spec, 3)) == straight[2:5]


def test_a_prefill_serves_every_policy(tiny_engine: Callable[..., Engine]) -> None:
    """Protects `prefill once`: a policy that writes to the cache leaves nothing behind for the next one."""
    engine = tiny_engine("llama", head="lens", shortlist=100)
    start = engine.prefill(PROMPTS, NEW)
    keys, values = start.start.cache.keys.clone(), start.start.cache.values.clone()
    specs = [policy("fixed", exit_layer=1), policy("confidence", threshold=0.2, kv="recompute"), policy("full")]
    first = [engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False).completions for spec in specs]
    again = [engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False).completions for spec in specs[::-1]]
    assert [_columns(done) for done in first] == [_columns(done) for done in again[::-1]]
    assert torch.equal(start.start.cache.keys, keys)
    assert torch.equal(start.start.cache.values, values)
    fresh = engine.decode(engine.prefill(PROMPTS, NEW), specs[2], max_new_tokens=NEW, ends_with_line=False)
    assert _columns(fresh.completions) == _columns(first[2])


@pytest.mark.parametrize("kv", ["copy", "recompute"])
def test_smollm2_under_policies(kv: str, smollm2: Engine, tmp_path: Path) -> None:
    """The same on the real model's shapes, with random exits: batch 4 against batch 1."""
    bundle = make_bundle(tmp_path / "exits", smollm2.facts, head="lens", points=(6, 12, 24), shortlist=2000)
    engine = _with_exits(smollm2, bundle)
    prompts = engine.encode([f"def power_{'of' * n}(base, exponent):\n    return" for n in range(4)], 5)
    spec = policy("confidence", threshold=0.5, kv=kv, max_debt=3)
    together = _columns(_complete(engine, prompts, spec, 4, new=5))
    assert together == _columns(_complete(engine, prompts, spec, 1, new=5))
    assert any("exit" in column for row in together for column in row), "nobody left, nothing was tested"


def _with_exits(engine: Engine, folder: Path) -> Engine:
    """The loaded model with other exits, without loading it again."""
    twin = copy.copy(engine)
    twin.manifest, twin.heads = read_manifest(folder), Heads.load(engine.stack, folder)
    return twin


def _complete(
    engine: Engine, prompts: list[Prompt], spec: PolicySpec, batch_size: int, new: int = NEW
) -> list[Completion]:
    done = []
    for first in range(0, len(prompts), batch_size):
        start = engine.prefill(prompts[first : first + batch_size], new)
        done += engine.decode(start, spec, max_new_tokens=new, ends_with_line=False).completions
    return done


def _columns(done: list[Completion]) -> list[tuple[list[int], list[int], list[int], list[str], str]]:
    return [(c.records.token_ids.tolist(), c.exit_layers, c.layers_run, c.decisions, c.finish.value) for c in done]
