"""Rotary positions (Su et al. 2021), as the Hugging Face classes compute them.

Two elements of a head turn against each other: (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin). With the sign in a table
of sines, every element is x cos + partner sin. Who is whose partner is the only difference between families: the
halves of a head face each other, or neighbours do.
"""

from typing import Any

import torch
from torch import Tensor

from engine import native
from engine.architectures.prenorm import PreNormStack

#: cosines and signed sines, [context, 1, head size] each
Table = tuple[Tensor, Tensor]


class RotaryStack(PreNormStack):
    """A stack whose queries and keys are turned by their positions."""

    rotary: Table

    def place(self, positions: Tensor) -> Table:
        return self.rotary[0][positions], self.rotary[1][positions]

    def positioned(self, layer: int, heads: Tensor, place: Table) -> Tensor:
        return rotate_halves(heads, place)


def halves_table(embedding: Any, context: int, like: Tensor) -> Table:
    """The table of a model's rotary module, for `rotate_halves`. Its angles must not depend on the text's length."""
    positions = torch.arange(context, device=like.device)[None]
    cos, sin = embedding(like[:1, None], positions)
    half = sin.shape[-1] // 2
    return cos[0][:, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)[:, None]


def pairs_table(sines_cosines: Tensor, head_size: int) -> Table:
    """The table for `rotate_pairs`, of sines and then cosines of all angles [context, angles + angles].

    Where there are fewer angles than pairs in a head, the rest of the head is not turned.
    """
    sin, cos = sines_cosines[:, None].repeat_interleave(2, dim=-1).chunk(2, dim=-1)
    sin = sin * sin.new_tensor([-1, 1]).repeat(sin.shape[-1] // 2)
    still = (0, head_size - cos.shape[-1])
    return torch.nn.functional.pad(cos, still, value=1), torch.nn.functional.pad(sin, still)


def rotate_halves(heads: Tensor, place: Table) -> Tensor:
    """Heads [tokens, heads, head size] turned by rows of the table, [tokens, 1, head size] each."""
    cos, sin = place
    if native.fits(heads) and cos.shape == sin.shape == (len(heads), 1, heads.shape[-1]):
        return native.rotate_halves(heads, cos, sin)
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def rotate_pairs(heads: Tensor, place: Table) -> Tensor:
    """The same, each element with its neighbour."""
    cos, sin = place
    return torch.addcmul(heads * cos, heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), sin)
