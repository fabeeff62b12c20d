"""Tokens as JSON text: what numpy writes is what Python would write, number by number."""

import json
import sqlite3

import numpy as np
import pytest

from db.records import TokenArrays
from db.token_json import from_json, to_json


def tokens(confidences: np.ndarray, drafts: int = 0) -> TokenArrays:
    """Ids of every length, a stop behind them."""
    n = len(confidences)
    ids = np.append(10 ** (np.arange(n - 1) % 10), -1).astype(np.int32)
    layers = (np.arange(n) * 7 % 32_768).astype(np.int16)
    return TokenArrays(
        ids, layers, layers[::-1].copy(), (np.arange(n) % 3).astype(np.int16), confidences, layers * drafts
    )


def plain(one: TokenArrays) -> list[list[object]]:
    columns = (one.token_ids, one.exit_layers, one.layers_run, one.decisions, one.confidences, one.drafts)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [[*row[:4], row[4] if np.isfinite(row[4]) else None, *([row[5]] if row[5] else [])] for row in rows]


@pytest.mark.parametrize(
    "confidences",
    [
        np.linspace(0, 1, 50_000),
        np.random.default_rng(0).random(50_000) ** 9,
        np.nextafter(np.array([1 / 16, 1 / 16, 1, 1], np.float32), np.array([0, 1, 0, 2], np.float32)),
        np.array([0, 1, -1, 1e-38, 3e38, np.nan, np.inf, -np.inf, 1e-45]),
        np.random.default_rng(0).integers(0, 2**32, 50_000, np.uint32).view(np.float32),
    ],
    ids=["even", "small", "at the edges", "strange", "any bits"],
)
@pytest.mark.parametrize("drafts", [0, -1])
def test_every_number_is_exact(confidences: np.ndarray, drafts: int) -> None:
    """As Python reads it, to the last bit of a double, and as SQLite does where it is exact itself."""
    with np.errstate(invalid="ignore"):
        sent = tokens(confidences.astype(np.float32), drafts)
    [text] = to_json([sent])
    assert json.loads(text) == plain(sent)
    with sqlite3.connect(":memory:") as connection:
        read = connection.execute("SELECT json_extract(value, '$[4]') FROM json_each(?)", (text,)).fetchall()
    pairs = [(ours, row[4]) for (ours,), row in zip(read, plain(sent), strict=True) if row[4] and 0.01 < row[4] < 100]
    assert all(ours == theirs for ours, theirs in pairs)


def test_outcomes_of_any_length_stay_apart() -> None:
    """Also one without a token, and those with drafts between those without."""
    rng = np.random.default_rng(0)
    sent = [tokens(rng.random(n, np.float32), drafts=n % 2) for n in (3, 1, 0, 8, 1, 0, 5) if n] + [from_json("[]")]
    sent.insert(0, from_json("[]"))
    assert [json.loads(text) for text in to_json(sent)] == [plain(one) for one in sent]
    assert to_json([]) == []
    assert to_json([from_json("[]")]) == ["[]"]


def test_columns_of_different_lengths_are_refused() -> None:
    good = tokens(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="broadcast"):
        to_json([TokenArrays(good.token_ids, good.exit_layers[:2], good.layers_run, good.decisions, good.confidences)])
