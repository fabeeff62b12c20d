"""Decision rules: at an exit point, which rows go on, which leave, which give up.

A rule reads only what it needs: `View.states` are free, `View.prediction` costs a head the first time it is asked for.
Rows decide alone: nothing in a rule may mix rows, and what a rule remembers of a row must not depend on tokens that
verification may undo.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import BadInput
from engine.heads import Heads, Prediction
from engine.points import check_patience, check_points, usable_points
from engine.record import Decision
from engine.spec import (
    Confidence,
    Controller,
    Entropy,
    Fixed,
    HeadPolicy,
    Margin,
    Patience,
    PolicySpec,
    Position,
    Random,
    SelfSpeculative,
    StateSimilarity,
    Static,
)

#: What a rule answers for a row that goes on; the other answers are Decision.EXIT and Decision.STOP.
CONTINUE = int(Decision.FULL)
EXIT, STOP = int(Decision.EXIT), int(Decision.STOP)


@dataclass(frozen=True)
class Batch:
    """The rows that a rule is about to decide for."""

    keys: Sequence[int]  #: [rows] a number for each prompt, the same wherever that prompt is decoded
    max_new_tokens: int
    device: torch.device

    @property
    def rows(self) -> int:
        return len(self.keys)


class View:
    """What a rule may look at, at one exit point of one step."""

    def __init__(
        self,
        heads: Heads,
        point: int,
        rows: Sequence[int],
        states: Tensor,
        steps: Sequence[int],
        previous: Tensor | None = None,
        left: Sequence[bool] | None = None,
    ) -> None:
        self.heads = heads
        self.point = point
        self.rows = rows  # [rows] places in the batch
        self.states = states  # [rows, hidden] raw state of each row's newest token
        self.steps = steps  # [rows] which token of its completion each row is about to write; 0 came out of prefill
        self.previous = previous  # [rows, hidden] the state one layer earlier, for rules that look back
        self.left = left  # [rows] whether each row's token before left early, for rules that recall it

    @cached_property
    def prediction(self) -> Prediction:
        """What the head at this exit point would write; computed once."""
        return self.heads.predict(self.point, self.states)

    @property
    def predicted(self) -> bool:
        """Whether the head has been run."""
        return "prediction" in self.__dict__


@dataclass(frozen=True)
class Verdict:
    """A rule's answer for each row it was asked about."""

    decisions: Tensor | Sequence[int]  # [rows] CONTINUE, EXIT or STOP
    stop_confidences: Tensor | None = None  # [rows] the probability of giving up, where the rule has one


class Rule(ABC):
    """A policy at run time. One instance serves one batch."""

    #: whether the rule ever says STOP: then it is asked about rows that may not leave, too
    stops = False
    #: whether the rule reads `View.previous`
    looks_back = False
    #: whether the rule reads `View.left`
    recalls = False
    #: the rule is asked only where the controller gives leaving more than this; None: everywhere
    ask_above: float | None = None
    #: layers, counted from 0, that no generated token runs
    removed: frozenset[int] = frozenset()

    def __init__(self, spec: PolicySpec, points: tuple[int, ...], n_layers: int) -> None:
        """points: the exit points of the bundle, rising. Raises `BadInput` where they do not fit the spec."""
        #: exit points at which the rule wants to be asked, rising; `n_layers` among them allows a stop at full depth
        self.points = usable_points(spec, points, n_layers)

    def begin(self, batch: Batch) -> None:  # noqa: B027 - most rules remember nothing
        """A batch starts."""

    def may_leave(self, row: int, waiting: int) -> bool:
        """Whether the row, of which so many tokens wait already, may leave at all in this step."""
        return True

    @abstractmethod
    def decide(self, view: View) -> Verdict:
        """Answer for the rows in view."""

    def verified(self, row: int, drafted: int, kept: int) -> None:  # noqa: B027 - most rules do not draft
        """Full depth looked at so many drafts of the row in a piece and agreed with the first `kept` of them."""


