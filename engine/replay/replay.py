"""Many policies over a whole trace, a piece of it at a time: sums in, figures out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import BadInput
from engine.replay.decide import Decisions, Oracle, check_replayable, decide
from engine.replay.figures import SUMS, Figure, figures, pareto_front
from engine.replay.ideal import CostModel, Steps
from engine.replay.traced import Array, Traced
from engine.spec import Full, PolicySpec

#: of sums by policy and group; more policies than fit are done in several goes over the trace
_SUM_BYTES = 256 * 2**20

_OWN = 8  #: sums of a policy's own: the first of `SUMS`


@dataclass(frozen=True)
class Replayed:
    """What a trace says of r policies."""

    policies: list[PolicySpec]
    figures: dict[str, Figure]  #: see `engine.replay.figures.FIGURES`; `speedup_ideal` is absent without a cost model
    tokens: int  #: of the trace
    samples: int
    groups: int  #: that have samples in what was replayed
    #: [r] on the Pareto front of ideal speed (without a cost model: of depth) and tokens right; the oracle is not
    front: Array
    stopped: Array  #: [r] samples that were given up


def replay(
    pieces: Callable[[], Iterable[Traced]],
    policies: Sequence[PolicySpec],
    *,
    groups: int,
    model: CostModel | None,
    of_groups: Array | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Replayed:
    """Apply policies to a trace.

    pieces: the trace from its start, each time it is called; whole batches. groups: how many source groups there are.
    of_groups: numbers of those that figures and stops are of; of all when absent.
    on_progress: tokens done and, once they are known, of how many (0 before), over all policies. Raises `BadInput`.
    """
    chosen = [*policies]
    at_once = max(1, _SUM_BYTES // (8 * len(SUMS) * max(groups, 1)))
    parts: list[dict[str, Figure]] = []
    stopped: list[Array] = []
    tokens = samples = done = present = 0
    for first in range(0, len(chosen), at_once):
        some = chosen[first : first + at_once]
        sums = np.zeros((len(some), groups, len(SUMS)))
        tokens = samples = 0
        for piece in pieces():
            if first == tokens == 0:
                for policy in chosen:
                    check_replayable(policy, piece.exit_points, piece.n_layers, piece.has_controller)
            _add(sums, some, piece, model)
            tokens, samples, done = tokens + len(piece), samples + len(piece.lengths), done + len(piece) * len(some)
            on_progress(done, 0 if first == 0 else tokens * len(chosen))
        sums = sums if of_groups is None else sums[:, of_groups]
        parts.append(figures(sums))
        present = int((sums[0, :, SUMS.index("samples")] > 0).sum())
        stopped.append(sums[:, :, SUMS.index("stops")].sum(1))
    joined = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    if model is None:
        del joined["speedup_ideal"]
    speed = -joined["mean_exit_layer"].values if model is None else joined["speedup_ideal"].values
    able = np.array([not isinstance(policy, Oracle) for policy in chosen])  # the oracle beats whoever can be run
    front = pareto_front(np.where(able, speed, np.nan), joined["tokens_right"].values)
    return Replayed(chosen, joined, tokens, samples, present, front, np.concatenate(stopped))


def _joined(parts: list[Figure]) -> Figure:
    return Figure(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "lows", "highs")))


def _add(sums: Array, policies: Sequence[PolicySpec], traced: Traced, model: CostModel | None) -> None:
    """Add a piece of the trace to sums [policies, groups, len(SUMS)]."""
    present, group = np.unique(traced.groups, return_inverse=True)
    tally = Tally(traced, group, len(present), model)
    shared = tally.shared()
    for place, policy in enumerate(policies):
        sums[place, present, :_OWN] += tally.of(policy, decide(policy, traced))
        sums[place, present, _OWN:] += shared


class Tally:
    """Sums by source group over one piece of a trace."""

    def __init__(self, traced: Traced, group: Array, n_groups: int, model: CostModel | None) -> None:
        """group: [s] of each sample, numbered from 0 within the piece."""
        self.traced, self.group, self.n_groups = traced, group, n_groups
        self.steps = None if model is None else Steps(traced, model)
        if int(traced.lengths.max()) >= 2**14:
            raise BadInput(f"a target has {int(traced.lengths.max()):,} tokens; replay takes fewer than {2**14:,}.")
        #: [p, n] a token's written, right, agree and layers in one number: a sample has fewer than 2^14 tokens
        self._marks = (
            1
            + (traced.right.astype(np.int64) << 14)
            + (traced.agrees.astype(np.int64) << 28)
            + (traced.layers[:, None] << 42)
        ).ravel()
        self._here = np.arange(len(traced))
        batches, firsts, of_sample = np.unique(traced.batches, return_index=True, return_inverse=True)
        group_of_batch = group[firsts]
        #: [s] and [k]: a batch belongs to the source group of its first sample, as in reports
        self._batch_group = group_of_batch[of_sample]
        if self.steps is not None:
            self._step_group = group_of_batch[np.searchsorted(batches, self.steps.batch)]

    def of(self, policy: PolicySpec, decisions: Decisions) -> Array:
        """[groups, 8] what is the policy's own."""
        traced = self.traced
        marks = self._marks.take(decisions.places * np.int64(len(traced)) + self._here)
        written = decisions.written
        if written is not None:
            marks = marks * written
        marks = np.add.reduceat(marks, traced.starts)
        low = 2**14 - 1
        columns: list[Array] = [marks & low, (marks >> 14) & low, (marks >> 28) & low, marks >> 42]
        if decisions.stops is None:
            columns += [np.zeros(len(marks))] * 2
        else:
            stops = np.add.reduceat(decisions.stops, traced.starts, dtype=np.int64)
            columns += [stops, stops * traced.wrong_samples]
        found = np.stack([self._by_group(column) for column in columns], axis=1)
        return np.concatenate([found, self._ideal(policy, decisions, marks & low)], axis=1)

    def shared(self) -> Array:
        """[groups, 4] what is the same for all policies."""
        counts = np.stack([self._by_group(np.ones(len(self.group))), self._by_group(self.traced.wrong_samples)], axis=1)
        full = Full()
        return np.concatenate([counts, self._ideal(full, decide(full, self.traced), self.traced.lengths)], axis=1)

    def _ideal(self, policy: PolicySpec, decisions: Decisions, written: Array) -> Array:
        """[groups, 2] ideal nanoseconds of the decode, and tokens that it writes: all but the first of each sample."""
        if self.steps is None:
            return np.zeros((self.n_groups, 2))
        cost = np.bincount(self._step_group, self.steps.cost(policy, decisions), self.n_groups)
        decoded = np.bincount(self._batch_group, np.maximum(written - 1, 0), self.n_groups)
        return np.stack([cost, decoded], axis=1)

    def _by_group(self, values: Array) -> Array:
        return np.bincount(self.group, values, self.n_groups)
