"""The Llama family: SmolLM2, CodeLlama, DeepSeek-Coder, TinyLlama."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.stack import LayerStack


class LlamaStack(LayerStack):
    """RMSNorm, rotary positions, grouped queries, gated MLP; projections of one input are fused."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        config = model.config
        self.n_layers = config.num_hidden_layers
        self.n_heads = config.num_attention_heads
        self.n_kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self.epsilon = config.rms_norm_eps
        self.activation = model.model.layers[0].mlp.act_fn
        self.embedding = model.model.embed_tokens.weight
        self.unembedding = model.lm_head.weight
        self.final_norm = model.model.norm.weight
        self.layers = [_Layer(layer) for layer in model.model.layers]
        positions = torch.arange(self.max_context, device=self.embedding.device)[None]
        cos, sin = model.model.rotary_emb(self.embedding[:1, None], positions)
        self.cos, self.sin = cos[0], sin[0]  # [context, head size]

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding[ids]

    def queries(self, layer: int, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.layers[layer]
        fused = F.linear(self._normed(states, weights.attention_norm), weights.qkv, weights.qkv_bias)
        heads = fused.view(len(states), -1, self.head_size)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        return self._rotated(q, positions), self._rotated(k, positions), v

    def keys_values(self, layer: int, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.layers[layer]
        start = self.n_heads * self.head_size
        bias = None if weights.qkv_bias is None else weights.qkv_bias[start:]
        fused = F.linear(self._normed(states, weights.attention_norm), weights.qkv[start:], bias)
        k, v = fused.view(len(states), -1, self.head_size).split(self.n_kv_heads, dim=1)
        return self._rotated(k, positions), v

    def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
        weights = self.layers[layer]
        states = states + F.linear(attended, weights.output, weights.output_bias)
        gate, up = F.linear(self._normed(states, weights.mlp_norm), weights.gate_up, weights.gate_up_bias).chunk(
            2, dim=-1
        )
        return states + F.linear(self.activation(gate) * up, weights.down, weights.down_bias)

    def norm(self, states: Tensor) -> Tensor:
        return self._normed(states, self.final_norm)

    def layer_parameters(self) -> int:
        weights = self.layers[0]
        return sum(w.numel() for w in (weights.qkv, weights.output, weights.gate_up, weights.down))

    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        # In float32 and rounded before the weight, as the Hugging Face class does it.
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return weight * wide.to(states.dtype)

    def _rotated(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Rotary positions (Su et al. 2021), the two halves of a head rotated against each other."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin


class _Layer:
    """One layer's weights, projections of the same input side by side."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm = layer.input_layernorm.weight
        self.qkv, self.qkv_bias = side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output, self.output_bias = attention.o_proj.weight, attention.o_proj.bias
        self.mlp_norm = layer.post_attention_layernorm.weight
        self.gate_up, self.gate_up_bias = side_by_side(mlp.gate_proj, mlp.up_proj)
        self.down, self.down_bias = mlp.down_proj.weight, mlp.down_proj.bias


def side_by_side(*projections: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights [outputs, inputs] and biases of several projections as those of one."""
    weight = torch.cat([projection.weight.data for projection in projections])
    biases = [projection.bias.data for projection in projections if projection.bias is not None]
    return weight, torch.cat(biases) if biases else None
