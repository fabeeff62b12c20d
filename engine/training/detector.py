"""The detector: behind the last layer, whether the shortlist has the token that full depth would write."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.controllers import DETECTOR_BIAS, DETECTOR_WEIGHT, in_own_size
from engine.training.states import States

_PLACES = 40_000  #: of the cached states so many are learned from: their copy in memory is bounded
#: of a place's squared weights: of some hundred weights few are needed
_DECAY = 3e-4


def train_detector(states: States, shortlist: Tensor) -> dict[str, Tensor]:
    """Logistic regression (L-BFGS), tensors as a bundle has them. shortlist: token ids [outputs]."""
    every = max(1, -(-len(states) // _PLACES))
    hidden = in_own_size(torch.from_numpy(np.array(states.hidden[::every, -1])).float())
    has = in_shortlist(states, shortlist)[::every].float()
    share = has.mean().clamp(1e-4, 1 - 1e-4)
    weight = torch.zeros(hidden.shape[1], requires_grad=True)
    bias = torch.logit(share).reshape(1).requires_grad_()
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(hidden @ weight + bias, has) + _DECAY * weight.pow(2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return {DETECTOR_WEIGHT: weight.detach().contiguous(), DETECTOR_BIAS: bias.detach().contiguous()}


def in_shortlist(states: States, shortlist: Tensor) -> Tensor:
    """[places] whether the shortlist has full depth's token."""
    return torch.from_numpy(np.isin(states.full, shortlist.cpu().numpy()))
