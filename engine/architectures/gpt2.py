"""The GPT-2 family: learned positions, LayerNorm, biases everywhere."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.architectures.prenorm import Layer, PreNormStack, layer_norm
from engine.architectures.projections import turned
from engine.matrices import Matrix

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


class GPT2Stack(PreNormStack):
    """Positions are added to the embedding; queries, keys and values come fused from the weights themselves."""

    def __init__(self, model: "GPT2LMHeadModel") -> None:
        body = model.transformer
        super().__init__(model.config, model.lm_head)
        self.scaled = model.config.scale_attn_weights
        self.activation = body.h[0].mlp.act
        self.embedding, self.position_embedding = body.wte.weight, body.wpe.weight
        self.final_norm = layer_norm(body.ln_f)
        self.layers = [self._read(layer) for layer in body.h]

    @cached_property
    def attention_scale(self) -> float:
        return self.head_size**-0.5 if self.scaled else 1.0

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding[ids] + self.position_embedding[positions]

    def _read(self, layer: Any) -> Layer:
        return Layer(
            attention_norm=layer_norm(layer.ln_1),
            qkv=self._qkv(layer.attn),
            output=turned(layer.attn.c_proj),
            mlp_norm=layer_norm(layer.ln_2),
            up=turned(layer.mlp.c_fc),
            down=turned(layer.mlp.c_proj),
        )

    def _qkv(self, attention: Any) -> Matrix:
        if attention.scale_attn_by_inverse_layer_idx:
            # Scores are divided by the layer's number: so are the queries, once for all.
            for parameter in (attention.c_attn.weight, attention.c_attn.bias):
                parameter.data[..., : self.hidden_size] /= attention.layer_idx + 1
        return turned(attention.c_attn)
