"""Attention of ragged rows on the CPU: no padding, no masks, no row that waits for a longer one."""

import numba as nb
import numpy as np
import numpy.typing as npt
from numba import float32, int64, prange, void
from torch import Tensor, from_numpy

from engine.loops import CACHE, CUBE, HIDDEN, HIDDEN_ROW, PLACES, STRIDED, TABLE, Floats, loop
from engine.native import exp, threads

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


@loop(void(STRIDED, TABLE, TABLE, int64, int64, int64, int64, int64, HIDDEN_ROW, int64, float32, CUBE))
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
            query[i] = q[token, head, i] * scale
        _score(query, keys, begin, end, scores)
        for j in range(begin, min(end, len(visible))):
            if visible[j] <= layer:
                scores[j] = -np.inf
        total = _exp_scores(scores, begin, end)
        _mix(scores, values, begin, end, mixed)
        for i in range(size):
            out[token, head, i] = mixed[i] / total


_ARGUMENTS = (STRIDED, CACHE, CACHE, PLACES, PLACES, PLACES, int64, HIDDEN, int64, float32, CUBE)


@loop(void(*_ARGUMENTS, int64, int64))
def _attend_some(
    q: Floats,
    keys: Floats,
    values: Floats,
    rows: Places,
    starts: Places,
    counts: Places,
    window: int,
    visible: Places,
    layer: int,
    scale: float,
    out: Floats,
    part: int,
    parts: int,
) -> None:
    """One of so many parts of all heads of all rows."""
    heads, group = q.shape[1], q.shape[1] // keys.shape[1]
    firsts = np.cumsum(counts) - counts
    tasks = len(rows) * heads
    for task in range(part * tasks // parts, (part + 1) * tasks // parts):
        place, head = task // heads, task % heads
        row, kv = rows[place], head // group
        _attend_head(
            q,
            keys[row, kv],
            values[row, kv],
            head,
            firsts[place],
            starts[place],
            counts[place],
            window,
            visible[row if visible.shape[0] > 1 else 0],
            layer,
            scale,
            out,
        )


@loop(void(*_ARGUMENTS, int64), parallel=True)
def _attend_together(
    q: Floats,
    keys: Floats,
    values: Floats,
    rows: Places,
    starts: Places,
    counts: Places,
    window: int,
    visible: Places,
    layer: int,
    scale: float,
    out: Floats,
    parts: int,
) -> None:
    for part in prange(parts):
        _attend_some(q, keys, values, rows, starts, counts, window, visible, layer, scale, out, part, parts)


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
        self.tokens = np.array(rows), np.array(starts), np.array(counts)
        self.visible = _ALL if visible is None else visible
        self.scale = scale
        self.parts = threads() if sum(starts) + sum(counts) > _WORTH_WAKING else 1

    def __call__(self, q: Tensor, keys: Floats, values: Floats, *, window: int | None, layer: int) -> Tensor:
        """The layer's keys and values are [rows, kv heads, positions, size], q is [tokens, heads, size].

        Gives [tokens, heads * size].
        """
        out = np.empty(q.shape, np.float32)
        given = (q.numpy(), keys, values, *self.tokens, window or 0, self.visible, layer, self.scale, out)
        if self.parts > 1:
            _attend_together(*given, self.parts)
        else:
            _attend_some(*given, 0, 1)
        return from_numpy(out.reshape(len(out), -1))


#: nothing is hidden
_ALL = np.zeros((1, 0), np.int64)
