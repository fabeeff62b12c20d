"""Memory: how large a batch the device has room for, and what happens where it had not.

A batch is at its largest either while its prompts go through a layer, beside their keys and values, or while a policy
completes them from a copy of those.
"""

import ctypes
import gc
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import psutil

from engine.errors import OutOfMemory
from engine.exits import read_manifest
from engine.shapes import BYTES, head_size, kv_heads, read_config

if TYPE_CHECKING:
    import torch

    from engine.loading import ModelFacts

P = ParamSpec("P")
R = TypeVar("R")

MIB = 2**20

#: of the free memory; estimates are rough, and the machine has other things to do
_SHARE = 0.8
#: of a worker's process without weights and batch: Python, torch, transformers, what the allocator keeps
_PROCESS_BYTES = 600 * MIB
#: of a layer's activations: kernels put what they read and write into another order
_COPIES_OF_ACTIVATIONS = 2
#: logits, and what a softmax over them needs beside them
_COPIES_OF_LOGITS = 3
_FLOAT32_BYTES = 4

#: what `auto` comes to at most. One core decodes 66, 92, 119, 127, 154 tokens/s of SmolLM2 at batch 8, 16, 32, 64, 128
#: (context 128); with its prefill of 256 tokens a request of 64 gains 9 % from 16 to 32 and 2 % from there to 64, which
#: takes twice the memory. No GPU has been measured.
_MOST_ROWS = {"cpu": 32, "cuda": 64}

#: how a RuntimeError of torch says that there was no memory; `torch.OutOfMemoryError` says it by its type
_NO_MEMORY = ("DefaultCPUAllocator", "std::bad_alloc", "ALLOC_FAILED", "CUDA error: out of memory")

# --- files in memory -------------------------------------------------------------------------------------------------


