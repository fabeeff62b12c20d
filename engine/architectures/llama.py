"""The Llama family: SmolLM2, CodeLlama, DeepSeek-Coder, TinyLlama, LayerSkip's checkpoints."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import LlamaForCausalLM

from engine.architectures.rotary import rotary_table, rotate
from engine.matrices import Matrix
from engine.stack import LayerStack


class LlamaStack(LayerStack):
    """RMSNorm, rotary positions, grouped queries, gated MLP; projections of one input are fused."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        config, body = model.config, model.model
        self.n_layers = config.num_hidden_layers
        self.n_heads = config.num_attention_heads
        self.n_kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self.epsilon = config.rms_norm_eps
        self.activation = body.layers[0].mlp.act_fn
        self.embedding = body.embed_tokens.weight
        self.unembedding = model.lm_head.weight
        self.unembedder = Matrix(self.unembedding)
        self.final_norm = body.norm.weight
        self.q_size = self.n_heads * self.head_size
        self.layers = [_Layer(layer, self.q_size) for layer in body.layers]
        self.rotary = rotary_table(body.rotary_emb, self.max_context, self.embedding)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding[ids]

    def place(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary[0][positions], self.rotary[1][positions]

    def queries(self, layer: int, states: Tensor, place: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.layers[layer]
        heads = weights.qkv(self._normed(states, weights.attention_norm)).view(len(states), -1, self.head_size)
        turned, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        q, k = rotate(turned, place).split([self.n_heads, self.n_kv_heads], dim=1)
        return q, k, v

    def keys_values(self, layer: int, states: Tensor, place: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights = self.layers[layer]
        heads = weights.kv(self._normed(states, weights.attention_norm)).view(len(states), -1, self.head_size)
        k, v = heads.split(self.n_kv_heads, dim=1)
        return rotate(k, place), v

    def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
        weights = self.layers[layer]
        states = states + weights.output(attended)
        gate, up = weights.gate_up(self._normed(states, weights.mlp_norm)).chunk(2, dim=-1)
        return states + weights.down(self.activation(gate) * up)

    def norm(self, states: Tensor) -> Tensor:
        return self._normed(states, self.final_norm)

    def matrices(self, layer: int) -> list[Matrix]:
        weights = self.layers[layer]
        return [weights.qkv, weights.output, weights.gate_up, weights.down]

    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(states, (self.hidden_size,), weight, self.epsilon)


class _Layer:
    """One layer's weights, projections of the same input side by side."""

    def __init__(self, layer: Any, q_size: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm = layer.input_layernorm.weight
        self.qkv = side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        self.kv = self.qkv.outputs(q_size)
        self.output = side_by_side(attention.o_proj)
        self.mlp_norm = layer.post_attention_layernorm.weight
        self.gate_up = side_by_side(mlp.gate_proj, mlp.up_proj)
        self.down = side_by_side(mlp.down_proj)


def side_by_side(*projections: torch.nn.Linear) -> Matrix:
    """Several projections of one input as one."""
    biases = [projection.bias.data for projection in projections if projection.bias is not None]
    if len(projections) == 1:
        return Matrix(projections[0].weight.data, *biases)
    # Joined weights are a copy: the parts give their memory back, or a model would be held twice.
    weight = torch.cat([projection.weight.data for projection in projections])
    for projection in projections:
        projection.weight.data = weight.new_empty(0)
    return Matrix(weight, torch.cat(biases) if biases else None)
