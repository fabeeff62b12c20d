"""The StarCoder2 family: LayerNorm, rotary positions, grouped queries, an MLP without a gate."""

from typing import TYPE_CHECKING, Any

from engine.architectures.prenorm import Layer, layer_norm
from engine.architectures.projections import side_by_side
from engine.architectures.rotary import RotaryStack, halves_table

if TYPE_CHECKING:
    from transformers import Starcoder2ForCausalLM


class Starcoder2Stack(RotaryStack):
    """All layers look back over the same window, where the configuration has one."""

    def __init__(self, model: "Starcoder2ForCausalLM") -> None:
        body = model.model
        super().__init__(model.config, model.lm_head)
        self.sliding_window = model.config.sliding_window
        self.activation = body.layers[0].mlp.act
        self.embedding = body.embed_tokens.weight
        self.final_norm = layer_norm(body.norm)
        self.layers = [_read(layer) for layer in body.layers]
        self.rotary = halves_table(body.rotary_emb, self.max_context, self.embedding)

    def window(self, layer: int) -> int | None:
        return self.sliding_window


def _read(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=layer_norm(layer.input_layernorm),
        qkv=side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
        output=side_by_side(attention.o_proj),
        mlp_norm=layer_norm(layer.post_attention_layernorm),
        up=side_by_side(mlp.c_fc),
        down=side_by_side(mlp.c_proj),
    )
