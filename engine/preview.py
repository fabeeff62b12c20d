"""Behind the last layer: the logits of a few tokens, those that a cheap look at all of them finds likely.

The unembedding of a small model costs as much as many of its layers. SVD-softmax (Shim et al. 2017) looks at all tokens
with a matrix of low rank first, and computes exactly only those that look likely. Here the rank is spent where states
lie: with x a normed state, W the unembedding and P = `up` `down` a projection of states, W P x is the nearest to W x of
its rank over the states of a corpus. What the look overlooks is not found: nearly always the choice is full depth's,
how often is among the bundle's scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import native, native_heads

DOWN, UP = "preview.down", "preview.up"


@dataclass(frozen=True)
class Foreseen:
    """What a preview finds for several states."""

    tokens: Tensor  #: [states] of those that were computed exactly the highest
    probabilities: Tensor  #: [states] its softmax probability among all
    logits: Tensor  #: [states, vocabulary] float32, exact where it matters
    exact: list[int]  #: [states] how many are


class Preview:
    """The look at all tokens, and what is exact behind it."""

    def __init__(self, unembedding: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> None:
        """unembedding: [vocabulary, hidden]; bias: [vocabulary]; tensors: down [rank, hidden], up [hidden, rank]."""
        self.unembedding, self.bias, self.down = unembedding, bias, tensors[DOWN]
        #: [rank, vocabulary]: read along the tokens, for a sum of few terms fills no vector
        self.rows = (unembedding @ tensors[UP]).t().contiguous()

    @property
    def parameters(self) -> int:
        """Parameters that one state multiplies with in the look."""
        return self.rows.numel() + self.down.numel()

    def looked(self, states: Tensor) -> Tensor:
        """What all logits look like: normed states [states, hidden] to [states, vocabulary], float32."""
        looked = (states @ self.down.t()) @ self.rows
        return (looked if self.bias is None else looked + self.bias).float()

    def __call__(self, states: Tensor, count: int) -> Foreseen:
        """Normed states [states, hidden], with at least `count` logits of each exact."""
        looked, count = self.looked(states), min(count, len(self.unembedding))
        if native.fits(looked) and native.fits(states):
            best, probabilities, exact = native_heads.refine(looked, states, self.unembedding, self.bias, count)
            return Foreseen(best, probabilities, looked, exact.tolist())
        likely = looked.topk(count, dim=-1).indices
        own = torch.einsum("sh,sch->sc", states, self.unembedding[likely]).float()
        if self.bias is not None:
            own += self.bias[likely].float()
        highest, place = own.max(dim=-1)
        logits = looked.scatter(1, likely, own)
        probabilities = torch.exp(highest - logits.logsumexp(dim=-1))
        return Foreseen(likely.gather(1, place[:, None])[:, 0], probabilities, logits, [count] * len(states))
