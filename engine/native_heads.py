"""What heads and controllers say of a few states on the CPU, in loops of our own: see `engine.native`."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import boolean, void
from torch import Tensor, empty
from torch import int64 as int64_

from engine.loops import PLACES, ROW, TABLE, Floats, loop
from engine.native import exp, some_outputs

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
