"""A second implementation of dynamic inference, slow and plain, written from DESIGN and not from the engine's code.

One prompt at a time, one token at a time, `transformers` does the layers, and the rules are loops over Python numbers.
`copy` projects the exit state into each skipped layer's keys and values; `recompute` runs the whole text anew for every
token.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.engine import Prompt
from engine.exits import TENSORS, ExitsManifest
from engine.record import Completion
from engine.spec import Confidence, Controller, Fixed, Patience, PolicySpec

CONTINUE, EXIT, STOP = 0, 1, 2
NAMES = {CONTINUE: "full", EXIT: "exit", STOP: "stop"}
#: a decision or a choice that hangs on less than this is a float tie
TIE = 1e-4


@dataclass
class Written:
    """What the naive decoder wrote, one entry a token."""

    token_ids: list[int] = field(default_factory=list)  # -1 for a stop
    exit_layers: list[int] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # recompute: tokens of this text that wait, after each token
    margins: list[float] = field(default_factory=list)  # how narrowly the token and its decision were reached


@dataclass
class Bundle:
    """An exit bundle, read without the engine."""

    manifest: ExitsManifest
    folder: Path

    def __post_init__(self) -> None:
        self.tensors = load_file(self.folder / TENSORS)

    def logits(self, model: PreTrainedModel, point: int, state: torch.Tensor) -> tuple[list[float], list[int]]:
        """Logits at an exit point before full depth, and the token that each stands for."""
        unembedding = model.lm_head.weight
        allowed = list(range(unembedding.shape[0]))
        if "shortlist" in self.tensors:
            allowed = self.tensors["shortlist"].tolist()
        if self.manifest.head == "untied":
            return (self.tensors[f"heads.{point}.weight"] @ state).tolist(), allowed
        if self.manifest.head == "lens":
            down, up = self.tensors[f"heads.{point}.down"], self.tensors[f"heads.{point}.up"]
            state = state + up @ (down @ state)
        return (unembedding[allowed] @ final_norm(model)(state)).tolist(), allowed


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    return model.model.norm if model.config.model_type == "llama" else model.transformer.ln_f


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    return model.model.layers if model.config.model_type == "llama" else model.transformer.h


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def best(values: list[float]) -> tuple[int, float]:
    """Place of the largest value, the first of equals, and how far the second is behind."""
    place = max(range(len(values)), key=lambda i: (values[i], -i))
    others = [value for i, value in enumerate(values) if i != place]
    return place, values[place] - max(others)


# --- rules ----------------------------------------------------------------------------------------------------


def sec_rule(state: list[float], controller: list[list[float]], exit: float, stop: float, last: bool) -> int:
    """SEC: act only if the class is the argmax and its probability exceeds its threshold; at the end only stop."""
    probabilities = softmax([sum(w * x for w, x in zip(row, state, strict=True)) for row in controller])
    winner, _ = best(probabilities)
    if winner == 1 and probabilities[1] > exit and not last:
        return EXIT
    if winner == 2 and probabilities[2] > stop:
        return STOP
    return CONTINUE


class Judge:
    """One token's walk through the exit points under one policy."""

    def __init__(self, model: PreTrainedModel, bundle: Bundle | None, policy: PolicySpec) -> None:
        self.model, self.bundle, self.policy = model, bundle, policy
        self.n_layers = len(layers_of(model))
        self.said: list[int] = []  # what each exit point predicted for this token
        self.margin = math.inf

    @property
    def points(self) -> tuple[int, ...]:
        if isinstance(self.policy, Fixed):
            return (self.policy.exit_layer,)
        if isinstance(self.policy, Controller):
            return self.bundle.manifest.exit_points
        if isinstance(self.policy, Confidence | Patience):
            return tuple(point for point in self.bundle.manifest.exit_points if point < self.n_layers)
        return ()

    def decide(self, point: int, state: torch.Tensor) -> int:
        policy = self.policy
        if isinstance(policy, Fixed):
            return EXIT
        if isinstance(policy, Confidence):
            _, confidence = self.predict(point, state)
            self._hangs_on(confidence - policy.threshold)
            return EXIT if confidence > policy.threshold else CONTINUE
        if isinstance(policy, Patience):
            self.said.append(self.predict(point, state)[0])
            recent = self.said[-policy.patience - 1 :]
            return EXIT if len(recent) == policy.patience + 1 and len(set(recent)) == 1 else CONTINUE
        if isinstance(policy, Controller):
            probabilities = self.judge(state)
            _, lead = best(probabilities)
            self._hangs_on(lead)
            self._hangs_on(probabilities[1] - policy.exit)
            self._hangs_on(probabilities[2] - policy.stop)
            controller = self.bundle.tensors["controller"].tolist()
            return sec_rule(state.tolist(), controller, policy.exit, policy.stop, last=point == self.n_layers)
        raise AssertionError(policy)

    def judge(self, state: torch.Tensor) -> list[float]:
        return softmax((self.bundle.tensors["controller"] @ state).tolist())

    def predict(self, point: int, state: torch.Tensor) -> tuple[int, float]:
        """Token and probability that the head at `point` gives; at full depth the model's own."""
        if point == self.n_layers:
            logits = self.model.lm_head(final_norm(self.model)(state)).tolist()
            allowed = list(range(len(logits)))
        else:
            logits, allowed = self.bundle.logits(self.model, point, state)
        place, lead = best(logits)
        self._hangs_on(lead)
        return allowed[place], softmax(logits)[place]

    def _hangs_on(self, distance: float) -> None:
        self.margin = min(self.margin, abs(distance))


