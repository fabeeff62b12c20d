"""What a decode should cost: FLOPs, bytes, and from them the time that a machine needs at best. No torch here.

The ideal of a step is the sum over layers, debts and every head evaluated of max(bytes / bandwidth, FLOPs / peak) (the
roofline of Williams, Waterman, Patterson 2009), at the number of tokens in hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Machine:
    """What the device reaches, measured: bytes read per second and floating point operations per second."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class Shape:
    """What of a model its cost hangs on."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    hidden_size: int
    layer_parameters: int  #: of one layer, that a token multiplies with
    element_size: int  #: bytes of one parameter

    @property
    def position(self) -> int:
        """Numbers that one position's keys and values have in one layer."""
        return 2 * self.n_kv_heads * self.head_size

    @property
    def projection(self) -> int:
        """Parameters that make them."""
        return self.hidden_size * self.position


@dataclass
class Work:
    """What a decode did, counted while it ran: cheap lists in the loop, arithmetic afterwards."""

    passes: list[tuple[int, int, int, int]] = field(default_factory=list)  #: (layers, tokens, context, cached)
    fills: list[tuple[int, int]] = field(default_factory=list)  #: (layers, tokens)
    heads: list[tuple[int, int]] = field(default_factory=list)  #: (parameters, states)
    looks: list[tuple[int, int, int]] = field(default_factory=list)  #: (parameters, bytes read, states)

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

    def look(self, *, parameters: int, bytes_read: int, states: int) -> None:
        """A preview looked at all tokens."""
        self.looks.append((parameters, bytes_read, states))


@dataclass(frozen=True)
class Cost:
    flops: int
    ideal_ns: int


def cost(work: Work, shape: Shape, machine: Machine) -> Cost:
    """FLOPs of the work and the time that they need at best on `machine`.

    A product of n tokens with P parameters is 2 n P operations and reads P once; attention that looks c times at one of
    r positions reads r keys and values and makes 4 c operations per head element.
    """
    layers, tokens, context, cached = _columns(work.passes, 4)
    flops, bytes_read = of_layers(shape, layers, tokens, context, cached)
    total, ideal = flops.sum(), _ideal(flops, bytes_read, machine)
    flops, bytes_read = of_fill(shape, *_columns(work.fills, 2))
    total, ideal = total + flops.sum(), ideal + _ideal(flops, bytes_read, machine)
    flops, bytes_read = of_head(shape, *_columns(work.heads, 2))
    total, ideal = total + flops.sum(), ideal + _ideal(flops, bytes_read, machine)
    flops, bytes_read = of_look(*_columns(work.looks, 3))
    total, ideal = total + flops.sum(), ideal + _ideal(flops, bytes_read, machine)
    return Cost(int(total), int(ideal))


#: FLOPs and bytes read
Price = tuple[np.ndarray, np.ndarray]


def of_layers(shape: Shape, layers: np.ndarray, tokens: np.ndarray, context: np.ndarray, cached: np.ndarray) -> Price:
    """As `Work.run`: tokens that look at `context` positions in all, among `cached` that are read once each."""
    flops = layers * (2 * shape.layer_parameters * tokens + 4 * shape.n_heads * shape.head_size * context)
    return flops, layers * shape.element_size * (shape.layer_parameters + shape.position * cached)


def of_fill(shape: Shape, layers: np.ndarray, tokens: np.ndarray) -> Price:
    """As `Work.fill`: only keys and values are projected."""
    return layers * 2 * shape.projection * tokens, layers * shape.element_size * shape.projection


def of_head(shape: Shape, parameters: np.ndarray, states: np.ndarray) -> Price:
    """As `Work.head`."""
    return 2 * parameters * states, shape.element_size * parameters


def of_look(parameters: np.ndarray, bytes_read: np.ndarray, states: np.ndarray) -> Price:
    """As `Work.look`."""
    return 2 * parameters * states, bytes_read


def _ideal(flops: np.ndarray, bytes_read: np.ndarray, machine: Machine) -> float:
    return float(np.maximum(bytes_read / machine.bandwidth, flops / machine.peak).sum() * 1e9)


def _columns(rows: Sequence[tuple[int, ...]], width: int) -> list[np.ndarray]:
    return list(np.array(rows, dtype=np.float64).reshape(-1, width).T)
