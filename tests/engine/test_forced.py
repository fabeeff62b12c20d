"""Likelihoods of given tokens: what a policy itself wrote is as likely as it said, and leaves where it left."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_models import random_model, random_prompts

from engine.engine import Engine
from engine.errors import BadInput
from engine.record import Finish
from engine.spec import parse_policy

NEW = 7
PROMPTS = random_prompts(6, seed=3, longest=20)
POLICIES = [
    "full",
    {"fixed": {"exit_layer": 4}},
    {"fixed": {"exit_layer": 2, "kv": "recompute", "max_debt": 2}},
    {"fixed": {"exit_layer": 2, "kv": "mask"}},
    {"confidence": {"threshold": 0.15}},
    {"confidence": {"threshold": 0.1, "ask_above": 0.3}},
    {"confidence": {"threshold": 0.3, "preview": 4}},
    {"confidence": {"threshold": 0.15, "kv": "recompute", "max_debt": 1}},
    {"entropy": {"threshold": 3.5}},
    {"patience": {"patience": 1}},
    {"state-similarity": {"threshold": 0.8}},
    {"static": {"layers": [3, 5]}},
    {"sec": {"exit": 0.4, "stop": 0.99}},
]


@pytest.mark.parametrize(
    ("bundle", "largest_logit"), [({"head": "lens", "shortlist": 100}, 16), ({"head": "untied"}, 90)], ids=str
)
def test_what_a_policy_wrote_is_as_likely_as_it_said(
    bundle: dict[str, object], largest_logit: int, tiny_engine: Callable[..., Engine]
) -> None:
    """Token by token: the same exit layers, the same probabilities, each of them the policy's own choice.

    Sums in another order differ by some steps of a float32 of the logits' size, probabilities by as large a share.
    """
    few_steps = 5 * float(np.spacing(np.float32(largest_logit)))
    engine = tiny_engine("llama rope llama3", **bundle)
    start = engine.prefill(PROMPTS, NEW)
    early = 0
    for policy in POLICIES:
        spec = parse_policy(policy)
        done = engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False).completions
        kept = [(p, c) for p, c in zip(PROMPTS, done, strict=True) if c.finish is not Finish.STOP]
        found = engine.likelihoods([(p.token_ids, c.token_ids) for p, c in kept], policy, batch_size=4)
        for (_, completion), one in zip(kept, found, strict=True):
            assert one.greedy.all(), spec.label
            assert one.exit_layers.tolist() == completion.exit_layers, spec.label
            np.testing.assert_allclose(np.exp(one.log_probabilities), completion.confidences, atol=few_steps)
            early += int((one.exit_layers < engine.n_layers).sum())
    assert early > 50


def test_at_full_depth_they_are_those_of_the_model(tiny_engine: Callable[..., Engine]) -> None:
    """Held against `transformers`, for tokens that nobody would choose, in batches of any size."""
    engine, peer = tiny_engine("gpt2", head="lens"), random_model("gpt2")
    rng = np.random.default_rng(5)
    pairs = [(p.token_ids, rng.integers(0, 120, 1 + i % 3).tolist()) for i, p in enumerate(PROMPTS)]
    found = engine.likelihoods(pairs)
    for (context, continuation), one in zip(pairs, found, strict=True):
        with torch.inference_mode():
            logits = peer(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected = [float(logits[place, token]) for place, token in zip(places, continuation, strict=True)]
        np.testing.assert_allclose(one.log_probabilities, expected, atol=1e-4)
        assert one.greedy.tolist() == [int(logits[p].argmax()) == t for p, t in zip(places, continuation, strict=True)]
    for one, alone in zip(found, engine.likelihoods(pairs, batch_size=1), strict=True):
        np.testing.assert_allclose(one.log_probabilities, alone.log_probabilities, atol=1e-5)


def test_verified_drafts_change_no_likelihood(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine("llama rope llama3", head="lens", shortlist=100)
    pairs = [(p.token_ids, [5, 9]) for p in PROMPTS]
    for one, full in zip(
        engine.likelihoods(pairs, {"self-speculative": {"exit_layer": 4}}), engine.likelihoods(pairs), strict=True
    ):
        assert one.log_probabilities.tolist() == full.log_probabilities.tolist()


def test_a_stop_is_no_token_and_what_a_shortlist_lacks_is_impossible(tiny_engine: Callable[..., Engine]) -> None:
    """A policy that gives up at once still says how likely a token is; a head cannot write what it does not know."""
    engine = tiny_engine("llama rope llama3", head="lens", shortlist=100)
    shortlist = set(engine.heads.shortlist.tolist())
    outside = next(token for token in range(engine.facts.vocab_size) if token not in shortlist)
    inside = next(iter(shortlist))
    pairs = [(PROMPTS[0].token_ids, [inside, inside, outside])]
    [stopping] = engine.likelihoods(pairs, {"controller": {"exit": 1.0, "stop": 0.0}})
    assert np.isfinite(stopping.log_probabilities).all()
    assert (stopping.exit_layers == engine.n_layers).all()
    [early] = engine.likelihoods(pairs, {"fixed": {"exit_layer": 2}})
    assert early.exit_layers.tolist() == [engine.n_layers, 2, 2]
    assert math.isfinite(early.log_probabilities[1])
    assert early.log_probabilities[2] == -math.inf
    assert not early.greedy[2]


def test_what_does_not_fit_is_refused(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine("llama rope llama3", head="lens", shortlist=100)
    assert engine.likelihoods([]) == []
    for context, continuation in (([], [1]), ([1], []), ([1], [2] * engine.max_context)):
        with pytest.raises(BadInput, match="shorten it"):
            engine.likelihoods([(context, continuation)])
    long = list(range(1, 50)) * 40
    [cut] = engine.likelihoods([(long, [3, 4])])
    [same] = engine.likelihoods([(long[-(engine.max_context - 2) :], [3, 4])])
    assert cut.log_probabilities.tolist() == same.log_probabilities.tolist()
