"""Attention of the tokens in hand over the cache, rows with their own lengths, every token causal from its place."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import KeyValues, Span
from engine.native_attention import Attention

if TYPE_CHECKING:
    from engine.stack import LayerStack


class NativeAttention:
    """A few tokens a row on the CPU."""

    def __init__(self, stack: "LayerStack", span: Span, cache: KeyValues) -> None:
        self.stack, self.cache = stack, cache
        visible = None if cache.visible is None else cache.visible.numpy()
        self.attend = Attention(span.rows, span.starts, span.counts, visible, stack.attention_scale)

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        return self.attend(q, *self.cache.arrays[layer], window=self.stack.window(layer), layer=layer)


class StepAttention:
    """A few tokens a row: all rows in one product, the shorter ones padded.

    Heads that share a key are queries of one product: [rows, kv heads, group * tokens, head size].
    """

    def __init__(self, stack: "LayerStack", span: Span, cache: KeyValues) -> None:
        self.stack, self.span, self.cache = stack, span, cache
        self.end = max(span.reach)
        # All rows in place: a view. Otherwise the living rows' keys are gathered.
        everyone = span.rows == list(range(cache.n_rows))
        self.rows = None if everyone else torch.tensor(span.rows, device=stack.device)
        self.width = max(span.counts)
        self.padded = None if span.size == len(span.rows) * self.width else self._places()
        self._seen: dict[int | None, tuple[int, Tensor | None]] = {}  # by window

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        start, mask = self._look(layer)
        k = self.cache.keys[layer][:, :, start : self.end]
        v = self.cache.values[layer][:, :, start : self.end]
        if self.rows is not None:
            k, v = k[self.rows], v[self.rows]
        mixed = F.scaled_dot_product_attention(
            self._grouped(q), k, v, attn_mask=mask, scale=self.stack.attention_scale
        )  # [rows, kv heads, group * width, head size]
        return self._flat(mixed)

    def _grouped(self, q: Tensor) -> Tensor:
        stack, rows = self.stack, len(self.span.rows)
        if self.width == 1:
            return q.reshape(rows, stack.n_kv_heads, -1, stack.head_size)
        if self.padded is not None:
            wide = q.new_zeros(rows * self.width, *q.shape[1:])
            wide[self.padded] = q
            q = wide
        q = q.view(rows, self.width, stack.n_kv_heads, -1, stack.head_size)
        return q.permute(0, 2, 3, 1, 4).reshape(rows, stack.n_kv_heads, -1, stack.head_size)

    def _flat(self, mixed: Tensor) -> Tensor:
        """Back to [tokens, heads * head size]."""
        rows, heads, _, size = mixed.shape
        if self.width == 1:
            return mixed.reshape(rows, -1)
        wide = mixed.view(rows, heads, -1, self.width, size).permute(0, 3, 1, 2, 4).reshape(rows * self.width, -1)
        return wide if self.padded is None else wide[self.padded]

    def _places(self) -> Tensor:
        """Where each token stands among rows of `width`, [tokens]."""
        places = [row * self.width + offset for row, count in enumerate(self.span.counts) for offset in range(count)]
        return torch.tensor(places, device=self.stack.device)

    def _look(self, layer: int) -> tuple[int, Tensor | None]:
        """The first position that any token sees in this layer, and a mask from there on; None where all is seen."""
        window = self.stack.window(layer)
        if window not in self._seen:
            self._seen[window] = self._mask(window)
        start, mask = self._seen[window]
        if self.cache.visible is None:
            return start, mask
        visible = self.cache.visible[:, start : self.end]
        visible = (visible if self.rows is None else visible[self.rows])[:, None, None] > layer
        return start, visible if mask is None else visible & mask

    def _mask(self, window: int | None) -> tuple[int, Tensor | None]:
        """[rows, 1, 1 or group * width, positions seen]"""
        span, device = self.span, self.stack.device
        start = 0 if window is None else max(0, min(span.starts) + 1 - window)
        if self.width == 1 and len(set(span.reach)) == 1:
            return start, None
        places = torch.arange(start, self.end, device=device)
        mine = torch.tensor(span.starts, device=device)[:, None] + torch.arange(self.width, device=device)
        mask = places <= mine[:, :, None]  # [rows, width, positions]
        if window is not None:
            mask &= places > mine[:, :, None] - window
        group = self.stack.n_heads // self.stack.n_kv_heads
        return start, mask.repeat(1, 1 if self.width == 1 else group, 1)[:, None]


class PromptAttention:
    """Many tokens a row: each row by itself."""

    def __init__(self, stack: "LayerStack", span: Span, cache: KeyValues) -> None:
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
