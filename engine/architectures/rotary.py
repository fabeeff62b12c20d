"""Rotary positions (Su et al. 2021), as the Hugging Face classes compute them."""

from typing import Any

import torch
from torch import Tensor


def rotary_table(embedding: Any, context: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [context, 1, head size] of a model's rotary module, for `rotate`.

    The two halves of a head turn against each other: (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin). With the sign in
    the table, the partner of each element is found by a roll.
    """
    positions = torch.arange(context, device=like.device)[None]
    cos, sin = embedding(like[:1, None], positions)
    half = sin.shape[-1] // 2
    return cos[0][:, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)[:, None]


def rotate(heads: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    """Heads [tokens, heads, head size] turned by rows of the table, [tokens, 1, head size] each."""
    cos, sin = place
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)
