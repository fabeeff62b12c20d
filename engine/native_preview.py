"""A preview of the vocabulary on the CPU, in one loop: a coarse look at all tokens, then the logits of the likeliest.

Threads share out pieces of the vocabulary, as many pieces whatever the number of threads and of states, so that every
sum here has one order.
"""

from ctypes import c_int64
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
from numba import carray, float32, int8, int64, void
from torch import Tensor, empty, get_num_threads
from torch import int64 as int64_

from engine.loops import FAST, PLACES, ROW, TABLE, Floats, kept
from engine.native import exp
from engine.openmp import GIVEN, OPTIONS, at, barrier, part, parts, share

#: of the vocabulary: several for each thread, since the likeliest tokens are not spread evenly
PIECES = 16
#: terms of a look that are added at once; ranks are filled up to a multiple of it
TERMS = 4
#: values that stay in the nearest cache while their terms are added
_BLOCK = 2048
Codes = npt.NDArray[np.int8]


@kept(nb.njit, void(int8[:, ::1], ROW, ROW, int64, int64), fastmath=FAST, nogil=True, error_model="numpy")
def _look(codes: Codes, projected: Floats, row: Floats, first: int, end: int) -> None:
    """Add projected @ codes to a piece of a row. codes: [rank, vocabulary]; projected: [rank]; row: [vocabulary]."""
    sums = np.empty(_BLOCK, np.float32)  # of its own: into the row itself no vectors are made
    for begin in range(first, end, _BLOCK):
        n = min(_BLOCK, end - begin)
        for i in range(n):
            sums[i] = row[begin + i]
        for k in range(0, len(codes), TERMS):
            c0, c1 = codes[k, begin : begin + n], codes[k + 1, begin : begin + n]
            c2, c3 = codes[k + 2, begin : begin + n], codes[k + 3, begin : begin + n]
            p0, p1, p2, p3 = projected[k], projected[k + 1], projected[k + 2], projected[k + 3]
            for i in range(n):
                sums[i] += (
                    p0 * np.float32(np.int32(c0[i]))
                    + p1 * np.float32(np.int32(c1[i]))
                    + p2 * np.float32(np.int32(c2[i]))
                    + p3 * np.float32(np.int32(c3[i]))
                )
        for i in range(n):
            row[begin + i] = sums[i]


@kept(nb.njit, int64(ROW, float32), fastmath=FAST, nogil=True)
def _so_high(row: Floats, lowest: np.float32) -> int:
    """How many values are not below this: in a loop that vectors have."""
    found = np.float32(0)
    for i in range(len(row)):
        found += np.float32(1) if row[i] >= lowest else np.float32(0)
    return int64(found)


@kept(nb.njit, float32(ROW, int64), fastmath=FAST, nogil=True, error_model="numpy")
def _lowest_of_highest(row: Floats, count: int) -> np.float32:
    """What `count` values are not below, found between two ends that come nearer; more only where some are so near to
    one another that they count as one. -inf where there are none.
    """
    highest = np.float32(-np.inf)
    for i in range(len(row)):
        highest = max(highest, row[i])
    if not np.isfinite(highest):  # whatever is no number is to be seen
        return np.float32(-np.inf)
    high, below = highest, np.float32(8)  # fewer than `count` are above `high`, so many not below `low`
    low = highest - below
    while _so_high(row, low) < count:
        high, below = low, below * np.float32(2)
        if not below < np.float32(1e9):
            return np.float32(-np.inf)
        low = highest - below
    for _ in range(30):
        middle = low + (high - low) * np.float32(0.5)
        found = _so_high(row, middle)
        if found < count:
            high = middle
        else:
            low = middle
        if found == count:
            break
    return low


@kept(nb.njit, int64(ROW, ROW, TABLE, ROW, float32, int64, int64, ROW), fastmath=FAST, nogil=True)
def _refine(
    row: Floats,
    state: Floats,
    weight: Floats,
    bias: Floats,
    lowest: np.float32,
    first: int,
    end: int,
    found: Floats,
) -> int:
    """Make logits of a piece exact that are not below `lowest`; gives the place of the highest of these, and in
    `found` this one, the highest of all in the piece, and how many are exact.
    """
    places, computed = np.empty(end - first + 1, np.int64), 0
    for i in range(first, end):
        places[computed] = i
        computed += int64(not row[i] < lowest)  # what is no number is to be seen
    best, top = first, np.float32(-np.inf)
    for place in range(computed):
        i = places[place]
        own = weight[i]
        total = np.float32(0)
        for j in range(len(state)):
            total += own[j] * state[j]
        if len(bias):
            total += bias[i]
        row[i] = total
        if total > top or total != total:
            best, top = i, total
    highest = top
    for i in range(first, end):
        highest = max(highest, row[i])
    found[0], found[1], found[2] = top, highest, np.float32(computed)
    return best


@kept(nb.njit, float32(ROW, float32, int64, int64), fastmath=FAST, nogil=True)
def _total(row: Floats, highest: np.float32, first: int, end: int) -> np.float32:
    total = np.float32(0)
    for i in range(first, end):
        total += exp(row[i] - highest)
    return total