# --- the decoder ----------------------------------------------------------------------------------------------


@torch.no_grad()
def complete(
    model: PreTrainedModel, bundle: Bundle | None, policy: PolicySpec, prompt: list[int], new: int, eos: int | None
) -> Written:
    """Complete one prompt."""
    text = _Copied(model, prompt) if policy.kv == "copy" else _Recomputed(model, prompt)
    written = Written()
    n_layers = len(layers_of(model))
    first = Judge(model, bundle, policy)
    token, confidence = first.predict(n_layers, text.prompt_state)
    _note(written, token, n_layers, CONTINUE, confidence, first.margin, 0)
    while written.token_ids[-1] not in (eos, -1) and len(written.token_ids) < new:
        judge = Judge(model, bundle, policy)
        layer, decision, state = _walk(text, judge, written.token_ids[-1], policy.max_debt)
        text.leave(layer)
        if decision == STOP:
            token, confidence = -1, judge.judge(state)[2]
        else:
            token, confidence = judge.predict(layer, state)
        _note(written, token, layer, decision, confidence, judge.margin, text.waiting)
    return written


def _walk(text: "_Copied | _Recomputed", judge: Judge, token: int, max_debt: int) -> tuple[int, int, torch.Tensor]:
    """Take a token down the layers until a rule ends the walk: layers run, decision, state."""
    text.enter(token)
    for layer in range(1, judge.n_layers + 1):
        state = text.deepen()
        if layer in judge.points:
            decision = judge.decide(layer, state)
            if decision == STOP or (decision == EXIT and text.waiting < max_debt):
                return layer, decision, state
    return judge.n_layers, CONTINUE, state


def _note(
    written: Written, token: int, layer: int, decision: int, confidence: float, margin: float, waiting: int
) -> None:
    written.token_ids.append(token)
    written.exit_layers.append(layer)
    written.decisions.append(NAMES[decision])
    written.confidences.append(confidence)
    written.margins.append(margin)
    written.waiting.append(waiting)


