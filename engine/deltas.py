"""Deltas: what tuning for exits adds to a model's own weights, kept in the bundle beside the heads.

Of a module `m`, such as `model.layers.7.mlp.down_proj`, with weights [outputs, inputs]:

- `deltas.m.a` [rank, inputs] and `deltas.m.b` [outputs, rank]: b @ a is added to the weights (Hu et al. 2021, its scale
  folded in);
- `deltas.m.full`, of the weights' own shape, is added as it is; `deltas.m.bias` to the bias.

They are merged when the model is loaded, in float32, so that a tuned model costs nothing more to run.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import BadInput
from engine.exits import TENSORS, ExitsManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "deltas."
_PARTS = ("a", "b", "full", "bias")


def read_deltas(folder: Path) -> dict[str, Tensor]:
    """The deltas among a bundle's tensors, by name."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(PREFIX)}  # noqa: SIM118


def tuned_weights_hash(weights_hash: str, tensors: Mapping[str, Tensor]) -> str | None:
    """What tells the tuned model from others: sha256 over the model's own hash and all deltas; None without any.

    Not over the merged weights: products differ in their last bit from processor to processor.
    """
    deltas = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not deltas:
        return None
    total = hashlib.sha256(weights_hash.encode())
    for name, tensor in sorted(deltas.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def check_deltas(manifest: ExitsManifest, tensors: Mapping[str, Tensor]) -> None:
    """Whether these are the deltas that `exits.json` tells of. Raises `BadInput`."""
    found = tuned_weights_hash(manifest.weights_hash, tensors)
    if found != manifest.tuned_weights_hash:
        has, says = ((hash[:12] + "…" if hash else "none") for hash in (found, manifest.tuned_weights_hash))
        raise BadInput(
            f"exits: tuned_weights_hash in exits.json is {says}, but the deltas beside it make {has}; "
            "get the bundle again."
        )


@torch.no_grad()
def merge_deltas(model: "PreTrainedModel", deltas: Mapping[str, Tensor]) -> None:
    """Add deltas to the model's weights. Raises `BadInput` where one belongs to no module, or not to its shape."""
    for module, parts in _by_module(deltas).items():
        for name in ("weight", "bias"):
            delta = _bias(parts) if name == "bias" else _weight(module, parts, _is_transposed(model, module))
            if delta is not None:
                _add(model, f"{module}.{name}", delta)


def _add(model: "PreTrainedModel", name: str, delta: Tensor) -> None:
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        raise BadInput(f"exits: deltas for {name!r}, which the model has not; use the bundle's own model.") from None
    if parameter.shape != delta.shape:
        raise BadInput(
            f"exits: deltas for {name!r} are {list(delta.shape)}, but the model has {list(parameter.shape)} there; "
            "use the bundle's own model."
        )
    # A new tensor: what is written into weights that are mapped from a file is lost when their pages are given back.
    parameter.data = (parameter.float() + delta.to(parameter.device)).to(parameter.dtype)


def _by_module(deltas: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(deltas.items()):
        module, _, part = name.removeprefix(PREFIX).rpartition(".")
        if part not in _PARTS or not module:
            raise BadInput(f"exits: tensor {name!r} is no delta; known are {PREFIX}<module>.{' .'.join(_PARTS)}.")
        modules.setdefault(module, {})[part] = tensor
    return modules


def _weight(module: str, parts: dict[str, Tensor], transposed: bool) -> Tensor | None:
    delta = parts["full"].float() if "full" in parts else None
    if "a" in parts or "b" in parts:
        if not ("a" in parts and "b" in parts) or parts["a"].shape[0] != parts["b"].shape[1]:
            raise BadInput(
                f"exits: deltas of {module!r} must have a [rank, inputs] and b [outputs, rank]; get the bundle again."
            )
        low_rank = parts["b"].float() @ parts["a"].float()
        low_rank = low_rank.T if transposed else low_rank
        delta = low_rank if delta is None else delta + low_rank
    return delta


def _bias(parts: dict[str, Tensor]) -> Tensor | None:
    return parts["bias"].float() if "bias" in parts else None


def _is_transposed(model: "PreTrainedModel", module: str) -> bool:
    """GPT-2 keeps the weights of its products as [inputs, outputs]."""
    from transformers.pytorch_utils import Conv1D

    try:
        return isinstance(model.get_submodule(module), Conv1D)
    except AttributeError:
        return False  # refused in a sentence where it is looked up
