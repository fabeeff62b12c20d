"""What a CPU does between and beside the large products, in loops that numba compiles for it.

PyTorch's operators are made for tensors: around one token each costs microseconds, some start threads for it, and a
norm is six of them. Here a norm, a rotation, a write to the cache and the attention of all rows are one loop each,
over float32 arrays. What was measured stands in `docs/decisions/kernels.md`.

Sums are reordered for the vector unit, so results differ from PyTorch's in the last bits, as two libraries' do.
"""

from ctypes import c_int64
from typing import Any

import llvmlite.binding as llvm
import numba as nb
import numpy as np
import numpy.typing as npt
from numba import carray, float32, int64, void
from torch import Tensor, device, empty, get_num_threads, is_grad_enabled
from torch import float32 as float_
from torch.compiler import is_compiling

from engine.loops import CACHE, CUBE, FAST, PLACES, ROW, STRIDED, TABLE, Floats, kept, loop
from engine.openmp import GIVEN, OPTIONS, at, part, parts, share

_CPU = device("cpu")


def fits(tensor: Tensor) -> bool:
    """Whether these loops are made for such tensors. Gradients, and code that `torch.compile` reads, are PyTorch's."""
    plain = tensor.dtype is float_ and tensor.device == _CPU
    return plain and not is_grad_enabled() and not is_compiling()


# --- states ----------------------------------------------------------------------------------------------------------


@loop(void(TABLE, ROW, float32, TABLE))
def norm_rows(states: Floats, weight: Floats, epsilon: float, out: Floats) -> None:
    """See `rms_norm`."""
    width = states.shape[1]
    for token in range(states.shape[0]):
        state, normed = states[token], out[token]
        total = np.float32(0)
        for i in range(width):
            total += state[i] * state[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
        for i in range(width):
            normed[i] = state[i] * scale * weight[i]


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """X / sqrt(mean(x²) + epsilon) · weight for each of [tokens, hidden] (Zhang and Sennrich 2019)."""
    out = empty(states.shape)
    norm_rows(states.contiguous().numpy(), weight.numpy(), epsilon, out.numpy())
    return out


@loop(void(TABLE, TABLE, ROW, float32, TABLE, TABLE))
def _add_rms_norm(states: Floats, added: Floats, weight: Floats, epsilon: float, sums: Floats, out: Floats) -> None:
    width = states.shape[1]
    for token in range(states.shape[0]):
        state, more, both, normed = states[token], added[token], sums[token], out[token]
        total = np.float32(0)
        for i in range(width):
            value = state[i] + more[i]
            both[i] = value
            total += value * value
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
        for i in range(width):
            normed[i] = both[i] * scale * weight[i]


def add_rms_norm(states: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The sum of two [tokens, hidden], and its norm."""
    sums, out = empty(states.shape), empty(states.shape)
    _add_rms_norm(
        states.contiguous().numpy(), added.contiguous().numpy(), weight.numpy(), epsilon, sums.numpy(), out.numpy()
    )
    return sums, out


@kept(nb.njit, float32(float32), fastmath={"contract"}, nogil=True)
def exp(x: np.float32) -> np.float32:
    """E to a power of 0 or less (below -87: as -87), to a unit in the last place or two, in steps that vectors have.

    Cody and Waite's reduction to [-ln 2 / 2, ln 2 / 2], then the polynomial of the Cephes library (Moshier 1992).
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x  # not `max`, which forgets a NaN
    # Adding 1.5 · 2²³ rounds to a whole number and leaves it in the lowest bits: sums must not be reordered here.
    shifted = np.float32(x * np.float32(1.44269504) + np.float32(12582912.0))
    n = shifted - np.float32(12582912.0)
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    power = np.int32(np.int32(shifted.view(np.int32) << 23) + np.int32(1065353216))  # 2ⁿ
    return p * power.view(np.float32)


@loop(void(TABLE, TABLE, int64, int64))
def gate_rows(gate_up: Floats, out: Floats, first: int, end: int) -> None:
    """See `gate_silu`: outputs `first` to `end` (excluded)."""
    width = out.shape[1]
    for token in range(out.shape[0]):
        both, gated = gate_up[token], out[token]
        for i in range(first, end):
            x = both[i]
            small = exp(-abs(x))
            sigmoid = np.float32(1) / (np.float32(1) + small)
            if x < 0:
                sigmoid *= small
            gated[i] = x * sigmoid * both[width + i]


def gate_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (SwiGLU, Shazeer 2020), of both side by side: [tokens, 2 * width] to [tokens, width]."""
    out = empty(gate_up.shape[0], gate_up.shape[1] // 2)
    gate_rows(gate_up.contiguous().numpy(), out.numpy(), 0, out.shape[1])
    return out


@loop(void(STRIDED, CUBE, CUBE))
def _rotate_halves(heads: Floats, cos: Floats, sin: Floats) -> None:
    half = heads.shape[2] // 2
    for token in range(heads.shape[0]):
        c, s = cos[token, 0], sin[token, 0]
        for head in range(heads.shape[1]):
            for i in range(half):
                first, second = heads[token, head, i], heads[token, head, half + i]
                heads[token, head, i] = first * c[i] + second * s[i]
                heads[token, head, half + i] = second * c[half + i] + first * s[half + i]


def rotate_halves(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X cos + (x with its halves exchanged) sin, in place: [tokens, heads, head size], [tokens, 1, head size] twice."""
    _rotate_halves(heads.numpy(), cos.numpy(), sin.numpy())
    return heads


# --- the cache -------------------------------------------------------------------------------------------------------


@loop(void(CACHE, CACHE, PLACES, PLACES, STRIDED, STRIDED))
def _store(
    keys: Floats, values: Floats, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], k: Floats, v: Floats
) -> None:
    for token in range(len(rows)):
        row, position = rows[token], positions[token]
        for head in range(k.shape[1]):
            for i in range(k.shape[2]):
                keys[row, head, position, i] = k[token, head, i]
                values[row, head, position, i] = v[token, head, i]


def store(
    keys: Floats, values: Floats, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], k: Tensor, v: Tensor
) -> None:
    """Keys and values of tokens, [tokens, kv heads, size], to their places in [rows, kv heads, positions, size]."""
    _store(keys, values, rows, positions, k.numpy(), v.numpy())


