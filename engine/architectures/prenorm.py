"""What the families here have in common: layers that are added to the state, a norm in front of each half."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from engine import native
from engine.kernels import TWICE
from engine.matrices import Matrix
from engine.stack import LayerStack


class Norm:
    """What stands in front of each half of a layer. Called with states [tokens, hidden]."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        self._norm = norm

    def __call__(self, states: Tensor) -> Tensor:
        return self._norm(states)

    def of_sum(self, states: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        states = states + added
        return states, self(states)


class RMSNorm(Norm):
    """The fused equal of a Hugging Face RMSNorm."""

    def __init__(self, module: Any, epsilon: float) -> None:
        self.weight, self.epsilon, self.shape = module.weight.detach(), epsilon, tuple(module.weight.shape)

    def __call__(self, states: Tensor) -> Tensor:
        if native.fits(states):
            return native.rms_norm(states, self.weight, self.epsilon)
        return F.rms_norm(states, self.shape, self.weight, self.epsilon)

    def of_sum(self, states: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        if native.fits(states):
            return native.add_rms_norm(states, added, self.weight, self.epsilon)
        return super().of_sum(states, added)


def layer_norm(module: nn.LayerNorm) -> Norm:
    """The norm without the module around it."""
    shape, weight, bias, epsilon = module.normalized_shape, module.weight, module.bias, module.eps
    return Norm(lambda states: F.layer_norm(states, shape, weight, bias, epsilon))


@dataclass
class Layer:
    """One layer's weights: what is projected from one input is one matrix."""

    attention_norm: Norm
    qkv: Matrix  # all queries, then all keys, then all values
    output: Matrix
    mlp_norm: Norm
    up: Matrix  # gate and up side by side, where the MLP is gated
    down: Matrix

    def __post_init__(self) -> None:
        # Heads are as wide going out as they were coming in.
        self.kv = self.qkv.outputs(self.output.shape[1])


class PreNormStack(LayerStack):
    """Norm, attention, norm, MLP; queries, keys and values are one product.

    As it stands the MLP is not gated, and queries and keys know nothing of positions. A family sets the attributes
    below, and overrides what it does otherwise.
    """

    embedding: Tensor  # [vocabulary, hidden]
    layers: list[Layer]
    final_norm: Norm
    activation: Callable[[Tensor], Tensor]

    def __init__(self, config: Any, lm_head: nn.Linear) -> None:
        self.n_layers = config.num_hidden_layers
        self.n_heads = config.num_attention_heads
        self.n_kv_heads = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.hidden_size = config.hidden_size
        self.head_size = getattr(config, "head_dim", None) or self.hidden_size // self.n_heads
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self.unembedding = lm_head.weight
        self.unembedder = Matrix(lm_head.weight, lm_head.bias, layouts=TWICE)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding[ids]

    def queries(self, layer: int, states: Tensor, place: Any) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.layers[layer]
        heads = weights.qkv(weights.attention_norm(states)).view(len(states), -1, self.head_size)
        qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        q, k = self.positioned(layer, qk, place).split([self.n_heads, self.n_kv_heads], dim=1)
        return q, k, v

    def keys_values(self, layer: int, states: Tensor, place: Any) -> tuple[Tensor, Tensor]:
        weights = self.layers[layer]
        heads = weights.kv(weights.attention_norm(states)).view(len(states), -1, self.head_size)
        k, v = heads.split(self.n_kv_heads, dim=1)
        return self.positioned(layer, k, place), v

    def positioned(self, layer: int, heads: Tensor, place: Any) -> Tensor:
        """What positions do to queries and keys, [tokens, heads, head size]: queries first, or keys alone."""
        return heads

    def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
        weights = self.layers[layer]
        states, normed = weights.mlp_norm.of_sum(states, weights.output(attended))
        return states + weights.down(self.activation(weights.up(normed)))

    def norm(self, states: Tensor) -> Tensor:
        return self.final_norm(states)

    def matrices(self, layer: int) -> list[Matrix]:
        weights = self.layers[layer]
        return [weights.qkv, weights.output, weights.up, weights.down]
