"""What the decode of a policy's decisions would cost at best, by the model of `engine.cost`, in the trace's batches.

Steps are synchronous: while reading weights dominates, depth is saved only where all rows of a batch have left.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.cost import Machine, Price, Shape, of_fill, of_head, of_layers
from engine.replay.decide import Decisions, usable_places
from engine.replay.traced import Array, Traced
from engine.spec import Confidence, Entropy, Margin, Patience, PolicySpec

#: rules that look at a head's prediction wherever they are asked
_PREDICTING = (Confidence, Margin, Entropy, Patience)


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


class Steps:
    """The decode steps of a piece of a trace, batch by batch; step 0 is prefill's and is none of them."""

    def __init__(self, traced: Traced, model: CostModel) -> None:
        self.traced, self.model = traced, model
        batch = traced.batches[traced.sample]
        longest = int(traced.lengths.max())
        #: [n] the step of a batch that each token is written by, numbered through; [k] which batch each is of
        steps, self.step = np.unique(batch * longest + traced.steps, return_inverse=True)
        self.batch = steps // longest
        self.decoded = traced.steps > 0
        self._segments = np.diff(traced.layers, prepend=0).astype(float)

    def cost(self, policy: PolicySpec, decisions: Decisions) -> Array:
        """[k] nanoseconds at best of each step."""
        counts, context = self._passes(decisions)
        if policy.kv == "recompute":
            tokens, looked_at = self._with_debts(decisions)
        else:
            tokens, looked_at = counts, context
        price = of_layers(self.model.shape, self._segments[:, None], tokens, looked_at, context)
        total = (self.model.ideal_ns(price) * (counts > 0)).sum(0)
        leavers = self._leavers(decisions)
        if policy.kv == "copy":
            total += self._fills(leavers[:-1])
        return total + self._heads(self._asked(policy, decisions, counts, leavers))

    @cached_property
    def n(self) -> int:
        return len(self.batch)

    def _of_places(self, places: Array, which: Array, weights: Array | None = None) -> Array:
        """[p, k] how many tokens, or how much of them, each step has at each place."""
        key = places[which].astype(np.int64) * self.n + self.step[which]
        p = len(self.traced.points)
        return np.bincount(key, None if weights is None else weights[which], p * self.n).reshape(p, self.n)

    def _alive(self, decisions: Decisions) -> Array:
        return self.decoded if decisions.behind is None else self.decoded & ~decisions.behind

    def _passes(self, decisions: Decisions) -> tuple[Array, Array]:
        """[p, k] each: rows whose newest token passes the layers before a point, and the positions that they see."""
        alive = self._alive(decisions)
        counts = self._of_places(decisions.places, alive)
        context = self._of_places(decisions.places, alive, self.traced.reach)
        return counts[::-1].cumsum(0)[::-1], context[::-1].cumsum(0)[::-1]

    def _with_debts(self, decisions: Decisions) -> tuple[Array, Array]:
        """As `_passes`, with the tokens that waited: one that passes takes all along that have not since the last one.

        A row's prefill has passed everything, so none goes back into the sample before.
        """
        p = len(self.traced.points)
        tokens, looked_at = np.zeros((p, self.n)), np.zeros((p, self.n))
        reach = np.cumsum(self.traced.reach)
        lives = np.ones(len(self.traced), np.bool_) if decisions.behind is None else ~decisions.behind
        for place in range(p):
            passing = np.flatnonzero(lives & (~self.decoded | (decisions.places >= place)))
            before, now = passing[:-1], passing[1:]
            own = self.decoded[now]  # the others came out of a prefill
            before, now = before[own], now[own]
            step = self.step[now]
            tokens[place] = np.bincount(step, now - before, self.n)
            looked_at[place] = np.bincount(step, reach[now] - reach[before], self.n)
        return tokens, looked_at

    def _leavers(self, decisions: Decisions) -> Array:
        """[p, k] rows whose token was chosen at each place."""
        alive = self._alive(decisions)
        return self._of_places(decisions.places, alive if decisions.stops is None else alive & ~decisions.stops)

    def _fills(self, leavers: Array) -> Array:
        """[k]: keys and values of the layers that were skipped, copied."""
        skipped = (self.traced.n_layers - self.traced.layers[:-1])[:, None]
        return (self.model.ideal_ns(of_fill(self.model.shape, skipped, leavers)) * (leavers > 0)).sum(0)

    def _asked(self, policy: PolicySpec, decisions: Decisions, counts: Array, leavers: Array) -> Array:
        """[p, k] states that each head is evaluated on: of the tokens chosen there, or of all that are asked."""
        if not isinstance(policy, _PREDICTING):
            return leavers
        asked = leavers.copy()
        unfree = np.bincount(self.step[self.decoded & decisions.forced], minlength=self.n)
        for place in usable_places(policy, self.traced):
            asked[place] = counts[place] - unfree
        return asked

    def _heads(self, asked: Array) -> Array:
        price = of_head(self.model.shape, np.array(self.model.heads, float)[:, None], asked)
        return (self.model.ideal_ns(price) * (asked > 0)).sum(0)