class FullDepth(Rule):
    """`full`."""

    def __init__(self, spec: PolicySpec, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, (), n_layers)

    def decide(self, view: View) -> Verdict:
        raise AssertionError("full depth has no exit points")


class Pruned(FullDepth):
    """`static`."""

    def __init__(self, spec: Static, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        for layer in spec.layers:
            if not 1 <= layer <= n_layers:
                raise BadInput(
                    f"policy static: layers has {layer}, which the model has not; give layers from 1 to {n_layers}."
                )
        self.removed = frozenset(layer - 1 for layer in spec.layers)
        if len(self.removed) == n_layers:
            raise BadInput("policy static: layers names every layer of the model; leave one in.")


class FixedExit(Rule):
    """`fixed`."""

    def __init__(self, spec: Fixed | SelfSpeculative, points: tuple[int, ...], n_layers: int) -> None:
        check_points(spec, "exit_layer", [spec.exit_layer], points, n_layers)
        super().__init__(spec, (spec.exit_layer,), n_layers)

    def decide(self, view: View) -> Verdict:
        return Verdict([EXIT] * len(view.rows))


class ByHead(Rule):
    """Rules that go by what the head predicts, where it is worth asking."""

    def __init__(self, spec: HeadPolicy, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.ask_above = None if spec.ask_above is None else float(np.float32(spec.ask_above))


class ConfidentExit(ByHead):
    """`confidence`."""

    def __init__(self, spec: Confidence, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.threshold, self.decay = spec.threshold, spec.decay

    def begin(self, batch: Batch) -> None:
        self.max_new_tokens = batch.max_new_tokens

    def decide(self, view: View) -> Verdict:
        threshold: float | Tensor = self.threshold
        if self.decay is not None:
            threshold = view.states.new_tensor([self._decayed(step) for step in view.steps], dtype=torch.float32)
        return Verdict((view.prediction.confidences > threshold).long() * EXIT)

    def _decayed(self, step: int) -> float:
        """CALM, equation 5: strict at first, where an error spoils more of what follows."""
        assert self.decay is not None
        return min(1.0, 0.9 * self.threshold + 0.1 * math.exp(-self.decay * step / self.max_new_tokens))


class MarginExit(ByHead):
    """`margin`."""

    def __init__(self, spec: Margin, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.threshold = spec.threshold

    def decide(self, view: View) -> Verdict:
        return Verdict((view.prediction.margins > self.threshold).long() * EXIT)


class EntropyExit(ByHead):
    """`entropy`."""

    def __init__(self, spec: Entropy, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.threshold = spec.threshold

    def decide(self, view: View) -> Verdict:
        return Verdict((view.prediction.entropies < self.threshold).long() * EXIT)


class PatientExit(Rule):
    """`patience`: count how often in a row an exit point agrees with the one before it."""

    def __init__(self, spec: Patience, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        check_patience(spec, self.points)
        self.patience = spec.patience

    def begin(self, batch: Batch) -> None:
        self.last = torch.full((batch.rows,), -1, device=batch.device)
        self.agreed = torch.zeros(batch.rows, dtype=torch.long, device=batch.device)

    def decide(self, view: View) -> Verdict:
        rows, tokens = view.rows, view.prediction.tokens
        if view.point == self.points[0]:
            self.last[rows] = -1  # a new token: what the last one's exit points said does not count
        same = tokens == self.last[rows]
        self.agreed[rows] = torch.where(same, self.agreed[rows] + 1, 0)
        self.last[rows] = tokens
        return Verdict((self.agreed[rows] >= self.patience).long() * EXIT)


class SimilarExit(Rule):
    """`state-similarity`."""

    looks_back = True

    def __init__(self, spec: StateSimilarity, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.threshold = spec.threshold

    def decide(self, view: View) -> Verdict:
        assert view.previous is not None
        similarity = F.cosine_similarity(view.states.float(), view.previous.float(), dim=-1)
        return Verdict((similarity > self.threshold).long() * EXIT)


class PositionExit(Rule):
    """`position`."""

    def __init__(self, spec: Position, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.spec = spec

    def decide(self, view: View) -> Verdict:
        return Verdict([EXIT if view.point >= self._depth(step) else CONTINUE for step in view.steps])

    def _depth(self, step: int) -> float:
        spec = self.spec
        return spec.deepest - (spec.deepest - spec.shallowest) * min(1.0, step / spec.over)


class RandomExit(Rule):
    """`random`: where a token leaves is drawn from its prompt and its place, so neighbours do not matter."""

    def __init__(self, spec: Random, points: tuple[int, ...], n_layers: int) -> None:
        check_points(spec, "exit_layers", spec.exit_layers, points, n_layers)
        super().__init__(spec, points, n_layers)
        self.shares = sorted(zip(spec.exit_layers, spec.shares, strict=True))
        self.points = tuple(point for point in self.points if point in spec.exit_layers)
        self.seed = spec.seed

    def begin(self, batch: Batch) -> None:
        self.keys = batch.keys

    def decide(self, view: View) -> Verdict:
        layers = [self._layer(row, step) for row, step in zip(view.rows, view.steps, strict=True)]
        return Verdict([EXIT if layer == view.point else CONTINUE for layer in layers])

    def _layer(self, row: int, step: int) -> int | None:
        """The exit layer of a token; None: all layers."""
        drawn = random.Random(f"{self.seed} {self.keys[row]} {step}").random()
        for layer, share in self.shares:
            drawn -= share
            if drawn < 0:
                return layer
        return None


class Drafting(FixedExit):
    """`self-speculative`: leave at one exit point while the head is sure and the drafts of late were kept.

    A row whose drafts were all kept may draft one more next time; otherwise one more than were kept.
    """

    #: where a row begins, before anything is known of it
    FIRST = 4

    def __init__(self, spec: SelfSpeculative, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.threshold, self.max_debt = spec.threshold, spec.max_debt

    def begin(self, batch: Batch) -> None:
        self.lengths = [min(self.FIRST, self.max_debt)] * batch.rows

    def may_leave(self, row: int, waiting: int) -> bool:
        return waiting < self.lengths[row]

    def decide(self, view: View) -> Verdict:
        return Verdict((view.prediction.confidences >= self.threshold).long() * EXIT)

    def verified(self, row: int, drafted: int, kept: int) -> None:
        # A draft that ended early because the head was unsure says nothing about longer ones.
        longest = max(self.lengths[row], kept + 1) if kept == drafted < self.lengths[row] else kept + 1
        self.lengths[row] = min(longest, self.max_debt)


class ControlledExit(Rule):
    """`controller`, SEC's rule: act where a class is the most likely one and its probability exceeds its threshold.

    Where the bundle has an exit point after the last layer, the controller is asked there too and can only stop.
    """

    stops = True
    recalls = True

    def __init__(self, spec: Controller, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.points += tuple(point for point in points if point == n_layers)
        self.n_layers = n_layers
        self.exit, self.stop = (float(np.float32(threshold)) for threshold in (spec.exit, spec.stop))

    def decide(self, view: View) -> Verdict:
        probabilities = view.heads.judge(view.point, view.states, view.left)  # [rows, 3]
        return Verdict([self._decided(view.point, row) for row in probabilities.tolist()], probabilities[:, STOP])

    def _decided(self, point: int, row: list[float]) -> int:
        """From the probabilities of one row. Three numbers: a tensor's operators would take longer than a head."""
        top = max(row)
        winner = row.index(top)
        if winner == EXIT and top > self.exit and point < self.n_layers:
            return EXIT
        return STOP if winner == STOP and top > self.stop else CONTINUE


def build_rule(spec: PolicySpec, points: tuple[int, ...], n_layers: int) -> Rule:
    """The rule of a policy for a model with these exit points. Raises `BadInput` where they do not fit."""
    module, name = spec.rule.split(":")
    rule: Rule = getattr(import_module(module), name)(spec, points, n_layers)
    return rule
