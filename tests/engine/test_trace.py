"""A trace holds what full passes and heads would say, token by token."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, N_LAYERS, POINTS, VOCABULARY, facts_of, random_prompts

from engine.cost import cost
from engine.decode import prefill
from engine.engine import Engine, Prompt
from engine.exits import read_manifest
from engine.shapes import head_parameters, model_shape

PROMPTS = random_prompts(4, seed=3, shortest=2, longest=25)


def random_targets(lengths: list[int], seed: int = 5) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


TARGETS = random_targets([7, 1, 5, 9])


@pytest.mark.parametrize("bundle", [{"head": "lens"}, {"head": "untied", "shortlist": 100}, {"head": "tied"}])
def test_trace_is_what_heads_say_behind_each_prefix(
    bundle: dict[str, object], tiny_engine: Callable[..., Engine]
) -> None:
    """Protects every column: each token of a target is predicted from a plain pass over all that stands before it."""
    engine = tiny_engine("llama", **bundle)
    done = engine.trace(PROMPTS, TARGETS)
    for prompt, target, trace in zip(PROMPTS, TARGETS, done.traces, strict=True):
        assert trace.targets.tolist() == target
        for step, token in enumerate(target):
            before = prompt.token_ids + target[:step]
            for place, point in enumerate(POINTS):
                state, earlier = (_state(engine, before, layers) for layers in (point, point - 1))
                prediction = engine.heads.predict(point, state)
                similarity = torch.cosine_similarity(state, earlier)
                judged = engine.heads.judge(point, state)[0]
                seen = [
                    trace.probabilities[place, step], trace.margins[place, step], trace.entropies[place, step],
                    trace.similarities[place, step], *trace.controller[place, :, step],
                ]  # fmt: skip
                wanted = [prediction.confidences, prediction.margins, prediction.entropies, similarity, *judged]
                assert seen == pytest.approx([float(value) for value in wanted], abs=1e-4)
                assert trace.tokens[place, step] == int(prediction.tokens)
                assert trace.ranks[place, step] == _rank(engine, point, prediction.logits[0], token)


@torch.inference_mode()
def _state(engine: Engine, ids: list[int], layers: int) -> torch.Tensor:
    from engine.cache import Span

    span = Span([0], [0], [len(ids)])
    states = engine.stack.embed(torch.tensor(ids), torch.arange(len(ids)))
    return engine.stack.run(states, span, engine.stack.new_cache(1, len(ids)), 0, layers)[-1:]


def _rank(engine: Engine, point: int, logits: torch.Tensor, token: int) -> int:
    shortlist = engine.heads.shortlist
    if point == N_LAYERS or shortlist is None:
        return int((logits > logits[token]).sum())
    places = (shortlist == token).nonzero()
    return int((logits > logits[places[0, 0]]).sum()) if len(places) else -1


def test_a_first_token_is_restricted_as_prefill_does(tiny_engine: Callable[..., Engine]) -> None:
    """Protects full depth's first token behind a healed prompt, which live decoding restricts."""
    engine = tiny_engine("llama", head="lens")
    newline = engine.text.tokens.index("\n")
    prompt = Prompt(PROMPTS[2].token_ids, healed=newline)
    allowed = engine.text.beginning_with(newline)
    [trace] = engine.trace([prompt], [TARGETS[0]]).traces
    assert set(trace.tokens[:, 0].tolist()) <= set(allowed)
    assert trace.tokens[-1, 0] == int(engine.prefill([prompt], 4).start.first.tokens)
    [free] = engine.trace([Prompt(prompt.token_ids)], [TARGETS[0]]).traces
    assert np.array_equal(free.tokens[:, 1:], trace.tokens[:, 1:])


def test_the_work_of_a_trace_is_a_pass_and_heads_on_target_positions(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the price: no head runs on a token of the prompt, and every layer runs once on each token."""
    engine = tiny_engine("llama", head="lens")
    work = engine.trace(PROMPTS, TARGETS).work
    positions = sum(len(p.token_ids) + len(t) - 1 for p, t in zip(PROMPTS, TARGETS, strict=True))
    assert sum(layers * tokens for layers, tokens, *_ in work.passes) == N_LAYERS * positions
    assert [states for _, states in work.heads] == [sum(map(len, TARGETS))] * len(POINTS)


@pytest.mark.parametrize("controller", ["sec", "calibrated"])
def test_nobody_asks_the_controller_behind_the_last_layer_where_no_exit_point_is(
    controller: str, tiny_engine: Callable[..., Engine]
) -> None:
    """Protects traces with exits like the shipped ones, which end before the model does."""
    engine = tiny_engine("llama", points=(1, 2, 4, 5), controller=controller)
    for trace in engine.trace(PROMPTS, TARGETS).traces:
        assert np.isnan(trace.controller[-1]).all()
        assert np.isfinite(trace.controller[:-1]).all()
        assert np.isfinite(trace.probabilities).all()


@pytest.mark.parametrize(
    "kind", ["llama", "llama wide heads", "gpt2", "qwen2", "qwen3", "codegen", "gpt_bigcode", "starcoder2"]
)
def test_a_models_shape_is_known_without_its_weights(
    kind: str, tiny_folder: Callable[[str], Path], tiny_bundle: Callable[..., Path], tiny_engine: Callable[..., Engine]
) -> None:
    """Protects replay's cost model: what preparing pins is what the loaded model has."""
    engine, facts = tiny_engine(kind, head="lens", shortlist=100), facts_of(tiny_folder(kind))
    assert kind in CONFIGS
    assert model_shape(facts, "float32") == engine.stack.shape
    manifest = read_manifest(tiny_bundle(kind, head="lens", shortlist=100))
    assert head_parameters(facts, manifest) == tuple(map(engine.heads.parameters, POINTS))


def test_targets_are_the_tokens_of_the_whole_text(tiny_engine: Callable[..., Engine]) -> None:
    """Protects what is traced: a reference's tokens as they stand behind the prompt, the healed token among them."""
    text = tiny_engine("llama", head="lens").text
    prompts, references = ["a = b\n", "x", ""], ["c = d;\ne", "y" * 5, "zz"]
    encoded = text.encode(prompts, 4, heal=True)
    assert encoded[0].healed is not None
    for prompt, reference, one, target in zip(
        prompts, references, encoded, text.targets(prompts, encoded, references, 100), strict=True
    ):
        written = text.tokenizer.decode(target)
        healed = "" if one.healed is None else text.tokens[one.healed]
        assert written == healed + reference, prompt
    assert [len(target) for target in text.targets(prompts, encoded, references, 2)] == [2, 2, 2]
    # `;` and a line's end are one token: in the whole text it reaches over the end of the prompt
    [over] = text.targets(["a;"], text.encode(["a;"], 4, heal=True), ["\nb"], 100)
    assert text.tokenizer.decode(over) == "\nb"


def test_price_of_a_trace(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the bench of traces: the price is the cost model's over the same work."""
    engine = tiny_engine("llama", head="lens")
    done = engine.trace(PROMPTS, TARGETS)
    assert engine.price(done.work) == cost(done.work, engine.stack.shape, engine.machine)
    assert prefill(engine.stack, [PROMPTS[0].token_ids], 0).prompts == [2]
