"""The GPT-2 family: learned positions, LayerNorm, tied unembedding."""

from typing import Any

from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import GPT2LMHeadModel

from engine.matrices import Matrix
from engine.stack import LayerStack


class GPT2Stack(LayerStack):
    """Pre-norm layers; queries, keys and values come fused from the weights themselves."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        config, body = model.config, model.transformer
        self.n_layers = config.n_layer
        self.n_heads = self.n_kv_heads = config.n_head
        self.hidden_size = config.n_embd
        self.head_size = config.n_embd // config.n_head
        self.vocab_size = config.vocab_size
        self.max_context = config.n_positions
        self.epsilon = config.layer_norm_epsilon
        self.scaled = config.scale_attn_weights
        self.by_layer = config.scale_attn_by_inverse_layer_idx
        self.activation = body.h[0].mlp.act
        self.token_embedding, self.position_embedding = body.wte.weight, body.wpe.weight
        self.unembedding = model.lm_head.weight
        self.unembedder = Matrix(self.unembedding)
        self.final_norm = (body.ln_f.weight, body.ln_f.bias)
        self.layers = [_Layer(layer) for layer in body.h]

    @property
    def attention_scale(self) -> float:
        return self.head_size**-0.5 if self.scaled else 1.0

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.token_embedding[ids] + self.position_embedding[positions]

    def queries(self, layer: int, states: Tensor, place: None) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.layers[layer]
        fused = weights.qkv(self._normed(states, weights.attention_norm))
        q, k, v = fused.view(len(states), 3, self.n_heads, self.head_size).unbind(1)
        return (q / (layer + 1) if self.by_layer else q), k, v

    def keys_values(self, layer: int, states: Tensor, place: None) -> tuple[Tensor, Tensor]:
        weights = self.layers[layer]
        fused = weights.kv(self._normed(states, weights.attention_norm))
        k, v = fused.view(len(states), 2, self.n_heads, self.head_size).unbind(1)
        return k, v

    def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
        weights = self.layers[layer]
        states = states + weights.output(attended)
        return states + weights.down(self.activation(weights.up(self._normed(states, weights.mlp_norm))))

    def norm(self, states: Tensor) -> Tensor:
        return self._normed(states, self.final_norm)

    def matrices(self, layer: int) -> list[Matrix]:
        weights = self.layers[layer]
        return [weights.qkv, weights.output, weights.up, weights.down]

    def _normed(self, states: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return layer_norm(states, (self.hidden_size,), *norm, eps=self.epsilon)


class _Layer:
    """One layer's weights; GPT-2 stores its projections as [inputs, outputs], here [outputs, inputs]."""

    def __init__(self, layer: Any) -> None:
        self.attention_norm = (layer.ln_1.weight, layer.ln_1.bias)
        self.qkv = turned(layer.attn.c_attn)
        self.kv = self.qkv.outputs(self.qkv.shape[1])
        self.output = turned(layer.attn.c_proj)
        self.mlp_norm = (layer.ln_2.weight, layer.ln_2.bias)
        self.up = turned(layer.mlp.c_fc)
        self.down = turned(layer.mlp.c_proj)


def turned(projection: Any) -> Matrix:
    """The matrix of a `Conv1D`; the module gives its memory back."""
    weight = projection.weight.data.t().contiguous()
    projection.weight.data = weight.new_empty(0)
    return Matrix(weight, projection.bias.data)
