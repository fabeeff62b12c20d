"""What a training goes on from after any end, and the log of its losses beside it."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine.errors import BadInput


class NotFinite(ArithmeticError):
    """The loss or its gradient became NaN or infinite; the last checkpoint is kept."""


def check_finite(stage: str, what: str, value: float, step: int, folder: Path) -> None:
    """Whether a step's loss or gradient is a number. folder: of the checkpoints. Raises `NotFinite`."""
    if not math.isfinite(value):
        raise NotFinite(
            f"{stage}: the {what} is {value} at step {step}; the last good checkpoint is kept in {folder}; lower the "
            "learning rate and train into another folder"
        )


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """A place for a file's new content, moved to `path` when it is whole. Raises `BadInput` where the disk is full."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise BadInput(
            f"out: {path} cannot be written ({getattr(error, 'strerror', None) or error}); make room and run the "
            "command again, it goes on from the last checkpoint."
        ) from None


class Checkpoint:
    """Parameters and optimiser of one stage in one file, which is whole at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, step: int, parameters: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, **more: Any) -> None:
        """Replace the file; a machine that dies meanwhile has the old one. Raises `BadInput` where the disk is full."""
        content = {"step": step, "parameters": dict(parameters), "optimiser": optimiser.state_dict(), **more}
        with making(self.path) as part, part.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                # torch still ends the file that had no room, and what it says of that hides the reason
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
            file.flush()
            os.fsync(file.fileno())

    def load(
        self, parameters: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, device: torch.device
    ) -> dict[str, Any] | None:
        """Fill parameters and optimiser; gives what else was saved, or None where there is no checkpoint."""
        if not self.path.exists():
            return None
        content: dict[str, Any] = torch.load(self.path, weights_only=True, map_location=device)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(content["parameters"][name])
        optimiser.load_state_dict(content["optimiser"])
        return {name: value for name, value in content.items() if name not in ("parameters", "optimiser")}


class Log:
    """One JSON object a line, one line a step, in the order of the steps however often training was interrupted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def forget(self, stage: str, step: int) -> None:
        """Drop what was logged after a checkpoint: those steps are taken again. step: -1 where there is none."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that a dying process was writing
                continue
            if entry["stage"] != stage or entry["step"] <= step:
                kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, stage: str, step: int, **figures: Any) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, "step": step, **figures}) + "\n")
        except OSError as error:
            raise BadInput(
                f"out: the log {self.path} cannot be written ({error.strerror}); make room and run the command again, "
                "it goes on from the last checkpoint."
            ) from None


def trainable(parameters: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The same tensors as leaves that gather gradients."""
    return {name: nn.Parameter(tensor.detach().clone()) for name, tensor in parameters.items()}
