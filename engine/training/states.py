"""Hidden states of the frozen model over a corpus, cached on disk so that heads train on them many times.

A place is one token of a window with at least `SKIPPED` tokens before it: the first positions of a sequence soak up
attention (Xiao et al. 2023), carry states a hundred times larger than all others, and nobody completes there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from engine.cache import Span
from engine.heads import full_depth
from engine.stack import LayerStack
from engine.training.corpus import Window

SKIPPED = 8
_TOGETHER = 4  # windows in one pass: more gains nothing here and costs memory


@dataclass(frozen=True)
class States:
    """Memory-mapped arrays, one row a place."""

    hidden: np.memmap[Any, np.dtype[np.float16]]  # [places, exit points + 1, hidden] raw; the last is full depth's
    reference: np.memmap[Any, np.dtype[np.int32]]  # [places] the token that the source has next
    full: np.memmap[Any, np.dtype[np.int32]]  # [places] the token that full depth would write next

    def __len__(self) -> int:
        return len(self.reference)


def cache_states(
    stack: LayerStack,
    windows: list[Window],
    points: tuple[int, ...],
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> States:
    """Run every window once; go on where an interrupted call left off."""
    folder.mkdir(parents=True, exist_ok=True)
    places = places_of(windows)
    starts = np.concatenate([[0], np.cumsum(places)])
    note = folder / "done.json"
    done = json.loads(note.read_text())["windows"] if note.exists() else 0
    states = _open(folder, int(starts[-1]), len(points) + 1, stack.hidden_size, new=done == 0)
    for first in range(done, len(windows), _TOGETHER):
        batch = windows[first : first + _TOGETHER]
        end = first + len(batch)
        hidden, reference, full = _run(stack, [window.token_ids for window in batch], points)
        at = slice(starts[first], starts[end])
        states.hidden[at], states.reference[at], states.full[at] = hidden, reference, full
        if end == len(windows) or (first // _TOGETHER) % 8 == 7:
            for array in (states.hidden, states.reference, states.full):
                array.flush()
            note.write_text(json.dumps({"windows": end}))
        on_progress(int(starts[end]), int(starts[-1]))
    return states


def places_of(windows: list[Window]) -> list[int]:
    """How many places each window has."""
    return [len(window.token_ids) - 1 - SKIPPED for window in windows]


def _open(folder: Path, places: int, depths: int, size: int, new: bool) -> States:
    mode: Literal["w+", "r+"] = "w+" if new else "r+"
    return States(
        hidden=np.memmap(folder / "hidden.f16", np.float16, mode, shape=(places, depths, size)),
        reference=np.memmap(folder / "reference.i32", np.int32, mode, shape=(places,)),
        full=np.memmap(folder / "full.i32", np.int32, mode, shape=(places,)),
    )


@torch.inference_mode()
def _run(
    stack: LayerStack, ids: list[list[int]], points: tuple[int, ...]
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    lengths = [len(window) for window in ids]
    span = Span(list(range(len(ids))), [0] * len(ids), lengths)
    cache = stack.new_cache(len(ids), max(lengths))
    flat = torch.tensor([token for window in ids for token in window], device=stack.device)
    offsets = torch.tensor(span.flat[1], device=stack.device)
    kept = torch.tensor(
        [place >= SKIPPED and place + 1 < length for length in lengths for place in range(length)], device=stack.device
    )
    states, depth, hidden = stack.embed(flat, offsets), 0, []
    for point in [*(point for point in points if point < stack.n_layers), stack.n_layers]:
        states, depth = stack.run(states, span, cache, depth, point), point
        hidden.append(states[kept])
    following = torch.roll(flat, -1)[kept]
    full = full_depth(stack, hidden[-1]).tokens
    return (
        torch.stack(hidden, dim=1).half().cpu().numpy(),
        following.int().cpu().numpy(),
        full.int().cpu().numpy(),
    )
