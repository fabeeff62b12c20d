"""What heads and controllers say of a few states on the CPU, in loops of our own: see `engine.native`."""

from collections.abc import Sequence
from ctypes import c_int64
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
from numba import boolean, carray, float32, int64, void
from torch import Tensor, empty, get_num_threads
from torch import int64 as int64_

from engine.loops import FAST, PLACES, ROW, TABLE, Floats, kept, loop
from engine.native import exp, some_outputs
from engine.openmp import GIVEN, OPTIONS, at, part, parts, share

#: states up to which these are faster than PyTorch's, which share out every operator among threads
FEW = 16


@loop(void(TABLE, TABLE, TABLE, TABLE, TABLE))
def _lens(states: Floats, down: Floats, up: Floats, between: Floats, out: Floats) -> None:
    some_outputs(down, states, between, 0, len(down))
    some_outputs(up, between, out, 0, len(up))
    for token in range(states.shape[0]):
        for i in range(states.shape[1]):
            out[token, i] += states[token, i]


def lens(states: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """X + (x downᵀ) upᵀ: states [tokens, hidden], down [rank, hidden], up [hidden, rank]."""
    between, out = empty(len(states), len(down)), empty(states.shape)
    _lens(states.contiguous().numpy(), down.numpy(), up.numpy(), between.numpy(), out.numpy())
    return out


@loop(void(TABLE, PLACES, ROW))
def _most_likely(logits: Floats, places: npt.NDArray[np.int64], probabilities: Floats) -> None:
    for token in range(logits.shape[0]):
        row = logits[token]
        highest = np.float32(-np.inf)
        for i in range(len(row)):
            highest = max(highest, row[i])
        total = np.float32(0)
        for i in range(len(row)):
            total += exp(row[i] - highest)
        place = 0
        while row[place] != highest and place + 1 < len(row):
            place += 1
        places[token] = place
        probabilities[token] = np.float32(1) / total


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first highest of each row of logits [tokens, outputs]: its place and its softmax probability, [tokens] each.

    A probability is no number where a logit is none, or infinite.
    """
    places, probabilities = empty(len(logits), dtype=int64_), empty(len(logits))
    _most_likely(logits.contiguous().numpy(), places.numpy(), probabilities.numpy())
    return places, probabilities


@kept(nb.njit, int64(ROW, float32), fastmath=FAST, nogil=True)
def _so_high(row: Floats, lowest: np.float32) -> int:
    """How many values are not below this: in a loop that vectors have."""
    found = np.float32(0)
    for i in range(len(row)):
        found += np.float32(1) if row[i] >= lowest else np.float32(0)
    return int64(found)


@kept(nb.njit, float32(ROW, int64), fastmath=FAST, nogil=True, error_model="numpy")
def _lowest_of_highest(row: Floats, count: int) -> np.float32:
    """The lowest of the `count` highest values, found between two ends that come nearer; -inf where there are none."""
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
    for _ in range(10):
        middle = low + (high - low) * np.float32(0.5)
        if _so_high(row, middle) < count:
            high = middle
        else:
            low = middle
    among, found = np.empty(len(row), np.float32), 0
    for i in range(len(row)):
        if row[i] >= low and (row[i] < high or high == highest):
            among[found] = row[i]
            found += 1
    above = _so_high(row, high) if high < highest else 0
    some = np.sort(among[:found])
    return some[found - (count - above)]


@kept(nb.njit, void(ROW, ROW, TABLE, ROW, int64, PLACES, ROW, PLACES, int64), fastmath=FAST, nogil=True)
def _refine_row(
    row: Floats,
    state: Floats,
    weight: Floats,
    bias: Floats,
    count: int,
    best: npt.NDArray[np.int64],
    probabilities: Floats,
    exact: npt.NDArray[np.int64],
    token: int,
) -> None:
    lowest = _lowest_of_highest(row, count)
    best[token], top, computed = 0, np.float32(-np.inf), int64(0)
    for i in range(len(row)):
        if row[i] < lowest:
            continue
        own = weight[i]
        total = np.float32(0)
        for j in range(len(state)):
            total += own[j] * state[j]
        if len(bias):
            total += bias[i]
        row[i] = total
        computed += 1
        if total > top or total != total:  # what is no number is to be seen
            best[token], top = i, total
    exact[token] = computed
    highest = top
    for i in range(len(row)):
        highest = max(highest, row[i])
    total = np.float32(0)
    for i in range(len(row)):
        total += exp(row[i] - highest)
    probabilities[token] = exp(top - highest) / total


@kept(nb.cfunc, GIVEN, **OPTIONS)
def _refine_some(given: Any) -> None:
    """What one thread does: some of the rows."""
    tokens, vocabulary, hidden = given[3], given[4], given[5]
    logits = carray(at(given[0]), (tokens, vocabulary), np.float32)
    states = carray(at(given[1]), (tokens, hidden), np.float32)
    weight = carray(at(given[2]), (vocabulary, hidden), np.float32)
    bias = carray(at(given[6]), given[7], np.float32)
    best, exact = carray(at(given[9]), tokens, np.int64), carray(at(given[11]), tokens, np.int64)
    probabilities = carray(at(given[10]), tokens, np.float32)
    for token in range(part(), tokens, parts()):
        _refine_row(logits[token], states[token], weight, bias, given[8], best, probabilities, exact, token)


def refine(
    logits: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Make at least `count` of each row's highest logits exact, in place; gives the place of the highest of these, its
    softmax probability among all, and how many are exact.

    logits: [states, vocabulary]; states: [states, hidden]; weight: [vocabulary, hidden]; bias: [vocabulary].
    """
    best, exact = empty(len(logits), dtype=int64_), empty(len(logits), dtype=int64_)
    probabilities = empty(len(logits))
    states, weight = states.contiguous(), weight.contiguous()
    nothing = weight if bias is None else bias  # of which no number is read
    given = (c_int64 * 12)(
        logits.data_ptr(),
        states.data_ptr(),
        weight.data_ptr(),
        *logits.shape,
        states.shape[1],
        nothing.data_ptr(),
        0 if bias is None else len(bias),
        count,
        best.data_ptr(),
        probabilities.data_ptr(),
        exact.data_ptr(),
    )
    share(_refine_some, given, min(get_num_threads(), len(logits)))
    return best, probabilities, exact


@loop(void(TABLE, TABLE, ROW, boolean, PLACES, ROW, TABLE))
def _judge(
    states: Floats,
    weight: Floats,
    bias: Floats,
    in_own_size: bool,
    left: npt.NDArray[np.int64],
    after_exit: Floats,
    out: Floats,
) -> None:
    width, classes = states.shape[1], len(weight)
    for token in range(states.shape[0]):
        state, row = states[token], out[token]
        scale = np.float32(1)
        if in_own_size:
            total = np.float32(0)
            for i in range(width):
                total += state[i] * state[i]
            scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(1e-6))
        highest = np.float32(-np.inf)
        for one in range(classes):
            total = np.float32(0)
            for i in range(width):
                total += state[i] * weight[one, i]
            row[one] = total * scale + bias[one]
            if left[token]:
                row[one] += after_exit[one]
            highest = max(highest, row[one])
        total = np.float32(0)
        for one in range(classes):
            row[one] = np.exp(row[one] - highest)
            total += row[one]
        for one in range(classes):
            row[one] /= total


def judge(
    states: Tensor, weight: Tensor, bias: Tensor, in_own_size: bool, left: Sequence[bool] | Tensor, after_exit: Tensor
) -> Tensor:
    """Probabilities [tokens, classes] of a linear classifier: softmax(weight x + bias, + after_exit where `left`).

    states: [tokens, hidden]; weight: [classes, hidden]; bias, after_exit: [classes]; left: [tokens].
    in_own_size: whether x is the state over its root mean square.
    """
    out = empty(len(states), len(weight))
    places = left.cpu().long().numpy() if isinstance(left, Tensor) else np.array(left, np.int64)
    _judge(
        states.contiguous().numpy(), weight.numpy(), bias.numpy(), in_own_size, places, after_exit.numpy(), out.numpy()
    )
    return out
