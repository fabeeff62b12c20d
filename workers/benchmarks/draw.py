"""Draws that come out the same on every machine and every Python: ranks by SHA-256, no random stream."""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice

Place = tuple[str, int]  # a group, and an index within it


def draw(groups: Sequence[str], size: Callable[[str], int], count: int | None, seed: int) -> list[Place]:
    """Up to `count` places (group, index below `size(group)`), spread over the groups and in their order.

    Every group gives one before any gives a second. `size` is asked only of the groups that the draw reaches; without
    a `count` every place is drawn.
    """

    @cache
    def shuffled(group: str) -> list[int]:
        return sorted(range(size(group)), key=lambda index: _rank(seed, group, index))

    order = {group: place for place, group in enumerate(groups)}
    ranked = sorted(groups, key=lambda group: _rank(seed, group))
    return sorted(islice(_in_turns(ranked, shuffled), count), key=lambda place: (order[place[0]], place[1]))


def ranked(places: Iterable[int], group: Callable[[int], str], count: int, seed: int) -> Iterator[int]:
    """The places in the order in which `draw` would take them, were each the only one of its group.

    The first `count` and some more are found without remembering the ranks of all.
    """
    some = 2 * count + 100
    key = partial(_rank_of, group, seed)
    first = heapq.nsmallest(some, places, key=key)
    yield from first
    if len(first) == some:
        yield from sorted(places, key=key)[some:]


def _rank_of(group: Callable[[int], str], seed: int, place: int) -> str:
    return _rank(seed, group(place))


def choose(low: int, high: int, *key: str | int) -> int:
    """A whole number from `low` to `high`, both included, that the key fixes."""
    return low + int(_rank(*key), 16) % (high - low + 1)


def _in_turns(groups: list[str], shuffled: Callable[[str], list[int]]) -> Iterator[Place]:
    turn = 0
    while groups:
        left = []
        for group in groups:
            if turn < len(shuffled(group)):
                yield group, shuffled(group)[turn]
                left.append(group)
        groups, turn = left, turn + 1


def _rank(*key: str | int) -> str:
    return hashlib.sha256(json.dumps(key).encode("ascii")).hexdigest()
