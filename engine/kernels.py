"""Ways to multiply a few tokens with a large matrix, and a short measurement that says which one to take when.

No way is the fastest everywhere: the same product takes up to four times longer in the wrong one, and which one is
wrong changes with the number of tokens, the shape and the processor: `docs/decisions/kernels.md`.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import native

#: states [tokens, inputs] → [tokens, outputs]
Product = Callable[[Tensor], Tensor]
#: weight in the kernel's layout and bias [outputs] or None → their product
Kernel = Callable[[Tensor, Tensor | None], Product]

#: part of a plan's name: another set of counts or kernels makes plans that were kept before worthless
VERSION = 4
#: counts of tokens that are measured; a count in between is served as the next one, a larger one as the last
COUNTS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
#: a smaller matrix lives in the processor's cache, where the choice means nothing
_SMALL = 2**18
#: more than caches hold, so that weights come from memory as they do in a decode step
_COLD_BYTES = 2**26
_CALLS = 12
#: from so many tokens on arithmetic decides, not memory, and a product takes long: a few calls say enough
_MANY = 256
#: tokens that a kernel is made for at most
_MOST = {"dots": 64}
#: outputs that only an unembedding has, which never meets so many tokens
_OUTPUTS = 2**14


def place(tokens: int) -> int:
    """Where in a plan the kernel for so many tokens stands."""
    return min(bisect_left(COUNTS, tokens), len(COUNTS) - 1)


# --- kernels ---------------------------------------------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor | None) -> Product:
    """PyTorch's own way."""
    return lambda states: F.linear(states, weight, bias)


def columns(weight: Tensor, bias: Tensor | None) -> Product:
    """W Xᵀ: the tokens are columns, and the weights are read in the order in which they lie."""
    return _biased(lambda states: (weight @ states.t()).t().contiguous(), bias)


def packed(weight: Tensor, bias: Tensor | None) -> Product:
    """oneDNN, on weights in its own blocks."""
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def dots(weight: Tensor, bias: Tensor | None) -> Product:
    """Sums for two outputs of four tokens at a time, in a loop of our own: for a few tokens."""
    if weight.dtype != torch.float32:
        raise TypeError("our own loops are made for float32")
    return _biased(native.Product(weight), bias)


def _biased(product: Product, bias: Tensor | None) -> Product:
    return product if bias is None else lambda states: product(states).add_(bias)


KERNELS: dict[str, Kernel] = {
    "linear": linear,
    "columns": columns,
    "packed": packed,
    "dots": dots,
}
#: how the weights lie in memory: a matrix is kept in one layout, and uses that layout's kernels
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dense": ("linear", "columns", "dots"),
    "packed": ("packed",),
}
#: sets of layouts of which a matrix takes one: weights are not held twice without need
Layouts = tuple[tuple[str, ...], ...]
ANY: Layouts = (("dense",), ("packed",))
#: where somebody else reads the weights as they are
DENSE: Layouts = (("dense",),)
#: where somebody else reads them, and a second copy is worth its memory
TWICE: Layouts = (("dense", "packed"),)
#: for a GPU, and for whatever is too small to care
PLAIN = ["linear"] * len(COUNTS)


def is_plan(kernels: object) -> bool:
    """Whether these are kernels of ours, one for each of `COUNTS`."""
    return isinstance(kernels, list) and len(kernels) == len(COUNTS) and all(name in KERNELS for name in kernels)


def layout_of(kernel: str) -> str:
    """The layout that a kernel, by name, needs."""
    return next(layout for layout, kernels in LAYOUTS.items() if kernel in kernels)


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """Weights [outputs, inputs] in a layout; the same tensor where that is `dense`."""
    if layout == "packed":  # what oneDNN lays out for 32 tokens serves all counts
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
    return weight


def dense_again(weight: Tensor, layout: str) -> Tensor:
    """What `laid_out` was given."""
    if layout == "packed":
        return weight.to_dense()
    return weight


# --- the choice ------------------------------------------------------------------------------------------------------


def measure(weights: Sequence[Tensor], layouts: Layouts) -> list[str]:
    """The fastest kernel for each of `COUNTS`, for matrices of one shape [outputs, inputs] on the CPU."""
    if weights[0].device.type != "cpu" or weights[0].numel() < _SMALL:
        return PLAIN
    weights = weights[: max(1, math.ceil(_COLD_BYTES / weights[0].nbytes))]
    seconds = _seconds(weights)
    choices = [_fastest(seconds, together) for together in layouts]
    # Every count weighs the same: what counts is the factor.
    return min(choices, key=lambda plan: sum(math.log(seconds[name][at]) for at, name in enumerate(plan)))


def _fastest(seconds: dict[str, list[float]], layouts: Sequence[str]) -> list[str]:
    names = [name for layout in layouts for name in LAYOUTS[layout]]
    return [min(names, key=lambda name: seconds[name][at]) for at in range(len(COUNTS))]


def _seconds(weights: Sequence[Tensor]) -> dict[str, list[float]]:
    """Time of one product by each kernel, for each of `COUNTS`; infinite where this build, or this type, has it not."""
    products = {name: _products(name, weights) for name in KERNELS}
    counts = [count for count in COUNTS if count <= _MANY or len(weights[0]) < _OUTPUTS]
    found: dict[str, list[float]] = {name: [] for name in KERNELS}
    for count in counts:
        for name, seconds in _typical(products, weights[0], count).items():
            found[name].append(seconds)
    return {name: seconds + seconds[-1:] * (len(COUNTS) - len(counts)) for name, seconds in found.items()}


def _products(name: str, weights: Sequence[Tensor]) -> list[Product]:
    """None where the kernel cannot be had here."""
    try:
        products = [KERNELS[name](laid_out(weight, layout_of(name)), None) for weight in weights]
        products[0](torch.ones(1, weights[0].shape[1], dtype=weights[0].dtype))
    except (RuntimeError, AttributeError, TypeError):
        return []
    return products


def _typical(products: dict[str, list[Product]], weight: Tensor, count: int) -> dict[str, float]:
    """Seconds of one product by each kernel, matrix after matrix so that weights come from memory.

    Kernels take turns: on a busy machine a bad moment is then everybody's. Of the times the lower quartile: a product
    that was interrupted takes a hundred times longer, and the fastest of all is one whose weights the cache still had.
    """
    states = torch.ones(count, weight.shape[1], dtype=weight.dtype)
    calls = _CALLS if count < _MANY else 3
    times: dict[str, list[float]] = {name: [] for name in products}
    for call in range(-1, calls):  # the first one warms up
        for name, same in products.items():
            if not same or count > _MOST.get(name, count):
                times[name].append(math.inf)
                continue
            begin = time.perf_counter()
            same[call % len(same)](states)
            times[name].append(time.perf_counter() - begin)
    return {name: sorted(found[1:])[calls // 4] for name, found in times.items()}
