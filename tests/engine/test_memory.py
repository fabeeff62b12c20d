"""How large a batch may be, how much memory there is, and what a failed allocation leaves behind."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import CONFIGS, HIDDEN, VOCABULARY, random_model

from engine.engine import Engine
from engine.errors import EngineError, OutOfMemory
from engine.memory import (
    Footprint,
    budget,
    fitting_rows,
    footprint,
    forget_pages,
    free_main_memory,
    free_memory,
    group_rooms,
    memory_errors,
    release,
)

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

sizes = st.integers(1, 10**6)
footprints = st.builds(Footprint, weights=sizes, position=sizes, activations=sizes, logits=sizes)
rooms = st.integers(-(10**12), 10**12)
positions = st.integers(1, 10**5)
most = st.integers(0, 300)

# --- files in memory -------------------------------------------------------------------------------------------------


def test_forgotten_pages_of_a_weights_file_come_back(tmp_path: Path) -> None:
    """Protects memory: weights that were joined to others are not held twice; and weights that lie in no file."""
    weights = torch.arange(2**20, dtype=torch.float32)
    save_file({"a": weights, "b": weights + 1}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        a, b = file.get_tensor("a"), file.get_tensor("b")
    assert torch.equal(a + 1, b)
    before = _file_bytes()
    forget_pages(a)
    assert before - _file_bytes() > 0.9 * a.nbytes
    assert torch.equal(a + 1, b)
    forget_pages(weights)
    assert torch.equal(weights, a)


def _file_bytes() -> int:
    """Of files in this process's memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


# --- how large a batch may be ----------------------------------------------------------------------------------------


@given(footprints, positions, rooms, most)
def test_a_batch_stays_within_its_budget(taken: Footprint, positions: int, room: int, most: int) -> None:
    """Protects the machine's memory: only a batch of one, which cannot be made smaller, may need more than there is."""
    rows = fitting_rows(taken, positions, room, most)
    assert rows == 1 or taken.batch(rows, positions) <= room
    assert rows == 1 or rows <= most
    assert rows & (rows - 1) == 0
    assert rows * 2 > most or taken.batch(2 * rows, positions) > room, "a larger one would have fitted"


@given(footprints, positions, st.integers(1, 8))
def test_a_batch_that_just_fits_is_taken(taken: Footprint, positions: int, power: int) -> None:
    """Protects the edge: a byte less, and the batch is half as large."""
    rows, room = 2**power, taken.batch(2**power, positions)
    assert fitting_rows(taken, positions, room, 300) == rows
    assert fitting_rows(taken, positions, room - 1, 300) == rows // 2


@given(footprints, positions, rooms, rooms, most)
def test_more_memory_never_makes_a_smaller_batch(
    taken: Footprint, positions: int, room: int, more: int, most: int
) -> None:
    """Protects the rule's direction, in memory and in the length of prompts."""
    low, high = sorted((room, more))
    assert fitting_rows(taken, positions, low, most) <= fitting_rows(taken, positions, high, most)
    assert fitting_rows(taken, 2 * positions, room, most) <= fitting_rows(taken, positions, room, most)


@given(st.integers(0, 2**45), st.integers(1, 64), st.integers(0, 2**40))
def test_workers_share_what_is_free(free: int, workers: int, weights: int) -> None:
    """Protects a machine with several workers: all their batches and weights together fit into what is free."""
    assert workers * (budget(free, workers, weights) + weights) < free or free == 0


def test_a_little_less_memory_tonight_is_the_same_batch_size() -> None:
    """Protects the comparison of two nights: free memory is never the same to the byte, and batch sizes must be."""
    taken = Footprint(weights=0, position=46_080, activations=33_792, logits=589_824)
    sizes = {fitting_rows(taken, 512, room, 1024) for room in range(2_000_000_000, 2_100_000_000, 1_000_000)}
    assert len(sizes) == 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_footprint_is_that_of_the_model(kind: str, tiny_engine: Callable[..., Engine]) -> None:
    """Protects what the batch size stands on: whatever a family calls its heads, its cache is as large as thought."""
    engine = tiny_engine(kind)
    taken, half = footprint(engine.facts, "float32"), footprint(engine.facts, "bfloat16")
    cache = engine.stack.new_cache(3, 11)
    assert 3 * 11 * taken.position == cache.keys.nbytes + cache.values.nbytes
    weights = sum(parameter.nbytes for parameter in random_model(kind).parameters())
    assert taken.weights == weights + VOCABULARY * HIDDEN * 4
    assert taken.logits >= VOCABULARY * 4
    assert (half.position, half.weights, half.logits) == (taken.position / 2, taken.weights / 2, taken.logits)


