"""The CPU's own loops: each against PyTorch on shapes that fill no vector, and an engine without them."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_prompts
from torch import Tensor

from engine import loops, native, native_attention, native_heads, native_preview, openmp
from engine.architectures.llama import LlamaStack
from engine.attention import StepAttention
from engine.cache import Span
from engine.engine import Engine, Prefilled
from engine.loading import load_model, resolve_model
from engine.native_attention import Attention
from engine.native_layers import LlamaLayers
from engine.preview import Preview
from engine.spec import PolicySpec, policy


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 7, 48, 577])
@pytest.mark.parametrize("tokens", [1, 3])
def test_norms_gates_and_rotations_are_pytorchs(tokens: int, width: int) -> None:
    """Protects what stands between the products, also where vectors are not full and tensors are parts of others."""
    states, added, weight = _random(tokens, width), _random(tokens, 2 * width, seed=1)[:, ::2], _random(width, seed=2)
    expected = F.rms_norm(states + added, (width,), weight, 1e-5)
    sums, normed = native.add_rms_norm(states, added, weight, 1e-5)
    torch.testing.assert_close(sums, states + added)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(native.rms_norm(sums, weight, 1e-5), expected)
    both = 30 * _random(tokens, 2 * width, seed=3)
    torch.testing.assert_close(native.gate_silu(both), F.silu(both[:, :width]) * both[:, width:])
    heads, cos, sin = _random(tokens, 5, 2 * width, seed=4)[:, 1:4], *_random(2, tokens, 1, 2 * width, seed=5)
    expected = heads * cos + heads.roll(width, -1) * sin
    torch.testing.assert_close(native.rotate_halves(heads, cos, sin), expected)


@pytest.mark.parametrize("width", [1, 7, 577])
def test_heads_and_controllers_are_pytorchs(width: int) -> None:
    """Protects what is said of one state: a lens, the likeliest token, a classifier's probabilities."""
    states, down, up = _random(3, 2 * width)[:, ::2], _random(5, width, seed=1), _random(width, 5, seed=2)
    torch.testing.assert_close(
        native_heads.lens(states, down, up), states + states @ down.T @ up.T, rtol=1e-4, atol=1e-4
    )
    logits = 20 * _random(4, width, seed=3)
    logits[1] = -5  # all tie: the first
    places, probabilities = native_heads.most_likely(logits)
    assert places.tolist() == [row.index(max(row)) for row in logits.tolist()]
    torch.testing.assert_close(probabilities, logits.softmax(dim=-1).max(dim=-1).values)
    weight, bias, after = _random(3, width, seed=4), _random(3, seed=5), _random(3, seed=6)
    for own in (True, False):
        x = F.rms_norm(states, (width,), eps=1e-6) if own else states
        expected = (x @ weight.T + bias + torch.tensor([[0.0], [1.0], [0.0]]) * after).softmax(dim=-1)
        torch.testing.assert_close(native_heads.judge(states, weight, bias, own, [False, True, False], after), expected)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 50.0])