@kept(nb.njit, float32(TABLE), fastmath={"contract"}, nogil=True)
def _highest(found: Floats) -> np.float32:
    highest = found[0, 1]
    for piece in range(1, len(found)):
        highest = max(highest, found[piece, 1])
    return highest


@kept(nb.njit, void(TABLE, PLACES, PLACES, ROW, PLACES, int64), fastmath={"contract"}, nogil=True)
def _join(
    found: Floats,
    places: npt.NDArray[np.int64],
    best: npt.NDArray[np.int64],
    probabilities: Floats,
    exact: npt.NDArray[np.int64],
    token: int,
) -> None:
    """Of all pieces the highest logit's token, its probability, and how many are exact."""
    best[token], exact[token] = places[0], int64(0)
    top, total = np.float32(-np.inf), np.float32(0)
    for piece in range(len(found)):
        own = found[piece, 0]
        if own > top or own != own:
            best[token], top = places[piece], own
        exact[token] += int64(found[piece, 2])
        total += found[piece, 3]
    probabilities[token] = exp(top - _highest(found)) / total


@kept(nb.cfunc, GIVEN, **OPTIONS)
def _some_of_a_preview(given: Any) -> None:
    """What one thread does: some of the pieces, and some states' thresholds."""
    tokens, rank, vocabulary, hidden, count = given[0], given[1], given[2], given[3], given[4]
    codes = carray(at(given[5]), (rank, vocabulary), np.int8)
    projected = carray(at(given[6]), (tokens, rank), np.float32)
    states = carray(at(given[7]), (tokens, hidden), np.float32)
    weight = carray(at(given[8]), (vocabulary, hidden), np.float32)
    bias = carray(at(given[9]), given[10], np.float32)
    logits = carray(at(given[11]), (tokens, vocabulary), np.float32)
    best, exact = carray(at(given[12]), tokens, np.int64), carray(at(given[13]), tokens, np.int64)
    probabilities = carray(at(given[14]), tokens, np.float32)
    places = carray(at(given[15]), (tokens, PIECES), np.int64)
    found = carray(at(given[16]), (tokens, PIECES, 4), np.float32)
    lowest = carray(at(given[17]), tokens, np.float32)
    length = -(-vocabulary // PIECES)
    for item in range(part(), tokens * PIECES, parts()):
        token, first = item // PIECES, min(item % PIECES * length, vocabulary)
        end = min(first + length, vocabulary)
        row = logits[token]
        for i in range(first, end):
            row[i] = bias[i] if len(bias) else np.float32(0)
        _look(codes, projected[token], row, first, end)
    barrier()
    for token in range(part(), tokens, parts()):
        lowest[token] = _lowest_of_highest(logits[token], count)
    barrier()
    for item in range(part(), tokens * PIECES, parts()):
        token, piece = item // PIECES, item % PIECES
        first = min(piece * length, vocabulary)
        end = min(first + length, vocabulary)
        places[token, piece] = _refine(
            logits[token], states[token], weight, bias, lowest[token], first, end, found[token, piece]
        )
    barrier()
    for item in range(part(), tokens * PIECES, parts()):
        token, piece = item // PIECES, item % PIECES
        first = min(piece * length, vocabulary)
        end = min(first + length, vocabulary)
        found[token, piece, 3] = _total(logits[token], _highest(found[token]), first, end)
    barrier()
    for token in range(part(), tokens, parts()):
        _join(found[token], places[token], best, probabilities, exact, token)


def foresee(
    codes: Tensor, projected: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look at all tokens and make at least `count` of each state's highest logits exact. Gives the token of the highest
    of these, its softmax probability among all, [states] each, all logits [states, vocabulary], and how many are exact.

    codes: [rank, vocabulary] int8, of a rank that is a multiple of `TERMS`; projected: [states, rank], by which they
    are multiplied; states: [states, hidden]; weight: [vocabulary, hidden]; bias: [vocabulary].
    """
    tokens = len(states)
    states, weight, projected = states.contiguous(), weight.contiguous(), projected.contiguous()
    best, exact, places = (empty(*shape, dtype=int64_) for shape in ((tokens,), (tokens,), (tokens, PIECES)))
    probabilities, lowest = empty(tokens), empty(tokens)
    logits, found = empty(tokens, len(weight)), empty(tokens, PIECES, 4)
    bias = None if bias is None else bias.contiguous()
    nothing = weight if bias is None else bias  # of which no number is read
    given = (c_int64 * 18)(
        tokens,
        *codes.shape,
        states.shape[1],
        count,
        codes.data_ptr(),
        projected.data_ptr(),
        states.data_ptr(),
        weight.data_ptr(),
        nothing.data_ptr(),
        0 if bias is None else len(bias),
        logits.data_ptr(),
        best.data_ptr(),
        exact.data_ptr(),
        probabilities.data_ptr(),
        places.data_ptr(),
        found.data_ptr(),
        lowest.data_ptr(),
    )
    share(_some_of_a_preview, given, get_num_threads())
    return best, probabilities, logits, exact
