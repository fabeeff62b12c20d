"""The Llama family: SmolLM2, CodeLlama, DeepSeek-Coder, TinyLlama, LayerSkip's checkpoints."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine import native
from engine.architectures.prenorm import Layer, RMSNorm
from engine.architectures.projections import side_by_side
from engine.architectures.rotary import RotaryStack, halves_table

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class LlamaStack(RotaryStack):
    """RMSNorm, rotary positions, grouped queries, gated MLP."""

    def __init__(self, model: "LlamaForCausalLM") -> None:
        body = model.model
        super().__init__(model.config, model.lm_head)
        self.epsilon = model.config.rms_norm_eps
        self.activation = body.layers[0].mlp.act_fn
        self.is_silu = model.config.hidden_act == "silu"
        self.embedding = body.embed_tokens.weight
        self.final_norm = RMSNorm(body.norm, self.epsilon)
        self.layers = [self._read(layer) for layer in body.layers]
        self.rotary = halves_table(body.rotary_emb, self.max_context, self.embedding)

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
            qkv=side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
            output=side_by_side(attention.o_proj),
            mlp_norm=RMSNorm(layer.post_attention_layernorm, self.epsilon),
            up=side_by_side(mlp.gate_proj, mlp.up_proj),
            down=side_by_side(mlp.down_proj),
        )