def forget_pages(tensor: "torch.Tensor") -> None:
    """Take the pages of a weights file that a tensor lies on out of this process's memory: it is not read again soon.

    A file that is mapped stays so while any of its tensors lives. Does nothing for other memory, and off Linux.
    What was written into a mapped tensor is lost.
    """
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    page = mmap.PAGESIZE
    first, last = -(-begin // page) * page, end // page * page
    if tensor.device.type == "cpu" and first < last and _is_of_a_file(first, last):
        # The file still has them. In anonymous memory this would write zeros.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _is_of_a_file(begin: int, end: int) -> bool:
    try:
        mappings = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for mapping in mappings:
        addresses, _, _, device, _, *path = mapping.split(maxsplit=5)
        low, high = (int(address, 16) for address in addresses.split("-"))
        if low <= begin and end <= high:
            return device != "00:00" and bool(path) and path[0].strip().endswith(".safetensors")
    return False


# --- how large a batch may be ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """What a model takes of a device's memory, in bytes."""

    weights: int  #: what packing the unembedding for its kernel adds included
    position: int  #: keys and values of one token in all layers
    activations: int  #: of one token of a prompt, while a layer works on it
    logits: int  #: of one row
    references: int = 1  #: sets of weights, each of which prefills a batch of its own; the copy that is decoded is one

    def batch(self, rows: int, positions: int) -> int:
        """Bytes that a batch needs at most beside the weights; positions: those of prompt and completion together."""
        cache = rows * positions * self.position
        return self.references * cache + max(cache, rows * positions * self.activations) + rows * self.logits


def rows_with_room(
    facts: "ModelFacts",
    dtype: str,
    exits: Path | None,
    device: "torch.device",
    *,
    positions: int,
    workers: int,
    most: int,
) -> int:
    """The batch size for a device as it is now, see `fitting_rows`.

    positions: tokens of the longest prompt and its completion. workers: how many are to share the machine.
    """
    taken = footprint(facts, dtype, exits)
    sharing = workers if device.type == "cpu" else 1  # a GPU has one worker
    room = budget(free_memory(device), sharing, taken.weights)
    return fitting_rows(taken, positions, room, min(most, _MOST_ROWS[device.type]))


def fitting_rows(footprint: Footprint, positions: int, budget: int, most: int) -> int:
    """The rows of the largest batch within `budget` bytes, `most` at most; 1 where not even one row fits.

    A power of two, so that a job prepared on two nights gets the same size although the free memory differs a little.
    """
    rows = 1
    while 2 * rows <= most and footprint.batch(2 * rows, positions) <= budget:
        rows *= 2
    return rows


def budget(free: int, workers: int, weights: int) -> int:
    """Bytes for the batch of each of `workers` that are still to be started and share `free` bytes."""
    return int(free * _SHARE) // workers - weights - _PROCESS_BYTES


def footprint(facts: "ModelFacts", dtype: str, exits: Path | None = None) -> Footprint:
    """What a model takes with the exits in a folder, from its configuration and the headers of all weights."""
    config = read_config(facts)
    size, width = BYTES[dtype], head_size(config, facts)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * facts.hidden_size
    # Of a layer: the state, its normed copy, queries, keys, values, what attention gave and its projection; then gate,
    # up, their product and its projection.
    widest = 4 * facts.hidden_size + max(
        2 * config.num_attention_heads * width + 2 * kv_heads(config) * width, 4 * inner
    )
    references = 2 if exits is not None and read_manifest(exits).tunes else 1
    parameters = references * _parameters(facts.folder) + (0 if exits is None else _parameters(exits))
    return Footprint(
        weights=size * (parameters + references * facts.vocab_size * facts.hidden_size),
        position=size * 2 * facts.n_layers * kv_heads(config) * width,
        activations=_COPIES_OF_ACTIVATIONS * size * widest,
        logits=_COPIES_OF_LOGITS * _FLOAT32_BYTES * facts.vocab_size,
        references=references,
    )


def _parameters(folder: Path) -> int:
    """Of all tensors in a folder's safetensors files."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


# --- how much there is -----------------------------------------------------------------------------------------------

#: limit and usage of a control group, and how much of the usage is given up on demand; by version
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(device: "torch.device") -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":  # not run on a GPU yet
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_main_memory()


def free_main_memory() -> int:
    """Bytes of the machine's memory that this process may still have."""
    return min([psutil.virtual_memory().available, *group_rooms()])


def group_rooms(groups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each limited control group that this process is in, version 1 or 2, has left, in bytes."""
    try:
        lines = mine.read_text().splitlines()
    except OSError:  # not on Linux
        return []
    rooms = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for folder in _ancestry(groups, controllers, path):
            room = _room(folder, *_GROUP_FILES[1 if controllers else 2])
            rooms += [] if room is None else [room]
    return rooms


def _ancestry(groups: Path, controllers: str, path: str) -> Iterator[Path]:
    """The folders of a group and of those around it; inside a container only the outermost may be there."""
    if controllers and "memory" not in controllers.split(","):
        return
    base = groups / "memory" if controllers else groups
    inner = base / path.lstrip("/")
    yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(base))


def _room(folder: Path, limit: str, usage: str, reclaimed: str) -> int | None:
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / usage).read_text()) - int(statistics.get(reclaimed, 0))
        return max(0, int((folder / limit).read_text()) - used)
    except (OSError, ValueError):  # no such group, or one without a limit ("max")
        return None


# --- where there was too little --------------------------------------------------------------------------------------


def memory_errors(act: Callable[P, R]) -> Callable[P, R]:
    """A function whose failed allocations come out as `OutOfMemory`, when what it allocated before is free again."""

    @wraps(act)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return act(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            sentence = _sentence(error)
        # Behind the except clause: as its context, torch's error would live on, and the batch in its traceback.
        raise OutOfMemory(sentence)

    return guarded


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation failed, whichever way torch or Python say so."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY)


def release(device: "torch.device") -> None:
    """Give back what a failed batch has left, before a smaller one is tried. Call it when its error is gone."""
    gc.collect()
    if device.type == "cuda":  # not run on a GPU yet
        import torch

        torch.cuda.empty_cache()


def _sentence(error: BaseException) -> str:
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    wanted = ""
    if asked:
        wanted = f" ({int(asked[1]) // MIB} MiB" if asked[2] == "bytes" else f" ({asked[1]} {asked[2]}"
        wanted += " more were wanted)"
    return f"out of memory{wanted}; take fewer or shorter prompts at once, fewer new tokens, or run fewer workers."
