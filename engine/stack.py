"""A decoder as the engine sees it: embed, layers, norm, unembed, over whatever tokens are in hand.

A family (`engine/architectures/`) says how its layer makes queries, keys and values and what follows attention;
attention itself, over ragged rows with their own lengths, is written here once.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import KeyValues, Span
from engine.matrices import Matrix


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

    def layer_parameters(self) -> int:
        """Parameters of one layer that a token multiplies with."""
        return sum(matrix.parameters for matrix in self.matrices(0))

    def run(self, states: Tensor, span: Span, cache: KeyValues, first: int, end: int) -> Tensor:
        """Take the tokens of `span` through layers `first` to `end` (excluded), writing their keys and values."""
        if first == end:
            return states
        index, attend = self._index(span), self._attention(span, cache)
        place = self.place(index[1])
        for layer in range(first, end):
            q, k, v = self.queries(layer, states, place)
            cache.write(layer, index, k, v)
            states = self.merge(layer, states, attend(layer, q))
        return states

    def fill(self, states: Tensor, span: Span, cache: KeyValues, first: int, end: int) -> None:
        """Write keys and values of layers `first` to `end` (excluded) from states that do not pass them (SEC, CALM)."""
        index = self._index(span)
        place = self.place(index[1])
        for layer in range(first, end):
            cache.write(layer, index, *self.keys_values(layer, states, place))

    def _index(self, span: Span) -> tuple[Tensor, Tensor]:
        rows, positions = torch.tensor(span.flat, device=self.device)
        return rows, positions

    def _attention(self, span: Span, cache: KeyValues):  # type: ignore[no-untyped-def]
        """Attention over the span's rows: a function of layer and queries, so that masks are made once a span."""
        return _SingleAttention(self, span, cache) if span.single else _RaggedAttention(self, span, cache)


class _SingleAttention:
    """One token a row: the heads that share a key are the queries of one product, rows run together under a mask."""

    def __init__(self, stack: LayerStack, span: Span, cache: KeyValues) -> None:
        self.stack, self.cache, self.reach = stack, cache, span.reach
        self.end = max(span.reach)
        # All rows in place: a view. Otherwise the living rows' keys are gathered.
        everyone = span.rows == list(range(cache.n_rows))
        self.rows = None if everyone else torch.tensor(span.rows, device=stack.device)
        self._seen: dict[int | None, tuple[int, Tensor | None]] = {}  # by window

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        stack = self.stack
        start, mask = self._look(stack.window(layer))
        k = self.cache.keys[layer][:, :, start : self.end]
        v = self.cache.values[layer][:, :, start : self.end]
        if self.rows is not None:
            k, v = k[self.rows], v[self.rows]
        grouped = q.reshape(len(q), stack.n_kv_heads, -1, stack.head_size)
        mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=stack.attention_scale)
        return mixed.reshape(len(q), -1)

    def _look(self, window: int | None) -> tuple[int, Tensor | None]:
        """The first position that any row sees, and which positions from there each row sees, [rows, 1, 1, seen]."""
        if window not in self._seen:
            firsts = [0 if window is None else max(0, reach - window) for reach in self.reach]
            start, mask = min(firsts), None
            if len(set(self.reach)) > 1:
                device = self.stack.device
                places = torch.arange(start, self.end, device=device)
                mask = places < torch.tensor(self.reach, device=device)[:, None]
                if window is not None:
                    mask &= places >= torch.tensor(firsts, device=device)[:, None]
                mask = mask[:, None, None]
            self._seen[window] = start, mask
        return self._seen[window]


class _RaggedAttention:
    """Several tokens a row: each row by itself, causal from its own start."""

    def __init__(self, stack: LayerStack, span: Span, cache: KeyValues) -> None:
        self.stack, self.span, self.cache = stack, span, cache
        self._masks: dict[int | None, list[Tensor | None]] = {}  # by window, a mask a row

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        span, scale = self.span, self.stack.attention_scale
        masks = self._look(self.stack.window(layer))
        parts = []
        for row, reach, mask, mine in zip(span.rows, span.reach, masks, q.split(span.counts), strict=True):
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

    def _look(self, window: int | None) -> list[Tensor | None]:
        if window not in self._masks:
            counted = zip(self.span.starts, self.span.counts, strict=True)
            self._masks[window] = [self._mask(start, count, window) for start, count in counted]
        return self._masks[window]

    def _mask(self, start: int, count: int, window: int | None) -> Tensor | None:
        """Which positions each of a row's tokens sees, [count, start + count]; None: plain causal, or all there is."""
        far = window is not None and start + count > window
        if not far and (start == 0 or count == 1):
            return None
        seen = torch.arange(start + count, device=self.stack.device)
        mine = torch.arange(start, start + count, device=self.stack.device)[:, None]
        mask = seen <= mine
        return mask & (seen > mine - window) if window is not None else mask
