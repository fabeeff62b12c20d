"""The preview that a bundle brings along: see `engine.preview`."""

import numpy as np
import torch
from torch import Tensor

from engine.preview import DOWN, UP
from engine.stack import LayerStack
from engine.training.states import States

_PLACES = 40_000  #: of the cached states so many say where states lie
_AT_ONCE = 2048
#: the smallest share of the largest variance that a direction counts with: it is divided by
_LEAST = 1e-7


@torch.no_grad()
def find_preview(stack: LayerStack, states: States, rank: int) -> dict[str, Tensor]:
    """The projection of this rank that leaves logits nearest to what they are, in the mean of squares over states and
    tokens: with C the second moments of normed states and W the unembedding, the best rank for W C^½ (Eckart and Young
    1936), taken back to states. Tensors as a bundle has them.
    """
    rank = min(rank, stack.hidden_size)
    places = range(0, len(states), max(1, -(-len(states) // _PLACES)))
    moments = torch.zeros(stack.hidden_size, stack.hidden_size, dtype=torch.float64)
    for first in range(0, len(places), _AT_ONCE):
        some = normed(stack, states, places[first : first + _AT_ONCE]).double().cpu()
        moments += some.t() @ some
    variances, axes = torch.linalg.eigh(moments / len(places))
    sizes = variances.clamp_min(_LEAST * float(variances[-1])).sqrt()
    unembedding = stack.unembedding.double().cpu() @ (axes * sizes)
    kept = torch.linalg.eigh(unembedding.t() @ unembedding)[1].flip(1)[:, :rank]
    return {
        DOWN: (kept.t() @ (axes / sizes).t()).float().contiguous(),
        UP: ((axes * sizes) @ kept).float().contiguous(),
    }


def normed(stack: LayerStack, states: States, places: range) -> Tensor:
    """States behind the last layer at some places, normed as in front of the unembedding: [places, hidden]."""
    hidden = torch.from_numpy(np.array(states.hidden[places.start : places.stop : places.step, -1]))
    return stack.norm(hidden.to(stack.unembedding))
