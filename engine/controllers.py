"""Controllers: from a state, without any head, the probabilities of continue, exit and stop.

`sec` is the paper's: one bias-free matrix for all exit points, on the raw state. `calibrated` has one an exit point, on
the state in units of its own size, and adds two biases: the exit point's, and one where the row's token before left
early. Biases are all that it knows beside the state, so that a replay can apply the second to recorded probabilities:
they are multiplied by exp(bias) and made to sum to 1 again.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import native, native_heads
from engine.exits import AFTER_EXIT
from engine.spec import ControllerKind

#: continue, exit, stop
CLASSES = 3
SEC = "controller"


class Controller:
    """Judges raw states [states, hidden] at the exit points of a bundle."""

    def __init__(self, kind: ControllerKind, points: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        self.kind = kind
        if kind == "sec":
            nothing = tensors[SEC].new_zeros(CLASSES)
            self.weights = dict.fromkeys(points, tensors[SEC])
            self.biases, self.after_exit = dict.fromkeys(points, nothing), nothing
        else:
            self.weights = {point: tensors[weight_name(point)] for point in points}
            self.biases = {point: tensors[bias_name(point)] for point in points}
            self.after_exit = tensors[AFTER_EXIT]

    @property
    def recalls(self) -> bool:
        """Whether it matters that the row's token before left early."""
        return self.kind == "calibrated"

    def __call__(self, point: int, states: Tensor, left: Sequence[bool] | Tensor | None = None) -> Tensor:
        """Probabilities of continue, exit and stop [states, 3].

        left: [states] whether the token before each left early; None: none did.
        """
        weight, bias = self.weights[point], self.biases[point]
        if native.fits(states):
            before = [False] * len(states) if left is None else left
            return native_heads.judge(states, weight, bias, self.recalls, before, self.after_exit)
        logits = F.linear(in_own_size(states) if self.recalls else states, weight, bias).float()
        if left is not None and self.recalls:
            logits += torch.as_tensor(left, device=states.device)[:, None] * self.after_exit.float()
        return logits.softmax(dim=-1)


def in_own_size(states: Tensor) -> Tensor:
    """States [..., hidden] over their root mean square: raw ones grow from layer to layer, and differ by token."""
    return F.rms_norm(states, states.shape[-1:], eps=1e-6)


def weight_name(point: int) -> str:
    """The tensor [3, hidden] of a calibrated controller at an exit point."""
    return f"controllers.{point}.weight"


def bias_name(point: int) -> str:
    """The tensor [3] of a calibrated controller at an exit point."""
    return f"controllers.{point}.bias"


def promised(kind: ControllerKind, points: Sequence[int], hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a controller's tensors."""
    if kind == "sec":
        return {SEC: (CLASSES, hidden)}
    shapes: dict[str, tuple[int, ...]] = {AFTER_EXIT: (CLASSES,)}
    for point in points:
        shapes |= {weight_name(point): (CLASSES, hidden), bias_name(point): (CLASSES,)}
    return shapes
