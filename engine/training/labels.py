"""What a controller is to say at every place and exit point, from what the heads say there."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.heads import Heads
from engine.policies import CONTINUE, EXIT, STOP
from engine.training.spec import Labels
from engine.training.states import States, reserve

_CHUNK = 2048
_SAVED_EVERY = 8  # chunks: a few seconds of work are lost at most


@torch.inference_mode()
def predictions(
    heads: Heads, states: States, on_progress: Callable[[int, int], None], kept: Path | None = None
) -> tuple[Tensor, Tensor]:
    """What the head of each exit point before full depth writes at every place, how surely: [places, points] each.

    kept: a folder in which an interrupted call goes on; without it they are in memory only.
    """
    points = [point for point in heads.points if point < heads.stack.n_layers]
    tokens, confidences = (_array(kept, name, kind, (len(states), len(points))) for name, kind in _KINDS.items())
    note = None if kept is None else kept / "predictions.json"
    done = json.loads(note.read_text())["places"] if note is not None and note.exists() else 0
    for first in range(done, len(states), _CHUNK):
        end = min(first + _CHUNK, len(states))
        hidden = torch.from_numpy(np.array(states.hidden[first:end])).to(heads.stack.unembedding)
        for depth, point in enumerate(points):
            prediction = heads.predict(point, hidden[:, depth])
            tokens[first:end, depth] = prediction.tokens.int().cpu().numpy()
            confidences[first:end, depth] = prediction.confidences.float().cpu().numpy()
        if note is not None and (end == len(states) or (first // _CHUNK) % _SAVED_EVERY == _SAVED_EVERY - 1):
            tokens.flush()
            confidences.flush()
            note.write_text(json.dumps({"places": end}))
        on_progress(end, len(states))
    return torch.from_numpy(tokens), torch.from_numpy(confidences)


_KINDS: dict[str, Any] = {"predictions.i32": np.int32, "confidences.f32": np.float32}


def _array(folder: Path | None, name: str, kind: Any, shape: tuple[int, int]) -> Any:
    if folder is None:
        return np.empty(shape, kind)
    folder.mkdir(parents=True, exist_ok=True)
    if not ((folder / name).exists() and (folder / "predictions.json").exists()):
        reserve(folder, {name: np.dtype(kind).itemsize * math.prod(shape)}, "predictions")
    return np.memmap(folder / name, kind, "r+", shape=shape)


def labels(tokens: Tensor, states: States, rule: Labels = "sec") -> Tensor:
    """Labels [places, points + 1] from predictions [places, points]; the last column is full depth's.

    `sec`: where no layer writes the source's token STOP; from the first layer on that does EXIT; before it CONTINUE.
    `agrees`: where full depth does not write the source's token STOP; where an exit point says what full depth says
    EXIT, elsewhere CONTINUE. It asks for what full depth would have written, at this very exit point.
    """
    reference = torch.from_numpy(np.array(states.reference))
    full = torch.from_numpy(np.array(states.full))
    said = torch.cat([tokens.int(), full[:, None]], dim=1)
    if rule == "agrees":
        label = torch.where(said == full[:, None], EXIT, CONTINUE)
        return torch.where((full == reference)[:, None], label, STOP).to(torch.int8)
    right = said == reference[:, None]
    reached = right.to(torch.int8).cummax(dim=1).values.bool()
    label = torch.where(reached, EXIT, CONTINUE)
    return torch.where(right.any(dim=1, keepdim=True), label, STOP).to(torch.int8)


def left_before(label: Tensor, windows: Sequence[int]) -> Tensor:
    """[places] whether the token before each place could have left early; a window's first place has none before it.

    label: [places, exit points before full depth + 1]. windows: how many places each window has, in order.
    """
    may_leave = (label[:, :-1] == EXIT).any(dim=1)
    before = torch.roll(may_leave, 1)
    firsts = np.cumsum([0, *windows])[:-1]
    before[torch.from_numpy(firsts[firsts < len(before)])] = False
    return before
