"""Thresholds off, the engine writes the tokens of `transformers` greedy `generate`; differences are counted."""

import copy
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, CONTEXT, EOS, random_model, random_prompts
from transformers import PreTrainedModel

from engine.engine import Engine, Prompt
from engine.spec import policy

#: logits of two tokens closer than this, in float32 and in float64 alike, are a float tie
TIE = 1e-3
FULL = policy("full")


@pytest.mark.parametrize("kind", CONFIGS)
def test_tiny_models(kind: str, tiny_engine: Callable[..., Engine]) -> None:
    """Protects every option of a family's configuration that changes what it computes."""
    engine, peer = tiny_engine(kind), random_model(kind)
    prompts = random_prompts(16, seed=11)
    differing = []
    for batch_size in (8, 1):
        chosen = prompts if batch_size == 8 else prompts[::4]
        theirs = generate(peer, chosen, 14, batch_size)
        mine = write(engine, chosen, 14, batch_size)
        differing += differences(peer, chosen, mine, theirs)
    print(f"{kind}: {len(differing)} of {len(prompts) * 14 + len(prompts[::4]) * 14} tokens differ {differing}")


def test_dynamic_angles_to_the_end_of_the_context(tiny_engine: Callable[..., Engine]) -> None:
    """Protects angles that change with the text's length: they do so beyond the context only, and we end there."""
    kind = "llama rope dynamic"
    prompts = random_prompts(4, seed=5, shortest=CONTEXT - 14, longest=CONTEXT - 14)
    theirs = generate(random_model(kind), prompts, 14, 4)
    assert differences(random_model(kind), prompts, write(tiny_engine(kind), prompts, 14, 4), theirs) == []


@pytest.mark.parametrize(("batch_size", "count"), [(8, 12), (1, 3)])
def test_smollm2(batch_size: int, count: int, smollm2: Engine, smollm2_peer: PreTrainedModel) -> None:
    """Protects what everything else stands on: the real model's full depth is the real model's."""
    prompts = [Prompt(prompt.token_ids[-96:]) for prompt in real_prompts(smollm2, count)]
    hold_against_generate(smollm2, smollm2_peer, prompts, 6, batch_size)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("batch_size", [8, 1])
def test_smollm2_on_two_hundred_prompts(batch_size: int, smollm2: Engine, smollm2_peer: PreTrainedModel) -> None:
    """The same on 200 prompts of 16 to 256 tokens."""
    hold_against_generate(smollm2, smollm2_peer, real_prompts(smollm2, 200), 12, batch_size)


def hold_against_generate(
    engine: Engine, peer: PreTrainedModel, prompts: list[Prompt], new: int, batch_size: int
) -> None:
    """The same batches on both sides; differences are counted, and fail where they are no ties."""
    mine, theirs = write(engine, prompts, new, batch_size), generate(peer, prompts, new, batch_size)
    found = differences(peer, prompts, mine, theirs)
    tokens = sum(map(len, theirs))
    print(
        f"{engine.name}, batch {batch_size}: {len(prompts)} prompts, {tokens} tokens, {len(found)} float ties {found}"
    )


def write(engine: Engine, prompts: list[Prompt], new: int, batch_size: int) -> list[list[int]]:
    written = []
    for first in range(0, len(prompts), batch_size):
        start = engine.prefill(prompts[first : first + batch_size], new)
        decoded = engine.decode(start, FULL, max_new_tokens=new, ends_with_line=False)
        written += [completion.token_ids for completion in decoded.completions]
    return written


@torch.inference_mode()
def generate(peer: PreTrainedModel, prompts: list[Prompt], new: int, batch_size: int) -> list[list[int]]:
    """`transformers` greedy, padded on the left, each text cut behind its end-of-sequence."""
    eos = peer.config.eos_token_id
    written = []
    for first in range(0, len(prompts), batch_size):
        ids = [prompt.token_ids for prompt in prompts[first : first + batch_size]]
        longest = max(map(len, ids))
        padded = torch.tensor([[EOS] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        out = peer.generate(padded, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=eos)
        for row in out[:, longest:].tolist():
            written.append(row[: row.index(eos) + 1] if eos in row else row)
    return written


def differences(
    peer: PreTrainedModel, prompts: list[Prompt], mine: list[list[int]], theirs: list[list[int]]
) -> list[tuple[float, float]]:
    """The gap between the two best logits, in float32 and float64, at each row's first difference; no tie fails."""
    gaps = []
    for prompt, my, their in zip(prompts, mine, theirs, strict=True):
        if my != their:
            place = next((i for i, (a, b) in enumerate(zip(my, their, strict=False)) if a != b), None)
            assert place is not None, f"same tokens, another end: {my} against {their}"
            text = torch.tensor([prompt.token_ids + their[:place]])
            gap = tuple(_gap(model, text, {my[place], their[place]}) for model in (peer, copy.deepcopy(peer).double()))
            assert max(gap) < TIE, f"no float tie: {my} against {their} at {place}, logits {gap} apart"
            gaps.append(gap)
    return gaps


@torch.inference_mode()
def _gap(model: PreTrainedModel, text: torch.Tensor, rivals: set[int]) -> float:
    top = model(text).logits[0, -1].topk(2)
    assert set(top.indices.tolist()) == rivals, "a token was written that was neither first nor second"
    return float(top.values[0] - top.values[1])


def real_prompts(engine: Engine, count: int) -> list[Prompt]:
    """Python of the standard library, cut at random places: 16 to 256 tokens each."""
    draw = random.Random(20240414)
    files = sorted(path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.stat().st_size > 20_000)
    prompts = []
    for _ in range(count):
        text = draw.choice(files).read_text(encoding="utf-8")
        end = draw.randrange(4_000, len(text))
        tokens = engine.tokenizer(text[end - 4_000 : end])["input_ids"]
        prompts.append(Prompt(tokens[-draw.randint(16, 256) :]))
    return prompts


def test_a_wrong_weight_shows(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the comparison itself: a peer with one other weight does not pass as a float tie."""
    engine, peer = tiny_engine("llama"), random_model("llama")
    with torch.no_grad():
        peer.model.layers[3].self_attn.k_proj.weight.mul_(1.5)
    prompts = random_prompts(8, seed=11)
    with pytest.raises(AssertionError, match=r"no float tie|neither first nor second"):
        differences(peer, prompts, write(engine, prompts, 10, 8), generate(peer, prompts, 10, 8))
