"""SEC's controller: one bias-free `Linear(hidden, 3)` for all exit points, on the raw state, labelled by the heads.

Sun et al., ICSE 2024. Labels, teacher-forced: where no layer writes the right token STOP; from the first layer on that
does EXIT; before it CONTINUE. The loss of an exit point is weighted by its index.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.heads import Heads
from engine.policies import CONTINUE, EXIT, STOP
from engine.training.states import States

_BATCH, _EPOCHS, _RATE, _CHUNK = 1024, 4, 2e-3, 2048


@torch.inference_mode()
def predictions(heads: Heads, states: States, on_progress: Callable[[int, int], None]) -> tuple[Tensor, Tensor]:
    """What the head of each exit point before full depth writes at every place, how surely: [places, points] each."""
    points = [point for point in heads.points if point < heads.stack.n_layers]
    tokens = torch.empty((len(states), len(points)), dtype=torch.long)
    confidences = torch.empty((len(states), len(points)))
    for first in range(0, len(states), _CHUNK):
        hidden = torch.from_numpy(np.array(states.hidden[first : first + _CHUNK])).to(heads.stack.unembedding)
        for depth, point in enumerate(points):
            prediction = heads.predict(point, hidden[:, depth])
            tokens[first : first + _CHUNK, depth] = prediction.tokens.cpu()
            confidences[first : first + _CHUNK, depth] = prediction.confidences.float().cpu()
        on_progress(min(first + _CHUNK, len(states)), len(states))
    return tokens, confidences


def labels(tokens: Tensor, states: States) -> Tensor:
    """SEC's labels [places, points + 1] from predictions [places, points]; the last column is full depth's."""
    reference = torch.from_numpy(np.array(states.reference)).long()
    full = torch.from_numpy(np.array(states.full)).long()
    right = torch.cat([tokens, full[:, None]], dim=1) == reference[:, None]
    reached = right.long().cummax(dim=1).values.bool()
    label = torch.where(reached, EXIT, CONTINUE)
    return torch.where(right.any(dim=1, keepdim=True), label, STOP)


def train_controller(
    heads: Heads, states: States, label: Tensor, seed: int, on_progress: Callable[[int, int, float], None]
) -> Tensor:
    """The controller's weight [3, hidden]. Asked at full depth too where the bundle has an exit point there."""
    depths = len(heads.points)
    device = heads.stack.device
    # Trained on states in units of each dimension's typical size, then folded in: the same model, better steps.
    sample = torch.from_numpy(np.array(states.hidden[:: max(1, len(states) // 4000), :depths])).float()
    size = sample.pow(2).mean(dim=(0, 1)).sqrt().clamp_min(1e-6).to(device)
    weight = torch.zeros(3, heads.stack.hidden_size, device=device, requires_grad=True)
    importance = torch.arange(1, depths + 1, device=device).float()
    optimiser = torch.optim.Adam([weight], lr=_RATE)
    per_epoch = -(-len(states) // _BATCH)
    for step in range(_EPOCHS * per_epoch):
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([seed, 1, epoch]).permutation(len(states))
        places = np.sort(order[at * _BATCH : (at + 1) * _BATCH])
        hidden = torch.from_numpy(states.hidden[places, :depths]).float().to(device)
        loss = F.cross_entropy(
            F.linear(hidden / size, weight).transpose(1, 2), label[places, :depths].to(device), reduction="none"
        )
        loss = (loss * importance).sum() / (importance.sum() * len(places))
        for group in optimiser.param_groups:
            group["lr"] = _RATE * (1 - step / (_EPOCHS * per_epoch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        on_progress(step + 1, _EPOCHS * per_epoch, loss.item())
    return (weight / size).detach().cpu()
