"""How the tokens of an outcome are kept: typed arrays on PostgreSQL, a JSON array of small records on SQLite.

PostgreSQL takes rows by binary COPY, whose bytes numpy builds: about ten times faster than driver parameters. Both ways
write through the driver's own connection, inside the transaction that SQLAlchemy began.
"""

import json
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, literal_column

from db.errors import RecordError
from db.queue import storable
from db.records import OutcomeRow, TokenArrays

_FIELDS = ("token_ids", "exit_layers", "layers_run", "decisions", "confidences")
#: numpy type in PostgreSQL's byte order, and the type's object id in its catalogue (int4, int2, float4)
_POSTGRESQL_TYPES = ((">i4", 23), (">i2", 21), (">i2", 21), (">i2", 21), (">f4", 700))
_NUMPY_TYPES = (np.int32, np.int16, np.int16, np.int16, np.float32)

_COLUMNS = "run_id, sample_id, task_id, n_tokens, prompt_tokens, cut_tokens, shown, isolated, text, error, finish"
_COPY = f"COPY outcome ({_COLUMNS}, {', '.join(_FIELDS)}) FROM STDIN (FORMAT BINARY)"
_INSERT = f"INSERT INTO outcome ({_COLUMNS}, tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

_RECORD = "[%d,%d,%d,%d,%r]"
_NOT_A_NUMBER = re.compile(r"nan|-?inf")

_COPY_BEGIN = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
_COPY_END = struct.pack(">h", -1)
_NULL = struct.pack(">i", -1)
#: field count, then each fixed field behind its length: three int8, three int4, two bool
_FIXED = struct.Struct(">h iq iq iq ii ii ii i? i?".replace(" ", ""))


def insert_outcomes(connection: Connection, task_id: int, outcomes: Sequence[OutcomeRow]) -> None:
    """Write the outcomes of one shard with their tokens. Raises `RecordError` where tokens and counts disagree."""
    for outcome in outcomes:
        _check(outcome)
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == "sqlite":
        driver.executemany(_INSERT, ((*_plain(task_id, o), _to_json(o.tokens)) for o in outcomes))
        return
    with driver.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.write(b"".join([_COPY_BEGIN, *_copy_rows(task_id, outcomes), _COPY_END]))


def selection(dialect: str) -> list[ColumnElement[Any]]:
    """The columns of `outcome` that `tokens_from` reads."""
    columns = ["outcome.tokens"] if dialect == "sqlite" else [f"array_send(outcome.{field})" for field in _FIELDS]
    return [literal_column(column).label(f"tokens_{i}") for i, column in enumerate(columns)]


def tokens_from(dialect: str, columns: Sequence[Any]) -> TokenArrays | None:
    """The arrays back from what `selection` named; None for an error."""
    if columns[0] is None:
        return None
    return _from_json(columns[0]) if dialect == "sqlite" else _from_arrays(columns)


def _check(outcome: OutcomeRow) -> None:
    expected = outcome.n_tokens + (outcome.finish == "stop") if outcome.error is None else 0
    found = len(outcome.tokens) if outcome.tokens is not None else 0
    if found != expected or (outcome.error is None) != (outcome.tokens is not None):
        raise RecordError(
            f"sample {outcome.sample_id} under run {outcome.run_id} has {found} token records where {expected} belong."
        )


def _plain(task_id: int, o: OutcomeRow) -> tuple[Any, ...]:
    counts = (o.run_id, o.sample_id, task_id, o.n_tokens, o.prompt_tokens, o.cut_tokens, o.shown, o.isolated)
    return (*counts, *(value if value is None else storable(value) for value in (o.text, o.error, o.finish)))


def _to_json(tokens: TokenArrays | None) -> str | None:
    """A confidence that is not a number becomes null. Formatting by hand takes two thirds of what `json.dumps` does."""
    if tokens is None:
        return None
    rows = zip(*(getattr(tokens, field).tolist() for field in _FIELDS), strict=True)
    text = "[" + ",".join([_RECORD % row for row in rows]) + "]"
    return text if np.isfinite(tokens.confidences).all() else _NOT_A_NUMBER.sub("null", text)


def _from_json(text: str) -> TokenArrays:
    columns = list(zip(*json.loads(text), strict=True)) or [()] * len(_FIELDS)
    return TokenArrays(*(np.array(column, dtype) for column, dtype in zip(columns, _NUMPY_TYPES, strict=True)))


def _copy_rows(task_id: int, outcomes: Sequence[OutcomeRow]) -> Iterable[bytes]:
    arrays = zip(*(_array_fields([o.tokens for o in outcomes], i) for i in range(len(_FIELDS))), strict=True)
    for outcome, fields in zip(outcomes, arrays, strict=True):
        *fixed, text, error, finish = _plain(task_id, outcome)
        widths = (8, 8, 8, 4, 4, 4, 1, 1)
        yield _FIXED.pack(16, *(part for pair in zip(widths, fixed, strict=True) for part in pair))
        yield from (_text_field(value) for value in (text, error, finish))
        yield from fields


def _text_field(value: str | None) -> bytes:
    if value is None:
        return _NULL
    encoded = value.encode()
    return struct.pack(">i", len(encoded)) + encoded


def _array_fields(tokens: list[TokenArrays | None], i: int) -> list[bytes]:
    """Column i of every outcome as COPY fields: all elements are encoded at once, then cut by outcome."""
    dtype, oid = _POSTGRESQL_TYPES[i]
    values = [getattr(t, _FIELDS[i]) for t in tokens if t is not None]
    element = np.dtype([("length", ">i4"), ("value", dtype)])
    encoded = np.empty(sum(map(len, values)), element)
    encoded["length"] = element["value"].itemsize
    encoded["value"] = np.concatenate(values) if values else 0
    everything, at, fields = memoryview(encoded.tobytes()), 0, []
    for t in tokens:
        n = 0 if t is None else len(t)
        size = n * element.itemsize
        fields.append(_NULL if t is None else _array_header(n, size, oid) + everything[at : at + size])
        at += size
    return fields


def _array_header(n: int, size: int, oid: int) -> bytes:
    """Field length, dimensions, has-nulls, element type; then for one dimension its length and lower bound."""
    if n == 0:
        return struct.pack(">iiii", 12, 0, 0, oid)
    return struct.pack(">iiiiii", 20 + size, 1, 0, oid, n, 1)


def _from_arrays(columns: Sequence[bytes]) -> TokenArrays:
    parts = zip(columns, _POSTGRESQL_TYPES, _NUMPY_TYPES, strict=True)
    return TokenArrays(*(_elements(bytes(data), dtype).astype(native) for data, (dtype, _), native in parts))


def _elements(data: bytes, dtype: str) -> npt.NDArray[Any]:
    element = np.dtype([("length", ">i4"), ("value", dtype)])
    return np.frombuffer(data, element, offset=20)["value"] if len(data) > 20 else np.empty(0, dtype)