def test_a_preview_computes_the_likeliest_exactly(count: int, spread: float) -> None:
    """Protects `preview`: in the loop as in PyTorch, whatever the distances of logits, and where they tie."""
    unembedding, states, bias = _random(40, 24), _random(3, 24, seed=1), _random(40, seed=2)
    axes = torch.linalg.qr(_random(24, 9, seed=3)).Q
    for own in (None, bias):
        preview = Preview(unembedding * spread, own, {"preview.down": axes.t().contiguous(), "preview.up": axes})
        with torch.inference_mode():
            mine = preview(states, count)
        theirs = preview(states, count)  # gradients are on: PyTorch's way
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(mine.probabilities, theirs.probabilities, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        assert mine.exact == theirs.exact == [count] * 3
    broken = states.clone()
    broken[1, 5] = float("nan")
    with torch.inference_mode():
        assert preview(broken, count).probabilities.isfinite().tolist() == [True, False, True]


def test_a_preview_says_the_same_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects that batch N is batch 1, to the last bit: neither threads nor other states change a sum's order."""
    unembedding, states, axes = _random(7_001, 24), _random(3, 24, seed=1), torch.linalg.qr(_random(24, 9, seed=3)).Q
    preview = Preview(unembedding, None, {"preview.down": axes.t().contiguous(), "preview.up": axes})
    found = []
    with torch.inference_mode():
        projected = states @ preview.down.t()  # PyTorch's, whose order hangs on the number of rows
        for threads in (1, 2, 3):
            monkeypatch.setattr(native_preview, "get_num_threads", lambda threads=threads: threads)
            for rows in ([0, 1, 2], [0], [1], [2]):
                one = native_preview.foresee(preview.codes, projected[rows], states[rows], unembedding, None, 50)
                found.append((rows, one))
    whole = found[0][1]
    for rows, one in found:
        for mine, theirs in zip(one, whole, strict=True):
            assert mine.equal(theirs[rows])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_probability_of_what_is_no_number_is_none(wrong: float, place: int) -> None:
    """Protects the check for numbers: wherever among the logits the fault stands."""
    logits = _random(2, 9)
    logits[1, place] = wrong
    probabilities = native_heads.most_likely(logits)[1]
    assert probabilities[0].isfinite()
    assert probabilities[1].isnan()


@pytest.mark.parametrize("tokens", range(1, 10))
@pytest.mark.parametrize("threads", [1, 3])
def test_products_of_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch, tokens: int, threads: int) -> None:
    """Protects the remainders: tokens that fill no four, outputs that fill no pair."""
    monkeypatch.setattr(native, "get_num_threads", lambda: threads)
    for outputs, inputs in ((1, 1), (2, 9), (35, 64)):
        weight, states = _random(outputs, inputs), _random(tokens, inputs, seed=1)
        torch.testing.assert_close(native.Product(weight)(states), F.linear(states, weight))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("hides", [False, True])
