"""Drafts that full depth verifies: the tokens are those of full depth, whatever was drafted and undone on the way."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from naive import Bundle, Judge, forward_keys_values, raw_states, relative
from tiny_models import EOS, N_LAYERS, random_model, random_prompts

from engine.decode import Decoding, Ends
from engine.engine import Engine
from engine.errors import BadInput
from engine.policies import Batch, build_rule
from engine.record import Completion, Finish
from engine.spec import PolicySpec, policy

NEW = 14
PROMPTS = random_prompts(8, seed=21, longest=30)
KINDS = [
    ("llama", {"head": "lens", "shortlist": 100}),
    ("llama rope llama3", {"head": "tied"}),
    ("gpt2", {"head": "untied"}),
]
VERIFY = {"kv": "recompute", "verify": True}
POLICIES = [
    policy("self-speculative", exit_layer=5, threshold=0.0),
    policy("self-speculative", exit_layer=4, threshold=0.15, max_debt=3),
    policy("fixed", exit_layer=5, max_debt=99, **VERIFY),
    policy("fixed", exit_layer=5, max_debt=1, **VERIFY),
    policy("confidence", threshold=0.15, **VERIFY),
    policy("patience", patience=1, max_debt=2, **VERIFY),
    policy("position", deepest=6, shallowest=4, over=6, **VERIFY),
    policy("random", exit_layers=[4, 5], shares=[0.3, 0.5], **VERIFY),
    policy("controller", exit=0.3, stop=1, max_exits_in_row=2, **VERIFY),
    policy("margin", threshold=0.05, full_first=4, **VERIFY),
]
SEEN: Counter[str] = Counter()
#: completions with drafts, by what ended them
STOPS: Counter[Finish] = Counter()


def complete(engine: Engine, spec: PolicySpec, batch_size: int = 8, *, lines: bool = False) -> list[Completion]:
    done = []
    for first in range(0, len(PROMPTS), batch_size):
        start = engine.prefill(PROMPTS[first : first + batch_size], NEW)
        done += engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=lines).completions
    return done


def written(done: list[Completion]) -> list[tuple[list[int], Finish]]:
    return [(completion.token_ids, completion.finish) for completion in done]


@pytest.mark.parametrize(
    ("batch_size", "lines", "policies"),
    [(8, False, POLICIES), (8, True, POLICIES[::2]), (1, False, POLICIES[::3])],
    ids=["batch 8", "batch 8 to the line's end", "batch 1"],
)
@pytest.mark.parametrize(("kind", "bundle"), KINDS, ids=[kind for kind, _ in KINDS])
def test_verified_tokens_are_those_of_full_depth(
    kind: str,
    bundle: dict[str, object],
    batch_size: int,
    lines: bool,
    policies: list[PolicySpec],
    tiny_engine: Callable[..., Engine],
) -> None:
    """Protects the promise of `verify`: the tokens and the end of every completion are those of `full`."""
    engine = tiny_engine(kind, **bundle)
    full = written(complete(engine, policy("full"), batch_size, lines=lines))
    for spec in policies:
        done = complete(engine, spec, batch_size, lines=lines)
        assert written(done) == full, spec.label
        for completion in done:
            assert set(completion.exit_layers) == {N_LAYERS}, "a verified token was decided at full depth"
            assert set(completion.layers_run) == {N_LAYERS}
            assert set(completion.decisions) == {"full"}
            SEEN.update(str(kept) for kept in completion.draft_kept)


def test_drafts_were_kept_and_undone() -> None:
    """Protects the tests above: both things happened, often."""
    print(f"verified tokens by whether a draft was kept: {dict(SEEN)}")
    assert min(SEEN["True"], SEEN["False"], SEEN["None"]) > 100


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(exit=st.floats(0, 0.7), stop=st.floats(0.3, 1), max_debt=st.integers(1, 9))
def test_with_stops_they_are_a_prefix(
    exit: float, stop: float, max_debt: int, tiny_engine: Callable[..., Engine]
) -> None:
    """Protects `ends act on verified tokens only`: a stop behind drafts ends a completion where full depth stands."""
    engine = tiny_engine("llama", head="lens", shortlist=100)
    full = complete(engine, policy("full"))
    done = complete(engine, policy("controller", exit=exit, stop=stop, max_debt=max_debt, **VERIFY))
    for one, other in zip(done, full, strict=True):
        assert one.token_ids == other.token_ids[: one.n_tokens]
        assert one.stopped or one.finish == other.finish
        assert not one.stopped or one.records.token_ids[-1] == -1, "a stop has no token, also where a draft was undone"
        STOPS[one.finish] += one.records.drafts.any()


def test_stops_came_behind_drafts() -> None:
    """Protects the test above: drafts were there when the rule gave up."""
    print(f"completions with drafts under a controller that stops, by their end: {dict(STOPS)}")
    assert STOPS[Finish.STOP] > 10


def test_batch_8_equals_batch_1(tiny_engine: Callable[..., Engine]) -> None:
    """Protects rows that go back alone: drafts, their ends and their lengths do not depend on neighbours."""
    engine = tiny_engine("llama", head="lens", shortlist=100)
    for spec in POLICIES[1::3]:
        together, alone = complete(engine, spec, 8), complete(engine, spec, 1)
        assert [c.records.drafts.tolist() for c in together] == [c.records.drafts.tolist() for c in alone], spec.label


@pytest.mark.parametrize(("kind", "bundle"), KINDS, ids=[kind for kind, _ in KINDS])
def test_a_draft_is_what_its_head_says(
    kind: str, bundle: dict[str, object], tiny_engine: Callable[..., Engine], tiny_bundle: Callable[..., Path]
) -> None:
    """Protects `draft_layer` and `draft_kept`: the head at that layer writes the token, or another, as recorded."""
    engine, peer = tiny_engine(kind, **bundle), random_model(kind)
    read = Bundle(engine.manifest, tiny_bundle(kind, **bundle))
    for spec in (POLICIES[0], POLICIES[4], POLICIES[7]):
        checked: Counter[bool] = Counter()
        for prompt, completion in zip(PROMPTS[:4], complete(engine, spec)[:4], strict=True):
            for place, (layer, kept) in enumerate(zip(completion.draft_layers, completion.draft_kept, strict=True)):
                if layer is None:
                    assert kept is None
                    continue
                text = torch.tensor([prompt.token_ids + completion.token_ids[:place]])
                with torch.no_grad():
                    state = raw_states(peer, text)[layer][-1]
                said, _ = Judge(peer, read, spec).predict(layer, state)
                assert (said == completion.token_ids[place]) == kept
                checked[kept] += 1
        assert checked[True] + checked[False] > 5, spec.label


@pytest.mark.parametrize(("kind", "bundle"), KINDS, ids=[kind for kind, _ in KINDS])
def test_what_was_undone_left_nothing_behind(
    kind: str, bundle: dict[str, object], tiny_engine: Callable[..., Engine]
) -> None:
    """Protects `rollback of everything`: keys and values of all layers are those of the tokens that stand."""
    engine, peer = tiny_engine(kind, **bundle), random_model(kind)
    for spec in POLICIES[:4]:
        with torch.inference_mode():
            rule = build_rule(spec, engine.exit_points, engine.n_layers)
            start = engine.prefill(PROMPTS, NEW).start.copy()
            ends = Ends(NEW, {EOS: Finish.EOS})
            decoding = Decoding(engine.stack, engine.heads, rule, spec, start, ends)
            decoding.run()
        assert decoding.drafted > decoding.drafts_kept, "nothing was undone, nothing was tested"
        for row, (prompt, record) in enumerate(zip(PROMPTS, decoding.records, strict=True)):
            text = prompt.token_ids + record.token_ids[:-1].tolist()
            for mine, theirs in zip(
                (start.cache.keys, start.cache.values), forward_keys_values(peer, text), strict=True
            ):
                assert relative(mine[:, row, :, : len(text)], theirs) < 1e-4
        records = decoding.records
        assert decoding.drafts_kept == sum(int((record.drafts > 0).sum()) for record in records)


def test_draft_length_follows_what_was_kept() -> None:
    """Protects the adaptive length: longer after drafts that were all kept, shorter after a wrong one, in bounds."""
    rule = build_rule(policy("self-speculative", exit_layer=2, max_debt=6), (2, 4), 6)
    rule.begin(Batch([1, 2], NEW, torch.device("cpu")))
    assert [rule.may_leave(0, n) for n in (0, 3, 4)] == [True, True, False]
    rule.verified(0, drafted=4, kept=4)
    assert [rule.may_leave(0, n) for n in (4, 5)] == [True, False]
    rule.verified(0, drafted=2, kept=2)  # the head was unsure: nothing is known of longer drafts
    assert [rule.may_leave(0, n) for n in (4, 5)] == [True, False]
    rule.verified(0, drafted=5, kept=1)
    assert [rule.may_leave(0, n) for n in (1, 2)] == [True, False]
    rule.verified(0, drafted=2, kept=0)
    assert [rule.may_leave(0, n) for n in (0, 1)] == [True, False]
    for length in range(1, 9):
        rule.verified(0, drafted=min(length, 6), kept=min(length, 6))
    assert [rule.may_leave(0, n) for n in (5, 6)] == [True, False], "max_debt bounds it"
    assert rule.may_leave(1, 3), "the other row has learnt nothing"


@pytest.mark.parametrize("kv", ["copy", "mask"])
def test_only_recomputed_keys_can_be_verified(kv: str) -> None:
    """Protects the legal pairs: a draft on estimated keys would be verified against estimates."""
    with pytest.raises(BadInput, match=rf"kv is '{kv}' and verify is true.*give kv: recompute"):
        policy("confidence", threshold=0.5, kv=kv, verify=True)


def test_random_exits_match_their_shares(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the control: the exit layers of `random` are distributed as it was told, and by the seed alone."""
    engine = tiny_engine("llama", head="tied")
    spec = policy("random", exit_layers=[2, 4], shares=[0.5, 0.2])
    layers: Counter[int] = Counter()
    for seed in range(9):
        start = engine.prefill(random_prompts(8, seed=seed), NEW)
        for completion in engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False).completions:
            layers.update(completion.exit_layers[1:])
    total = sum(layers.values())
    assert [layers[layer] / total for layer in (2, 4, N_LAYERS)] == pytest.approx([0.5, 0.2, 0.3], abs=0.05)
    again, other = complete(engine, spec), complete(engine, spec.model_copy(update={"seed": 1}))
    assert [c.exit_layers for c in again] == [c.exit_layers for c in complete(engine, spec, 1)]
    assert [c.exit_layers for c in again] != [c.exit_layers for c in other]
