"""Tokens as JSON, on SQLite: an array of small records an outcome.

numpy writes the records of many outcomes at once, four times faster than Python formats them one by one. They all get
one width: what is shorter is padded with blanks, which JSON allows between values.
"""

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from db.records import TokenArrays

#: drafts are the last, and stand only in the record of a token that was one
FIELDS = ("token_ids", "exit_layers", "layers_run", "decisions", "confidences", "drafts")
NUMPY_TYPES = (np.int32, np.int16, np.int16, np.int16, np.float32, np.int16)

Characters = npt.NDArray[np.uint8]  # [n, width]

_BLANK, _ZERO, _MINUS, _POINT = b" 0-."
#: from here on up to 1, seventeen decimals tell a double from its neighbours (half the distance is 2 ** -57)
_DECIMALS_SUFFICE = 2.0**-4
_HIGH, _LOW = 8, 9  # of the seventeen
#: characters of 0. and the decimals
_DECIMALS = 2 + _HIGH + _LOW
#: digits written at once: 0000 to 9999
_GROUP = 4
_FOUR_DIGITS = np.array([f"{number:04d}".encode() for number in range(10**_GROUP)]).view(np.uint32)


def to_json(tokens: Sequence[TokenArrays]) -> list[str]:
    """Of each outcome. A confidence that is not a number becomes null."""
    drafting = [bool(np.count_nonzero(one.drafts)) for one in tokens]
    plain = iter(_to_json([one for one, drafts in zip(tokens, drafting, strict=True) if not drafts], FIELDS[:-1]))
    drafted = iter(_to_json([one for one, drafts in zip(tokens, drafting, strict=True) if drafts], FIELDS))
    return [next(drafted if drafts else plain) for drafts in drafting]


def from_json(text: str) -> TokenArrays:
    """The arrays of one outcome."""
    columns = list(zip_longest(*json.loads(text), fillvalue=0)) or [()] * len(FIELDS)
    return TokenArrays(*(np.array(column, dtype) for column, dtype in zip(columns, NUMPY_TYPES, strict=False)))


def ids_from_json(text: str) -> list[int]:
    """The token ids of one outcome, a stop's -1 among them."""
    return [record[0] for record in json.loads(text)]


def _to_json(tokens: list[TokenArrays], fields: Sequence[str]) -> list[str]:
    if not any(map(len, tokens)):
        return ["[]"] * len(tokens)
    records = _records([np.concatenate([getattr(one, field) for one in tokens]) for field in fields])
    text, width = records.tobytes().decode("ascii"), records.shape[1]
    written, at = [], 0
    for one in tokens:
        end = at + len(one) * width
        written.append(f"[{text[at : end - 1]}]" if end > at else "[]")  # without the last comma
        at = end
    return written


def _records(columns: Sequence[npt.NDArray[Any]]) -> Characters:
    """A record a row, with the comma behind it. Raises `ValueError` where the columns differ in length."""
    token_ids, exit_layers, layers_run, decisions, confidences, *drafts = columns
    parts: list[Characters] = [_literal("[")]
    for column in (token_ids, exit_layers, layers_run, decisions):
        parts += [_whole_numbers(column), _literal(",")]
    parts += [_confidences(confidences), *map(_drafts, drafts), _literal("],")]
    first = np.hstack([part[:1] for part in parts])
    records = np.repeat(first, len(token_ids), axis=0)
    at = 0
    for part in parts:
        end = at + part.shape[1]
        if len(part) > 1:
            records[:, at:end] = part
        at = end
    return records


def _literal(text: str) -> Characters:
    return np.frombuffer(text.encode(), np.uint8)[None]


def _whole_numbers(values: npt.NDArray[Any]) -> Characters:
    """Right-aligned."""
    magnitudes = np.abs(values.astype(np.int64))
    negative = np.flatnonzero(values < 0)
    width = len(str(magnitudes.max(initial=0))) + bool(len(negative))
    characters = _digits(magnitudes, width)
    for place in range(width - 1):
        characters[magnitudes < 10 ** (width - 1 - place), place] = _BLANK
    blanks = (characters[negative] == _BLANK).sum(axis=1)
    characters[negative, blanks - 1] = _MINUS
    return characters


def _digits(values: npt.NDArray[np.int64], width: int) -> Characters:
    """The last `width` decimal digits, with zeros before."""
    groups = -(-width // _GROUP)
    characters = np.empty((len(values), groups), _FOUR_DIGITS.dtype)
    for place in reversed(range(groups)):
        rest = values // 10**_GROUP
        characters[:, place] = _FOUR_DIGITS[values - rest * 10**_GROUP]
        values = rest
    return characters.view(np.uint8)[:, groups * _GROUP - width :]


def _confidences(values: npt.NDArray[np.float32]) -> Characters:
    """Seventeen decimals where they suffice, otherwise as Python writes it; left-aligned."""
    with np.errstate(invalid="ignore"):  # of what is no number there are several kinds
        exact = values.astype(np.float64)
    suffice = (exact >= _DECIMALS_SUFFICE) & (exact <= 1)
    others = [repr(value) if np.isfinite(value) else "null" for value in exact[~suffice].tolist()]
    characters = _decimals(np.where(suffice, exact, 0.0), max(_DECIMALS, *map(len, others), 0))
    width = characters.shape[1]
    texts = "".join(text.ljust(width) for text in others)
    characters[~suffice] = np.frombuffer(texts.encode(), np.uint8).reshape(-1, width)
    return characters


def _decimals(values: npt.NDArray[np.float64], width: int) -> Characters:
    """Numbers from 0 to 1 that a float32 holds. What is multiplied first is exact: 24 bits by 19, and a shift."""
    scaled = values * 10**_HIGH
    high = np.floor(scaled)
    low = np.rint((scaled - high) * 10**_LOW)
    carried = low == 10**_LOW
    high, low = high + carried, np.where(carried, 0, low)
    characters = np.full((len(values), width), _BLANK, np.uint8)
    characters[:, 0] = _ZERO + (high == 10**_HIGH)
    characters[:, 1] = _POINT
    characters[:, 2 : 2 + _HIGH] = _digits(high.astype(np.int64), _HIGH)
    characters[:, 2 + _HIGH : _DECIMALS] = _digits(low.astype(np.int64), _LOW)
    return characters


def _drafts(values: npt.NDArray[np.int16]) -> Characters:
    """With the comma before it; blank for a token that was none."""
    numbers = _whole_numbers(values)
    characters = np.hstack([np.full((len(values), 1), ord(","), np.uint8), numbers])
    characters[values == 0] = _BLANK
    return characters
