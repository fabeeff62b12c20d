"""The traces of an export: from arrays to Arrow's columns, a row a token and exit point, and back."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from db.records import TraceArrays, TracedSample

#: a trace's floats by the names of their columns; the controller's are null without one
_FLOATS = {
    "probability": "probabilities",
    "margin": "margins",
    "entropy": "entropies",
    "similarity": "similarities",
}
_CONTROLLER = ("p_continue", "p_exit", "p_stop")

#: what `cells` makes
CELL_FIELDS = [
    ("position", pa.int32()),  # in the target, from 1
    ("exit_layer", pa.int16()),  # the last is full depth
    ("target_id", pa.int32()),
    ("token_id", pa.int32()),
    ("rank", pa.int32()),  # of the target, from 1; null: this head cannot predict it
    *((name, pa.float32()) for name in (*_FLOATS, *_CONTROLLER)),
]


def cells(traces: Sequence[TraceArrays], points: Sequence[int]) -> dict[str, pa.Array]:
    """The columns `CELL_FIELDS` of some traces, each token by token, and from point to point.

    points: layers of the exit points, full depth last.
    """

    def by_cell(column: Callable[[TraceArrays], npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate([np.empty(0, np.float32), *(column(one).T.ravel() for one in traces)])

    def by_token(column: Callable[[TraceArrays], npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
        return np.concatenate([np.empty(0, np.int32), *(np.repeat(column(one), len(points)) for one in traces)])

    def whole(name: str) -> npt.NDArray[np.int32]:
        parts = [getattr(one, name).T.ravel() for one in traces]
        return np.concatenate([np.empty(0, np.int32), *parts])

    ranks = whole("ranks")
    made = {
        "position": pa.array(by_token(lambda one: np.arange(1, len(one) + 1, dtype=np.int32))),
        "exit_layer": pa.array(np.tile(np.array(points, np.int16), sum(map(len, traces)))),
        "target_id": pa.array(by_token(lambda one: one.targets)),
        "token_id": pa.array(whole("tokens")),
        "rank": pa.array(ranks + 1, pa.int32(), mask=ranks < 0),
    }
    for name, field in _FLOATS.items():
        made[name] = pa.array(by_cell(lambda one, field=field: getattr(one, field)))  # type: ignore[misc]
    for place, name in enumerate(_CONTROLLER):
        values = by_cell(lambda one, place=place: one.controller[:, place])  # type: ignore[misc]
        made[name] = pa.array(values, mask=np.isnan(values))
    return made


def trace_columns(place: int, samples: Sequence[TracedSample], points: Sequence[int]) -> list[pa.Array]:
    """The columns of an export's file: of one run, some samples."""
    counts = [len(one.arrays) * len(points) for one in samples]
    of_sample = [
        np.repeat(np.array(values, kind), counts)
        for values, kind in (
            ([place] * len(samples), np.int32),
            ([one.position for one in samples], np.int32),
            ([one.prompt_tokens for one in samples], np.int32),
            ([one.prompt_key for one in samples], np.int64),
        )
    ]
    return [*map(pa.array, of_sample), *cells([one.arrays for one in samples], points).values()]


def exported_traces(pieces: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, int, int, int, TraceArrays]]:
    """What `trace_columns` wrote, sample by sample: (run, sample, prompt tokens, prompt key, arrays).

    Raises `ValueError` where rows are not those of whole traces.
    """
    waiting: dict[str, npt.NDArray[np.float64]] = {}
    for piece in pieces:
        found = {name: _numpy(piece.column(name)) for name in piece.schema.names}
        waiting = {name: np.concatenate([waiting[name], found[name]]) for name in found} if waiting else found
        # the last sample may go on in the next piece
        *ends, _ = _ends(waiting)
        yield from _cut(waiting, ends)
        waiting = {name: column[ends[-1] if ends else 0 :] for name, column in waiting.items()}
    if waiting:
        yield from _cut(waiting, _ends(waiting))


def _ends(columns: dict[str, npt.NDArray[np.float64]]) -> list[int]:
    """Where the rows of each sample end."""
    differs = (np.diff(columns["run"]) != 0) | (np.diff(columns["sample"]) != 0)
    return [*(np.flatnonzero(differs) + 1).tolist(), len(columns["run"])]


def _cut(
    columns: dict[str, npt.NDArray[np.float64]], ends: list[int]
) -> Iterator[tuple[int, int, int, int, TraceArrays]]:
    begin = 0
    for end in ends:
        own = {name: column[begin:end] for name, column in columns.items()}
        points = int((own["position"] == 1).sum())
        if not points or (end - begin) % points:
            raise ValueError(f"the trace of sample {int(own['sample'][0])} is not whole")
        grid = {name: column.reshape(-1, points).T for name, column in own.items()}
        yield (
            *(int(own[name][0]) for name in ("run", "sample", "prompt_tokens", "prompt_key")),
            TraceArrays(
                targets=grid["target_id"][0].astype(np.int32),
                tokens=grid["token_id"].astype(np.int32),
                ranks=np.where(np.isnan(grid["rank"]), 0, grid["rank"]).astype(np.int32) - 1,
                controller=np.stack([grid[name] for name in _CONTROLLER], axis=1).astype(np.float32),
                **{field: grid[name].astype(np.float32) for name, field in _FLOATS.items()},
            ),
        )  # type: ignore[misc]
        begin = end


def _numpy(column: pa.Array) -> npt.NDArray[np.float64]:
    """As floats, which hold every number of these columns; nan where there is none."""
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)
