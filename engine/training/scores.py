"""How good the exits are on code that they did not learn from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from engine.exits import Bin
from engine.heads import Heads
from engine.policies import EXIT, STOP
from engine.training.labels import labels, left_before, predictions
from engine.training.preview import normed
from engine.training.spec import Labels
from engine.training.states import States

_CLASSES = {"exit": EXIT, "stop": STOP}
_BINS = 10
#: a controller that stops this share of what is hopeless: what `stop_lift` is measured at
_RECALL = 0.3
#: tokens that a preview is scored with
_EXACT = (256, 1024, 4096)
_CHUNK = 512

Reliability = dict[str, dict[str, list[Bin]]]


class HeldOut(NamedTuple):
    """Scores by exit point, and by exit point and class what the controller said against what was so."""

    scores: dict[str, dict[str, float]]
    reliability: Reliability


def held_out_scores(
    heads: Heads,
    states: States,
    on_progress: Callable[[int, int], None],
    windows: Sequence[int] = (),
    rule: Labels = "sec",
) -> HeldOut:
    """By exit point, shares of places: `agrees` with full depth, `right`, and what may leave at 97 % and 95 % agreement
    by the head's own confidence. With a controller, against labels by `rule`: precision and recall of its most likely
    class beside the class's base rate, AUROC, and of stop the lift over the base rate at a recall of 0.3. Under `full`:
    how often full depth is right, how often a token is labelled STOP, and where there is a preview how often it finds
    full depth's token.

    windows: how many places each window has, in order.
    """
    tokens, confidences = predictions(heads, states, on_progress)
    reference = torch.from_numpy(np.array(states.reference))
    full = torch.from_numpy(np.array(states.full))
    label = labels(tokens, states, rule)
    left = left_before(label, windows)
    scores: dict[str, dict[str, float]] = {}
    reliability: Reliability = {}
    for depth, point in enumerate(heads.points):
        found: dict[str, float] = {}
        if point < heads.stack.n_layers:
            agrees = tokens[:, depth] == full
            found = {
                "agrees": _share(agrees),
                "right": _share(tokens[:, depth] == reference),
                "leaves_at_97": _coverage(agrees, confidences[:, depth], 0.97),
                "leaves_at_95": _coverage(agrees, confidences[:, depth], 0.95),
            }
        if heads.controller is not None:
            judged = _judged(heads, states, depth, left)
            found |= controller_scores(judged, label[:, depth])
            reliability[str(point)] = {
                name: reliability_bins(judged[:, value], label[:, depth] == value) for name, value in _CLASSES.items()
            }
        if found:
            scores[str(point)] = found
    scores["full"] = {"right": _share(full == reference), "no_layer_right": _share(label[:, -1] == STOP)}
    if heads.preview is not None:
        scores["full"] |= _preview_scores(heads, states)
    return HeldOut(scores, reliability)


@torch.inference_mode()
def _preview_scores(heads: Heads, states: States) -> dict[str, float]:
    """How often the preview finds full depth's token, by how many are computed exactly."""
    assert heads.preview is not None
    found = dict.fromkeys(_EXACT, 0)
    for first in range(0, len(states), _CHUNK):
        here = range(first, min(first + _CHUNK, len(states)))
        x = normed(heads.stack, states, here)
        looked = heads.preview.looked(x).cpu()
        full = torch.from_numpy(np.array(states.full[first : here.stop])).long()
        before = (looked > looked.gather(1, full[:, None])).sum(dim=1)
        for count in found:
            found[count] += int((before < count).sum())
    return {f"preview_finds_in_{count}": hits / len(states) for count, hits in found.items()}


def controller_scores(judged: Tensor, label: Tensor) -> dict[str, float]:
    """judged: probabilities [places, 3]; label: [places]. What is undefined, of a class that is never so, is 0."""
    said = judged.argmax(dim=-1)
    scores = {}
    for name, value in _CLASSES.items():
        so, by_rank = label == value, judged[:, value]
        both = ((said == value) & so).sum().item()
        scores[f"{name}_base_rate"] = _share(so)
        scores[f"{name}_precision"] = both / max(1, (said == value).sum().item())
        scores[f"{name}_recall"] = both / max(1, so.sum().item())
        scores[f"{name}_auroc"] = auroc(by_rank, so)
    scores["stop_lift"] = lift(judged[:, STOP], label == STOP, _RECALL)
    return scores


def auroc(score: Tensor, so: Tensor) -> float:
    """The chance that a place where it is so scores higher than one where it is not, ties counted half."""
    yes, no = int(so.sum()), int((~so).sum())
    if not (yes and no):
        return 0.0
    ranks = rankdata(score.double().numpy())
    return float((ranks[so.numpy()].sum() - yes * (yes + 1) / 2) / (yes * no))


def lift(score: Tensor, so: Tensor, recall: float) -> float:
    """Precision over the base rate where the highest scores together find this share of what is so."""
    if not so.any():
        return 0.0
    found = so[score.argsort(descending=True, stable=True)].double().cumsum(0)
    taken = int((found >= recall * found[-1]).nonzero()[0].item())
    return float(found[taken] / (taken + 1) / so.double().mean())


def reliability_bins(said: Tensor, so: Tensor) -> list[Bin]:
    """Places sorted into tenths of the probability that was said; those without a place are left out."""
    tenth = (said * _BINS).long().clamp(0, _BINS - 1)
    members = [tenth == n for n in range(_BINS)]
    return [(_share(said[mine]), _share(so[mine]), int(mine.sum())) for mine in members if mine.any()]


def _coverage(agrees: Tensor, confidences: Tensor, wanted: float) -> float:
    """The largest share of places, taken from the surest on, of which at least `wanted` agree."""
    order = confidences.argsort(descending=True, stable=True)
    so_far = agrees[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    kept = (so_far >= wanted).nonzero()
    return 0.0 if len(kept) == 0 else (kept[-1].item() + 1) / len(order)


@torch.inference_mode()
def _judged(heads: Heads, states: States, depth: int, left: Tensor) -> Tensor:
    hidden = torch.from_numpy(np.array(states.hidden[:, depth])).to(heads.stack.unembedding)
    return heads.judge(heads.points[depth], hidden, left.to(hidden.device)).cpu()


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()
