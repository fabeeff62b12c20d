"""Runs of twelve tokens: what two texts have in common whatever their layout, and hardly ever by chance.

Shared by what keeps a training corpus apart from benchmarks and by what looks for a benchmark in a corpus.
"""

import re
import zlib

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

#: tokens of a shingle
LENGTH = 12
_TOKEN = re.compile(r"\w+|[^\w\s]")
_FACTORS = np.array([pow(6364136223846793005, place + 1, 1 << 64) for place in range(LENGTH)], np.uint64)


def tokens_of(text: str) -> list[str]:
    """Words and numbers, and every other sign by itself; white space separates and does not count."""
    return _TOKEN.findall(text)


def token_ends(text: str) -> list[int]:
    """Where in the text each token ends, in characters."""
    return [found.end() for found in _TOKEN.finditer(text)]


def shingles(text: str) -> Hashes:
    """[n - 11] a hash of 64 bits for each run of twelve of the text's n tokens, in order; none where it has fewer."""
    tokens = tokens_of(text)
    if len(tokens) < LENGTH:
        return np.zeros(0, np.uint64)
    known = {token: _number(token) for token in set(tokens)}
    numbers = np.array([known[token] for token in tokens], np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(numbers, LENGTH)
    return _spread((runs * _FACTORS).sum(axis=1, dtype=np.uint64))


def _number(token: str) -> int:
    """64 bits: two checksums side by side, one of them over the reversed token."""
    encoded = token.encode("utf-8", "surrogatepass")
    return zlib.crc32(encoded) << 32 | zlib.crc32(encoded[::-1], 0x5BD1E995)


def _spread(sums: Hashes) -> Hashes:
    """As the last step of SplitMix64 does (Steele et al. 2014), so that close sums are far apart."""
    sums = (sums ^ (sums >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    sums = (sums ^ (sums >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return sums ^ (sums >> np.uint64(31))
