"""What the decode of a policy's decisions would cost at best, by the model of `engine.cost`, in the trace's batches.

Steps are synchronous: while reading weights dominates, depth is saved only where all rows of a batch have left.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.cost import Machine, Price, Shape, of_fill, of_head, of_layers
from engine.replay.decide import Decisions, asked_at, usable_places
from engine.replay.traced import Array, Traced
from engine.spec import HeadPolicy, Patience, PolicySpec

#: rules that look at a head's prediction wherever they are asked
_PREDICTING = (HeadPolicy, Patience)


@dataclass(frozen=True)
class CostModel:
    """A model with its exits on a machine."""

    shape: Shape
    heads: tuple[int, ...]  #: [p] parameters of the head at each point; of full depth the unembedding
    machine: Machine

    def ideal_ns(self, price: Price) -> Array:
        """The time at best, in nanoseconds."""
        flops, bytes_read = price
        return np.maximum(bytes_read / self.machine.bandwidth, flops / self.machine.peak) * 1e9


#: a token's count and the positions that it looks at, in one number: neither sum reaches 2^26 here
_ONE = 2.0**26


class Steps:
    """The decode steps of a piece of a trace, batch by batch; step 0 is prefill's and is none of them."""

    def __init__(self, traced: Traced, model: CostModel) -> None:
        self.traced, self.model = traced, model
        self.decoded = traced.steps > 0
        numbers = traced.batches[traced.sample] * (int(traced.lengths.max()) + 1) + traced.steps
        #: [k] the batch of each step; [n] the step that each token is written by, k for those out of prefill
        found, of_decoded = np.unique(numbers[self.decoded], return_inverse=True)
        self.batch = found // (int(traced.lengths.max()) + 1)
        self.n = len(found)
        self.step = np.full(len(traced), self.n)
        self.step[self.decoded] = of_decoded
        self._weights = _ONE + traced.reach
        self._reach = np.cumsum(traced.reach)
        self._segments = np.diff(traced.layers, prepend=0).astype(float)[:, None]
        most = int(np.bincount(of_decoded).max(initial=0))
        #: [p, most + 1] nanoseconds of a head on so many states, and of so many tokens' skipped keys and values
        self._head_table = self._table(of_head, np.array(model.heads, float), most)
        self._fill_table = self._table(of_fill, traced.n_layers - traced.layers.astype(float), most)

    def cost(self, policy: PolicySpec, decisions: Decisions) -> Array:
        """[k] nanoseconds at best of each step."""
        step = self.step if decisions.behind is None else np.where(decisions.behind, self.n, self.step)
        rows, context = self._passes(decisions, step)
        tokens, looked_at = (rows, context)
        if policy.kv == "recompute":
            tokens, looked_at = self._with_debts(decisions)
        total = (self._layers(tokens, looked_at, context) * (rows > 0)).sum(0)
        leavers = rows.copy()
        leavers[:-1] -= rows[1:]
        if decisions.stops is not None:
            given_up = np.flatnonzero(decisions.stops)
            np.subtract.at(leavers, (decisions.places[given_up], step[given_up]), 1)
        if policy.kv == "copy":
            total += self._looked_up(self._fill_table, leavers)
        return total + self._looked_up(self._head_table, self._asked(policy, decisions, rows, leavers))

    def _table(self, price: Callable[[Shape, Array, Array], Price], many: Array, most: int) -> Array:
        counts = np.arange(most + 1.0)
        return self.model.ideal_ns(price(self.model.shape, many[:, None], counts)) * (
            (counts > 0) & (many[:, None] > 0)
        )

    def _looked_up(self, table: Array, counts: Array) -> Array:
        """[k] summed over points."""
        places = np.arange(len(table))[:, None] * table.shape[1]
        return table.ravel().take(counts + places).sum(0)

    def _layers(self, tokens: Array, looked_at: Array, cached: Array) -> Array:
        """[p, k] of the layers before each point."""
        return self.model.ideal_ns(of_layers(self.model.shape, self._segments, tokens, looked_at, cached))

    def _passes(self, decisions: Decisions, step: Array) -> tuple[Array, Array]:
        """[p, k] each: rows whose newest token passes the layers before a point, and the positions that they see."""
        p = len(self.traced.points)
        key = decisions.places * np.int64(self.n + 1) + step
        packed = np.bincount(key, self._weights, p * (self.n + 1)).reshape(p, self.n + 1)[:, :-1]
        passing = packed[::-1].cumsum(0)[::-1]
        rows = (passing * (1 / _ONE)).astype(np.int64)
        return rows, passing - rows * _ONE

    def _with_debts(self, decisions: Decisions) -> tuple[Array, Array]:
        """As `_passes`, with the tokens that waited: one that passes takes all along that have not since the last one.

        A row's prefill has passed everything, so none goes back into the sample before.
        """
        p = len(self.traced.points)
        tokens, looked_at = np.zeros((p, self.n)), np.zeros((p, self.n))
        lives = np.ones(len(self.traced), np.bool_) if decisions.behind is None else ~decisions.behind
        for place in range(p):
            passing = np.flatnonzero(lives & (~self.decoded | (decisions.places >= place)))
            before, now = passing[:-1], passing[1:]
            own = self.decoded[now]  # the others came out of a prefill
            before, now = before[own], now[own]
            step = self.step[now]
            tokens[place] = np.bincount(step, now - before, self.n)
            looked_at[place] = np.bincount(step, self._reach[now] - self._reach[before], self.n)
        return tokens, looked_at

    def _asked(self, policy: PolicySpec, decisions: Decisions, rows: Array, leavers: Array) -> Array:
        """[p, k] states that each head is evaluated on: of the tokens chosen there, or of all that are asked."""
        if not isinstance(policy, _PREDICTING):
            return leavers
        asked = leavers.copy()
        places = usable_places(policy, self.traced)
        asked[places.start : places.stop] = rows[places.start : places.stop]
        if isinstance(policy, HeadPolicy) and policy.ask_above is not None:
            return self._asked_above(policy, decisions, asked, places)
        if decisions.forced is not None:
            unfree = np.bincount(self.step[decisions.forced], minlength=self.n + 1)[:-1]
            asked[places.start : places.stop] -= unfree
        return asked

    def _asked_above(self, policy: HeadPolicy, decisions: Decisions, asked: Array, places: range) -> Array:
        """The same where the controller is asked before the head."""
        free = self.decoded if decisions.forced is None else self.decoded & ~decisions.forced
        let = asked_at(policy, self.traced)
        for place in places:
            here = free & let[place] & (decisions.places >= place)
            asked[place] = np.bincount(self.step[here], minlength=self.n + 1)[:-1]
        return asked
