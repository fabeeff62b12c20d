"""Text metrics: a completion held against its reference, `(prediction, reference) -> float`.

Shares are 0..1. What is defined by somebody else's tool keeps that tool's scale: `es_codexglue`, `bleu` and `chrf` are
0..100, so that they can be laid beside published numbers.
"""

import keyword
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from rapidfuzz import fuzz, process
from rapidfuzz.distance import LCSseq

from workers.scoring.code_tokenizer import code_tokens

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU, CHRF

#: the least `es` of the first lines at which `accepted_loose` takes a completion for accepted
LOOSE = 0.9


def em(prediction: str, reference: str) -> float:
    """Exact match: equal after stripping trailing white space."""
    return float(prediction.rstrip() == reference.rstrip())


def em_line(prediction: str, reference: str) -> float:
    """Exact match of the first lines."""
    return em(first_line(prediction), first_line(reference))


def es(prediction: str, reference: str) -> float:
    """Edit similarity: rapidfuzz's normalised insertion-deletion ratio of the texts as they are."""
    return fuzz.ratio(prediction, reference) / 100


def es_of_many(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """`es` of pairs, in one call of compiled code."""
    if not len(predictions):
        return []
    ratios = process.cpdist(predictions, references, scorer=fuzz.ratio, dtype=np.float64, workers=1)
    return [ratio / 100 for ratio in ratios.tolist()]


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F (Lin 2004) over code tokens; two texts without any are equal, hence 1."""
    if not prediction.strip() and not reference.strip():
        return 1.0
    return _rouge_l(code_tokens(prediction), code_tokens(reference))


def rouge_l_default(prediction: str, reference: str) -> float:
    """What `rouge_score` reports without options: over `[a-z0-9]+` of the lower-cased text, so `a+b` equals `a-b`.

    Two texts without any such word score 0, as they do there.
    """
    return _rouge_l(_default_words(prediction), _default_words(reference))


def bleu(prediction: str, reference: str) -> float:
    """Sacrebleu's sentence BLEU with effective order, 0..100."""
    return float(_bleu().sentence_score(prediction, [reference]).score)


def chrf(prediction: str, reference: str) -> float:
    """Sacrebleu's sentence chrF, 0..100."""
    return float(_chrf().sentence_score(prediction, [reference]).score)


def identifier_f1(prediction: str, reference: str) -> float:
    """F1 over the identifiers of both, each counted as often as it stands there; 1 where neither has any.

    What stands in a string literal of one line, and the keywords of Python and of the C-like languages, are none.
    """
    ours, theirs = Counter(identifiers(prediction)), Counter(identifiers(reference))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


def accepted(prediction: str, reference: str) -> float:
    """An offline proxy for a user's acceptance: the first line is an exact match."""
    return em_line(prediction, reference)


def accepted_loose(prediction: str, reference: str) -> float:
    """An offline proxy that forgives a small edit: `es` of the first lines is at least 0.9."""
    return float(es(first_line(prediction), first_line(reference)) >= LOOSE)


def accepted_chars(prediction: str, reference: str) -> float:
    """How many characters of the reference's first line the completion begins with: what need not be typed."""
    pairs = zip(first_line(prediction), first_line(reference), strict=False)
    return float(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))


def first_line(text: str) -> str:
    """Up to the first newline."""
    return text.split("\n", 1)[0]


def identifiers(text: str) -> list[str]:
    """The identifiers of a piece of code, in order: no keywords, nothing inside a string literal of one line."""
    words = code_tokens(_STRING.sub(" ", text))
    return [word for word in words if word not in _KEYWORDS and (word[0].isalpha() or word[0] in "_$")]


def _rouge_l(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F of the longest common subsequence, in the order of operations of `rouge_score`."""
    if not prediction or not reference:
        return 0.0
    common = LCSseq.similarity(prediction, reference)
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _default_words(text: str) -> list[str]:
    return _NOT_DEFAULT.sub(" ", text.lower()).split()


@cache
def _bleu() -> "BLEU":
    """Imported on first use: a list of names should not wait for sacrebleu."""
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


@cache
def _chrf() -> "CHRF":
    from sacrebleu.metrics import CHRF

    return CHRF()


_NOT_DEFAULT = re.compile("[^a-z0-9]+")
#: with the letters in front that say what kind of literal it is
_STRING = re.compile(
    r""" (?:(?<![\w$])(?:[rRbBuUfFtT]{1,2}|u8R?|LR?|c))? (?:"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*') """, re.VERBOSE
)
#: with Python's, the words that C, C++, Go, Java, JavaScript, Rust and TypeScript all or mostly reserve
_RESERVED = (
    "abstract boolean byte case catch char const constexpr default delete do double else enum export extends extern "
    "false final float fn for func function goto if impl implements import inline instanceof int interface let long "
    "mod mut namespace native new null nullptr package private protected pub public return short signed sizeof static "
    "struct super switch template this throw throws true try typedef typename typeof union unsigned use using var "
    "virtual void volatile while"
)
_KEYWORDS = frozenset(keyword.kwlist) | frozenset(_RESERVED.split())
