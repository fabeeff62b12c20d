"""A decoder as the engine sees it: embed, layers, norm, unembed, over whatever tokens are in hand.

A family (`engine/architectures/`) says how its layer makes queries, keys and values and what follows attention;
attention itself, over ragged rows with their own lengths, is written once, in `engine/attention.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engine import native
from engine.attention import NativeAttention, PromptAttention, StepAttention
from engine.cache import KeyValues, Span
from engine.cost import Shape
from engine.matrices import Matrix
from engine.native_layers import MOST_TOGETHER, LlamaLayers

#: so many tokens of a row share one product with padding; more, and each row has its own
_FEW = 16


class LayerStack(ABC):
    """The layers of one model. Tokens are flat: [tokens, hidden], whichever rows they belong to."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    max_context: int
    unembedding: Tensor  # [vocabulary, hidden]
    unembedder: Matrix  # the same, multiplied by the fastest kernel
    layers: Sequence[Any]  # each layer's weights; the attributes that are a `Matrix` get a kernel plan
    _kept: tuple[Span, tuple[Tensor, Tensor], Any] | None = None

    # --- what a family says -----------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions, [tokens] each, to states [tokens, hidden]."""

    def place(self, positions: Tensor) -> Any:
        """What the layers need to know of positions [tokens], such as rotary angles: made once for all layers."""
        return None

    def window(self, layer: int) -> int | None:
        """How many positions a token of this layer looks back over, itself included; None: all."""
        return None

    @abstractmethod
    def queries(self, layer: int, states: Tensor, place: Any) -> tuple[Tensor, Tensor, Tensor]:
        """States to positioned queries [tokens, heads, head size], keys and values [tokens, kv heads, head size]."""

    @abstractmethod
    def keys_values(self, layer: int, states: Tensor, place: Any) -> tuple[Tensor, Tensor]:
        """Only the keys and values of `queries`."""

    @abstractmethod
    def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: states and what attention gave, [tokens, heads * head size], to the next states."""

    @abstractmethod
    def norm(self, states: Tensor) -> Tensor:
        """The norm in front of the unembedding."""

    @abstractmethod
    def matrices(self, layer: int) -> list[Matrix]:
        """The matrices that a token multiplies with in one layer."""

    def compile(self) -> None:
        """Let `torch.compile` fuse what stands between a layer's products; it happens when a layer is first run."""
        # Every layer is a graph of its own, and one token another than several.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * self.n_layers)
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 16 * self.n_layers)
        self.together = None
        for matrix in self.all_matrices():
            matrix.stay_uncompiled()
        for name in ("queries", "keys_values", "merge"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True))

    @cached_property
    def together(self) -> LlamaLayers | None:
        """All layers as one loop of few tokens, where a family has one and this machine can run it."""
        return None

    # --- what all families share ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.unembedding.device

    @cached_property
    def attention_scale(self) -> float:
        return self.head_size**-0.5

    def new_cache(self, rows: int, positions: int) -> KeyValues:
        return KeyValues(self.n_layers, rows, self.n_kv_heads, positions, self.head_size, like=self.unembedding)

    def unembed(self, states: Tensor) -> Tensor:
        """Normed states [tokens, hidden] to logits [tokens, vocabulary]."""
        return self.unembedder(states)

    def all_matrices(self) -> list[Matrix]:
        """Every matrix that may be multiplied with, the unembedding included."""
        found = [value for layer in self.layers for value in vars(layer).values() if isinstance(value, Matrix)]
        return [*found, self.unembedder]

    def layer_parameters(self) -> int:
        """Parameters of one layer that a token multiplies with."""
        return sum(matrix.parameters for matrix in self.matrices(0))

    @property
    def shape(self) -> Shape:
        """What the cost model knows of it."""
        return Shape(
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_size=self.head_size,
            hidden_size=self.hidden_size,
            layer_parameters=self.layer_parameters(),
            element_size=self.unembedding.element_size(),
        )

    def run(self, states: Tensor, span: Span, cache: KeyValues, first: int, end: int) -> Tensor:
        """Take the tokens of `span` through layers `first` to `end` (excluded), writing their keys and values."""
        if first == end:
            return states
        index, place = self._placed(span)
        if span.size <= MOST_TOGETHER and native.fits(states) and self.together is not None:
            return self.together.run(states, span, cache, index, place, first, end)
        attend, write = self._attention(span, cache), cache.writer(span, index)
        for layer in range(first, end):
            q, k, v = self.queries(layer, states, place)
            write(layer, k, v)
            states = self.merge(layer, states, attend(layer, q))
        return states

    def fill(self, states: Tensor, span: Span, cache: KeyValues, first: int, end: int) -> None:
        """Write keys and values of layers `first` to `end` (excluded) from states that do not pass them (SEC, CALM)."""
        index, place = self._placed(span)
        if span.size <= MOST_TOGETHER and native.fits(states) and self.together is not None:
            self.together.run(states, span, cache, index, place, first, end, only_fill=True)
            return
        write = cache.writer(span, index)
        for layer in range(first, end):
            write(layer, *self.keys_values(layer, states, place))

    def _placed(self, span: Span) -> tuple[tuple[Tensor, Tensor], Any]:
        """Row and position of each token, [tokens] each, and their `place`; kept while the same span goes on."""
        kept = self._kept
        if kept is None or kept[0] is not span:
            rows, positions = torch.tensor(span.flat, device=self.device)
            kept = self._kept = span, (rows, positions), self.place(positions)
        return kept[1:]  # not what another thread may have put there meanwhile

    def _attention(self, span: Span, cache: KeyValues) -> Callable[[int, Tensor], Tensor]:
        """Attention over the span's rows: a function of layer and queries, so that masks are made once a span."""
        if max(span.counts) > _FEW:
            return PromptAttention(self, span, cache)
        return (NativeAttention if native.fits(cache.keys) else StepAttention)(self, span, cache)
