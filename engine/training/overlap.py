"""Shared code: near-duplicates within a corpus, and what a corpus has in common with a benchmark.

Compared are shingles of twelve lexical tokens (words, or single signs), so that layout and line breaks do not matter.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_LENGTH = 12
_SIGN = re.compile(r"\w+|[^\w\s]")
_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(_LENGTH)], dtype=np.uint64)
#: every so manieth shingle, chosen by its hash, stands for all: what is kept of a corpus fits into memory
_SAMPLED = 8
_FEWEST = 4  #: sampled shingles below which a document is judged by all of its shingles
_DUPLICATE = 0.6  #: share of a document's shingles that were seen before
_OVERLAP = 0.2  #: share of a benchmark text's shingles that a document has: half a solution, or a docstring
_FEWEST_SHARED = 8  #: a few shingles in common are idiom


def shingles(text: str) -> Hashes:
    """Hashes of all different runs of twelve tokens, rising."""
    signs = np.array([zlib.crc32(sign.encode()) for sign in _SIGN.findall(text)], dtype=np.uint64)
    if len(signs) < _LENGTH:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(signs, _LENGTH)
    mixed = (windows * _POWERS).sum(axis=1, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed * np.uint64(0xBF58476D1CE4E5B9))


class Seen:
    """What was taken into a corpus so far."""

    def __init__(self) -> None:
        self._owner: dict[int, str] = {}

    def duplicate_of(self, found: Hashes) -> str | None:
        """The document of which one with these shingles is a near-duplicate."""
        mine = _sample(found)
        owners = [self._owner[shingle] for shingle in mine if shingle in self._owner]
        if not owners or len(owners) < _DUPLICATE * len(mine):
            return None
        return Counter(owners).most_common(1)[0][0]

    def add(self, name: str, found: Hashes) -> None:
        for shingle in _sample(found):
            self._owner.setdefault(shingle, name)


class Benchmarks:
    """Texts that a corpus must not have, by name."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        parts, owners = [], []
        for name, text in texts:
            found = shingles(text)
            owners.append(np.full(len(found), len(self._names)))
            parts.append(found)
            self._names.append(name)
            self._sizes.append(len(found))
        together = np.concatenate([np.empty(0, np.uint64), *parts])
        order = together.argsort(kind="stable")
        self._hashes, self._owners = together[order], np.concatenate([np.empty(0, np.int64), *owners])[order]

    def overlap(self, found: Hashes) -> str | None:
        """The text that a document with these shingles has too much in common with."""
        first = np.searchsorted(self._hashes, found, side="left")
        end = np.searchsorted(self._hashes, found, side="right")
        hits = [self._owners[a:b] for a, b in zip(first, end, strict=True) if b > a]
        if not hits:
            return None
        owner, shared = Counter(np.concatenate(hits).tolist()).most_common(1)[0]
        if shared < min(_FEWEST_SHARED, self._sizes[owner]) or shared < _OVERLAP * self._sizes[owner]:
            return None
        return self._names[owner]


def _sample(found: Hashes) -> list[int]:
    sampled = found[found % np.uint64(_SAMPLED) == 0]
    return (sampled if len(sampled) >= _FEWEST else found).tolist()
