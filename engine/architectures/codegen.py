"""The CodeGen family: attention and MLP side by side on one norm, neighbours of a part of each head turn."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.architectures.prenorm import Layer, layer_norm
from engine.architectures.projections import gathered, side_by_side
from engine.architectures.rotary import RotaryStack, Table, pairs_table, rotate_pairs

if TYPE_CHECKING:
    from transformers import CodeGenForCausalLM

#: the model was trained on so many cores at once, and its weights are still stored core by core
_CORES = 4


class CodeGenStack(RotaryStack):
    """Attention and MLP read the same state; the unembedding has a bias."""

    def __init__(self, model: "CodeGenForCausalLM") -> None:
        body = model.transformer
        super().__init__(model.config, model.lm_head)
        self.activation = body.h[0].mlp.act
        self.embedding = body.wte.weight
        self.final_norm = layer_norm(body.ln_f)
        self.layers = [_read(layer) for layer in body.h]
        self.rotary = pairs_table(body.h[0].attn.embed_positions, self.head_size)

    def positioned(self, layer: int, heads: Tensor, place: Table) -> Tensor:
        # The table is float32, as in transformers; in narrow types what it turns is rounded back.
        return rotate_pairs(heads, place).to(heads.dtype)

    def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
        weights = self.layers[layer]
        beside = weights.down(self.activation(weights.up(weights.mlp_norm(states))))
        return states + weights.output(attended) + beside


def _read(layer: Any) -> Layer:
    norm = layer_norm(layer.ln_1)
    return Layer(
        attention_norm=norm,
        qkv=gathered(layer.attn.qkv_proj, _CORES, order=(0, 2, 1)),
        output=side_by_side(layer.attn.out_proj),
        mlp_norm=norm,
        up=side_by_side(layer.mlp.fc_in),
        down=side_by_side(layer.mlp.fc_out),
    )
