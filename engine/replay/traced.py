"""A piece of a trace in hand: some whole batches of samples, their tokens one after another."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Traced:
    """Samples in the benchmark's order, s of them with n tokens in all, at p exit points of which full depth is last.

    Per token as `db.records.TraceArrays` has it. Never changed once it is made: what it computes it keeps.
    """

    points: tuple[int, ...]  #: [p] rising, the last is the number of layers
    exit_points: tuple[int, ...]  #: of the exits: with or without the last layer
    has_controller: bool
    max_new_tokens: int
    # one place a sample
    lengths: Array  #: [s] int, tokens of each, at least one
    groups: Array  #: [s] int, number of its source group
    batches: Array  #: [s] int, number of its batch
    prompt_tokens: Array  #: [s] int
    prompt_keys: Array  #: [s] int
    # one place a token
    targets: Array  #: [n]
    tokens: Array  #: [p, n]
    probabilities: Array  #: [p, n]
    margins: Array  #: [p, n]
    entropies: Array  #: [p, n]
    similarities: Array  #: [p, n]
    controller: Array  #: [p, 3, n]
    ranks: Array  #: [p, n]
    #: what the controller adds to its logits where the token before left early; None: it does not look at that
    after_exit: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def n_layers(self) -> int:
        return self.points[-1]

    @property
    def last(self) -> int:
        """Place of full depth among the points."""
        return len(self.points) - 1

    @cached_property
    def starts(self) -> Array:
        """[s] place of each sample's first token."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def sample(self) -> Array:
        """[n] which sample each token is of."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def steps(self) -> Array:
        """[n] a token's place in its target, from 0: the step that writes it. Step 0 comes out of prefill."""
        return np.arange(len(self)) - self.starts[self.sample]

    @cached_property
    def reach(self) -> Array:
        """[n] positions that the pass which writes the token looks at, itself included."""
        return self.prompt_tokens[self.sample] + self.steps

    @cached_property
    def right(self) -> Array:
        """[p, n] whether an exit point's choice is the target."""
        return np.asarray(self.tokens == self.targets)

    @cached_property
    def agrees(self) -> Array:
        """[p, n] whether it is full depth's choice."""
        return np.asarray(self.tokens == self.tokens[-1])

    @cached_property
    def wrong_samples(self) -> Array:
        """[s] whether full depth, on its own, would not write the target: exact, for up to there the texts are one."""
        return np.add.reduceat(~self.right[-1], self.starts, dtype=np.int64) > 0

    @cached_property
    def winners(self) -> tuple[Array, Array]:
        """[p, n] each: the controller's likeliest class, and its probability."""
        return self.controller.argmax(axis=1).astype(np.int8), self.controller.max(axis=1)

    @cached_property
    def exits(self) -> Array:
        """[p, n] the controller's probability of leaving where that is its likeliest class, else -1."""
        return self._where_likeliest(1)

    @cached_property
    def stops(self) -> Array:
        """[p, n] the same for giving up."""
        return self._where_likeliest(2)

    def _where_likeliest(self, which: int) -> Array:
        winner, top = self.winners
        return np.where(winner == which, top, np.float32(-1))

    @cached_property
    def behind_exits(self) -> "Traced":
        """As if the token before each had left early. The controller's probabilities are recorded as if none had."""
        assert self.after_exit is not None
        weighted = self.controller * np.exp(np.array(self.after_exit, np.float32))[:, None]
        return replace(self, controller=weighted / weighted.sum(axis=1, keepdims=True), after_exit=None)

    def so_far(self, column: str, places: range, sign: int = 1) -> list[Array]:
        """For each of these neighbouring places [n] the highest of a signal from the first of them up to it; kept.

        sign: -1 turns the signal round.
        """
        key = (column, places.start, places.stop)
        if key not in self._kept:
            values = sign * getattr(self, column)[places.start : places.stop]
            self._kept[key] = list(np.maximum.accumulate(values, axis=0))
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[tuple[str, int, int], list[Array]]:
        return {}

    @cached_property
    def layers(self) -> Array:
        """[p] the points as an array."""
        return np.array(self.points)
