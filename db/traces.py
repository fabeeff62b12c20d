"""Traces: a row a sample, its arrays in one fixed layout under zstd.

Layout 1, little endian, no padding, for n tokens and p exit points: the right tokens, 4 n bytes; the most likely
tokens and the ranks, p n numbers of 3 bytes each (a rank of 2^24 - 1 is -1); p n floats of 4 bytes for probability,
margin, entropy, similarity and the controller's three probabilities in turn: 34 bytes a token and exit point,
and with the right token, over at least two exit points, at most 36.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sqlalchemy import Connection, and_, func, insert, select

from db.errors import BadInput, Missing, RecordError
from db.jobs import runs_of
from db.records import RunRow, TraceArrays, TracedSample, TraceRow
from db.session import Database
from db.tables import benchmark, run, sample, trace

LAYOUT = 1
#: bytes a token and exit point at most, before compression
MOST_BYTES = 36
_FLOATS = 7
_NEVER = 2**24 - 1

_ROW = [trace.c[name] for name in ("prompt_tokens", "prompt_key", "layout", "n_points", "n_tokens", "content")]
_SAMPLE = [sample.c[name] for name in ("id", "position", "name", "source_group", "language")]


def insert_traces(connection: Connection, traces: Sequence[TraceRow]) -> None:
    """Write the traces of samples."""
    if not traces:
        return
    rows = [
        {
            "run_id": row.run_id,
            "sample_id": row.sample_id,
            "layout": LAYOUT,
            "n_points": len(row.arrays.tokens),
            "n_tokens": len(row.arrays),
            "prompt_tokens": row.prompt_tokens,
            "prompt_key": row.prompt_key,
            "content": pack(row.arrays),
        }
        for row in traces
    ]
    connection.execute(insert(trace), rows)


def traces(db: Database, run_id: int, *, samples: int = 512, every: int = 1) -> Iterator[list[TracedSample]]:
    """The traces of a run in the benchmark's order, those of so many neighbouring samples at a time.

    every: of these pieces only the first, the one so many later, and so on.
    Samples that ended with an error have none. No transaction is open between two pieces. Raises `Missing`.
    """
    with db.read() as connection:
        of_job = connection.execute(select(run.c.job_id).where(run.c.id == run_id)).scalar_one_or_none()
        if of_job is None:
            raise Missing(f"run {run_id} does not exist; `shortstop show` lists the runs of a job.")
        [one] = [one for one in runs_of(connection, of_job) if one.id == run_id]
        size = select(benchmark.c.n_samples).where(benchmark.c.id == one.benchmark_id)
        n_samples = connection.execute(size).scalar_one()
    for first in range(0, n_samples, samples * every):
        with db.read() as connection:
            found = read_traces(connection, one, first, first + samples)
        if found:
            yield found


def read_traces(connection: Connection, one: RunRow, first: int, end: int) -> list[TracedSample]:
    """The traces of a run at positions `[first, end)` of its benchmark, in order, inside the caller's transaction."""
    within = (sample.c.benchmark_id == one.benchmark_id, sample.c.position >= first, sample.c.position < end)
    of_run = and_(trace.c.sample_id == sample.c.id, trace.c.run_id == one.id)
    chosen = select(*_SAMPLE, *_ROW).join(trace, of_run).where(*within).order_by(sample.c.position)
    return [_traced(*row) for row in connection.execute(chosen)]


def _traced(
    sample_id: int, position: int, name: str, group: str, language: str, tokens: int, key: int, *packed: Any
) -> TracedSample:
    return TracedSample(sample_id, position, name, group, language, tokens, key, unpack(*packed))


def source_groups(db: Database, run_id: int) -> list[str]:
    """The source groups that a trace has samples of, in the order of their names."""
    chosen = select(sample.c.source_group).join(trace).where(trace.c.run_id == run_id).distinct()
    with db.read() as connection:
        return sorted(connection.execute(chosen).scalars())


def traced_tokens(db: Database, run_id: int) -> int:
    """Tokens of all targets of a trace."""
    total = select(func.coalesce(func.sum(trace.c.n_tokens), 0)).where(trace.c.run_id == run_id)
    with db.read() as connection:
        return int(connection.execute(total).scalar_one())


def pack(arrays: TraceArrays) -> bytes:
    """The arrays in layout 1, compressed."""
    points, n = arrays.tokens.shape
    floats = np.concatenate(
        [
            np.stack([arrays.probabilities, arrays.margins, arrays.entropies, arrays.similarities]),
            arrays.controller.transpose(1, 0, 2),
        ]
    )
    parts = [arrays.targets.astype("<i4").tobytes(), _short(arrays.tokens), _short(arrays.ranks)]
    content = b"".join([*parts, floats.astype("<f4").tobytes()])
    assert len(content) == _size(points, n)
    return bytes(_zstd().compress(content, asbytes=True))


def unpack(layout: int, n_points: int, n_tokens: int, content: bytes) -> TraceArrays:
    """The arrays back. Raises `BadInput` for a layout of another version, `RecordError` where they are damaged."""
    if layout != LAYOUT:
        raise BadInput(f"a trace has layout {layout}, this version reads {LAYOUT}; trace the benchmark again.")
    cells = n_points * n_tokens
    try:
        raw = _zstd().decompress(content, _size(n_points, n_tokens), asbytes=True)
    except (OSError, ValueError) as error:
        raise RecordError(f"a trace is damaged ({error}); trace the benchmark again.") from None
    shape, at = (n_points, n_tokens), 4 * n_tokens
    floats = np.frombuffer(raw, "<f4", offset=at + 6 * cells).reshape(_FLOATS, *shape)
    ranks = _long(raw, at + 3 * cells, shape)
    return TraceArrays(
        targets=np.frombuffer(raw, "<i4", n_tokens),
        tokens=_long(raw, at, shape),
        probabilities=floats[0],
        margins=floats[1],
        entropies=floats[2],
        similarities=floats[3],
        controller=floats[4:].transpose(1, 0, 2),
        ranks=np.where(ranks == _NEVER, -1, ranks),
    )


def _size(points: int, n: int) -> int:
    return 4 * n + (6 + 4 * _FLOATS) * points * n


def _short(numbers: npt.NDArray[np.int32]) -> bytes:
    """Three bytes a number; -1 is the largest of them."""
    return numbers.astype("<i4")[..., None].view(np.uint8)[..., :3].tobytes()


def _long(raw: bytes, offset: int, shape: tuple[int, int]) -> npt.NDArray[np.int32]:
    count = shape[0] * shape[1]
    numbers = np.zeros((count, 4), np.uint8)
    numbers[:, :3] = np.frombuffer(raw, np.uint8, 3 * count, offset).reshape(count, 3)
    return numbers.view("<i4").reshape(shape).astype(np.int32, copy=False)


@cache
def _zstd() -> Any:
    return pa.Codec("zstd")