# --- products --------------------------------------------------------------------------------------------------------


#: how many sums stay in vector registers: 16 where a processor has 32 of them, 8 elsewhere
MANY_REGISTERS = llvm.get_host_cpu_features().get("avx512vl", False)


@kept(nb.njit, void(TABLE, TABLE, TABLE, int64), fastmath=FAST, nogil=True)
def _four_outputs(weight: Floats, states: Floats, out: Floats, j: int) -> None:
    """Four outputs of four tokens at a time; of one token at a time what is left."""
    tokens, inputs = states.shape
    w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
    in_fours = tokens - tokens % 4
    for t in range(0, in_fours, 4):
        x0, x1, x2, x3 = states[t], states[t + 1], states[t + 2], states[t + 3]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
        for i in range(inputs):
            y0, y1, y2, y3 = x0[i], x1[i], x2[i], x3[i]
            w = w0[i]
            a0 += w * y0
            a1 += w * y1
            a2 += w * y2
            a3 += w * y3
            w = w1[i]
            b0 += w * y0
            b1 += w * y1
            b2 += w * y2
            b3 += w * y3
            w = w2[i]
            c0 += w * y0
            c1 += w * y1
            c2 += w * y2
            c3 += w * y3
            w = w3[i]
            d0 += w * y0
            d1 += w * y1
            d2 += w * y2
            d3 += w * y3
        out[t, j], out[t + 1, j], out[t + 2, j], out[t + 3, j] = a0, a1, a2, a3
        out[t, j + 1], out[t + 1, j + 1], out[t + 2, j + 1], out[t + 3, j + 1] = b0, b1, b2, b3
        out[t, j + 2], out[t + 1, j + 2], out[t + 2, j + 2], out[t + 3, j + 2] = c0, c1, c2, c3
        out[t, j + 3], out[t + 1, j + 3], out[t + 2, j + 3], out[t + 3, j + 3] = d0, d1, d2, d3
    for t in range(in_fours, tokens):
        x0 = states[t]
        a0 = b0 = c0 = d0 = np.float32(0)
        for i in range(inputs):
            y0 = x0[i]
            a0 += w0[i] * y0
            b0 += w1[i] * y0
            c0 += w2[i] * y0
            d0 += w3[i] * y0
        out[t, j], out[t, j + 1], out[t, j + 2], out[t, j + 3] = a0, b0, c0, d0


