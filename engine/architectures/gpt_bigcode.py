"""The GPT-BigCode family: StarCoder-1B, StarCoder, SantaCoder."""

from typing import Any

from engine.architectures.gpt2 import GPT2Stack
from engine.architectures.prenorm import Layer, layer_norm
from engine.architectures.projections import gathered, side_by_side


class GPTBigCodeStack(GPT2Stack):
    """GPT-2's layers with plain linear projections; all query heads may share one key and one value."""

    def _read(self, layer: Any) -> Layer:
        attention = layer.attn
        return Layer(
            attention_norm=layer_norm(layer.ln_1),
            # With a key for each head, the weights go head by head.
            qkv=side_by_side(attention.c_attn) if attention.multi_query else gathered(attention.c_attn, self.n_heads),
            output=side_by_side(attention.c_proj),
            mlp_norm=layer_norm(layer.ln_2),
            up=side_by_side(layer.mlp.c_fc),
            down=side_by_side(layer.mlp.c_proj),
        )
