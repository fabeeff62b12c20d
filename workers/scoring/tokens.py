"""Token metrics: a completion's token ids held against those of full depth for the same sample."""

from collections.abc import Sequence


def token_agreement(token_ids: Sequence[int], full_token_ids: Sequence[int]) -> float:
    """Share of the tokens written that stand at their place at full depth too; 1 where none was written.

    What a stop left unwritten is no disagreement: stops are accounted for apart.
    """
    if not len(token_ids):
        return 1.0
    equal = sum(token == full for token, full in zip(token_ids, full_token_ids, strict=False))
    return equal / len(token_ids)


def exact_agreement(token_ids: Sequence[int], full_token_ids: Sequence[int]) -> float:
    """Whether the completion equals the full-depth one in full."""
    return float(list(token_ids) == list(full_token_ids))


def first_divergence(token_ids: Sequence[int], full_token_ids: Sequence[int]) -> float:
    """How many tokens were written before the first that is not full depth's; all of them where none differs."""
    for place, token in enumerate(token_ids):
        if place >= len(full_token_ids) or token != full_token_ids[place]:
            return float(place)
    return float(len(token_ids))
