"""Texts side by side: where two differ, piece by piece, and tokens as texts."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Literal

from cluster.reports.decoder import decoder
from cluster.reports.examples import Decode
from db.session import Database

_PIECES = re.compile(r"\w+|\s|[^\w\s]")
#: pieces of either text that are compared; what is longer differs as a whole
_MOST_PIECES = 2_000


@dataclass(frozen=True)
class Piece:
    """A stretch of a text."""

    kind: Literal["same", "missing", "added"]  #: missing: only the other text has it
    text: str


def difference(text: str, other: str) -> list[Piece]:
    """What `text` has and lacks, held against `other`."""
    old, new = _PIECES.findall(other), _PIECES.findall(text)
    if max(len(old), len(new)) > _MOST_PIECES:
        return [Piece("same", text)] if text == other else [Piece("missing", other), Piece("added", text)]
    found: list[Piece] = []
    for what, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            found.append(Piece("same", "".join(new[c:d])))
            continue
        if b > a:
            found.append(Piece("missing", "".join(old[a:b])))
        if d > c:
            found.append(Piece("added", "".join(new[c:d])))
    return found


@lru_cache(8)
def texts_of(db: Database, job_id: int) -> tuple[Decode, bool]:
    """The texts of token ids, and whether they are that: numbers where the tokenizer is not on this machine."""
    decode = decoder(db, job_id)
    return (_numbers, False) if decode is None else (decode, True)


def _numbers(ids: list[int]) -> list[str]:
    return [f"[{id}]" for id in ids]
