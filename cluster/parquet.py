"""Rows whose types nobody has announced, as a Parquet file: written aside first, until each column's type is known."""

import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

#: rows in memory at a time
_ROWS = 10_000
_SMALLEST, _BEYOND = -(2**63), 2**63


def write_parquet(file: Path, columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> None:
    """A column holds integers, floats (integers among them), booleans or bytes; everything else is text.

    SQLite gives any type in any row, so all rows are looked at before the first is written.
    """
    seen: list[set[type]] = [set() for _ in columns]
    with tempfile.TemporaryFile() as aside:
        for piece in _pieces(rows):
            for kinds, values in zip(seen, zip(*piece, strict=True), strict=True):
                kinds.update(map(_kind, values))
            pickle.dump(piece, aside)
        aside.seek(0)
        schema = pa.schema([(name, _type(kinds)) for name, kinds in zip(columns, seen, strict=True)])
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for piece in _again(aside):
                by_column = zip(zip(*piece, strict=True), schema, strict=True)
                arrays = [_array(values, field.type) for values, field in by_column]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _pieces(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    ahead = iter(rows)
    while piece := list(islice(ahead, _ROWS)):
        yield piece


def _again(aside: IO[bytes]) -> Iterator[list[tuple[Any, ...]]]:
    while True:
        try:
            yield pickle.load(aside)
        except EOFError:
            return


def _kind(value: Any) -> type:
    if isinstance(value, int) and not isinstance(value, bool) and not _SMALLEST <= value < _BEYOND:
        return str
    return type(value)


def _type(kinds: set[type]) -> pa.DataType:
    present = kinds - {type(None)}
    for known, kind in (({int}, "int64"), ({int, float}, "float64"), ({bool}, "bool"), ({bytes}, "binary")):
        if present and present <= known:
            return pa.type_for_alias(kind)
    return pa.string()


def _array(values: tuple[Any, ...], kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        values = tuple(value if value is None else str(value) for value in values)
    elif pa.types.is_floating(kind):
        values = tuple(value if value is None else float(value) for value in values)
    return pa.array(values, type=kind)
