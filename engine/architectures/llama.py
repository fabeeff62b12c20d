"""The Llama family: SmolLM2, CodeLlama, DeepSeek-Coder, TinyLlama, LayerSkip's checkpoints."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine import native, openmp
from engine.architectures.prenorm import Layer, Norm, RMSNorm
from engine.architectures.projections import side_by_side
from engine.architectures.rotary import RotaryStack, halves_table
from engine.kernels import ANY, DENSE
from engine.native_layers import LlamaLayers, LlamaWeights

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class LlamaStack(RotaryStack):
    """RMSNorm, rotary positions, grouped queries, gated MLP."""

    runs_together = True
    head_norms: list[Tensor] = []  # of queries and keys, [heads + kv heads, head size] a layer, where they have any

    def __init__(self, model: "LlamaForCausalLM") -> None:
        body = model.model
        super().__init__(model.config, model.lm_head)
        self.epsilon = model.config.rms_norm_eps
        self.activation = body.layers[0].mlp.act_fn
        self.is_silu = model.config.hidden_act == "silu"
        like = self.unembedding
        self._may_run_together = (
            self.is_silu and like.dtype == torch.float32 and like.device.type == "cpu" and openmp.available()
        )
        self._layouts = DENSE if self._may_run_together else ANY
        self.embedding = body.embed_tokens.weight
        self.final_norm = RMSNorm(body.norm, self.epsilon)
        self.layers = [self._read(layer) for layer in body.layers]
        self.rotary = halves_table(body.rotary_emb, self.max_context, self.embedding)

    @cached_property
    def together(self) -> LlamaLayers | None:
        """Not for a class that only inherits `runs_together`: it may do something else in its layers."""
        if not (vars(type(self)).get("runs_together") and self._may_run_together):
            return None
        return LlamaLayers(
            [self._plain(layer) for layer in range(self.n_layers)],
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_size=self.head_size,
            inner=self.layers[0].down.shape[1],
            epsilon=self.epsilon,
            scale=self.attention_scale,
        )

    def _plain(self, layer: int) -> LlamaWeights:
        weights = self.layers[layer]
        return LlamaWeights(
            attention_norm=_weight(weights.attention_norm),
            qkv=weights.qkv.weight,
            qkv_bias=weights.qkv.bias,
            head_norms=self.head_norms[layer] if self.head_norms else None,
            output=weights.output.weight,
            output_bias=weights.output.bias,
            mlp_norm=_weight(weights.mlp_norm),
            up=weights.up.weight,
            up_bias=weights.up.bias,
            down=weights.down.weight,
            down_bias=weights.down.bias,
            window=self.window(layer),
        )

    def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
        weights = self.layers[layer]
        states, normed = weights.mlp_norm.of_sum(states, weights.output(attended))
        return states + weights.down(self._gated(weights.up(normed)))

    def _gated(self, gate_up: Tensor) -> Tensor:
        if self.is_silu and native.fits(gate_up):
            return native.gate_silu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up

    def _read(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return Layer(
            attention_norm=RMSNorm(layer.input_layernorm, self.epsilon),
            qkv=side_by_side(attention.q_proj, attention.k_proj, attention.v_proj, layouts=self._layouts),
            output=side_by_side(attention.o_proj, layouts=self._layouts),
            mlp_norm=RMSNorm(layer.post_attention_layernorm, self.epsilon),
            up=side_by_side(mlp.gate_proj, mlp.up_proj, layouts=self._layouts),
            down=side_by_side(mlp.down_proj, layouts=self._layouts),
        )


def _weight(norm: Norm) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return norm.weight
