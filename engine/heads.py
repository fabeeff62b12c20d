"""Exits at run time: a head per exit point that predicts a token, and a controller that judges a state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from engine import controllers, native, native_heads, preview
from engine.controllers import Controller
from engine.deltas import PREFIX, check_deltas
from engine.errors import BadInput
from engine.exits import MANIFEST, TENSORS, ExitsManifest, read_manifest
from engine.matrices import Matrix
from engine.preview import Foreseen, Preview
from engine.spec import ControllerKind, HeadKind
from engine.stack import LayerStack


@dataclass(frozen=True)
class Choice:
    """The token chosen for each of several states."""

    tokens: Tensor  # [states] ids in the model's vocabulary
    confidences: Tensor  # [states] the head's probability of its choice

    def of(self, places: list[int]) -> "Choice":
        """The same for some of the states."""
        return Choice(self.tokens[places], self.confidences[places])


@dataclass(frozen=True)
class Prediction(Choice):
    """A head's choice with all that it hangs on."""

    logits: Tensor  # [states, vocabulary or shortlist] float32

    @cached_property
    def margins(self) -> Tensor:
        """How far the second best probability is behind, [states]."""
        best = self.logits.topk(2, dim=-1).values
        return self.confidences * (1 - torch.exp(best[:, 1] - best[:, 0]))

    @cached_property
    def entropies(self) -> Tensor:
        """Entropy of the head's distribution in nats, [states]."""
        logs = self.logits.log_softmax(dim=-1)
        return -(logs.exp() * logs).sum(dim=-1)


def choose(logits: Tensor, shortlist: Tensor | None = None) -> Prediction:
    """The most likely token of each row of logits [states, vocabulary or shortlist], with its softmax probability."""
    logits = logits.float()
    if len(logits) <= native_heads.FEW and native.fits(logits):
        place, confidences = native_heads.most_likely(logits)
    else:
        top, place = logits.max(dim=-1)
        confidences = torch.exp(top - logits.logsumexp(dim=-1))
    return Prediction(place if shortlist is None else shortlist[place], confidences, logits)


class Heads:
    """The heads of all exit points, on top of one model.

    `tied`: the model's final norm and unembedding on the state as it is. `lens`: the same after a low-rank residual,
    x + (x Dᵀ) Uᵀ. `untied`: one matrix on the un-normalised state, as SEC. A shortlist keeps the rows of the most
    frequent tokens only.
    """

    def __init__(
        self,
        stack: LayerStack,
        kind: HeadKind,
        points: tuple[int, ...],
        tensors: dict[str, Tensor],
        controller: ControllerKind | None = None,
    ) -> None:
        """tensors: as a bundle has them, without deltas."""
        self.stack, self.kind, self.points = stack, kind, points
        tensors = {name: tensor.to(stack.unembedding) for name, tensor in tensors.items() if name != "shortlist"} | {
            name: tensor.to(stack.device, torch.long) for name, tensor in tensors.items() if name == "shortlist"
        }
        self.shortlist = tensors.get("shortlist")
        self.controller = None if controller is None else Controller(controller, points, tensors)
        bias = stack.unembedder.bias
        self.preview = Preview(stack.unembedding, bias, tensors) if preview.UP in tensors else None
        self.unembedder = stack.unembedder
        if self.shortlist is not None and kind != "untied":  # those have matrices of their own
            self.unembedder = _shortened(stack, self.shortlist)
        self.untied = {
            point: Matrix(tensors[f"heads.{point}.weight"])
            for point in points
            if kind == "untied" and point < stack.n_layers
        }
        self.tensors = {name: tensor for name, tensor in tensors.items() if name.endswith((".down", ".up"))}

    @classmethod
    def load(cls, stack: LayerStack, folder: Path) -> "Heads":
        """Read a bundle. Raises `BadInput` where its tensors are not those that its manifest promises."""
        manifest, tensors = read_manifest(folder), load_file(folder / TENSORS)
        check_tensors(folder, manifest, tensors)
        check_deltas(manifest, tensors)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        return cls(stack, manifest.head, manifest.exit_points, own, manifest.controller)

    @property
    def outputs(self) -> int:
        """Tokens that a head before full depth chooses among."""
        return self.unembedder.shape[0] if self.shortlist is None else len(self.shortlist)

    def all_matrices(self) -> list[Matrix]:
        """The matrices that come on top of the model's own."""
        shortlisted = [] if self.unembedder is self.stack.unembedder else [self.unembedder]
        return shortlisted + list(self.untied.values())

    def parameters(self, point: int) -> int:
        """Parameters that a state multiplies with in the head at `point`."""
        if point == self.stack.n_layers:
            return self.stack.unembedding.numel()
        lens = (
            sum(self.tensors[f"heads.{point}.{part}"].numel() for part in ("down", "up")) if self.kind == "lens" else 0
        )
        return lens + self.outputs * self.stack.hidden_size

    def logits(self, point: int, states: Tensor) -> Tensor:
        """Raw states [states, hidden] at an exit point before full depth to logits [states, outputs]."""
        if self.kind == "untied":
            return self.untied[point](states)
        if self.kind == "lens":
            states = lens(states, self.tensors[f"heads.{point}.down"], self.tensors[f"heads.{point}.up"])
        return self.unembedder(self.stack.norm(states))

    def predict(self, point: int, states: Tensor) -> Prediction:
        """What the head at `point` would write. At full depth it is always the model's own unembedding."""
        if point == self.stack.n_layers:
            return full_depth(self.stack, states)
        return choose(self.logits(point, states), self.shortlist)

    def foresee(self, states: Tensor, count: int) -> Foreseen:
        """What full depth would most likely write of states [states, hidden] behind the last layer."""
        assert self.preview is not None
        return self.preview(self.stack.norm(states), count)

    def judge(self, point: int, states: Tensor, left: Sequence[bool] | Tensor | None = None) -> Tensor:
        """The controller's probabilities [states, 3] of continue, exit and stop, from raw states [states, hidden].

        left: [states] whether the token before each left early; None: none did.
        """
        assert self.controller is not None
        return self.controller(point, states, left)


