"""How good the exits are on code that they did not learn from."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.heads import Heads
from engine.policies import EXIT, STOP
from engine.training.controller import labels, predictions
from engine.training.states import States


def held_out_scores(
    heads: Heads, states: States, on_progress: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """By exit point, shares of places: `agrees` with full depth, `right`, and what may leave at 97 % and 95 % agreement
    by the head's own confidence; with a controller the precision and recall of its most likely class. Under `full`: how
    often full depth is right, and how often no layer is.
    """
    tokens, confidences = predictions(heads, states, on_progress)
    reference = torch.from_numpy(np.array(states.reference)).long()
    full = torch.from_numpy(np.array(states.full)).long()
    label = labels(tokens, states)
    scores = {}
    for depth, point in enumerate(point for point in heads.points if point < heads.stack.n_layers):
        agrees = tokens[:, depth] == full
        scores[str(point)] = {
            "agrees": _share(agrees),
            "right": _share(tokens[:, depth] == reference),
            "leaves_at_97": _coverage(agrees, confidences[:, depth], 0.97),
            "leaves_at_95": _coverage(agrees, confidences[:, depth], 0.95),
        } | (_controller_scores(heads, states, depth, label[:, depth]) if heads.controller is not None else {})
    scores["full"] = {"right": _share(full == reference), "no_layer_right": _share(label[:, -1] == STOP)}
    return scores


def _coverage(agrees: Tensor, confidences: Tensor, wanted: float) -> float:
    """The largest share of places, taken from the surest on, of which at least `wanted` agree."""
    order = confidences.argsort(descending=True, stable=True)
    so_far = agrees[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    kept = (so_far >= wanted).nonzero()
    return 0.0 if len(kept) == 0 else (kept[-1].item() + 1) / len(order)


@torch.inference_mode()
def _controller_scores(heads: Heads, states: States, depth: int, label: Tensor) -> dict[str, float]:
    hidden = torch.from_numpy(np.array(states.hidden[:, depth])).to(heads.stack.unembedding)
    said = heads.judge(hidden).argmax(dim=-1).cpu()
    scores = {}
    for name, value in (("exit", EXIT), ("stop", STOP)):
        both = ((said == value) & (label == value)).sum().item()
        scores[f"{name}_precision"] = both / max(1, (said == value).sum().item())
        scores[f"{name}_recall"] = both / max(1, (label == value).sum().item())
        scores[f"{name}_base_rate"] = _share(label == value)
    return scores


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()
