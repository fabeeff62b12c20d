"""The tokens that heads may choose among: the most frequent of the corpus."""

from collections import Counter

import torch
from torch import Tensor

from engine.training.corpus import Window


def choose_shortlist(windows: list[Window], size: int, vocab_size: int) -> Tensor:
    """Ids of the most frequent tokens, rising [size]."""
    counts = Counter(token for window in windows for token in window.token_ids)
    # Byte-pair vocabularies number frequent tokens low: what was never seen is filled up from there.
    order = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(order[:size]))


def coverage(shortlist: Tensor, windows: list[Window], vocab_size: int) -> float:
    """Share of the tokens of these windows that a shortlist has."""
    has = torch.zeros(vocab_size, dtype=torch.bool)
    has[shortlist] = True
    return has[torch.tensor([window.token_ids for window in windows])].double().mean().item()
