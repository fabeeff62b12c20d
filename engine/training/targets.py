"""What a head is to say: the distribution of full depth, its choice, the token that the source has, or a mix.

Where a shortlist has no place for what should be said, the head should be unsure: that part of the target is spread
evenly. A renormalised target would teach it to be sure of something else.
"""

import torch
from torch import Tensor

from engine.training.spec import Target


def targets(
    kind: Target, mix: float, full: Tensor, known: Tensor, choice: Tensor, reference: Tensor, n_outputs: int
) -> Tensor:
    """Probabilities that a head is to give some of its outputs, [states, some].

    full: full depth's probabilities of these; known: [states, 1] their sum over all of the head's outputs, where that
    is known. choice, reference: places of full depth's choice and of the source's token among these, -1 where missing.
    """
    if kind == "full":
        return full + (1 - known).clamp_min(0) / n_outputs
    if kind == "mix":
        wanted = targets("full", mix, full, known, choice, reference, n_outputs)
        return (1 - mix) * wanted + mix * _only(reference, full, n_outputs)
    return _only(choice if kind == "choice" else reference, full, n_outputs)


def _only(places: Tensor, like: Tensor, n_outputs: int) -> Tensor:
    """All for one output, a row a state; evenly where there is none."""
    rows = torch.zeros_like(like)
    found = (places >= 0).to(like.dtype)[:, None]
    rows.scatter_(1, places.clamp_min(0)[:, None], found)
    return rows + (1 - found) / n_outputs


def places_of(shortlist: Tensor | None, vocab_size: int) -> Tensor:
    """The place of each token of the vocabulary among a head's outputs; -1 where it has none, [vocabulary]."""
    if shortlist is None:
        return torch.arange(vocab_size)
    places = torch.full((vocab_size,), -1)
    places[shortlist] = torch.arange(len(shortlist))
    return places