@kept(nb.njit, void(TABLE, TABLE, TABLE, int64), fastmath=FAST, nogil=True)
def _two_outputs(weight: Floats, states: Floats, out: Floats, j: int) -> None:
    """Two outputs of four tokens at a time; of one token at a time what is left."""
    tokens, inputs = states.shape
    w0, w1 = weight[j], weight[j + 1]
    in_fours = tokens - tokens % 4
    for t in range(0, in_fours, 4):
        x0, x1, x2, x3 = states[t], states[t + 1], states[t + 2], states[t + 3]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
        for i in range(inputs):
            y0, y1, y2, y3 = x0[i], x1[i], x2[i], x3[i]
            w = w0[i]
            a0 += w * y0
            a1 += w * y1
            a2 += w * y2
            a3 += w * y3
            w = w1[i]
            b0 += w * y0
            b1 += w * y1
            b2 += w * y2
            b3 += w * y3
        out[t, j], out[t + 1, j], out[t + 2, j], out[t + 3, j] = a0, a1, a2, a3
        out[t, j + 1], out[t + 1, j + 1], out[t + 2, j + 1], out[t + 3, j + 1] = b0, b1, b2, b3
    for t in range(in_fours, tokens):
        x0 = states[t]
        a0 = b0 = np.float32(0)
        for i in range(inputs):
            a0 += w0[i] * x0[i]
            b0 += w1[i] * x0[i]
        out[t, j], out[t, j + 1] = a0, b0


@kept(nb.njit, void(TABLE, TABLE, TABLE, int64, int64), fastmath=FAST, nogil=True)
def some_outputs(weight: Floats, states: Floats, out: Floats, first: int, end: int) -> None:
    """Outputs `first` to `end` (excluded): as many sums at once as registers hold, so that weights are read once."""
    j = first
    if MANY_REGISTERS or len(states) == 1:
        while j + 4 <= end:
            _four_outputs(weight, states, out, j)
            j += 4
    while j + 2 <= end:
        _two_outputs(weight, states, out, j)
        j += 2
    if j < end:
        row = weight[j]
        for t in range(len(states)):
            state = states[t]
            total = np.float32(0)
            for i in range(len(row)):
                total += row[i] * state[i]
            out[t, j] = total


@kept(nb.cfunc, GIVEN, **OPTIONS)
def _some_of_a_product(given: Any) -> None:
    outputs, inputs, tokens = given[1], given[2], given[4]
    share = -(-outputs // parts())
    share += -share % 4
    first = min(part() * share, outputs)
    some_outputs(
        carray(at(given[0]), (outputs, inputs), np.float32),
        carray(at(given[3]), (tokens, inputs), np.float32),
        carray(at(given[5]), (tokens, outputs), np.float32),
        first,
        min(first + share, outputs),
    )


class Product:
    """Weights [outputs, inputs], which must stay where they are, times a few states [tokens, inputs].

    The memory is handed on as addresses: arrays would cost a tenth of a small product.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous()
        self.outputs = len(weight)
        self._weights = self.weight.data_ptr(), *weight.shape

    def __call__(self, states: Tensor) -> Tensor:
        """Gives [tokens, outputs]."""
        states = states.contiguous()
        out = empty(len(states), self.outputs)
        given = (c_int64 * 6)(*self._weights, states.data_ptr(), len(states), out.data_ptr())
        share(_some_of_a_product, given, get_num_threads())
        return out
