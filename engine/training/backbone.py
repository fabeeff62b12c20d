"""A model that can be tuned for its exits: gradients through the Hugging Face layers to low-rank deltas only.

A step multiplies by W + B A, made once: forward costs what the model costs, and backward never makes the gradient of a
whole matrix, only those of A and B. That is a third less arithmetic than training W.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.deltas import PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Backbone:
    """The layers of a model with deltas on all their matrices.

    model: weights in float32; its matrices are replaced, so nobody else may use it. deltas: `deltas.<module>.a/b` to
    start from; without them the model starts as it is. Afterwards the parameters are in `deltas`.
    """

    def __init__(
        self, model: "PreTrainedModel", rank: int, generator: torch.Generator, deltas: Mapping[str, Tensor] | None
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.body: nn.Module = model.base_model
        self.n_layers = model.config.num_hidden_layers
        self.device = next(model.parameters()).device
        self.deltas: dict[str, nn.Parameter] = {}
        for name, module in list(projections(model)):
            tuned = TunedProjection(module, rank, generator).to(self.device)
            self.deltas |= {f"{PREFIX}{name}.a": tuned.a, f"{PREFIX}{name}.b": tuned.b}
            model.set_submodule(name, tuned)
        if deltas is not None:
            self.load(deltas)
        self._passed: dict[int, Tensor] = {}
        self._dropped: Set[int] = frozenset()
        for layer, module in enumerate(layers_of(model)[1], start=1):
            module.forward = self._watched(layer, module.forward)

    @torch.no_grad()
    def load(self, deltas: Mapping[str, Tensor]) -> None:
        """Take deltas; those of a lower rank fill the first rows, so that the model is the same."""
        for name, parameter in self.deltas.items():
            given = deltas[name].to(parameter)
            rank = given.shape[0 if name.endswith(".a") else 1]
            if name.endswith(".a"):
                parameter[:rank] = given
            else:
                parameter[:, :rank] = given

    def states(self, ids: Tensor, points: tuple[int, ...], dropped: Set[int] = frozenset()) -> list[Tensor]:
        """Raw states [windows, tokens, hidden] after each of the layers `points`; ids: [windows, tokens]."""
        self._dropped, self._passed = dropped, {}
        self.body(input_ids=ids, use_cache=False)
        return [self._passed[point] for point in points]

    def norm(self, states: Tensor) -> Tensor:
        """The norm in front of the unembedding."""
        return self._final_norm(states)

    @property
    def _final_norm(self) -> nn.Module:
        return next(getattr(self.body, name) for name in ("norm", "ln_f") if hasattr(self.body, name))

    def _watched(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if layer in self._dropped:
                self._passed[layer] = states
                return states
            out = forward(states, *args, **kwargs)
            self._passed[layer] = out[0] if isinstance(out, tuple) else out
            return out

        return run


def layers_of(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """The decoder's layers, and their path in the model."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return next((name, module) for name, module in lists if len(module) == model.config.num_hidden_layers)


def projections(model: "PreTrainedModel") -> Iterator[tuple[str, nn.Module]]:
    """Every matrix of every layer, with its path: `nn.Linear`, and the `Conv1D` of GPT-2, which keeps its transpose."""
    path, layers = layers_of(model)
    for name, module in layers.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            yield f"{path}.{name}", module


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is [inputs, outputs]."""
    return type(module).__name__ == "Conv1D"


class TunedProjection(nn.Module):
    """A frozen matrix with a low-rank delta: x (W + B A)ᵀ + bias. As long as B is zero the model is as it was."""

    def __init__(self, projection: Any, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = projection.weight.data
        self.weight = weight.t().contiguous() if is_transposed(projection) else weight
        self.bias = None if projection.bias is None else projection.bias.data
        outputs, inputs = self.weight.shape
        bound = 1 / math.sqrt(inputs)
        self.a = nn.Parameter(torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        made = _LowRank.apply(flat, self.weight, self.a, self.b).view(*x.shape[:-1], -1)
        return made if self.bias is None else made + self.bias


class _LowRank(torch.autograd.Function):
    """x [tokens, inputs] times (W + B A)ᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        merged = torch.addmm(weight, b, a)
        ctx.save_for_backward(x, merged, a, b)
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor]:
        x, merged, a, b = ctx.saved_tensors
        [out] = grads
        to_x = out @ merged if ctx.needs_input_grad[0] else None
        return to_x, None, (out @ b).t() @ x, out.t() @ (x @ a.t())
