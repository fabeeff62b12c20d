"""Attention of ragged rows on the CPU: no padding, no masks, no row that waits for a longer one."""

from ctypes import c_int64
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
from numba import carray, float32, int64, void
from torch import Tensor, empty, get_num_threads

from engine.loops import CACHE, FAST, HIDDEN, HIDDEN_ROW, TABLE, Floats, kept, loop
from engine.native import exp
from engine.openmp import GIVEN, OPTIONS, at, part, parts, share

Places = npt.NDArray[np.int64]


@nb.njit(inline="always")
def _score(query: Floats, keys: Floats, begin: int, end: int, scores: Floats) -> None:
    """The query times each of a head's keys, four at a time so that it is read once for them."""
    in_fours = end - (end - begin) % 4
    for j in range(begin, in_fours, 4):
        a = b = c = d = np.float32(0)
        for i in range(len(query)):
            a += query[i] * keys[j, i]
            b += query[i] * keys[j + 1, i]
            c += query[i] * keys[j + 2, i]
            d += query[i] * keys[j + 3, i]
        scores[j], scores[j + 1], scores[j + 2], scores[j + 3] = a, b, c, d
    for j in range(in_fours, end):
        a = np.float32(0)
        for i in range(len(query)):
            a += query[i] * keys[j, i]
        scores[j] = a


@nb.njit(inline="always")
def _exp_scores(scores: Floats, begin: int, end: int) -> np.float32:
    """Scores to weights that are not yet divided by their sum, which is given back."""
    highest = np.float32(-np.inf)
    for j in range(begin, end):
        highest = max(highest, scores[j])
    for j in range(begin, end):
        scores[j] = exp(scores[j] - highest)
    total = np.float32(0)
    for j in range(begin, end):
        total += scores[j]
    return total


@nb.njit(inline="always")
def _mix(weights: Floats, values: Floats, begin: int, end: int, mixed: Floats) -> None:
    """The weighted sum of a head's values."""
    in_fours = end - (end - begin) % 4
    mixed[:] = np.float32(0)
    for j in range(begin, in_fours, 4):
        a, b, c, d = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        for i in range(len(mixed)):
            mixed[i] += a * values[j, i] + b * values[j + 1, i] + c * values[j + 2, i] + d * values[j + 3, i]
    for j in range(in_fours, end):
        for i in range(len(mixed)):
            mixed[i] += weights[j] * values[j, i]


@loop(void(TABLE, TABLE, TABLE, int64, int64, int64, int64, int64, HIDDEN_ROW, int64, float32, TABLE))
def _attend_head(
    q: Floats,
    keys: Floats,
    values: Floats,
    head: int,
    first: int,
    start: int,
    count: int,
    window: int,
    visible: npt.NDArray[np.int64],
    layer: int,
    scale: float,
    out: Floats,
) -> None:
    """One head of a row's tokens, from the flat place `first` on, over that row's keys and values of it."""
    size = keys.shape[1]
    query, mixed = np.empty(size, np.float32), np.empty(size, np.float32)
    scores = np.empty(start + count, np.float32)
    for nth in range(count):
        token, end = first + nth, start + nth + 1
        begin = max(0, end - window) if window else 0
        for i in range(size):
            query[i] = q[token, head * size + i] * scale
        _score(query, keys, begin, end, scores)
        for j in range(begin, min(end, len(visible))):
            if visible[j] <= layer:
                scores[j] = -np.inf
        total = _exp_scores(scores, begin, end)
        _mix(scores, values, begin, end, mixed)
        for i in range(size):
            out[token, head * size + i] = mixed[i] / total


_ATTENDED = void(TABLE, int64, CACHE, CACHE, HIDDEN, int64, HIDDEN, int64, float32, TABLE, int64, int64)


@kept(nb.njit, _ATTENDED, fastmath=FAST, nogil=True, error_model="numpy")
def attend_heads(
    q: Floats,
    n_heads: int,
    keys: Floats,
    values: Floats,
    span: Places,
    window: int,
    visible: Places,
    layer: int,
    scale: float,
    out: Floats,
    part: int,
    parts: int,
) -> None:
    """One of so many parts of all heads of all rows.

    q: each token's heads first in its row of the table. span: see `spans`.
    """
    group, tasks = n_heads // keys.shape[1], span.shape[1] * n_heads
    for task in range(part * tasks // parts, (part + 1) * tasks // parts):
        place, head = task // n_heads, task % n_heads
        row, kv = span[0, place], head // group
        _attend_head(
            q,
            keys[row, kv],
            values[row, kv],
            head,
            span[3, place],
            span[1, place],
            span[2, place],
            window,
            visible[row if visible.shape[0] > 1 else 0],
            layer,
            scale,
            out,
        )


@kept(nb.cfunc, GIVEN, **OPTIONS)
def _attend_some(given: Any) -> None:
    """This thread's part of a layer's attention."""
    n_tokens, stride, n_heads = given[1], given[2], given[3]
    shape = given[6], given[7], given[8], given[9]
    attend_heads(
        carray(at(given[0]), (n_tokens, stride), np.float32),
        n_heads,
        carray(at(given[4]), shape, np.float32),
        carray(at(given[5]), shape, np.float32),
        carray(at(given[10]), (4, given[11]), np.int64),
        given[16],
        carray(at(given[12]), (given[13], given[14]), np.int64),
        given[17],
        carray(at(given[15]), 1, np.float32)[0],
        carray(at(given[18]), (n_tokens, n_heads * shape[3]), np.float32),
        part(),
        parts(),
    )


#: keys that are looked at, over all rows: fewer, and waking the other threads takes longer than they save
_WORTH_WAKING = 1000


class Attention:
    """Attention of some tokens, the same in every layer: each over its row's positions up to its own.

    rows, the position of each one's first token in hand, and how many it has, [rows] each. visible: see
    `KeyValues.visible`, or None where all is seen. A position that is hidden has no weight.
    """

    def __init__(
        self, rows: list[int], starts: list[int], counts: list[int], visible: Places | None, scale: float
    ) -> None:
        # Everything that the loop gets by its address is kept here.
        self._span = spans(rows, starts, counts)
        self._visible = ALL if visible is None else np.ascontiguousarray(visible)
        self._scale = np.array([scale], np.float32)
        hidden = self._visible.ctypes.data, *self._visible.shape, self._scale.ctypes.data
        self._given = (c_int64 * 19)(*[0] * 10, self._span.ctypes.data, len(rows), *hidden)
        self.threads = get_num_threads() if sum(starts) + sum(counts) > _WORTH_WAKING else 1

    def __call__(self, q: Tensor, keys: Floats, values: Floats, *, window: int | None, layer: int) -> Tensor:
        """The layer's keys and values are [rows, kv heads, positions, size], q is [tokens, heads, size].

        Gives [tokens, heads * size].
        """
        tokens, heads, size = q.shape
        if q.stride()[1:] != (size, 1):
            q = q.contiguous()
        out = empty(tokens, heads * size)
        self._given[:4] = [q.data_ptr(), tokens, q.stride(0), heads]
        self._given[4:10] = [keys.ctypes.data, values.ctypes.data, *keys.shape]
        self._given[16:] = [window or 0, layer, out.data_ptr()]
        share(_attend_some, self._given, self.threads)
        return out


def spans(rows: list[int], starts: list[int], counts: list[int]) -> Places:
    """What attention needs of each row, [4, rows].

    Its place in the cache, its first token's position, how many tokens, and the flat place of the first.
    """
    return np.array([rows, starts, counts, np.cumsum(counts) - counts])


#: nothing is hidden
ALL = np.zeros((1, 0), np.int64)
