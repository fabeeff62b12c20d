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

from engine.engine import Prompt
from engine.exits import TENSORS, ExitsManifest
from engine.record import Completion
from engine.spec import (
    Confidence,
    Controller,
    Entropy,
    Fixed,
    Margin,
    Patience,
    PolicySpec,
    Position,
    StateSimilarity,
    Static,
)

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
        allowed = list(range(model.lm_head.weight.shape[0]))
        if "shortlist" in self.tensors:
            allowed = self.tensors["shortlist"].tolist()
        if self.manifest.head == "untied":
            return (self.tensors[f"heads.{point}.weight"] @ state).tolist(), allowed
        if self.manifest.head == "lens":
            down, up = self.tensors[f"heads.{point}.down"], self.tensors[f"heads.{point}.up"]
            state = state + up @ (down @ state)
        return model.lm_head(final_norm(model)(state))[allowed].tolist(), allowed


#: families whose layers take the cache by another name
LAYER_PAST = ("codegen", "gpt_bigcode")


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its unembedding."""
    return getattr(model, model.base_model_prefix)


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    body = body_of(model)
    return body.ln_f if hasattr(body, "ln_f") else body.norm


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    body = body_of(model)
    return body.h if hasattr(body, "h") else body.layers


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
        if isinstance(self.policy, Confidence | Margin | Entropy | Patience | StateSimilarity | Position):
            return tuple(point for point in self.bundle.manifest.exit_points if point < self.n_layers)
        return ()

    def decide(self, point: int, state: torch.Tensor, before: torch.Tensor, step: int, new: int) -> int:
        """before: the state one layer earlier. step: which of `new` tokens is written, the first being 0."""
        policy = self.policy
        if isinstance(policy, Fixed):
            return EXIT
        if isinstance(policy, Confidence | Margin | Entropy) and policy.ask_above is not None:
            leaving = self.judge(state)[EXIT]
            self._hangs_on(leaving - policy.ask_above)
            if leaving <= policy.ask_above:
                return CONTINUE
        if isinstance(policy, Confidence):
            _, confidence = self.predict(point, state)
            threshold = policy.threshold
            if policy.decay is not None:
                threshold = min(1, 0.9 * threshold + 0.1 * math.exp(-policy.decay * step / new))
            return self._if_over(confidence, threshold)
        if isinstance(policy, Margin):
            first, second = sorted(self.probabilities(point, state))[:-3:-1]
            return self._if_over(first - second, policy.threshold)
        if isinstance(policy, Entropy):
            entropy = -sum(p * math.log(p) for p in self.probabilities(point, state) if p > 0)
            return self._if_over(policy.threshold, entropy)
        if isinstance(policy, StateSimilarity):
            a, b = state.tolist(), before.tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            return self._if_over(dot / math.hypot(*a) / math.hypot(*b), policy.threshold)
        if isinstance(policy, Position):
            fallen = (policy.deepest - policy.shallowest) * min(step, policy.over) / policy.over
            return EXIT if point >= policy.deepest - fallen else CONTINUE
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

    def foresee(self, state: torch.Tensor) -> tuple[int, float]:
        """Token and probability where only the likeliest by the preview are computed, the rest being looked at."""
        down, up = self.bundle.tensors["preview.down"], self.bundle.tensors["preview.up"]
        x = final_norm(self.model)(state)
        terms = torch.stack([self.model.lm_head(column) - self.model.lm_head(0 * column) for column in up.t()])
        step = terms.abs().max(dim=1, keepdim=True).values / 127  # eight bits a number
        seen = (down @ x) @ ((terms / step).round() * step) + self.model.lm_head(0 * x)
        exact, looked = self.model.lm_head(x).tolist(), seen.tolist()
        order = sorted(range(len(looked)), key=lambda token: -looked[token])
        computed = order[: self.policy.preview]
        token = max(computed, key=lambda token: exact[token])
        self._hangs_on(min(exact[token] - exact[other] for other in computed if other != token))
        self._hangs_on(looked[computed[-1]] - looked[order[len(computed)]])
        mixed = [exact[token] if token in computed else looked[token] for token in range(len(looked))]
        return token, softmax(mixed)[token]

    def probabilities(self, point: int, state: torch.Tensor) -> list[float]:
        """What the head at `point` before full depth thinks of each token that it knows."""
        return softmax(self.bundle.logits(self.model, point, state)[0])

    def _if_over(self, value: float, threshold: float) -> int:
        self._hangs_on(value - threshold)
        return EXIT if value > threshold else CONTINUE

    def _hangs_on(self, distance: float) -> None:
        self.margin = min(self.margin, abs(distance))


# --- the decoder ----------------------------------------------------------------------------------------------


@torch.no_grad()
def complete(
    model: PreTrainedModel, bundle: Bundle | None, policy: PolicySpec, prompt: list[int], new: int, eos: int | None
) -> Written:
    """Complete one prompt."""
    text = {"copy": _Copied, "recompute": _Recomputed, "mask": _Masked}[policy.kv](model, prompt)
    written = Written()
    n_layers = len(layers_of(model))
    first = Judge(model, bundle, policy)
    token, confidence = first.predict(n_layers, text.prompt_state)
    _note(written, token, n_layers, CONTINUE, confidence, first.margin, 0)
    while written.token_ids[-1] not in (eos, -1) and len(written.token_ids) < new:
        judge = Judge(model, bundle, policy)
        layer, decision, state = _walk(text, judge, written, new)
        if not isinstance(policy, Static):
            text.leave(layer)
        if decision == STOP:
            token, confidence = -1, judge.judge(state)[2]
        elif decision == CONTINUE and policy.preview is not None and len(written.token_ids) >= policy.full_first:
            token, confidence = judge.foresee(state)
        else:
            token, confidence = judge.predict(n_layers if isinstance(policy, Static) else layer, state)
        _note(written, token, layer, decision, confidence, judge.margin, text.waiting)
    return written


def _walk(text: "_Copied | _Recomputed", judge: Judge, written: Written, new: int) -> tuple[int, int, torch.Tensor]:
    """Take the newest token down the layers until a rule ends the walk: layers run, decision, state."""
    policy, step = judge.policy, len(written.token_ids)
    if isinstance(policy, Static):
        return len(layers_of(judge.model)) - len(set(policy.layers)), EXIT, _pruned(text, policy, written.token_ids[-1])
    left = [decision == "exit" for decision in written.decisions]
    in_row = len(left) - max((i + 1 for i, early in enumerate(left) if not early), default=0)
    free = (
        step >= policy.full_first and text.waiting < policy.max_debt and in_row < (policy.max_exits_in_row or math.inf)
    )
    state = text.enter(written.token_ids[-1])
    for layer in range(1, judge.n_layers + 1):
        before, state = state, text.deepen()
        if layer in judge.points and layer >= (policy.min_layer or 0) and step >= policy.full_first:
            decision = judge.decide(layer, state, before, step, new)
            if decision == STOP or (decision == EXIT and free):
                return layer, decision, state
    return judge.n_layers, CONTINUE, state


def _pruned(text: "_Copied", policy: Static, token: int) -> torch.Tensor:
    text.enter(token)
    for layer in range(1, len(text.layers) + 1):
        if layer in policy.layers:
            text.depth += 1
        else:
            state = text.deepen()
    return state


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
    """Keys and values of skipped layers come from the exit state, as if it had reached each of them."""

    waiting = 0

    def __init__(self, model: PreTrainedModel, prompt: list[int]) -> None:
        self.model, self.layers = model, layers_of(model)
        self.cache = DynamicCache(config=model.config)
        self.length = len(prompt)
        states = raw_states(model, torch.tensor([prompt]), self.cache)
        self.prompt_state = states[-1][-1]

    def enter(self, token: int) -> torch.Tensor:
        self.depth = 0
        self.positions = torch.tensor([[self.length]])
        self.length += 1
        body, ids = body_of(self.model), torch.tensor([[token]])
        name = "layer_past" if self.model.config.model_type in LAYER_PAST else "past_key_values"
        self.settings = {name: self.cache, "use_cache": True}
        self.state = (body.embed_tokens if hasattr(body, "embed_tokens") else body.wte)(ids)
        if hasattr(body, "wpe"):
            self.state = self.state + body.wpe(self.positions)
        else:
            self.settings["position_ids"] = self.positions
        if hasattr(body, "rotary_emb"):
            self.settings["position_embeddings"] = body.rotary_emb(self.state, self.positions)
        return self.state[0, 0]

    def deepen(self) -> torch.Tensor:
        out = self.layers[self.depth](self.state, **self.settings)
        self.state = out[0] if isinstance(out, tuple) else out
        self.depth += 1
        return self.state[0, 0]

    def leave(self, depth: int) -> None:
        # A layer keeps the keys and values of what goes in; what comes out is not wanted.
        for layer in self.layers[depth:]:
            layer(self.state, **self.settings)


class _Masked(_Copied):
    """Skipped layers have no keys and values of the token: later tokens do not see it there."""

    def leave(self, depth: int) -> None:
        pass


class _Recomputed:
    """Everything is computed again for every token; only how deep each token would have waited is kept."""

    def __init__(self, model: PreTrainedModel, prompt: list[int]) -> None:
        self.model, self.n_layers = model, len(layers_of(model))
        self.ids = list(prompt)
        self.depths: list[int] = []  # of the tokens since the prompt
        self.prompt_state = raw_states(model, torch.tensor([self.ids]))[-1][-1]

    @property
    def waiting(self) -> int:
        return sum(depth < self.n_layers for depth in self.depths)

    def enter(self, token: int) -> torch.Tensor:
        self.ids.append(token)
        self.depth = 0
        self.states = raw_states(self.model, torch.tensor([self.ids]))
        return self.states[0][-1]

    def deepen(self) -> torch.Tensor:
        self.depth += 1
        return self.states[self.depth][-1]

    def leave(self, depth: int) -> None:
        self.depths = [max(before, depth) for before in self.depths] + [depth]


def raw_states(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None = None) -> list[torch.Tensor]:
    """States [tokens, hidden] in front of the first layer and behind each one, before any final norm."""
    states: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, out: object) -> None:
        states.append((out[0] if isinstance(out, tuple) else out)[0])

    def keep_first(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        states.append(inputs[0][0])

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    hooks.append(layers_of(model)[0].register_forward_pre_hook(keep_first))
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


@torch.inference_mode()
def forward_keys_values(peer: PreTrainedModel, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all layers, [layers, kv heads, tokens, head size] each."""
    cache = DynamicCache(config=peer.config)
    peer(torch.tensor([text]), past_key_values=cache, use_cache=True)
    return torch.cat([layer.keys for layer in cache.layers]), torch.cat([layer.values for layer in cache.layers])


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of any layer, as a share of that layer's largest entry."""
    gap = (mine - theirs).abs().flatten(1).max(dim=1).values
    return float((gap / theirs.abs().flatten(1).max(dim=1).values).max())
