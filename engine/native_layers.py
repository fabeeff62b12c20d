"""Whole layers of the Llama kind on the CPU, one after the other without coming back to Python.

A decode step of a small model is a hundred small products. Between two of them Python and PyTorch take as long as a
quarter of a product, and threads that wait for the next one may fall asleep. Here all layers between two exit points
are one call: the threads share out the outputs of each product, and the heads of attention, and meet after each.
The state itself, and its norms, every thread keeps for itself: that is cheaper than to meet once more.
"""

from ctypes import c_int64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import numba as nb
import numpy as np
import numpy.typing as npt
from numba import carray, int64, void
from torch import Tensor, empty, get_num_threads

from engine.loops import FAST, TABLE, Floats, kept
from engine.native import MANY_REGISTERS, gate_rows, norm_rows, some_outputs
from engine.native_attention import ALL, attend_heads, spans
from engine.openmp import GIVEN, OPTIONS, at, barrier, part, parts, share

if TYPE_CHECKING:
    from engine.cache import KeyValues, Span

Addresses = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LlamaWeights:
    """One layer's weights, float32 and contiguous: norms [hidden], matrices [outputs, inputs], biases [outputs]."""

    attention_norm: Tensor
    qkv: Tensor  #: all queries, then all keys, then all values
    qkv_bias: Tensor | None
    head_norms: Tensor | None  #: of queries and keys, [heads + kv heads, head size]
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    up: Tensor  #: gate and up side by side
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    window: int | None  #: positions that a token looks back over, itself included


#: tokens: with more, a product of its own for each matrix is as fast
MOST_TOGETHER = 16 if MANY_REGISTERS else 8

# What a loop is given of a layer, in this order; 0 where there is none.
_WEIGHTS = (
    "attention_norm",
    "qkv",
    "qkv_bias",
    "head_norms",
    "output",
    "output_bias",
    "mlp_norm",
    "up",
    "up_bias",
    "down",
    "down_bias",
)
_N_WEIGHTS = len(_WEIGHTS)
_WINDOW = _N_WEIGHTS


@nb.njit(inline="always")
def _floats(address: int, shape: Any) -> Floats:
    return carray(at(address), shape, np.float32)


@nb.njit(inline="always")
def _whole(address: int, shape: Any) -> Addresses:
    return carray(at(address), shape, np.int64)


@kept(nb.njit, void(int64, int64, TABLE, TABLE, int64, int64), fastmath=FAST, nogil=True, error_model="numpy")
def _multiply(weight_at: int, bias_at: int, states: Floats, out: Floats, first: int, end: int) -> None:
    """Outputs `first` to `end` of a product."""
    tokens, inputs = states.shape
    some_outputs(_floats(weight_at, (out.shape[1], inputs)), states, out, first, end)
    if bias_at:
        bias = _floats(bias_at, out.shape[1])
        for token in range(tokens):
            for j in range(first, end):
                out[token, j] += bias[j]


@kept(nb.njit, void(TABLE, TABLE), fastmath=FAST, nogil=True)
def _add(states: Floats, added: Floats) -> None:
    for token in range(states.shape[0]):
        state, more = states[token], added[token]
        for i in range(states.shape[1]):
            state[i] += more[i]


