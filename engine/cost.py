"""What a decode should cost: FLOPs, bytes, and from them the time that this machine needs at best.

The ideal of a step is the sum over layers, debts and every head evaluated of max(bytes / bandwidth, FLOPs / peak) (the
roofline of Williams, Waterman, Patterson 2009), at the number of tokens in hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

from engine.stack import LayerStack
from engine.stopwatch import Stopwatch


@dataclass(frozen=True)
class Machine:
    """What the device reaches, measured: bytes read per second and floating point operations per second."""

    bandwidth: float
    peak: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        """Read 256 MiB, and multiply two square matrices: median of five each, after a warm-up; about half a second."""
        data = torch.zeros(2**26, device=device)
        square = torch.ones((1536, 1536), device=device, dtype=dtype)
        read = _median_seconds(data.sum, device)
        multiply = _median_seconds(lambda: square @ square, device)
        return cls(bandwidth=data.nbytes / read, peak=2 * 1536**3 / multiply)


@dataclass
class Work:
    """What a decode did, counted while it ran: cheap lists in the loop, arithmetic afterwards."""

    passes: list[tuple[int, int, int, int]] = field(default_factory=list)  #: (layers, tokens, context, cached)
    fills: list[tuple[int, int]] = field(default_factory=list)  #: (layers, tokens)
    heads: list[tuple[int, int]] = field(default_factory=list)  #: (parameters, states)

    def run(self, *, layers: int, tokens: int, context: int, cached: int) -> None:
        """Tokens went through layers, looking at `context` positions in all, among `cached` that were read once each.

        Windows are not taken into account.
        """
        self.passes.append((layers, tokens, context, cached))

    def fill(self, *, layers: int, tokens: int) -> None:
        """Tokens had their keys and values projected, nothing else."""
        self.fills.append((layers, tokens))

    def head(self, *, parameters: int, states: int) -> None:
        """A head or the unembedding was evaluated."""
        self.heads.append((parameters, states))


@dataclass(frozen=True)
class Cost:
    flops: int
    ideal_ns: int


def cost(work: Work, stack: LayerStack, machine: Machine) -> Cost:
    """FLOPs of the work and the time that they need at best on `machine`.

    A product of n tokens with P parameters is 2 n P operations and reads P once; attention that looks c times at one of
    r positions reads r keys and values and makes 4 c operations per head element.
    """
    size = stack.unembedding.element_size()
    layer, kv = stack.layer_parameters(), 2 * stack.n_kv_heads * stack.head_size
    layers, tokens, context, cached = _columns(work.passes, 4)
    flops = layers * (2 * layer * tokens + 4 * stack.n_heads * stack.head_size * context)
    bytes_read = layers * size * (layer + kv * cached)
    total, ideal = flops.sum(), _ideal(flops, bytes_read, machine)
    layers, tokens = _columns(work.fills, 2)
    projection = stack.hidden_size * kv
    flops = layers * 2 * projection * tokens
    total, ideal = total + flops.sum(), ideal + _ideal(flops, layers * size * projection, machine)
    parameters, states = _columns(work.heads, 2)
    flops = 2 * parameters * states
    total, ideal = total + flops.sum(), ideal + _ideal(flops, size * parameters, machine)
    return Cost(int(total), int(ideal))


def _ideal(flops: np.ndarray, bytes_read: np.ndarray, machine: Machine) -> float:
    return float(np.maximum(bytes_read / machine.bandwidth, flops / machine.peak).sum() * 1e9)


def _columns(rows: Sequence[tuple[int, ...]], width: int) -> list[np.ndarray]:
    return list(np.array(rows, dtype=np.float64).reshape(-1, width).T)


def _median_seconds(act: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(6):
        with Stopwatch(device) as watch:
            act()
        times.append(watch.ns / 1e9)
    return median(times[1:])
