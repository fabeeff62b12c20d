"""Hidden states of the frozen model over a corpus, cached on disk so that heads train on them many times.

A place is one token of a window with at least `SKIPPED` tokens before it: the first positions of a sequence soak up
attention (Xiao et al. 2023), carry states a hundred times larger than all others, and nobody completes there.
"""

import json
import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.cache import Span
from engine.errors import BadInput
from engine.heads import full_depth
from engine.stack import LayerStack
from engine.training.corpus import Window

SKIPPED = 8
TOP = 32  #: most likely tokens of full depth whose probabilities are kept
_TOGETHER = 4  # windows in one pass: more gains nothing here and costs memory


@dataclass(frozen=True)
class States:
    """Memory-mapped arrays, one row a place."""

    hidden: np.memmap[Any, np.dtype[np.float16]]  # [places, exit points + 1, hidden] raw; the last is full depth's
    reference: np.memmap[Any, np.dtype[np.int32]]  # [places] the token that the source has next
    full: np.memmap[Any, np.dtype[np.int32]]  # [places] the token that full depth would write next
    top: np.memmap[Any, np.dtype[np.int32]]  # [places, TOP] full depth's most likely tokens, the likeliest first
    top_shares: np.memmap[Any, np.dtype[np.float16]]  # [places, TOP] their probabilities

    def __len__(self) -> int:
        return len(self.reference)

    @property
    def arrays(self) -> list[np.memmap[Any, Any]]:
        return [self.hidden, self.reference, self.full, self.top, self.top_shares]

    def forget(self) -> None:
        """Give back the memory of pages that were read: they stay on disk, and would count as ours until the end."""
        for array in self.arrays:
            if isinstance(array, np.memmap):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


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
    states = _open(folder, int(starts[-1]), len(points) + 1, stack, new=done == 0)
    for first in range(done, len(windows), _TOGETHER):
        batch = windows[first : first + _TOGETHER]
        end = first + len(batch)
        at = slice(starts[first], starts[end])
        for array, found in zip(
            states.arrays, _run(stack, [window.token_ids for window in batch], points), strict=True
        ):
            array[at] = found
        if end == len(windows) or (first // _TOGETHER) % 8 == 7:
            for array in states.arrays:
                array.flush()
            states.forget()
            note.write_text(json.dumps({"windows": end}))
        on_progress(int(starts[end]), int(starts[-1]))
    return states


def places_of(windows: list[Window]) -> list[int]:
    """How many places each window has."""
    return [len(window.token_ids) - 1 - SKIPPED for window in windows]


def _open(folder: Path, places: int, depths: int, stack: LayerStack, new: bool) -> States:
    """The files, at their full size: a disk that is too small says so now. Raises `BadInput`."""
    top = min(TOP, stack.vocab_size)
    shapes = {
        "hidden": (np.float16, (places, depths, stack.hidden_size)),
        "reference": (np.int32, (places,)),
        "full": (np.int32, (places,)),
        "top": (np.int32, (places, top)),
        "top_shares": (np.float16, (places, top)),
    }
    if new:
        sizes = {name: np.dtype(kind).itemsize * math.prod(shape) for name, (kind, shape) in shapes.items()}
        reserve(folder, sizes, "states")
    opened = {name: np.memmap(folder / name, kind, "r+", shape=shape) for name, (kind, shape) in shapes.items()}
    return States(**opened)


def reserve(folder: Path, sizes: dict[str, int], what: str) -> None:
    """Files with room on the disk behind them: writing to a mapped file without would end the process (SIGBUS).

    sizes: bytes by name. Raises `BadInput`.
    """
    try:
        for name, size in sizes.items():
            with (folder / name).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        for name in sizes:
            (folder / name).unlink(missing_ok=True)
        raise BadInput(
            f"out: {folder} has no room for {sum(sizes.values()) / 1e9:.1f} GB of {what} ({error.strerror}); make "
            "room, lower cached_tokens, or give another folder."
        ) from None


@torch.inference_mode()
def _run(stack: LayerStack, ids: list[list[int]], points: tuple[int, ...]) -> list[npt.NDArray[Any]]:
    """Rows of each of the arrays of `States`."""
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
    full = full_depth(stack, hidden[-1])
    top = full.logits.topk(min(TOP, stack.vocab_size), dim=-1)
    shares = torch.exp(top.values - full.logits.logsumexp(dim=-1, keepdim=True))
    return [
        torch.stack(hidden, dim=1).half().cpu().numpy(),
        following.int().cpu().numpy(),
        full.tokens.int().cpu().numpy(),
        top.indices.int().cpu().numpy(),
        shares.half().cpu().numpy(),
    ]
