"""A decoder as the engine sees it: embed, layers, norm, unembed, over whatever tokens are in hand.

A family (`engine/architectures/`) says how its layer makes queries, keys and values and what follows attention;
attention itself, over ragged rows with their own lengths, is written here once.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import KeyValues, Span


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

    # --- what a family says -----------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions, [tokens] each, to states [tokens, hidden]."""

    @abstractmethod
    def queries(self, layer: int, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States to positioned queries [tokens, heads, head size], keys and values [tokens, kv heads, head size]."""

    @abstractmethod
    def keys_values(self, layer: int, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Only the keys and values of `queries`."""

    @abstractmethod
    def merge(self, layer: int, states: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: states and what attention gave, [tokens, heads * head size], to the next states."""

    @abstractmethod
    def norm(self, states: Tensor) -> Tensor:
        """The norm in front of the unembedding."""

    @abstractmethod
    def layer_parameters(self) -> int:
        """Parameters of one layer that a token multiplies with."""

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
        return F.linear(states, self.unembedding)

    def run(self, states: Tensor, span: Span, cache: KeyValues, first: int, end: int) -> Tensor:
        """Take the tokens of `span` through layers `first` to `end` (excluded), writing their keys and values."""
        if first == end:
            return states
        index, attend = self._index(span), self._attention(span, cache)
        for layer in range(first, end):
            q, k, v = self.queries(layer, states, index[1])
            cache.write(layer, index, k, v)
            states = self.merge(layer, states, attend(layer, q))
        return states

    def fill(self, states: Tensor, span: Span, cache: KeyValues, first: int, end: int) -> None:
        """Write keys and values of layers `first` to `end` (excluded) from states that do not pass them (SEC, CALM)."""
        index = self._index(span)
        for layer in range(first, end):
            cache.write(layer, index, *self.keys_values(layer, states, index[1]))

    def _index(self, span: Span) -> tuple[Tensor, Tensor]:
        rows, positions = torch.tensor(span.flat, device=self.device)
        return rows, positions

    def _attention(self, span: Span, cache: KeyValues):  # type: ignore[no-untyped-def]
        """Attention over the span's rows: a function of layer and queries, so that masks are made once a span."""
        return _SingleAttention(self, span, cache) if span.single else _RaggedAttention(self, span, cache)


class _SingleAttention:
    """One token a row: the heads that share a key are the queries of one product, rows run together under a mask."""

    def __init__(self, stack: LayerStack, span: Span, cache: KeyValues) -> None:
        self.stack, self.cache = stack, cache
        self.length = max(span.reach)
        device = stack.device
        # All rows in place: a view. Otherwise the living rows' keys are gathered.
        everyone = span.rows == list(range(cache.n_rows))
        self.rows = None if everyone else torch.tensor(span.rows, device=device)
        self.mask = None
        if any(reach != self.length for reach in span.reach):
            reach = torch.tensor(span.reach, device=device)
            self.mask = (torch.arange(self.length, device=device) < reach[:, None])[
                :, None, None
            ]  # [rows, 1, 1, length]

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        stack = self.stack
        k = self.cache.keys[layer][:, :, : self.length]
        v = self.cache.values[layer][:, :, : self.length]
        if self.rows is not None:
            k, v = k[self.rows], v[self.rows]
        grouped = q.view(len(q), stack.n_kv_heads, -1, stack.head_size)
        mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask, scale=stack.attention_scale)
        return mixed.reshape(len(q), -1)


class _RaggedAttention:
    """Several tokens a row: each row by itself, causal from its own start."""

    def __init__(self, stack: LayerStack, span: Span, cache: KeyValues) -> None:
        self.stack, self.span, self.cache = stack, span, cache
        self.masks = [self._mask(start, count) for start, count in zip(span.starts, span.counts, strict=True)]

    def _mask(self, start: int, count: int) -> Tensor | None:
        if start == 0 or count == 1:
            return None  # plain causal, or everything there is
        seen = torch.arange(start + count, device=self.stack.device)
        return seen <= torch.arange(start, start + count, device=self.stack.device)[:, None]  # [count, start + count]

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        span, scale = self.span, self.stack.attention_scale
        parts = []
        for row, reach, mask, mine in zip(span.rows, span.reach, self.masks, q.split(span.counts), strict=True):
            k = self.cache.keys[layer, row : row + 1, :, :reach]
            v = self.cache.values[layer, row : row + 1, :, :reach]
            mixed = F.scaled_dot_product_attention(
                mine.transpose(0, 1)[None],
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and len(mine) > 1,
                scale=scale,
                enable_gqa=True,
            )
            parts.append(mixed[0].transpose(0, 1).reshape(len(mine), -1))
        return torch.cat(parts)
