"""The loop that every training here goes through: steps, looks at held-out code, checkpoints, a log, an end."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.training.checkpoint import Checkpoint, Log, check_finite
from engine.training.spec import Pace


@dataclass
class Losses:
    """Means over the states of one step, or of one look at held-out code."""

    full: float | None = None  #: next token at the last layer, nats; None where no step changes it
    exits: dict[int, float] = field(default_factory=dict)  #: against the target, by exit point
    agrees: dict[int, float] = field(default_factory=dict)  #: share of states whose exit says what the last layer says
    right: float | None = None  #: share of states whose last layer says what the source says

    def joint(self, exit_weight: float = 1.0) -> float:
        """One figure: what is made as low as can be."""
        return (self.full or 0.0) + exit_weight * sum(self.exits.values())

    @classmethod
    def mean(cls, several: Sequence["Losses"]) -> "Losses":
        first = several[0]
        return cls(
            full=None if first.full is None else _mean(one.full or 0.0 for one in several),
            exits={point: _mean(one.exits[point] for one in several) for point in first.exits},
            agrees={point: _mean(one.agrees[point] for one in several) for point in first.agrees},
            right=None if first.right is None else _mean(one.right or 0.0 for one in several),
        )

    def figures(self) -> dict[str, Any]:
        """What the log says of them."""
        named = {"loss": self.full, "right": self.right, "exits": self.exits, "agrees": self.agrees}
        return {name: value for name, value in named.items() if value is not None and value != {}}


Report = Callable[[int, int, Losses], None]  #: tokens seen, tokens to see, the step's losses


class Trainer(ABC):
    """Steps with Adam from wherever the last checkpoint in `work` stands; the best parameters by held-out code win.

    A subclass makes its steps functions of the seed and of `step`, so that a resumed training takes the same ones.
    """

    def __init__(
        self,
        stage: str,
        parameters: Mapping[str, Tensor],
        rates: Sequence[tuple[float, Iterable[Tensor]]],
        pace: Pace,
        steps: int,
        tokens_per_step: int,
        work: Path,
        log: Log,
    ) -> None:
        """rates: the highest learning rate, and the parameters that have it."""
        self.stage, self.parameters, self.pace = stage, parameters, pace
        self.steps, self.tokens_per_step, self.log = steps, tokens_per_step, log
        groups = [{"params": list(group), "highest": rate} for rate, group in rates]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.checkpoint, self.best_kept = Checkpoint(work / f"{stage}.pt"), Checkpoint(work / f"{stage}-best.pt")
        self.step, self.best, self.since_best = 0, math.inf, 0
        device = next(iter(parameters.values())).device
        found = self.checkpoint.load(parameters, self.optimiser, device)
        if found is not None:
            self.step, self.best, self.since_best = found["step"], found["best"], found["since_best"]
        log.forget(stage, -1 if found is None else self.step)

    @abstractmethod
    def losses_of_step(self) -> Losses:
        """Go through what step `step` learns from, and leave gradients in the parameters."""

    @abstractmethod
    def held_out(self) -> Losses:
        """The same on held-out code, without gradients."""

    @abstractmethod
    def score(self, losses: Losses) -> float:
        """By which held-out losses are compared; lower is better."""

    def run(self, on_progress: Report) -> None:
        """Go on to the last step, or until held-out code gains no more. Raises `NotFinite`, `BadInput`: full disk."""
        if self.step == 0:
            self._look()
        saved = time.monotonic()
        while self.step < self.steps and self.since_best < self.pace.patience:
            losses = self.take_step()
            if self.step % self.pace.evaluate_every == 0 or self.step == self.steps:
                self._look()
            if time.monotonic() - saved >= self.pace.save_every or self.step == self.steps:
                self._save()
                saved = time.monotonic()
            on_progress(self.step * self.tokens_per_step, self.steps * self.tokens_per_step, losses)
        self.best_kept.load(self.parameters, self.optimiser, next(iter(self.parameters.values())).device)

    def take_step(self) -> Losses:
        """One step, with its line in the log. Raises `NotFinite`."""
        started = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = group["highest"] * self._share_of_rate()
        self.optimiser.zero_grad()
        losses = self.losses_of_step()
        self._check("loss", losses.joint())
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.pace.clip)
        self._check("gradient", norm.item())  # before it is in the parameters, and in a checkpoint
        self.optimiser.step()
        self.step += 1
        rate = round(self.tokens_per_step / (time.monotonic() - started), 1)
        self.log.write(self.stage, self.step, **losses.figures(), tokens_per_s=rate)
        return losses

    def _check(self, what: str, value: float) -> None:
        check_finite(self.stage, what, value, self.step, self.checkpoint.path.parent)

    def _share_of_rate(self) -> float:
        """Up in a line, down along a cosine."""
        if self.step < self.pace.warm_up:
            return (self.step + 1) / self.pace.warm_up
        gone = (self.step - self.pace.warm_up) / max(1, self.steps - self.pace.warm_up)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, gone)))

    @torch.no_grad()
    def _look(self) -> None:
        """Measure on held-out code; keep the parameters where they are the best so far."""
        losses = self.held_out()
        self.log.write(self.stage, self.step, **losses.figures(), held_out=True)
        self.since_best += 1
        if self.score(losses) < self.best:
            self.best, self.since_best = self.score(losses), 0
            self.best_kept.save(self.step, self.parameters, self.optimiser)

    def _save(self) -> None:
        self.checkpoint.save(self.step, self.parameters, self.optimiser, best=self.best, since_best=self.since_best)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
