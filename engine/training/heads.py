"""Heads learn to say early what full depth says late (self-distillation): all exit points in one pass over states."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.heads import lens
from engine.stack import LayerStack
from engine.training.spec import TrainSpec
from engine.training.states import States

_CHECKPOINT_EVERY = 50  # steps: a few seconds of work are lost at most


class NotFinite(ArithmeticError):
    """The loss became NaN or infinite; the last checkpoint is kept."""


def choose_shortlist(states: States, size: int, vocab_size: int) -> Tensor:
    """Ids of the most frequent tokens, in the source and in what full depth writes, rising [size]."""
    counts = Counter(states.reference.tolist())
    counts.update(states.full.tolist())
    # Byte-pair vocabularies number frequent tokens low: what was never seen is filled up from there.
    order = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(order[:size]))


class HeadTrainer:
    """Trains `lens` or `untied` heads from a spec, step by step, from a checkpoint where there is one."""

    def __init__(
        self, stack: LayerStack, spec: TrainSpec, states: States, shortlist: Tensor | None, checkpoint: Path
    ) -> None:
        self.stack, self.spec, self.states, self.checkpoint = stack, spec, states, checkpoint
        self.points = [point for point in spec.exit_points if point < stack.n_layers]
        self.shortlist = shortlist
        self.unembedding = stack.unembedding if shortlist is None else stack.unembedding[shortlist]
        self.unembedding = self.unembedding.detach().clone()
        bias = stack.unembedder.bias
        self.bias = bias if bias is None or shortlist is None else bias[shortlist]
        #: place of each token of the vocabulary among a head's outputs; -1 where it has none
        self.places = torch.arange(stack.vocab_size)
        if shortlist is not None:
            self.places = torch.full((stack.vocab_size,), -1)
            self.places[shortlist] = torch.arange(len(shortlist))
        # States grow from layer to layer; a lens works in units of its point's typical size, folded in at the end.
        sample = torch.from_numpy(np.array(states.hidden[:: max(1, len(states) // 2000)])).float()
        self.sizes = sample.pow(2).mean(dim=(0, 2)).sqrt().to(stack.device)
        generator = torch.Generator().manual_seed(spec.seed)
        self.parameters = {name: p.requires_grad_() for name, p in self._fresh(generator).items()}
        self.optimiser = torch.optim.Adam(list(self.parameters.values()), lr=spec.learning_rate)
        self.step = 0
        if checkpoint.exists():
            self._load()

    @property
    def steps(self) -> int:
        return self.spec.epochs * math.ceil(len(self.states) / self.spec.batch_tokens)

    def train(self, on_progress: Callable[[int, int, float], None]) -> dict[str, Tensor]:
        """Go on to the last step; gives the tensors of the bundle. Raises `NotFinite`."""
        while self.step < self.steps:
            loss = self._train_step()
            if not math.isfinite(loss):
                raise NotFinite(
                    f"the loss is {loss} at step {self.step}; lower learning_rate and run the command again"
                )
            self.step += 1
            if self.step % _CHECKPOINT_EVERY == 0 or self.step == self.steps:
                self._save()
            on_progress(self.step, self.steps, loss)
        return self._folded()

    def _train_step(self) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.spec.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        places = self._batch(self.step)
        hidden = torch.from_numpy(self.states.hidden[places]).float().to(self.stack.device)
        target = self._target(hidden[:, -1], places)
        self.optimiser.zero_grad()
        total = 0.0
        for depth, point in enumerate(self.points):
            loss = F.cross_entropy(self._logits(point, depth, hidden[:, depth]), target)
            loss.backward()
            total += loss.item()
        self.optimiser.step()
        return total / len(self.points)

    def _batch(self, step: int) -> np.ndarray:
        """Places of a step: a function of seed and step, so that a resumed run sees what an unbroken one would."""
        size, per_epoch = self.spec.batch_tokens, math.ceil(len(self.states) / self.spec.batch_tokens)
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([self.spec.seed, epoch]).permutation(len(self.states))
        return np.sort(order[at * size : (at + 1) * size])

    @torch.no_grad()
    def _target(self, final: Tensor, places: np.ndarray) -> Tensor:
        if self.spec.target == "full":
            return F.linear(self.stack.norm(final), self.unembedding, self.bias).softmax(dim=-1)
        wanted = self.places[torch.from_numpy(self.states.reference[places]).long()]
        return torch.where(wanted < 0, -100, wanted).to(final.device)  # -100: left out of the loss

    def _logits(self, point: int, depth: int, states: Tensor) -> Tensor:
        if self.spec.head == "untied":
            return F.linear(states / self.sizes[depth], self.parameters[f"heads.{point}.weight"])
        size = self.sizes[depth]
        down, up = self.parameters[f"heads.{point}.down"] / size, self.parameters[f"heads.{point}.up"] * size
        return F.linear(self.stack.norm(lens(states, down, up)), self.unembedding, self.bias)

    def _fresh(self, generator: torch.Generator) -> dict[str, Tensor]:
        d, device = self.stack.hidden_size, self.stack.device
        if self.spec.head == "untied":
            return {f"heads.{point}.weight": self.unembedding.clone() for point in self.points}
        fresh = {}
        for point in self.points:
            fresh[f"heads.{point}.down"] = (torch.randn(self.spec.rank, d, generator=generator) / d**0.5).to(device)
            fresh[f"heads.{point}.up"] = torch.zeros(d, self.spec.rank, device=device)
        return fresh

    @torch.no_grad()
    def _folded(self) -> dict[str, Tensor]:
        sizes = dict(zip(self.points, self.sizes, strict=False))
        folded = {}
        for name, parameter in self.parameters.items():
            size = sizes[int(name.split(".")[1])]
            folded[name] = (parameter * size if name.endswith(".up") else parameter / size).detach().cpu().contiguous()
        return folded

    def _save(self) -> None:
        part = self.checkpoint.with_suffix(".part")
        content = {"step": self.step, "parameters": self.parameters, "optimiser": self.optimiser.state_dict()}
        torch.save(content, part)
        part.replace(self.checkpoint)

    def _load(self) -> None:
        content = torch.load(self.checkpoint, weights_only=True, map_location=self.stack.device)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(content["parameters"][name])
        self.optimiser.load_state_dict(content["optimiser"])
        self.step = content["step"]
