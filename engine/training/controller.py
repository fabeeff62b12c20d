"""Training of a controller on cached states, all exit points in one pass, in memory that does not grow with them.

`sec` (Sun et al., ICSE 2024): one bias-free `Linear(hidden, 3)` for all exit points, on the raw state; the loss of an
exit point is weighted by its index. `calibrated`: one an exit point, see `engine.controllers`; rare classes count more
while it learns, and then a scale and biases are fitted, without such weights, on a tenth of the windows that it did not
learn from (vector scaling, Guo et al. 2017), so that its probabilities are shares again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.controllers import CLASSES, SEC, bias_name, in_own_size, weight_name
from engine.exits import AFTER_EXIT
from engine.heads import Heads
from engine.training.checkpoint import Checkpoint, check_finite
from engine.training.labels import labels, left_before, predictions
from engine.training.spec import ControllerSpec
from engine.training.states import States

_BATCH, _CHECKPOINT_EVERY = 1024, 50
#: every so many-th window is kept apart to calibrate on
_CALIBRATED_ON = 10

Progress = Callable[..., None]


def train_controller(
    heads: Heads,
    states: States,
    windows: Sequence[int],
    spec: ControllerSpec,
    seed: int,
    work: Path,
    on_progress: Callable[[str], Progress],
) -> dict[str, Tensor]:
    """The controller's tensors as a bundle has them.

    windows: how many places each window has, in the order of `states`. work: where an interrupted call left its
    predictions and checkpoint, and where it goes on. on_progress: what shows a stage, by its name.
    """
    tokens, _ = predictions(heads, states, on_progress("predictions"), work)
    label = labels(tokens, states, spec.labels)
    trainer = ControllerTrainer(heads, states, windows, label, spec, seed, work / "controller.pt")
    trainer.train(on_progress("controller"))
    return trainer.tensors()


class ControllerTrainer:
    """Takes steps from a spec, or from a checkpoint where there is one."""

    def __init__(
        self,
        heads: Heads,
        states: States,
        windows: Sequence[int],
        label: Tensor,
        spec: ControllerSpec,
        seed: int,
        checkpoint: Path,
    ) -> None:
        self.states, self.label, self.spec, self.seed = states, label, spec, seed
        self.checkpoint = Checkpoint(checkpoint)
        self.points, self.device = heads.points, heads.stack.device
        # Full depth is the last of the states; where it is no exit point, nobody asks there.
        self.depths = len(self.points)
        self.left = left_before(label, windows)
        window = np.repeat(np.arange(len(windows)), windows)
        kept = (window % _CALIBRATED_ON == _CALIBRATED_ON - 1) & (spec.kind == "calibrated")
        self.learned, self.kept = np.flatnonzero(~kept), np.flatnonzero(kept)
        self.size = self._typical_size(heads.stack.hidden_size)
        self.class_weights = self._class_weights()
        self.parameters = {name: p.to(self.device).requires_grad_() for name, p in self._fresh(heads).items()}
        self.optimiser = torch.optim.Adam(list(self.parameters.values()), lr=spec.learning_rate)
        found = self.checkpoint.load(self.parameters, self.optimiser, self.device)
        self.step = 0 if found is None else found["step"]

    @property
    def steps(self) -> int:
        return self.spec.epochs * self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return -(-len(self.learned) // _BATCH)

    def train(self, on_progress: Callable[[int, int, float], None]) -> None:
        """Go on to the last step, and calibrate. Raises `NotFinite`, `BadInput`: full disk."""
        while self.step < self.steps:
            loss = self._train_step()
            self.step += 1
            if self.step % _CHECKPOINT_EVERY == 0 or self.step == self.steps:
                self.checkpoint.save(self.step, self.parameters, self.optimiser)
            on_progress(self.step, self.steps, loss)
        if self.spec.kind == "calibrated" and len(self.kept):
            self._calibrate()

    def tensors(self) -> dict[str, Tensor]:
        """As a bundle has them, float32."""
        weight = self.parameters["weight"].detach()
        if self.spec.kind == "sec":
            return {SEC: (weight / self.size).cpu().contiguous()}
        found = {AFTER_EXIT: self.parameters["after_exit"].detach().cpu().contiguous()}
        for depth, point in enumerate(self.points):
            found[weight_name(point)] = weight[depth].cpu().contiguous()
            found[bias_name(point)] = self.parameters["bias"].detach()[depth].cpu().contiguous()
        return found

    def _train_step(self) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.spec.learning_rate * (1 - self.step / self.steps)
        places = self._batch(self.step)
        logits = self._logits(places)  # [places, depths, 3]
        wanted = self.label[places, : self.depths].long().to(self.device)
        loss = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        if self.spec.kind == "sec":
            importance = torch.arange(1, self.depths + 1, device=self.device).float()
            loss = (loss * importance).sum() / (importance.sum() * len(places))
        else:
            weights = self.class_weights[torch.arange(self.depths, device=self.device), wanted]
            loss = (loss * weights).sum() / weights.sum()
        check_finite("controller", "loss", loss.item(), self.step, self.checkpoint.path.parent)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def _logits(self, places: np.ndarray) -> Tensor:
        hidden = torch.from_numpy(self.states.hidden[places][:, : self.depths]).float().to(self.device)
        if self.spec.kind == "sec":
            return F.linear(hidden / self.size, self.parameters["weight"])
        logits = torch.einsum("pdh,dch->pdc", in_own_size(hidden), self.parameters["weight"])
        left = self.left[torch.from_numpy(places)].float().to(self.device)
        return logits + self.parameters["bias"] + left[:, None, None] * self.parameters["after_exit"]

    def _batch(self, step: int) -> np.ndarray:
        """Places of a step: a function of seed and step, so that a resumed run sees what an unbroken one would."""
        epoch, at = divmod(step, self._per_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.learned)
        return np.sort(order[at * _BATCH : (at + 1) * _BATCH])

    def _calibrate(self) -> None:
        """Fit a scale and biases of each exit point, and the bias after an exit, to what was so."""
        with torch.no_grad():
            chunks = [self._logits(places) for places in np.array_split(self.kept, -(-len(self.kept) // _BATCH))]
        left = self.left[torch.from_numpy(self.kept)].float().to(self.device)[:, None, None]
        base = torch.cat(chunks) - self.parameters["bias"].detach() - left * self.parameters["after_exit"].detach()
        wanted = self.label[self.kept, : self.depths].long().to(self.device)
        scale = torch.ones(self.depths, 1, device=self.device, requires_grad=True)
        bias = self.parameters["bias"].detach().clone().requires_grad_()
        after = self.parameters["after_exit"].detach().clone().requires_grad_()
        optimiser = torch.optim.LBFGS([scale, bias, after], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy((base * scale + bias + left * after).flatten(0, 1), wanted.flatten())
            loss.backward()
            return loss

        optimiser.step(closure)
        with torch.no_grad():
            self.parameters["weight"] *= scale[:, :, None]
            self.parameters["bias"].copy_(bias)
            self.parameters["after_exit"].copy_(after)

    def _typical_size(self, hidden: int) -> Tensor:
        """Of each dimension of a raw state: SEC's learns in these units, folded in at the end: better steps."""
        if self.spec.kind != "sec":
            return torch.ones(hidden, device=self.device)
        every = max(1, len(self.states) // 4000)
        sample = torch.from_numpy(np.array(self.states.hidden[::every, : self.depths])).float()
        return sample.pow(2).mean(dim=(0, 1)).sqrt().clamp_min(1e-6).to(self.device)

    def _class_weights(self) -> Tensor:
        """[depths, 3]: one over the root of a class's share, so that a rare one is neither drowned nor everything."""
        learned = self.label[self.learned, : self.depths]
        shares = torch.stack([(learned == value).double().mean(dim=0) for value in range(CLASSES)], dim=1)
        return shares.clamp_min(1e-3).rsqrt().float().to(self.device)

    def _fresh(self, heads: Heads) -> dict[str, Tensor]:
        hidden = heads.stack.hidden_size
        if self.spec.kind == "sec":
            return {"weight": torch.zeros(CLASSES, hidden)}
        return {
            "weight": torch.zeros(self.depths, CLASSES, hidden),
            "bias": torch.zeros(self.depths, CLASSES),
            "after_exit": torch.zeros(CLASSES),
        }