def test_attention_of_ragged_rows(
    monkeypatch: pytest.MonkeyPatch, together: bool, window: int | None, hides: bool
) -> None:
    """Protects attention over rows of any length and number of tokens, by each of its two loops."""
    monkeypatch.setattr(native_attention, "_WORTH_WAKING", 0)
    monkeypatch.setattr(native_attention, "get_num_threads", lambda: 3 if together else 1)
    keys, values, q = _random(3, 2, 20, 10), _random(3, 2, 20, 10, seed=1), _random(6, 6, 10, seed=2)
    rows, starts, counts = [2, 0], [13, 0], [2, 4]
    visible = torch.full((3, 20), 9)
    visible[2, ::3], visible[0, 1] = 4, 3
    attend = Attention(rows, starts, counts, visible.numpy() if hides else None, 0.3)
    out = attend(q, keys.numpy(), values.numpy(), window=window, layer=4).view(6, 6, 10)
    places = [(row, start + n) for row, start, count in zip(rows, starts, counts, strict=True) for n in range(count)]
    for token, (row, place) in enumerate(places):
        seen = torch.arange(20) <= place
        if window is not None:
            seen &= torch.arange(20) > place - window
        if hides:
            seen &= visible[row] > 4
        for head in range(6):
            scores = (0.3 * keys[row, head // 3] @ q[token, head]).masked_fill(~seen, -torch.inf)
            expected = scores.softmax(0).nan_to_num() @ values[row, head // 3] if seen.any() else None
            if expected is not None:
                torch.testing.assert_close(out[token, head], expected)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(number: float) -> None:
    """Protects the error of a sample whose numbers have gone: no loop turns them into others."""
    states, weight = _random(2, 9), torch.ones(9)
    states[1, 3] = number
    assert native.rms_norm(states, weight, 1e-5)[1].isnan().any()
    assert not native.Product(_random(4, 9))(states)[1].isfinite().any()
    assert not native.gate_silu(_random(1, 8).index_fill(1, torch.tensor([2]), number)).isfinite().all()
    keys = _random(1, 1, 4, 8)
    keys[0, 0, 1, 1] = number
    attend = Attention([0], [3], [1], None, 1.0)
    out = attend(_random(1, 1, 8).abs(), keys.numpy(), _random(1, 1, 4, 8).numpy(), window=None, layer=0)
    assert not out.isfinite().all()


POLICIES = [
    policy("full"),
    policy("fixed", exit_layer=2, kv="copy"),
    policy("fixed", exit_layer=2, kv="recompute", max_debt=3),
    policy("fixed", exit_layer=2, kv="mask"),
    policy("confidence", threshold=0.02, kv="recompute", verify=True),
]


def _written(engine: Engine, spec: PolicySpec) -> list[list[int]]:
    start = engine.prefill(random_prompts(5, seed=4), 12)
    done = engine.decode(start, spec, max_new_tokens=12, ends_with_line=False)
    return [completion.token_ids for completion in done.completions]


@pytest.mark.parametrize("spec", POLICIES, ids=lambda spec: f"{spec.kind} {spec.kv}")
@pytest.mark.parametrize("kind", ["llama", "qwen2 window in every other layer", "qwen3"])
def test_an_engine_without_them_writes_the_same(
    tiny_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: str, spec: PolicySpec
) -> None:
    """Protects GPUs, narrow types, and families without a loop of their own: whole layers, loops apart and PyTorch."""
    engine = tiny_engine(kind, head="tied")
    assert engine.stack.together is not None
    calls: dict[str, int] = {}

    def count(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def counted(*given: object, **named: object) -> object:
            calls[owner.__name__] = calls.get(owner.__name__, 0) + 1
            return plain(*given, **named)

        monkeypatch.setattr(owner, name, counted)

    count(LlamaLayers, "run")
    count(Attention, "__call__")
    count(StepAttention, "_flat")
    ours = _written(engine, spec)
    assert "LlamaLayers" in calls
    calls.clear()
    monkeypatch.setattr(engine.stack, "together", None)
    assert _written(engine, spec) == ours
    assert set(calls) == {"Attention"}
    calls.clear()
    monkeypatch.setattr(native, "fits", lambda tensor: False)
    assert _written(engine, spec) == ours
    assert set(calls) == {"StepAttention"}


def test_two_threads_use_one_engine_at_once(tiny_engine: Callable[..., Engine]) -> None:
    """Protects callers with threads of their own: each has its own cache, and none writes into the other's."""
    engine = tiny_engine("llama")
    starts = [engine.prefill(random_prompts(5, seed=seed), 40) for seed in (4, 5)]

    def written(start: Prefilled) -> list[list[int]]:
        done = engine.decode(start, POLICIES[0], max_new_tokens=40, ends_with_line=False)
        return [completion.token_ids for completion in done.completions]

    alone = [written(start) for start in starts]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(written, starts * 8)) == alone * 8


def test_a_cache_is_gone_when_its_batch_is(tiny_engine: Callable[..., Engine]) -> None:
    """Protects memory: what is held longer comes on top of the next batch, and of a smaller one after a failure."""
    engine = tiny_engine("llama")
    start = engine.prefill(random_prompts(5, seed=4), 12)
    assert engine.stack.together is not None
    cache = start.start.copy().cache
    with torch.inference_mode():
        engine.stack.run(torch.ones(1, engine.stack.hidden_size), Span([0], [1], [1]), cache, 0, 2)
    held = weakref.ref(cache)
    del cache
    gc.collect()
    assert held() is None


def test_the_library_of_threads_in_a_folder_with_a_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects environments in such folders: the engine could not even be imported there."""
    if not openmp.available():
        pytest.skip("PyTorch has threads of another kind here")
    mappings = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line]
    real = next(Path(fields[-1]) for fields in mappings if Path(fields[-1]).name.startswith(("libgomp", "libomp")))
    moved = tmp_path / "my projects" / real.name
    moved.parent.mkdir()
    moved.symlink_to(real)
    monkeypatch.setattr(Path, "read_text", lambda path: f"7f00-7f01 r-xp 00000000 08:01 7   {moved}\n")
    assert openmp._library.__wrapped__() is not None


def test_a_class_of_its_own_runs_its_own_layers(tiny_folder: Callable[[str], Path]) -> None:
    """Protects families of third parties: what they do otherwise in a layer is done, not what Llama does."""

    class Other(LlamaStack):
        def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
            return super().merge(layer, states, attended) * 0.5

    facts = resolve_model(str(tiny_folder("llama")))
    assert LlamaStack(load_model(facts)).together is not None
    assert Other(load_model(facts)).together is None


_LOOPS_ALONE = """
import resource, sys
from pathlib import Path
read = Path.read_text
Path.read_text = lambda path, **how: "" if str(path) == "/proc/self/maps" else read(path, **how)
import torch
if "full" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from engine import loops, native, openmp
torch.set_num_threads(2)
print(openmp.available(), native.Product(torch.ones(3, 4))(torch.ones(2, 4)).sum().item())
if "all" in sys.argv:
    from engine import native_attention, native_heads, native_layers, native_preview
modules = [module for name, module in sys.modules.items() if name.startswith("engine.native")]
found = [one for module in modules for one in vars(module).values() if hasattr(one, "inspect_llvm")]
compiled = [one for one in found if getattr(one, "signatures", True)]  # others are inlined
print(loops.KEPT.folder is not None, len(compiled) > len(modules), all(map(loops.was_kept, compiled)))
"""
#: alone, right, kept, more than one a module, all of them read
_READ = ["False", "24.0", "True", "True", "True"]


def _alone(cache: Path | str, *how: str, here: Path | None = None) -> subprocess.Popen[str]:
    without = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _LOOPS_ALONE, *how],
        env=without | {"SHORTSTOP_CACHE": str(cache)},
        cwd=here,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _said(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """What it printed, and its warnings."""
    try:
        printed, warned = process.communicate(timeout=250)
        return printed.split(), warned
    finally:
        process.kill()


@pytest.mark.parametrize("full", [False, True])
def test_loops_where_threads_are_of_another_kind_and_there_is_no_folder(full: bool, tmp_path: Path) -> None:
    """Protects machines where PyTorch has no OpenMP, and those where nothing can be written: loops run alone."""
    process = _alone(tmp_path, "full") if full else _alone("/proc/nowhere")
    printed, warned = _said(process)
    assert printed == [*_READ[:2], "False", "True", "False"]
    assert "compiled for this process alone" in warned
    assert list(tmp_path.glob("numba/*/*")) == []


def test_loops_are_compiled_by_one_process_for_all(tmp_path: Path) -> None:
    """Protects numbers from hanging on who came first: LLVM adds in another order where a loop that is called was kept
    already, so that what two processes compile together differs from what one does.
    """
    assert [_said(one)[0] for one in (_alone(tmp_path), _alone(tmp_path, "all"))] == [_READ] * 2
    some = {"native.some_outputs", "native_layers._run_layers", "native_preview._some_of_a_preview"}
    assert some <= _kept(tmp_path).keys()


def test_a_compiler_that_was_killed_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects from half a folder: exit statuses of children are lost where a parent ignores their deaths."""
    monkeypatch.setattr(subprocess, "run", lambda *command, **how: None)
    with pytest.raises(OSError, match="ended early"):
        loops._fill(tmp_path / "loops")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_loops_of_which_some_are_gone_or_damaged_are_all_compiled_once_more(tmp_path: Path) -> None:
    """Protects numbers on machines that lost power, or where somebody tidied up: not one is made beside the others.
    Modules in the current folder, of whatever name, are nobody's business.
    """
    (tmp_path / "random.py").write_text("raise SystemExit('not meant')")
    assert _said(_alone(tmp_path, here=tmp_path))[0] == _READ
    before = _kept(tmp_path)
    assert _said(_alone(tmp_path, "all"))[0] == _READ
    assert _kept(tmp_path) == before
    for lost in tmp_path.glob("numba/*/*/native.gate_rows-*.nbc"):
        lost.unlink()
    for damaged in tmp_path.glob("numba/*/*/native_heads._judge-*.nbi"):
        damaged.write_bytes(b"")
    assert _said(_alone(tmp_path, "all"))[0] == _READ
    after = _kept(tmp_path)
    assert after.keys() == before.keys()
    assert not after.items() & before.items()


def _kept(cache: Path) -> dict[str, int]:
    """When each loop was written."""
    [folder] = [made for made in (cache / "numba").iterdir() if made.is_dir()]
    codes = list(folder.glob("*/*.nbc"))
    assert len(codes) == len(list(folder.glob("*/*.nbi")))
    return {code.name.split("-")[0]: code.stat().st_mtime_ns for code in codes}
