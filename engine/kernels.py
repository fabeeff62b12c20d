"""Ways to multiply a few tokens with a large matrix."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

#: (states [tokens, inputs], weight [outputs, inputs], bias [outputs] or None) → [tokens, outputs]
Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def bucket(tokens: int) -> int:
    """Counts of tokens share a kernel by powers of two: 1, 2, 3–4, 5–8, …"""
    return (tokens - 1).bit_length()


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What PyTorch would do."""
    return F.linear(states, weight, bias)


KERNELS: dict[str, Kernel] = {"linear": linear}
