"""Kernels: every one multiplies alike, plans are held against what there is, threads are the engine's own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import open_engine, own_cache, random_prompts

from engine.engine import Engine
from engine.errors import BadInput
from engine.kernels import ANY, COUNTS, DENSE, KERNELS, LAYOUTS, PLAIN, TWICE, is_plan, layout_of, measure, place
from engine.matrices import Matrix
from engine.spec import policy


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_multiplies(name: str, biased: bool) -> None:
    """Protects every kernel, its layout, and the way back from it: the product is `F.linear`'s."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(96, generator=torch.Generator().manual_seed(2)) if biased else None
    matrix = Matrix(weight, bias)
    with torch.inference_mode():
        matrix.use([name] * len(COUNTS))
        for tokens in (1, 2, 3, 7, 40, 300):
            states = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
            torch.testing.assert_close(matrix(states), F.linear(states, weight, bias), rtol=1e-4, atol=1e-4)
        assert torch.equal(matrix.weight, weight)
        torch.testing.assert_close(
            matrix.outputs(90)(states), F.linear(states, weight, bias)[:, 90:], rtol=1e-4, atol=1e-4
        )
        matrix.use(PLAIN)
        assert torch.equal(matrix(states), F.linear(states, weight, bias))


def test_counts_between_are_served_by_the_next() -> None:
    """Protects the plan's order: 3 tokens take the kernel that was measured for 4, 10,000 the last."""
    assert [COUNTS[place(tokens)] for tokens in (1, 2, 3, 4, 5, 64, 65, 257, 10_000)] == [
        1,
        2,
        4,
        4,
        8,
        64,
        256,
        1024,
        1024,
    ]


def test_a_measured_plan_keeps_weights_once() -> None:
    """Protects memory: one layout for all counts; only what has to stay dense anyway may add another."""
    with torch.inference_mode():
        weights = [torch.randn(1024, 512)]
        assert len({layout_of(name) for name in measure(weights, ANY)}) == 1
        assert {layout_of(name) for name in measure(weights, DENSE)} == {"dense"}
        assert {layout_of(name) for name in measure(weights, TWICE)} <= {"dense", "packed"}
        assert measure([torch.randn(64, 64)], ANY) == PLAIN
    with pytest.raises(TypeError, match="made for float32"):
        KERNELS["dots"](torch.ones(8, 8, dtype=torch.float16), None)
    assert {name for kernels in LAYOUTS.values() for name in kernels} == set(KERNELS)


@pytest.mark.parametrize("wrong", [["linear"], ["fast"] * len(COUNTS), None, "linear"])
def test_a_plan_of_another_version(wrong: object, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """Protects against a stored plan that this version cannot read: refused in a sentence, or measured anew."""
    assert not is_plan(wrong)
    engine = open_engine(tiny_folder("llama"))
    [shape, *others] = engine.matrix_shapes
    with pytest.raises(BadInput, match=rf"kernels for shape '{shape}' are .*measured again"):
        engine.kernels = {shape: wrong} | dict.fromkeys(others, PLAIN)
    with own_cache(tmp_path):
        folder = tmp_path / "kernels"
        assert open_engine(tiny_folder("llama")).kernels
        for note in folder.glob("*.json"):
            note.write_text(json.dumps({shape: wrong}))
        assert is_plan(open_engine(tiny_folder("llama")).kernels[shape])


def test_threads_are_the_engines_own(tiny_folder: Callable[[str], Path]) -> None:
    """Protects a device class: what another engine, or the caller, has set since does not change how one computes."""
    one, two = open_engine(tiny_folder("llama"), threads=1), open_engine(tiny_folder("llama"), threads=2)
    try:
        for engine in (two, one, two):
            engine.prefill(random_prompts(2), 2)
            assert torch.get_num_threads() == engine.threads
        assert "1 thread," in one.device_class
        assert "2 threads," in two.device_class
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_layers_write_the_same(tiny_folder: Callable[[str], Path]) -> None:
    """Protects `compile: on`: the same tokens at several batch sizes, and the time for it is kept apart."""
    plain, compiled = open_engine(tiny_folder("llama")), open_engine(tiny_folder("llama"), compile="on")
    compiled.warm_up()
    assert compiled.compile_ns > 0
    assert plain.compile_ns == 0
    for rows in (1, 2, 3, 8):
        written = []
        for engine in (plain, compiled):
            start = engine.prefill(random_prompts(rows, seed=3), 6)
            done = engine.decode(start, policy("full"), max_new_tokens=6, ends_with_line=False)
            written.append([completion.token_ids for completion in done.completions])
        assert written[0] == written[1]


def test_openmp_sleeps_while_it_waits() -> None:
    """Protects a busy machine: the settings are there before torch is loaded, whoever imports the engine first."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = f"import engine.engine, os; print(*(os.environ.get(name) for name in {names}))"
    without = {name: value for name, value in os.environ.items() if name not in names}
    for environment, expected in (
        (without, "PASSIVE 30000"),
        (without | {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_warm_up_survives_weights_that_fail(tiny_folder: Callable[[str], Path]) -> None:
    """Protects a shard: where all logits are NaN its samples end as errors, not its worker before the first one."""
    engine: Engine = open_engine(tiny_folder("llama"))
    engine.stack.final_norm = lambda states: states * float("nan")
    engine.warm_up([policy("full")])


def test_warm_up_survives_a_memory_that_is_full(tiny_folder: Callable[[str], Path]) -> None:
    """Protects a shard: its batches are halved where they do not fit, and its worker lives to halve them."""

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine: Engine = open_engine(tiny_folder("llama"))
    _ = engine.machine
    engine.stack.final_norm = full
    engine.warm_up([policy("full")])
