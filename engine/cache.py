"""Keys and values of a batch, and which tokens are in hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine import native
from engine.loops import Floats


@dataclass(frozen=True)
class Span:
    """The tokens that go through a layer together: grouped by row, positions ascending and gapless within a row.

    Rows are places in the cache. A decode step has one token a row; a prefill has a whole prompt a row; where debts are
    paid, rows differ.
    """

    rows: list[int]  #: the rows that take part, in order
    starts: list[int]  #: position of each row's first token in hand
    counts: list[int]  #: how many tokens of each row are in hand

    @cached_property
    def size(self) -> int:
        return sum(self.counts)

    @cached_property
    def single(self) -> bool:
        """One token a row."""
        return self.size == len(self.rows)

    @cached_property
    def reach(self) -> list[int]:
        """Positions that each row's last token may look at, itself included."""
        return [start + count for start, count in zip(self.starts, self.counts, strict=True)]

    @cached_property
    def context(self) -> int:
        """Positions looked at by all tokens together."""
        return sum(
            count * start + count * (count + 1) // 2 for start, count in zip(self.starts, self.counts, strict=True)
        )

    @cached_property
    def flat(self) -> tuple[list[int], list[int]]:
        """Row and position of each token, [size] each."""
        rows = [row for row, count in zip(self.rows, self.counts, strict=True) for _ in range(count)]
        positions = [
            start + offset for start, count in zip(self.starts, self.counts, strict=True) for offset in range(count)
        ]
        return rows, positions

    @cached_property
    def last(self) -> list[int]:
        """Place of each row's newest token among the tokens in hand, [rows]."""
        ends, total = [], 0
        for count in self.counts:
            total += count
            ends.append(total - 1)
        return ends


class KeyValues:
    """Preallocated keys and values of all layers: [layers, rows, kv heads, positions, head size] each."""

    def __init__(self, layers: int, rows: int, heads: int, positions: int, head_size: int, like: Tensor) -> None:
        shape = (layers, rows, heads, positions, head_size)
        # Zeros, not garbage: a masked position may still meet a NaN as 0 x NaN.
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        #: layers whose keys can be seen at a place, [rows, positions]; None while all can
        self.visible: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return self.keys.shape[1]

    @property
    def n_positions(self) -> int:
        return self.keys.shape[3]

    @cached_property
    def arrays(self) -> list[tuple[Floats, Floats]]:
        """Keys and values of each layer as arrays over the same memory, on the CPU."""
        return [(keys.numpy(), values.numpy()) for keys, values in zip(self.keys, self.values, strict=True)]

    def writer(self, span: Span, index: tuple[Tensor, Tensor]) -> Callable[[int, Tensor, Tensor], None]:
        """A function that stores a layer's keys and values of the span, [tokens, kv heads, head size] each.

        index: row and position of each token, [tokens] each.
        """
        if native.fits(self.keys):
            rows, positions = index[0].numpy(), index[1].numpy()
            return lambda layer, keys, values: native.store(*self.arrays[layer], rows, positions, keys, values)
        if len(span.rows) > 1:

            def scatter(layer: int, keys: Tensor, values: Tensor) -> None:
                self.keys[layer][index[0], :, index[1]] = keys
                self.values[layer][index[0], :, index[1]] = values

            return scatter
        # One row's tokens lie side by side: a copy, where an index costs ten times as much.
        row, start, end = span.rows[0], span.starts[0], span.reach[0]
        own_keys, own_values = self.keys[:, row, :, start:end], self.values[:, row, :, start:end]

        def copy(layer: int, keys: Tensor, values: Tensor) -> None:
            own_keys[layer].copy_(keys.transpose(0, 1))
            own_values[layer].copy_(values.transpose(0, 1))

        return copy

    def hide(self, rows: list[int], positions: list[int], layer: int) -> None:
        """The tokens at these places have no keys from `layer` on."""
        if self.visible is None:
            self.visible = torch.full((self.n_rows, self.n_positions), len(self.keys), device=self.keys.device)
        self.visible[rows, positions] = layer

    def copy(self) -> "KeyValues":
        """An independent copy, so that every policy starts from the same prefill."""
        twin = object.__new__(KeyValues)
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        twin.visible = None if self.visible is None else self.visible.clone()
        return twin
