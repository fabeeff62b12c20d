"""Tuning for exits: the backbone moves, by low-rank deltas, towards states that say early what they say in the end.

One loss for all: next-token cross-entropy of the last layer over the whole vocabulary, so that full depth does not pay,
and at the exit points the distance to the last layer's own distribution (self-distillation) through their lenses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.heads import lens
from engine.training.backbone import Backbone
from engine.training.checkpoint import Log, trainable
from engine.training.corpus import Window
from engine.training.spec import TrainSpec
from engine.training.states import SKIPPED
from engine.training.targets import places_of, targets
from engine.training.trainer import Losses, Report, Trainer

_HELD = 16  #: held-out windows that one look takes
_ROWS = 256  #: states whose logits over the whole vocabulary are in memory at once


@dataclass(frozen=True)
class Truth:
    """What the last layer says of some states, [states, ...]."""

    loss: float  #: mean cross-entropy of the next token
    towards: Tensor  #: gradient of that mean with respect to the normed states, [states, hidden]
    target: Tensor  #: what an exit is to say, [states, shortlist]
    choice: Tensor  #: the token, [states]
    right: float


class Tuner(Trainer):
    """Takes steps from a spec, or from a checkpoint where there is one."""

    def __init__(
        self,
        backbone: Backbone,
        spec: TrainSpec,
        shortlist: Tensor,
        lenses: Mapping[str, Tensor] | None,
        learned: list[Window],
        held: list[Window],
        work: Path,
        log: Log,
    ) -> None:
        assert spec.tuning is not None
        self.backbone, self.spec, self.tuning = backbone, spec, spec.tuning
        self.points = tuple(point for point in spec.exit_points if point < backbone.n_layers)
        self.shortlist = shortlist.to(backbone.device)
        self.unembedding = backbone.model.get_output_embeddings().weight.detach()  # [vocabulary, hidden]
        self.bias = getattr(backbone.model.get_output_embeddings(), "bias", None)
        self.short_unembedding = self.unembedding[self.shortlist]
        self.places = places_of(self.shortlist.cpu(), len(self.unembedding)).to(backbone.device)
        self.learned, self.held = learned, held
        self.sizes = self._measure_sizes()
        self.lenses = trainable(self._lenses(lenses))
        rates = [
            (spec.tuning.learning_rate, backbone.deltas.values()),
            (spec.tuning.heads_rate, self.lenses.values()),
        ]
        tokens = spec.tuning.windows * spec.context
        parameters = {**backbone.deltas, **self.lenses}
        super().__init__("tuning", parameters, rates, spec.tuning, spec.tuning.steps, tokens, work, log)

    def train(self, on_progress: Report) -> dict[str, Tensor]:
        """Go on to the end; gives deltas and lenses. Raises `NotFinite`."""
        self.run(on_progress)
        return self.tensors()

    def tensors(self) -> dict[str, Tensor]:
        """Deltas and lenses as a bundle has them."""
        folded = {name: parameter.detach().half() for name, parameter in self.backbone.deltas.items()}
        for name, parameter in self.lenses.items():
            size = self.sizes[int(name.split(".")[1])]
            folded[name] = parameter.detach() * size if name.endswith(".up") else parameter.detach() / size
        return {name: tensor.cpu().contiguous() for name, tensor in folded.items()}

    # --- a step -----------------------------------------------------------------------------------------------

    def losses_of_step(self) -> Losses:
        points = self._points_of_step()
        return self._losses(self._windows(self.step), points, self._dropped(), self._weights(points))

    def held_out(self) -> Losses:
        weights = dict.fromkeys(self.points, 1.0)
        return Losses.mean(
            [
                self._losses(torch.tensor([window.token_ids], device=self.backbone.device), self.points, set(), weights)
                for window in self.held[:_HELD]
            ]
        )

    def score(self, losses: Losses) -> float:
        return losses.joint(self.tuning.exit_weight)

    def _losses(self, ids: Tensor, points: tuple[int, ...], dropped: set[int], weights: dict[int, float]) -> Losses:
        """Forward; with gradients switched on, backward too.

        The losses' own graphs end at the states, one after the other: no two of them are in memory at once.
        """
        learning = torch.is_grad_enabled()
        passed = self.backbone.states(ids, (*points, self.backbone.n_layers), dropped)
        leaves = [states.detach().requires_grad_(learning) for states in passed]
        following = ids[:, SKIPPED + 1 :].flatten()
        normed = self.backbone.norm(_kept(leaves[-1]))
        truth = self._truth(normed.detach(), following)
        if learning:
            normed.backward(truth.towards)
        losses = Losses(full=truth.loss, right=truth.right)
        for point, leaf in zip(points, leaves, strict=False):
            logits = self._exit_logits(point, _kept(leaf))
            loss = F.cross_entropy(logits, truth.target)
            if learning:
                (loss * weights[point]).backward()
            losses.exits[point] = loss.item()
            said = self.shortlist[logits.detach().argmax(dim=-1)]
            losses.agrees[point] = (said == truth.choice).double().mean().item()
        if learning:
            torch.autograd.backward(passed, [leaf.grad for leaf in leaves])
        return losses

    @torch.no_grad()
    def _truth(self, normed: Tensor, following: Tensor) -> Truth:
        """The last layer's loss and gradient, exact over the whole vocabulary, made without a graph."""
        losses, towards, full, choices = [], [], [], []
        for rows, wanted in zip(normed.split(_ROWS), following.split(_ROWS), strict=True):
            logs = F.linear(rows, self.unembedding, self.bias).log_softmax(dim=-1)
            losses.append(-logs.gather(1, wanted[:, None])[:, 0])
            choices.append(logs.argmax(dim=-1))
            probabilities = logs.exp_()
            full.append(probabilities[:, self.shortlist])
            towards.append((probabilities @ self.unembedding - self.unembedding[wanted]) / len(normed))
        choice = torch.cat(choices)
        shares = torch.cat(full)
        target = targets(
            self.spec.target,
            self.spec.mix,
            shares,
            shares.sum(dim=1, keepdim=True),
            self.places[choice],
            self.places[following],
            len(self.shortlist),
        )
        right = (choice == following).double().mean().item()
        return Truth(torch.cat(losses).mean().item(), torch.cat(towards), target, choice, right)

    def _exit_logits(self, point: int, states: Tensor) -> Tensor:
        size = self.sizes[point]
        down, up = self.lenses[f"heads.{point}.down"] / size, self.lenses[f"heads.{point}.up"] * size
        bias = None if self.bias is None else self.bias[self.shortlist]
        return F.linear(self.backbone.norm(lens(states, down, up)), self.short_unembedding, bias)

    # --- what a step is made of: functions of seed and step, so that a resumed run takes the same ---------------

    def _windows(self, step: int) -> Tensor:
        size = self.tuning.windows
        per_epoch = max(1, len(self.learned) // size)
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([self.spec.seed, 2, epoch]).permutation(len(self.learned))
        chosen = order[at * size : (at + 1) * size]
        return torch.tensor([self.learned[place].token_ids for place in chosen], device=self.backbone.device)

    def _points_of_step(self) -> tuple[int, ...]:
        if self.tuning.exits == "together":
            return self.points
        return (self.points[self.step % len(self.points)],)

    def _weights(self, points: tuple[int, ...]) -> dict[int, float]:
        """Weights of the exit points' losses. Over a whole turn, rotation weighs as much as all together."""
        shares = {point: point if self.tuning.weighted == "by-depth" else 1 for point in self.points}
        mean = sum(shares.values()) / len(shares)
        turns = len(self.points) / len(points)
        return {point: self.tuning.exit_weight * turns * shares[point] / mean for point in points}

    def _dropped(self) -> set[int]:
        """Layers that this step leaves out, never the last: the probability is `layer_dropout` there and falls to 0."""
        if self.tuning.layer_dropout == 0:
            return set()
        n_layers = self.backbone.n_layers
        draw = np.random.default_rng([self.spec.seed, 3, self.step]).random(n_layers)
        return {
            layer
            for layer in range(1, n_layers)
            if draw[layer - 1] < self.tuning.layer_dropout * (2 ** ((layer - 1) / (n_layers - 1)) - 1)
        }

    @torch.no_grad()
    def _measure_sizes(self) -> dict[int, float]:
        """Typical size of a state at each exit point: a lens works in these units, as states grow with depth."""
        states = self.backbone.states(self._windows(0), self.points)
        return {
            point: _kept(found).pow(2).mean().sqrt().item() for point, found in zip(self.points, states, strict=True)
        }

    def _lenses(self, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.spec.seed)
        hidden = self.unembedding.shape[1]
        lenses: dict[str, Tensor] = {}
        for point in self.points:
            down = torch.randn(self.spec.rank, hidden, generator=generator) / hidden**0.5
            up = torch.zeros(hidden, self.spec.rank)
            if start is not None and f"heads.{point}.down" in start:
                down = start[f"heads.{point}.down"].float() * self.sizes[point]
                up = start[f"heads.{point}.up"].float() / self.sizes[point]
            lenses |= {f"heads.{point}.down": down, f"heads.{point}.up": up}
        return {name: tensor.to(self.backbone.device) for name, tensor in lenses.items()}


def _kept(states: Tensor) -> Tensor:
    """Places that are learned from, [places, hidden]: see `engine.training.states`."""
    return states[:, SKIPPED:-1].flatten(0, 1)
