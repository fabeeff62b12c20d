"""Keys and values of a batch, and which tokens are in hand."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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

    @property
    def n_rows(self) -> int:
        return self.keys.shape[1]

    @property
    def n_positions(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, index: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Store keys and values ([tokens, kv heads, head size] each) at `index`: rows and positions, [tokens] each."""
        rows, positions = index
        self.keys[layer][rows, :, positions] = keys
        self.values[layer][rows, :, positions] = values

    def copy(self) -> "KeyValues":
        """An independent copy, so that every policy starts from the same prefill."""
        twin = object.__new__(KeyValues)
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        return twin
