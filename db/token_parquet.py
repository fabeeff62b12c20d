"""The tokens of an export: from arrays to Parquet's columns, and back."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from db.exchange import DECISIONS
from db.records import TokenArrays


def token_columns(place: int, kept: list[tuple[int, TokenArrays]]) -> list[pa.Array]:
    """Of completions of one run: (position of the sample, its tokens)."""
    lengths = [len(arrays) for _, arrays in kept]
    total = sum(lengths)

    def joined(name: str, dtype: type[Any]) -> npt.NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *(getattr(arrays, name) for _, arrays in kept)]).astype(dtype)

    decisions, drafts = joined("decisions", np.int8), joined("drafts", np.int16)
    never = drafts == 0
    return [
        pa.array(np.full(total, place, np.int32)),
        pa.array(np.repeat(np.array([position for position, _ in kept], np.int32), lengths)),
        pa.array(np.concatenate([np.empty(0, np.int32), *(np.arange(1, n + 1, dtype=np.int32) for n in lengths)])),
        pa.array(joined("token_ids", np.int32), mask=decisions == DECISIONS.index("stop")),
        pa.array(joined("exit_layers", np.int16)),
        pa.array(joined("layers_run", np.int16)),
        pa.DictionaryArray.from_arrays(decisions, list(DECISIONS)).cast(pa.string()),
        pa.array(joined("confidences", np.float32)),
        pa.array(np.abs(drafts), mask=never),
        pa.array(drafts > 0, mask=never),
    ]


class TokensOfExport:
    """The file's tokens, taken completion by completion."""

    def __init__(self, pieces: Iterator[pa.RecordBatch]) -> None:
        self._pieces = pieces
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._at = self._end = 0

    def take(self, run: int, sample: int, n: int) -> TokenArrays:
        """The next n, which must be those of this run and sample. Raises `ValueError`."""
        while self._end - self._at < n and self._more():
            pass
        own = {name: column[self._at : self._at + n] for name, column in self._columns.items()}
        self._at += n
        if n and not (len(own["run"]) == n and (own["run"] == run).all() and (own["sample"] == sample).all()):
            raise ValueError(f"sample {sample} of run {run} has other tokens than it counts")
        if not n:
            own = {name: np.empty(0, np.int16) for name in ("token_id", "exit_layer", "layers_run", "drafts")}
            own |= {"decision": np.empty(0, np.int16), "confidence": np.empty(0, np.float32)}
        return TokenArrays(
            token_ids=own["token_id"].astype(np.int32),
            exit_layers=own["exit_layer"],
            layers_run=own["layers_run"],
            decisions=own["decision"],
            confidences=own["confidence"],
            drafts=own["drafts"],
        )

    def left(self) -> bool:
        """Whether there are more than were taken."""
        return self._at < self._end or self._more()

    def _more(self) -> bool:
        piece = next(self._pieces, None)
        if piece is None:
            return False
        found = _numpy(piece)
        if self._columns:
            found = {name: np.concatenate([self._columns[name][self._at :], found[name]]) for name in found}
        self._columns, self._at, self._end = found, 0, len(found["run"])
        return True


def _numpy(piece: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
    def column(name: str, absent: Any) -> npt.NDArray[Any]:
        return pc.fill_null(piece.column(name), absent).to_numpy(zero_copy_only=False)

    decisions = pc.index_in(piece.column("decision"), value_set=pa.array(DECISIONS))
    kept, layers = column("draft_kept", True), column("draft_layer", 0)
    return {
        **{name: column(name, -1) for name in ("run", "sample", "token_id", "exit_layer", "layers_run")},
        "confidence": column("confidence", np.nan),
        "decision": decisions.to_numpy(zero_copy_only=False).astype(np.int16),
        "drafts": np.where(kept, layers, -layers).astype(np.int16),
    }