def _shortened(stack: LayerStack, shortlist: Tensor) -> Matrix:
    """The unembedding for the tokens of a shortlist."""
    bias = stack.unembedder.bias
    return Matrix(stack.unembedding[shortlist], None if bias is None else bias[shortlist])


def check_tensors(folder: Path, manifest: ExitsManifest, tensors: dict[str, Tensor]) -> None:
    """Whether a bundle's tensors are those that its manifest promises. Raises `BadInput`."""
    for name, shape in _promised(manifest).items():
        if name not in tensors or tensors[name].shape != shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise BadInput(
                f"exits {folder}: tensor {name!r} is {found}, but {MANIFEST} promises {list(shape)}; "
                "train the bundle again."
            )


def _promised(manifest: ExitsManifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a manifest says there are."""
    shapes: dict[str, tuple[int, ...]] = {}
    hidden, outputs = manifest.hidden_size, manifest.shortlist or manifest.vocab_size
    for point in (point for point in manifest.exit_points if point < manifest.n_layers):
        if manifest.head == "lens":
            rank = manifest.rank or 0
            shapes |= {f"heads.{point}.down": (rank, hidden), f"heads.{point}.up": (hidden, rank)}
        elif manifest.head == "untied":
            shapes[f"heads.{point}.weight"] = (outputs, hidden)
    if manifest.shortlist:
        shapes["shortlist"] = (manifest.shortlist,)
    if manifest.preview:
        shapes |= {preview.DOWN: (manifest.preview, hidden), preview.UP: (hidden, manifest.preview)}
    if manifest.controller:
        shapes |= controllers.promised(manifest.controller, manifest.exit_points, hidden)
    return shapes


def lens(states: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Low-rank residual: states [n, hidden], down [rank, hidden], up [hidden, rank]."""
    if len(states) <= native_heads.FEW and native.fits(states):
        return native_heads.lens(states, down, up)
    return states + F.linear(F.linear(states, down), up)


def full_depth(stack: LayerStack, states: Tensor) -> Prediction:
    """The model's own choice, over its whole vocabulary."""
    return choose(stack.unembed(stack.norm(states)))
