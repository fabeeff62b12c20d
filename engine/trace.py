"""One teacher-forced pass over prompts and targets: what every exit point predicts for every token of a target.

Layers run over all tokens at once, heads on target positions only.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import Span
from engine.cost import Work
from engine.errors import NumericalError
from engine.heads import Heads, choose
from engine.stack import LayerStack
from engine.stopwatch import Stopwatch

#: states that a head is evaluated on at once: their logits are copied a few times
_AT_ONCE = 128
#: the logit of what a first token cannot be: its probability is 0, and a sum over it stays a number
_RULED_OUT = -1e30


@dataclass(frozen=True)
class TargetTrace:
    """The trace of one target: n tokens at p exit points, full depth the last; fields as `db.records.TraceArrays`."""

    targets: np.ndarray  # [n] int32
    tokens: np.ndarray  # [p, n] int32
    probabilities: np.ndarray  # [p, n] float32, as all that follow but the ranks
    margins: np.ndarray  # [p, n]
    entropies: np.ndarray  # [p, n]
    similarities: np.ndarray  # [p, n]
    controller: np.ndarray  # [p, 3, n]; nan without one, and at full depth where that is no exit point
    ranks: np.ndarray  # [p, n] int32; -1 where the head cannot predict the target


@dataclass(frozen=True)
class TracedBatch:
    """What a pass over a batch gave."""

    traces: list[TargetTrace]
    pass_ns: int  #: wall time of the layers, device synchronised
    heads_ns: int  #: of heads and controller
    work: Work


class Tracing:
    """A batch of prompts, token ids of any lengths from 1 on, each with a target of one token at least."""

    def __init__(
        self,
        stack: LayerStack,
        heads: Heads,
        prompts: list[list[int]],
        targets: list[list[int]],
        allowed: list[Tensor | None],
    ) -> None:
        """allowed: ids that each row's first token is among; None: any."""
        self.stack, self.heads, self.targets, self.allowed = stack, heads, targets, allowed
        self.points = sorted({*heads.points, stack.n_layers})
        # The last token of a target is predicted, and nothing is predicted from it.
        self.ids = [token for pair in zip(prompts, targets, strict=True) for token in (*pair[0], *pair[1][:-1])]
        lengths = [len(p) + len(t) - 1 for p, t in zip(prompts, targets, strict=True)]
        self.span = Span(list(range(len(prompts))), [0] * len(prompts), lengths)
        begins = [0, *accumulate(lengths)]
        #: [tokens of targets] among the tokens of the pass the one that each is predicted from
        self.places = [
            begins[row] + len(prompt) - 1 + step
            for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
            for step in range(len(target))
        ]
        #: among the tokens of targets the first of each row
        self.firsts = [0, *accumulate(map(len, targets))][:-1]
        self.device, self.work = stack.device, Work()
        self.wanted = torch.tensor([token for target in targets for token in target], device=self.device)
        shortlist = heads.shortlist
        #: [vocabulary] a token's place among a shortlisted head's outputs; -1: none
        self.short = None
        if shortlist is not None:
            self.short = torch.full((stack.vocab_size,), -1, device=self.device)
            self.short[shortlist] = torch.arange(len(shortlist), device=self.device)

    def run(self) -> TracedBatch:
        """The pass. Raises `NumericalError`."""
        with Stopwatch(self.device) as layers:
            kept = self._layers()
        with Stopwatch(self.device) as heads:
            columns = [self._at(point, *states) for point, states in zip(self.points, kept, strict=True)]
        made = {name: np.stack([column[name] for column in columns]) for name in columns[0]}
        targets = self.wanted.cpu().numpy().astype(np.int32)
        traces = [
            TargetTrace(
                targets=targets[first : first + len(target)],
                **{name: values[..., first : first + len(target)] for name, values in made.items()},
            )
            for first, target in zip(self.firsts, self.targets, strict=True)
        ]
        return TracedBatch(traces, layers.ns, heads.ns, self.work)

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """At each point the states of target positions after its layer, and one layer before."""
        stack, span = self.stack, self.span
        cache = stack.new_cache(len(span.rows), max(span.counts))
        positions = torch.tensor(span.flat[1], device=self.device)
        states = stack.embed(torch.tensor(self.ids, device=self.device), positions)
        kept, depth = [], 0
        for point in self.points:
            states = stack.run(states, span, cache, depth, point - 1)
            before = states[self.places]  # a copy: layers may work in place
            states = stack.run(states, span, cache, point - 1, point)
            kept.append((states[self.places], before))
            self.work.run(layers=point - depth, tokens=span.size, context=span.context, cached=sum(span.reach))
            depth = point
        return kept

    def _at(self, point: int, states: Tensor, before: Tensor) -> dict[str, np.ndarray]:
        """What is kept of one point; the axis of target tokens is the last."""
        parts = [
            self._some(point, first, states[first : first + _AT_ONCE]) for first in range(0, len(states), _AT_ONCE)
        ]
        self.work.head(parameters=self.heads.parameters(point), states=len(states))
        column = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        column["similarities"] = F.cosine_similarity(states.float(), before.float(), dim=-1)
        if self.heads.controller is None or point not in self.heads.points:  # full depth may be no exit point
            judged = torch.full((3, len(states)), torch.nan)
        else:
            judged = self.heads.judge(point, states).T
        self._check_finite(point, column["probabilities"])
        return {
            name: values.cpu().numpy().astype(np.int32 if name in ("tokens", "ranks") else np.float32)
            for name, values in (column | {"controller": judged}).items()
        }

    def _some(self, point: int, first: int, states: Tensor) -> dict[str, Tensor]:
        full = point == self.stack.n_layers
        if full:
            logits = self.stack.unembed(self.stack.norm(states))
        else:
            logits = self.heads.logits(point, states)
        short = None if full else self.short
        self._restrict(logits, first, short)
        prediction = choose(logits, None if full else self.heads.shortlist)
        wanted = self.wanted[first : first + len(states)]
        places = wanted if short is None else short[wanted]
        own = prediction.logits.gather(1, places.clamp(min=0)[:, None])
        ranks = (prediction.logits > own).sum(1)
        return {
            "tokens": prediction.tokens,
            "probabilities": prediction.confidences,
            "margins": prediction.margins,
            "entropies": _entropies(prediction.logits),
            "ranks": torch.where((places < 0) | (own[:, 0] == _RULED_OUT), -1, ranks),
        }

    def _restrict(self, logits: Tensor, first: int, short: Tensor | None) -> None:
        """A row's first token is one that is allowed, as in prefill; where a shortlist has none of them, it is free."""
        for row, place in enumerate(self.firsts):
            ids = self.allowed[row]
            if ids is None or not first <= place < first + len(logits):
                continue
            if short is not None:
                ids = short[ids]
                ids = ids[ids >= 0]
            if len(ids):
                kept = logits[place - first, ids]
                logits[place - first] = _RULED_OUT
                logits[place - first, ids] = kept

    def _check_finite(self, point: int, probabilities: Tensor) -> None:
        finite = torch.isfinite(probabilities)
        if not bool(finite.all()):
            position = self.span.flat[1][self.places[int(finite.logical_not().nonzero()[0])]]
            raise NumericalError(
                f"the logits after layer {point}, at position {position} are not finite; check the weights and the "
                "dtype."
            )


def _entropies(logits: Tensor) -> Tensor:
    """As `Prediction.entropies`, with fewer goes over the logits."""
    logs = logits - logits.logsumexp(dim=-1, keepdim=True)
    return -torch.linalg.vecdot(logs.exp(), logs)
