"""Ways to multiply a few tokens with a large matrix, and a short measurement that says which one to take when.

No way is the fastest everywhere: on one processor the plain product wastes a factor of three for eight tokens, on
another the packed one is slower for one. What was measured is in `docs/decisions/kernels.md`.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: states [tokens, inputs] → [tokens, outputs]
Product = Callable[[Tensor], Tensor]
#: weight [outputs, inputs] and bias [outputs] or None → their product
Kernel = Callable[[Tensor, Tensor | None], Product]

#: part of a plan's name: another set of counts or kernels makes plans that were kept before worthless
VERSION = 1
#: counts of tokens that are measured; a count in between is served as the next one, a larger one as the last
COUNTS = (1, 2, 4, 8, 16, 32, 64, 256)
#: a smaller matrix lives in the processor's cache, where the choice means nothing
_SMALL = 2**18
#: more than caches hold, so that weights come from memory as they do in a decode step
_COLD_BYTES = 2**26
_CALLS = 12


def place(tokens: int) -> int:
    """Where in a plan the kernel for so many tokens stands."""
    return min((tokens - 1).bit_length(), len(COUNTS) - 1)


def linear(weight: Tensor, bias: Tensor | None) -> Product:
    """PyTorch's own way."""
    return lambda states: F.linear(states, weight, bias)


def columns(weight: Tensor, bias: Tensor | None) -> Product:
    """W Xᵀ: the tokens are columns, and the weights are read in the order in which they lie."""

    def product(states: Tensor) -> Tensor:
        outputs = (weight @ states.t()).t().contiguous()
        return outputs if bias is None else outputs.add_(bias)

    return product


def packed(weight: Tensor, bias: Tensor | None) -> Product:
    """oneDNN, on weights that were given to `pack`."""
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    """The weights in oneDNN's own blocks. What it lays out for 32 tokens serves all counts."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)


KERNELS: dict[str, Kernel] = {"linear": linear, "columns": columns, "packed": packed}
#: those that need the weights as they came
DENSE = ("linear", "columns")
#: for a GPU, and for whatever is too small to care
PLAIN = ["linear"] * len(COUNTS)


def measure(weights: Sequence[Tensor], keeps_dense: bool) -> list[str]:
    """The fastest kernel for each of `COUNTS`, for matrices of one shape [outputs, inputs] on the CPU.

    `packed` is a second copy of the weights, so a matrix takes it for all counts or for none, unless the weights have
    to stay as they are anyway (`keeps_dense`): an embedding that is the unembedding too.
    """
    if weights[0].device.type != "cpu" or weights[0].numel() < _SMALL:
        return PLAIN
    weights = weights[: max(1, math.ceil(_COLD_BYTES / weights[0].nbytes))]
    seconds = {name: _seconds(kernel, weights) for name, kernel in KERNELS.items()}
    dense = [min(DENSE, key=lambda name: seconds[name][at]) for at in range(len(COUNTS))]
    if keeps_dense:
        return [min(KERNELS, key=lambda name: seconds[name][at]) for at in range(len(COUNTS))]
    # Every count weighs the same: what counts is the factor.
    gain = sum(math.log(seconds[name][at] / seconds["packed"][at]) for at, name in enumerate(dense))
    return ["packed"] * len(COUNTS) if gain > 0 else dense


def _seconds(kernel: Kernel, weights: Sequence[Tensor]) -> list[float]:
    """Time of one product for each of `COUNTS`; infinite where this build of PyTorch does not have the kernel."""
    try:
        weights = [pack(weight) for weight in weights] if kernel is packed else weights
        products = [kernel(weight, None) for weight in weights]
        return [_typical(products, weights[0], count) for count in COUNTS]
    except (RuntimeError, AttributeError):
        return [math.inf] * len(COUNTS)


def _typical(products: Sequence[Product], weight: Tensor, count: int) -> float:
    """Seconds of one product, matrix after matrix so that weights come from memory.

    The lower quartile: on a busy machine a product that was interrupted takes a hundred times longer, and the fastest
    of all is the one whose weights the cache still had.
    """
    states = torch.ones(count, weight.shape[1], dtype=weight.dtype)
    products = products if count < COUNTS[-2] else products[:3]  # by then arithmetic decides, and that takes long
    products[0](states)
    times = []
    for product in [*products] * max(1, math.ceil(_CALLS / len(products))):
        begin = time.perf_counter()
        product(states)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 4]
