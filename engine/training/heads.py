"""Heads learn to say early what full depth says late (self-distillation): all exit points in one pass over states."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.heads import lens
from engine.stack import LayerStack
from engine.training.checkpoint import Log, trainable
from engine.training.spec import TrainSpec
from engine.training.states import States
from engine.training.targets import places_of, targets
from engine.training.trainer import Losses, Report, Trainer

_FORGET_EVERY = 50  #: steps after which pages of cached states are given back
_SURE = 4  #: of each state's most likely tokens so many are always compared
_HELD = 4096  #: held-out states that one look takes


@dataclass(frozen=True)
class Candidates:
    """The outputs that one step compares, and for how many each of them stands.

    What a batch's targets are likely to be is there for certain. Of the rest a few are drawn, each standing for its
    share of them: sums over candidates estimate sums over all outputs, without bias.
    """

    outputs: Tensor  # [candidates] places among a head's outputs, rising
    logs: Tensor  # [candidates] log of how many outputs each stands for
    place: Tensor  # [outputs] place of each output among the candidates, -1 where it is none


class HeadTrainer(Trainer):
    """Trains `lens` or `untied` heads from a spec, step by step, from a checkpoint where there is one.

    start: tensors of a bundle to begin with; heads that it has not begin as the model's own.
    """

    def __init__(
        self,
        stack: LayerStack,
        spec: TrainSpec,
        states: States,
        held: States,
        shortlist: Tensor | None,
        start: Mapping[str, Tensor],
        work: Path,
        log: Log,
    ) -> None:
        self.stack, self.spec, self.states, self.held = stack, spec, states, held
        self.points = [point for point in spec.exit_points if point < stack.n_layers]
        rows = slice(None) if shortlist is None else shortlist.to(stack.device)
        self.unembedding = stack.unembedding[rows].detach().clone()
        bias = stack.unembedder.bias
        self.bias = None if bias is None else bias[rows].detach().clone()
        self.places = places_of(shortlist, stack.vocab_size)
        # States grow from layer to layer; a lens works in units of its point's typical size, folded in at the end.
        sample = torch.from_numpy(np.array(states.hidden[:: max(1, len(states) // 2000)])).float()
        self.sizes = dict(zip(self.points, sample.pow(2).mean(dim=(0, 2)).sqrt().to(stack.device), strict=False))
        parameters = trainable(self._begin(start))
        rates = [(spec.learning_rate, parameters.values())]
        self._per_epoch = math.ceil(len(states) / spec.batch_tokens)
        super().__init__("heads", parameters, rates, spec, spec.epochs * self._per_epoch, spec.batch_tokens, work, log)

    def train(self, on_progress: Report) -> dict[str, Tensor]:
        """Go on to the end; gives tensors of a bundle. Raises `NotFinite`."""
        self.run(on_progress)
        return self._folded()

    def losses_of_step(self) -> Losses:
        if self.step % _FORGET_EVERY == 0:
            self.states.forget()
        draw = np.random.default_rng([self.spec.seed, 4, self.step])
        return self._losses(self.states, self._batch(self.step), draw)

    def held_out(self) -> Losses:
        places = np.arange(0, len(self.held), max(1, len(self.held) // _HELD))
        parts = np.array_split(places, math.ceil(len(places) / self.spec.batch_tokens))
        return Losses.mean(
            [self._losses(self.held, part, np.random.default_rng([5, i])) for i, part in enumerate(parts)]
        )

    def score(self, losses: Losses) -> float:
        return losses.joint()

    def _losses(self, states: States, places: np.ndarray, draw: np.random.Generator) -> Losses:
        """Of some places; with gradients switched on they are propagated."""
        top = self._outputs(states.top[places])
        shares = torch.from_numpy(states.top_shares[places]).to(self.stack.device, torch.float32)
        reference, choice = self._outputs(states.reference[places]), self._outputs(states.full[places])
        chosen = self._candidates(torch.cat([top[:, :_SURE].flatten(), reference]), draw)
        target = self._target(top, shares, choice, reference, chosen)
        hidden = torch.from_numpy(states.hidden[places]).to(self.stack.device, torch.float32)
        losses = Losses()
        for depth, point in enumerate(self.points):
            logits = self._logits(point, hidden[:, depth], chosen.outputs)
            # All of the target's mass is 1, whatever part of it the candidates have.
            loss = (torch.logsumexp(logits + chosen.logs, dim=-1) - (target * logits).sum(dim=-1)).mean()
            if loss.requires_grad:
                loss.backward()
            losses.exits[point] = loss.item()
        return losses

    def _outputs(self, tokens: np.ndarray) -> Tensor:
        """Places of tokens among a head's outputs; -1 where they have none."""
        return self.places[torch.from_numpy(tokens).long()].to(self.stack.device)

    def _candidates(self, certain: Tensor, draw: np.random.Generator) -> Candidates:
        n_outputs = len(self.unembedding)
        sure = np.unique(certain[certain >= 0].cpu().numpy())
        n_drawn = max(self.spec.candidates - len(sure), self.spec.candidates // 4)
        if len(sure) + n_drawn >= n_outputs:
            outputs, logs = np.arange(n_outputs), np.zeros(n_outputs)
        else:
            others = np.setdiff1d(np.arange(n_outputs), sure, assume_unique=True)
            drawn = draw.choice(others, n_drawn, replace=False, shuffle=False)
            outputs = np.concatenate([sure, drawn])
            logs = np.concatenate([np.zeros(len(sure)), np.full(n_drawn, math.log(len(others) / n_drawn))])
        place = torch.full((n_outputs,), -1)
        place[outputs] = torch.arange(len(outputs))
        device = self.stack.device
        return Candidates(
            torch.from_numpy(outputs).to(device), torch.from_numpy(logs).float().to(device), place.to(device)
        )

    def _target(self, top: Tensor, shares: Tensor, choice: Tensor, reference: Tensor, chosen: Candidates) -> Tensor:
        """What heads are to say, [states, candidates], each weighted by how many outputs it stands for."""
        n_outputs = len(self.unembedding)
        place = torch.where(top >= 0, chosen.place[top.clamp_min(0)], -1)
        full = shares.new_zeros(len(top), len(chosen.outputs))
        full.scatter_add_(1, place.clamp_min(0), torch.where(place >= 0, shares, 0))
        known = torch.where(top >= 0, shares, 0).sum(dim=1, keepdim=True)

        def at(outputs: Tensor) -> Tensor:
            return torch.where(outputs >= 0, chosen.place[outputs.clamp_min(0)], -1)

        wanted = targets(self.spec.target, self.spec.mix, full, known, at(choice), at(reference), n_outputs)
        return wanted * chosen.logs.exp()

    def _logits(self, point: int, states: Tensor, outputs: Tensor) -> Tensor:
        size = self.sizes[point]
        if self.spec.head == "untied":
            return F.linear(states / size, self.parameters[f"heads.{point}.weight"][outputs])
        down, up = self.parameters[f"heads.{point}.down"] / size, self.parameters[f"heads.{point}.up"] * size
        bias = None if self.bias is None else self.bias[outputs]
        return F.linear(self.stack.norm(lens(states, down, up)), self.unembedding[outputs], bias)

    def _batch(self, step: int) -> np.ndarray:
        """Places of a step: a function of seed and step, so that a resumed run sees what an unbroken one would."""
        size = self.spec.batch_tokens
        epoch, at = divmod(step, self._per_epoch)
        order = np.random.default_rng([self.spec.seed, epoch]).permutation(len(self.states))
        return np.sort(order[at * size : (at + 1) * size])

    # --- around the steps ---------------------------------------------------------------------------------------

    def _begin(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What heads begin as: those of `start`, or the model's own."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        d, device = self.stack.hidden_size, self.stack.device
        begun: dict[str, Tensor] = {}
        for point in self.points:
            size = self.sizes[point]
            if self.spec.head == "untied":
                weight = start.get(f"heads.{point}.weight")
                begun[f"heads.{point}.weight"] = self.unembedding.clone() if weight is None else weight.float() * size
                continue
            down, up = torch.randn(self.spec.rank, d, generator=generator) / d**0.5, torch.zeros(d, self.spec.rank)
            if f"heads.{point}.down" in start:
                down = start[f"heads.{point}.down"].float() * size.cpu()
                up = start[f"heads.{point}.up"].float() / size.cpu()
            begun |= {f"heads.{point}.down": down.to(device), f"heads.{point}.up": up.to(device)}
        return begun

    @torch.no_grad()
    def _folded(self) -> dict[str, Tensor]:
        """As a bundle has them: in the model's units, in 16 bits."""
        folded = {}
        for name, parameter in self.parameters.items():
            size = self.sizes[int(name.split(".")[1])]
            tensor = parameter * size if name.endswith(".up") else parameter / size
            folded[name] = tensor.half().cpu().contiguous()
        return folded