# --- how much there is -----------------------------------------------------------------------------------------------


def group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def test_the_narrowest_control_group_counts(tmp_path: Path) -> None:
    """Protects a container, in which the machine's free memory is not ours: version 2, limits at two levels."""
    groups, mine = tmp_path / "cgroup", tmp_path / "self"
    mine.write_text("0::/pod/ours\n")
    group(groups / "pod", {"memory.max": 5000, "memory.current": 3000, "memory.stat": "anon 1\ninactive_file 400"})
    group(groups / "pod/ours", {"memory.max": "max", "memory.current": 900, "memory.stat": "inactive_file 0"})
    assert group_rooms(groups, mine) == [2400]
    group(groups / "pod/ours", {"memory.max": 1000})
    assert group_rooms(groups, mine) == [100, 2400]
    group(groups / "pod/ours", {"memory.current": 1200})
    assert group_rooms(groups, mine) == [0, 2400], "over its limit, a group has nothing left"


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    """Protects containers on older kernels; what the path names is not mounted there, only the group itself."""
    groups, mine = tmp_path / "cgroup", tmp_path / "self"
    mine.write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n2:cpu:/\n")
    limited = {"memory.limit_in_bytes": 700, "memory.usage_in_bytes": 300, "memory.stat": "total_inactive_file 50"}
    group(groups / "memory", limited)
    assert group_rooms(groups, mine) == [450]


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    """Protects systems that have none."""
    assert group_rooms(tmp_path, tmp_path / "none") == []


def test_free_memory_here_is_some_and_less_than_there_is() -> None:
    """Protects the reading against a wrong unit."""
    assert 2**26 < free_main_memory() == pytest.approx(free_memory(CPU), rel=0.2)
    assert free_main_memory() < psutil.virtual_memory().total


# --- where there was too little --------------------------------------------------------------------------------------


def too_much() -> object:
    return torch.empty(2**58)


def test_failed_allocations_come_out_as_one_error() -> None:
    """Protects what catches it: torch and Python say in several ways that there was no memory."""

    def out_of_bytes() -> object:
        return bytearray(2**62)

    def on_a_gpu() -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …")

    def in_cublas() -> object:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    for act, wanted in (
        (too_much, f"{2**60 // 2**20} MiB more were wanted"),
        (out_of_bytes, "out of memory; take fewer"),
        (on_a_gpu, "20.00 MiB more were wanted"),
        (in_cublas, "out of memory; take fewer"),
    ):
        with pytest.raises(OutOfMemory, match=wanted) as caught:
            memory_errors(act)()
        assert isinstance(caught.value, EngineError)
        assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    """Protects a fault in the engine from being taken for a lack of memory and tried again on smaller batches."""

    def wrong() -> object:
        return torch.zeros(2, 3) @ torch.zeros(2, 3)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        memory_errors(wrong)()
    assert memory_errors(lambda number: number + 1)(1) == 2


class Held:
    """Stands for a batch's keys and values."""


def test_what_failed_is_let_go_before_the_next_try() -> None:
    """Protects the second try's memory: an error's traceback, and its context's, would keep the first one's batch."""
    held: list[weakref.ref[Held]] = []

    def inner() -> object:
        states = Held()
        held.append(weakref.ref(states))
        return too_much(), states

    @memory_errors
    def decode() -> object:
        cache = Held()
        held.append(weakref.ref(cache))
        return inner(), cache

    gc.disable()  # nothing may wait for it
    try:
        with pytest.raises(OutOfMemory) as caught:
            decode()
        assert caught.value.__context__ is None
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_release_on_a_cpu_needs_no_gpu() -> None:
    """Protects machines without a GPU from the call that empties its cache."""
    release(CPU)


@pytest.mark.gpu
@no_gpu
def test_free_memory_of_a_gpu_falls_by_what_is_taken() -> None:
    """Protects `batch_size: auto` on a GPU, and that `release` gives back what a failed batch took."""
    device = torch.device("cuda")
    release(device)
    before = free_memory(device)
    taken = torch.zeros(2**28, device=device)
    assert before - free_memory(device) >= taken.nbytes
    del taken
    release(device)
    assert free_memory(device) >= before - 2**26


@pytest.mark.gpu
@no_gpu
def test_a_gpu_runs_out_of_memory_as_one_error() -> None:
    """Protects the halving of batches on a GPU."""
    with pytest.raises(OutOfMemory, match="more were wanted"):
        memory_errors(lambda: torch.empty(2**44, device="cuda"))()
