"""Behind the last layer: the logits of a few tokens, those that a cheap look at all of them finds likely.

The unembedding of a small model costs as much as many of its layers. SVD-softmax (Shim et al. 2017) looks at all tokens
with a matrix of low rank first, and computes exactly only those that look likely. Here the rank is spent where states
lie: with x a normed state, W the unembedding and P = `up` `down` a projection of states, W P x is the nearest to W x of
its rank over the states of a corpus. What the look overlooks is not found: nearly always the choice is full depth's,
how often is among the bundle's scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import native, native_preview

DOWN, UP = "preview.down", "preview.up"


@dataclass(frozen=True)
class Foreseen:
    """What a preview finds for several states."""

    tokens: Tensor  #: [states] of those that were computed exactly the highest
    probabilities: Tensor  #: [states] its softmax probability among all
    logits: Tensor  #: [states, vocabulary] float32, exact where it matters
    exact: list[int]  #: [states] how many are


class Preview:
    """The look at all tokens, and what is exact behind it.

    The look reads eight bits a number: with a scale for each term, it is as near to what it stands for as a few
    thousandths of the spread of logits, while what its rank leaves out is a hundred times that.
    """

    def __init__(self, unembedding: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> None:
        """unembedding: [vocabulary, hidden]; bias: [vocabulary]; tensors: down [rank, hidden], up [hidden, rank]."""
        self.unembedding, self.bias = unembedding, bias
        terms = (unembedding @ tensors[UP]).t().float()
        terms = F.pad(terms, (0, 0, 0, -len(terms) % native_preview.TERMS))
        scale = terms.abs().amax(dim=1).clamp_min(1e-30) / 127
        #: [rank, vocabulary] int8: read along the tokens, for a sum of few terms fills no vector
        self.codes = (terms / scale[:, None]).round().to(torch.int8).contiguous()
        down = F.pad(tensors[DOWN].float(), (0, 0, 0, len(terms) - len(tensors[DOWN])))
        #: [rank, hidden], the codes' scales in it
        self.down = (down * scale[:, None]).to(unembedding)

    @property
    def parameters(self) -> int:
        """Parameters that one state multiplies with in the look."""
        return self.codes.numel() + self.down.numel()

    def bytes_read(self, states: Tensor) -> int:
        """Bytes of them: a code is one where the loop reads it, as wide as a state for the products of PyTorch."""
        width = 1 if native.fits(states) else states.element_size()
        return width * self.codes.numel() + states.element_size() * self.down.numel()

    def looked(self, states: Tensor) -> Tensor:
        """What all logits look like: normed states [states, hidden] to [states, vocabulary], float32."""
        looked = (states @ self.down.t()) @ self._terms
        return (looked if self.bias is None else looked + self.bias).float()

    @cached_property
    def _terms(self) -> Tensor:
        """The codes as the products of PyTorch take them."""
        return self.codes.to(self.unembedding)

    def __call__(self, states: Tensor, count: int) -> Foreseen:
        """Normed states [states, hidden], with at least `count` logits of each exact."""
        count = min(count, len(self.unembedding))
        if native.fits(states):
            found = native_preview.foresee(
                self.codes, states @ self.down.t(), states, self.unembedding, self.bias, count
            )
            best, probabilities, logits, exact = found
            return Foreseen(best, probabilities, logits, exact.tolist())
        looked = self.looked(states)
        likely = looked.topk(count, dim=-1).indices
        own = torch.einsum("sh,sch->sc", states, self.unembedding[likely]).float()
        if self.bias is not None:
            own += self.bias[likely].float()
        highest, place = own.max(dim=-1)
        logits = looked.scatter(1, likely, own)
        probabilities = torch.exp(highest - logits.logsumexp(dim=-1))
        return Foreseen(likely.gather(1, place[:, None])[:, 0], probabilities, logits, [count] * len(states))
