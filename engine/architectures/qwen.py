"""The Qwen families: Qwen2 (also Qwen2.5-Coder) and Qwen3, dense."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from engine.architectures.llama import LlamaStack
from engine.architectures.rotary import Table
from engine.errors import BadInput

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM


class Qwen2Stack(LlamaStack):
    """Llama's layers, of which some may look back over a window only."""

    runs_together = True

    def __init__(self, model: "Qwen2ForCausalLM") -> None:
        super().__init__(model)
        self.windows = [_window(model.config, kind) for kind in model.config.layer_types]

    def window(self, layer: int) -> int | None:
        return self.windows[layer]


class Qwen3Stack(Qwen2Stack):
    """Qwen2's layers, in which queries and keys have norms of their own."""

    runs_together = True

    def __init__(self, model: "Qwen3ForCausalLM") -> None:
        super().__init__(model)
        self.head_norms = [self._head_norms(layer.self_attn) for layer in model.model.layers]

    def positioned(self, layer: int, heads: Tensor, place: Table) -> Tensor:
        norms = self.head_norms[layer][-heads.shape[1] :]  # keys come last, or alone
        return super().positioned(layer, rms_norm(heads, (self.head_size,), None, self.epsilon) * norms, place)

    def _head_norms(self, attention: Any) -> Tensor:
        """The weight of each head's norm, queries and then keys: [heads + kv heads, head size]."""
        queries = attention.q_norm.weight.expand(self.n_heads, -1)
        return torch.cat((queries, attention.k_norm.weight.expand(self.n_kv_heads, -1)))


def _window(config: Any, kind: str) -> int | None:
    if kind == "full_attention":
        return None
    if kind == "sliding_attention" and config.sliding_window:
        return int(config.sliding_window)
    raise BadInput(
        f"model {config.name_or_path!r}: its config.json has {kind!r} among layer_types and sliding_window "
        f"{config.sliding_window} with use_sliding_window {config.use_sliding_window}; layers can have full_attention, "
        "or sliding_attention and a window."
    )
