"""Decision rules: at an exit point, which rows go on, which leave, which give up.

A rule reads only what it needs: `View.states` are free, `View.prediction` costs a head the first time it is asked for.
Rows decide alone: nothing in a rule may mix rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import torch
from torch import Tensor

from engine.errors import BadInput
from engine.heads import Heads, Prediction
from engine.record import Decision
from engine.spec import Confidence, Controller, Fixed, Full, Patience, PolicySpec

#: What a rule answers for a row that goes on; the other answers are Decision.EXIT and Decision.STOP.
CONTINUE = int(Decision.FULL)
EXIT, STOP = int(Decision.EXIT), int(Decision.STOP)


class View:
    """What a rule may look at, at one exit point of one step."""

    def __init__(self, heads: Heads, point: int, rows: Tensor, states: Tensor) -> None:
        self.heads = heads
        self.point = point
        self.rows = rows  # [rows] places in the batch
        self.states = states  # [rows, hidden] raw state of each row's newest token

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

    decisions: Tensor  # [rows] CONTINUE, EXIT or STOP
    stop_confidences: Tensor | None = None  # [rows] the probability of giving up, where the rule has one


class Rule(ABC):
    """A policy at run time. One instance serves one batch."""

    def __init__(self, spec: PolicySpec, points: tuple[int, ...], n_layers: int) -> None:
        #: exit points at which the rule wants to be asked, rising; `n_layers` among them allows a stop at full depth
        self.points = tuple(point for point in points if point < n_layers)

    def begin(self, rows: int, device: torch.device) -> None:  # noqa: B027 - most rules remember nothing
        """A batch of so many rows starts."""

    @abstractmethod
    def decide(self, view: View) -> Verdict:
        """Answer for the rows in view."""


class FullDepth(Rule):
    """`full`."""

    def __init__(self, spec: Full, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, (), n_layers)

    def decide(self, view: View) -> Verdict:
        raise AssertionError("full depth has no exit points")


class FixedExit(Rule):
    """`fixed`."""

    def __init__(self, spec: Fixed, points: tuple[int, ...], n_layers: int) -> None:
        if spec.exit_layer not in points or spec.exit_layer >= n_layers:
            known = ", ".join(str(point) for point in points if point < n_layers) or "none"
            raise BadInput(
                f"policy fixed: exit_layer is {spec.exit_layer}, which is no exit point; trained ones: {known}."
            )
        super().__init__(spec, (spec.exit_layer,), n_layers)

    def decide(self, view: View) -> Verdict:
        return Verdict(torch.full_like(view.rows, EXIT))


class ConfidentExit(Rule):
    """`confidence`."""

    def __init__(self, spec: Confidence, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.threshold = spec.threshold

    def decide(self, view: View) -> Verdict:
        return Verdict((view.prediction.confidences > self.threshold).long() * EXIT)


class PatientExit(Rule):
    """`patience`: count how often in a row an exit point agrees with the one before it."""

    def __init__(self, spec: Patience, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        if spec.patience >= len(self.points):
            raise BadInput(
                f"policy patience: patience is {spec.patience}, but {len(self.points)} exit points can agree at most "
                f"{max(len(self.points) - 1, 0)} times; give less patience or more exit points."
            )
        self.patience = spec.patience

    def begin(self, rows: int, device: torch.device) -> None:
        self.last = torch.full((rows,), -1, device=device)
        self.agreed = torch.zeros(rows, dtype=torch.long, device=device)

    def decide(self, view: View) -> Verdict:
        rows, tokens = view.rows, view.prediction.tokens
        if view.point == self.points[0]:
            self.last[rows] = -1  # a new token: what the last one's exit points said does not count
        same = tokens == self.last[rows]
        self.agreed[rows] = torch.where(same, self.agreed[rows] + 1, 0)
        self.last[rows] = tokens
        return Verdict((self.agreed[rows] >= self.patience).long() * EXIT)


class ControlledExit(Rule):
    """`controller`, SEC's rule: act where a class is the most likely one and its probability exceeds its threshold.

    Where the bundle has an exit point after the last layer, the controller is asked there too and can only stop.
    """

    def __init__(self, spec: Controller, points: tuple[int, ...], n_layers: int) -> None:
        super().__init__(spec, points, n_layers)
        self.points = points
        self.n_layers = n_layers
        self.exit, self.stop = spec.exit, spec.stop

    def decide(self, view: View) -> Verdict:
        probabilities = view.heads.judge(view.states)  # [rows, 3]
        top, winner = probabilities.max(dim=-1)
        leaves = (winner == EXIT) & (top > self.exit) & (view.point < self.n_layers)
        stops = (winner == STOP) & (top > self.stop)
        return Verdict(leaves * EXIT + stops * STOP, probabilities[:, STOP])


def build_rule(spec: PolicySpec, points: tuple[int, ...], n_layers: int) -> Rule:
    """The rule of a policy for a model with these exit points. Raises `BadInput` where they do not fit."""
    module, name = spec.rule.split(":")
    rule: Rule = getattr(import_module(module), name)(spec, points, n_layers)
    return rule