@kept(nb.njit, nb.types.UniTuple(int64, 2)(int64, int64, int64), nogil=True)
def _mine(outputs: int, me: int, threads: int) -> tuple[int, int]:
    """This thread's share of so many outputs, in fours."""
    fours = (outputs + 3) // 4
    return min(outputs, 4 * (me * fours // threads)), min(outputs, 4 * ((me + 1) * fours // threads))


@nb.njit(inline="always")
def _turn(head: Floats, norms_at: int, epsilon: float, cos: Floats, sin: Floats) -> None:
    """A query's or a key's own norm, where it has one, and its rotation: in place."""
    size = len(head)
    half = size // 2
    if norms_at:
        weight = _floats(norms_at, size)
        total = np.float32(0)
        for i in range(size):
            total += head[i] * head[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(size) + epsilon)
        for i in range(size):
            head[i] = head[i] * scale * weight[i]
    for i in range(half):
        first, second = head[i], head[half + i]
        head[i] = first * cos[i] + second * sin[i]
        head[half + i] = second * cos[half + i] + first * sin[half + i]


@kept(nb.cfunc, GIVEN, **OPTIONS)
def _run_layers(given: Any) -> None:
    """What one thread does of all layers from `first` to `end`."""
    first, end, tokens, hidden = given[1], given[2], given[3], given[4]
    n_heads, n_kv, size, inner = given[5], given[6], given[7], given[8]
    weights = _whole(given[0], (end, _N_WEIGHTS + 1))
    n_all = n_heads + 2 * n_kv
    qkv = _floats(given[10], (tokens, n_all * size))
    attended, added = _floats(given[11], (tokens, n_heads * size)), _floats(given[12], (tokens, hidden))
    both, gated = _floats(given[13], (tokens, 2 * inner)), _floats(given[14], (tokens, inner))
    cos, sin = _floats(given[15], (tokens, size)), _floats(given[16], (tokens, size))
    token_rows, positions = _whole(given[17], tokens), _whole(given[18], tokens)
    span = _whole(given[19], (4, given[20]))
    visible = _whole(given[21], (given[22], given[23]))
    numbers = _floats(given[24], 2)
    scale, epsilon = numbers[0], numbers[1]
    cache = given[25], n_kv, given[26], size
    of_a_layer = 4 * given[25] * n_kv * given[26] * size
    me, threads = int64(part()), int64(parts())
    states, normed = np.empty((tokens, hidden), np.float32), np.empty((tokens, hidden), np.float32)
    states[:] = _floats(given[9], (tokens, hidden))
    for layer in range(first, end):
        own = weights[layer]
        before = layer * of_a_layer
        keys, values = _floats(given[28] + before, cache), _floats(given[29] + before, cache)
        norm_rows(states, _floats(own[0], hidden), epsilon, normed)
        begin, stop = _mine(n_all * size, me, threads)
        _multiply(own[1], own[2], normed, qkv, begin, stop)
        barrier()
        for task in range(me * tokens * n_all // threads, (me + 1) * tokens * n_all // threads):
            token, head = task // n_all, task % n_all
            mine = qkv[token, head * size : (head + 1) * size]
            if head < n_heads + n_kv:
                norms_at = own[3] + 4 * head * size if own[3] else 0
                _turn(mine, norms_at, epsilon, cos[token], sin[token])
            if head >= n_heads + n_kv:
                values[token_rows[token], head - n_heads - n_kv, positions[token]] = mine
            elif head >= n_heads:
                keys[token_rows[token], head - n_heads, positions[token]] = mine
        barrier()
        attend_heads(
            qkv,
            n_heads,
            keys,
            values,
            span,
            own[_WINDOW],
            visible,
            layer,
            scale,
            attended,
            me,
            threads,
        )
        barrier()
        begin, stop = _mine(hidden, me, threads)
        _multiply(own[4], own[5], attended, added, begin, stop)
        barrier()
        _add(states, added)
        norm_rows(states, _floats(own[6], hidden), epsilon, normed)
        begin, stop = _mine(inner, me, threads)
        _multiply(own[7], own[8], normed, both, begin, stop)
        _multiply(own[7], own[8], normed, both, inner + begin, inner + stop)
        gate_rows(both, gated, begin, stop)
        barrier()
        begin, stop = _mine(hidden, me, threads)
        _multiply(own[9], own[10], gated, added, begin, stop)
        barrier()
        _add(states, added)
    if me == 0:
        _floats(given[27], (tokens, hidden))[:] = states


@kept(nb.cfunc, GIVEN, **OPTIONS)
def _fill_layers(given: Any) -> None:
    """What one thread does of the keys and values of all layers from `first` to `end`."""
    first, end, tokens, hidden, n_heads, n_kv, size = (
        given[1],
        given[2],
        given[3],
        given[4],
        given[5],
        given[6],
        given[7],
    )
    weights = _whole(given[0], (end, _N_WEIGHTS + 1))
    states, both = _floats(given[9], (tokens, hidden)), _floats(given[10], (tokens, 2 * n_kv * size))
    cos, sin = _floats(given[15], (tokens, size)), _floats(given[16], (tokens, size))
    token_rows, positions = _whole(given[17], tokens), _whole(given[18], tokens)
    epsilon = _floats(given[24], 2)[1]
    cache = given[25], n_kv, given[26], size
    of_a_layer = 4 * given[25] * n_kv * given[26] * size
    me, threads = int64(part()), int64(parts())
    normed = np.empty((tokens, hidden), np.float32)
    begin, stop = _mine(2 * n_kv * size, me, threads)
    for layer in range(first, end):
        own = weights[layer]
        before = layer * of_a_layer
        keys, values = _floats(given[28] + before, cache), _floats(given[29] + before, cache)
        norm_rows(states, _floats(own[0], hidden), epsilon, normed)
        skipped = 4 * n_heads * size
        _multiply(own[1] + skipped * hidden, own[2] + skipped if own[2] else 0, normed, both, begin, stop)
        barrier()
        for task in range(me * tokens * 2 * n_kv // threads, (me + 1) * tokens * 2 * n_kv // threads):
            token, head = task // (2 * n_kv), task % (2 * n_kv)
            mine = both[token, head * size : (head + 1) * size]
            if head < n_kv:
                norms_at = own[3] + 4 * (n_heads + head) * size if own[3] else 0
                _turn(mine, norms_at, epsilon, cos[token], sin[token])
                keys[token_rows[token], head, positions[token]] = mine
            else:
                values[token_rows[token], head - n_kv, positions[token]] = mine
        barrier()


#: where in what the loops are given stands what changes from call to call
_FIRST, _END, _STATES, _OUT = 1, 2, 9, 27


@dataclass(frozen=True)
class _Prepared:
    """What the loops are given for the tokens of a span, and all whose addresses are in it."""

    span: "Span"
    cache: "ref[KeyValues]"  #: weak: a batch that has ended gives its memory back
    visible: Tensor | None
    given: Any
    alive: tuple[Any, ...]


class LlamaLayers:
    """All layers of a model, whose weights must stay where they are."""

    def __init__(
        self,
        layers: list[LlamaWeights],
        *,
        n_heads: int,
        n_kv_heads: int,
        head_size: int,
        inner: int,
        epsilon: float,
        scale: float,
    ) -> None:
        """inner: width of the MLP between `up` and `down`. scale: what scores are multiplied with."""
        self.layers = layers  # kept alive, like everything else whose address is handed on
        self._sizes = n_heads, n_kv_heads, head_size, inner
        self._numbers = np.array([scale, epsilon], np.float32)
        #: for the tokens that went last: they mostly go on, from exit point to exit point
        self._kept: _Prepared | None = None
        self._weights = np.zeros((len(layers), _N_WEIGHTS + 1), np.int64)
        for row, layer in zip(self._weights, layers, strict=True):
            tensors = [getattr(layer, name) for name in _WEIGHTS]
            assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
            row[:_N_WEIGHTS] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            row[_WINDOW] = layer.window or 0

    def run(
        self,
        states: Tensor,
        span: "Span",
        cache: "KeyValues",
        index: tuple[Tensor, Tensor],
        place: tuple[Tensor, Tensor],
        first: int,
        end: int,
        *,
        only_fill: bool = False,
    ) -> Tensor:
        """Take the tokens of `span` [tokens, hidden] through layers `first` to `end` (excluded).

        index: row and position of each token, [tokens] each. place: cosines and signed sines, [tokens, 1, head size]
        each. only_fill: only write the keys and values that these layers make of the states, which stay as they are.
        """
        states = states.contiguous()
        out = states if only_fill else empty(states.shape)
        kept = self._kept
        if kept is None or kept.span is not span or kept.cache() is not cache or kept.visible is not cache.visible:
            kept = self._kept = self._prepared(span, cache, index, place, *states.shape)
        given = kept.given
        given[_FIRST], given[_END], given[_STATES], given[_OUT] = first, end, states.data_ptr(), out.data_ptr()
        share(_fill_layers if only_fill else _run_layers, given, get_num_threads())
        return out

    def _prepared(
        self,
        span: "Span",
        cache: "KeyValues",
        index: tuple[Tensor, Tensor],
        place: tuple[Tensor, Tensor],
        tokens: int,
        hidden: int,
    ) -> "_Prepared":
        """What the loops are given for these tokens, whichever layers they pass."""
        n_heads, n_kv_heads, size, inner = self._sizes
        widths = (n_heads + 2 * n_kv_heads) * size, n_heads * size, hidden, 2 * inner, inner
        buffers = [empty(tokens, width) for width in widths]
        rows, positions = index
        cos, sin = place
        places = spans(span.rows, span.starts, span.counts)
        visible = ALL if cache.visible is None else cache.visible.numpy()
        given = (c_int64 * 30)(
            self._weights.ctypes.data,
            0,
            0,
            tokens,
            hidden,
            *self._sizes,
            0,
            *(buffer.data_ptr() for buffer in buffers),
            cos.data_ptr(),
            sin.data_ptr(),
            rows.data_ptr(),
            positions.data_ptr(),
            places.ctypes.data,
            len(span.rows),
            visible.ctypes.data,
            *visible.shape,
            self._numbers.ctypes.data,
            cache.n_rows,
            cache.n_positions,
            0,
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
        )
        return _Prepared(span, ref(cache), cache.visible, given, (buffers, index, place, places))