class _Copied:
    """Keys and values of skipped layers come from the exit state: norm, projection, rotary."""

    waiting = 0

    def __init__(self, model: PreTrainedModel, prompt: list[int]) -> None:
        self.model, self.layers = model, layers_of(model)
        self.llama = model.config.model_type == "llama"
        self.cache = DynamicCache(config=model.config)
        self.length = len(prompt)
        states = _raw_states(model, torch.tensor([prompt]), self.cache)
        self.prompt_state = states[-1][-1]

    def enter(self, token: int) -> None:
        self.depth = 0
        self.positions = torch.tensor([[self.length]])
        self.length += 1
        ids = torch.tensor([[token]])
        if self.llama:
            self.state = self.model.model.embed_tokens(ids)
            self.rotary = self.model.model.rotary_emb(self.state, self.positions)
        else:
            self.state = self.model.transformer.wte(ids) + self.model.transformer.wpe(self.positions)

    def deepen(self) -> torch.Tensor:
        layer, settings = self.layers[self.depth], {"past_key_values": self.cache, "use_cache": True}
        if self.llama:
            settings |= {"position_embeddings": self.rotary, "position_ids": self.positions}
        out = layer(self.state, **settings)
        self.state = out[0] if isinstance(out, tuple) else out
        self.depth += 1
        return self.state[0, 0]

    def leave(self, depth: int) -> None:
        for number in range(depth, len(self.layers)):
            layer = self.layers[number]
            if self.llama:
                attention, normed = layer.self_attn, layer.input_layernorm(self.state)
                shape = (1, 1, -1, attention.head_dim)
                keys = attention.k_proj(normed).view(shape).transpose(1, 2)
                values = attention.v_proj(normed).view(shape).transpose(1, 2)
                keys, _ = apply_rotary_pos_emb(keys, keys, *self.rotary)
            else:
                _, keys, values = layer.attn.c_attn(layer.ln_1(self.state)).chunk(3, dim=-1)
                shape = (1, 1, self.model.config.n_head, -1)
                keys, values = keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)
            self.cache.update(keys, values, number)


class _Recomputed:
    """Everything is computed again for every token; only how deep each token would have waited is kept."""

    def __init__(self, model: PreTrainedModel, prompt: list[int]) -> None:
        self.model, self.n_layers = model, len(layers_of(model))
        self.ids = list(prompt)
        self.depths: list[int] = []  # of the tokens since the prompt
        self.prompt_state = _raw_states(model, torch.tensor([self.ids]))[-1][-1]

    @property
    def waiting(self) -> int:
        return sum(depth < self.n_layers for depth in self.depths)

    def enter(self, token: int) -> None:
        self.ids.append(token)
        self.depth = 0
        self.states = _raw_states(self.model, torch.tensor([self.ids]))

    def deepen(self) -> torch.Tensor:
        self.depth += 1
        return self.states[self.depth - 1][-1]

    def leave(self, depth: int) -> None:
        self.depths = [max(before, depth) for before in self.depths] + [depth]


def _raw_states(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None = None) -> list[torch.Tensor]:
    """States [tokens, hidden] behind each layer, before any final norm."""
    states: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, out: object) -> None:
        states.append((out[0] if isinstance(out, tuple) else out)[0])

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        model(ids, past_key_values=cache, use_cache=cache is not None)
    finally:
        for hook in hooks:
            hook.remove()
    return states


def complete_all(
    model: PreTrainedModel,
    bundle: Bundle | None,
    policy: PolicySpec,
    prompts: list[Prompt],
    new: int,
    eos: int | None,
) -> list[Written]:
    return [complete(model, bundle, policy, prompt.token_ids, new, eos) for prompt in prompts]


def first_difference(mine: Written, theirs: Written) -> int | None:
    """The first token at which two writings differ in id, exit layer or decision."""
    a = list(zip(mine.token_ids, mine.exit_layers, mine.decisions, strict=True))
    b = list(zip(theirs.token_ids, theirs.exit_layers, theirs.decisions, strict=True))
    for place in range(max(len(a), len(b))):
        if a[place : place + 1] != b[place : place + 1]:
            return place
    return None


def as_written(completion: Completion) -> Written:
    """The engine's completion in the form of the naive decoder's."""
    return Written(
        token_ids=completion.records.token_ids.tolist(),
        exit_layers=completion.exit_layers,
        decisions=completion.decisions,
        confidences=completion.confidences,
    )


def count_ties(mine: list[Completion], theirs: list[Completion], judge: list[Written]) -> int:
    """Rows that differ in a token, exit layer or decision, each by a float tie; any other difference fails.

    `judge` is the naive decoder's view of the same rows: it knows how narrowly each decision was reached.
    """
    ties = 0
    for row, (one, other, naive) in enumerate(zip(mine, theirs, judge, strict=True)):
        place = first_difference(as_written(one), as_written(other))
        if place is not None:
            story = f"row {row}, token {place}: {as_written(one)} against {as_written(other)}, judged by {naive}"
            assert first_difference(as_written(one), naive) in (None, place), story
            assert naive.margins[place] < TIE, story
            ties += 1
    return ties
