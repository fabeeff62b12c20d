"""How the tokens of an outcome are kept: typed arrays on PostgreSQL, a JSON array of small records on SQLite.

Drafts are rare and cost nothing where there are none: PostgreSQL keeps NULL for an outcome without any, SQLite a sixth
element only in the record of a token that was one.

PostgreSQL takes rows by binary COPY, whose bytes numpy builds: about ten times faster than driver parameters. Both ways
write through the driver's own connection, inside the transaction that SQLAlchemy began.
"""

import json
import re
import struct
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, literal_column

from db.errors import RecordError
from db.queue import storable
from db.records import OutcomeRow, TokenArrays

#: drafts are the last, and may be absent
_FIELDS = ("token_ids", "exit_layers", "layers_run", "decisions", "confidences", "drafts")
#: numpy type in PostgreSQL's byte order, and the type's object id in its catalogue (int4, int2, float4)
_POSTGRESQL_TYPES = ((">i4", 23), (">i2", 21), (">i2", 21), (">i2", 21), (">f4", 700), (">i2", 21))
_NUMPY_TYPES = (np.int32, np.int16, np.int16, np.int16, np.float32, np.int16)

_COLUMNS = "run_id, sample_id, task_id, n_tokens, prompt_tokens, cut_tokens, shown, isolated, text, error, finish"
_N_COLUMNS = len(_COLUMNS.split()) + len(_FIELDS)
_COPY = f"COPY outcome ({_COLUMNS}, {', '.join(_FIELDS)}) FROM STDIN (FORMAT BINARY)"
_INSERT = f"INSERT INTO outcome ({_COLUMNS}, tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

_RECORD, _RECORD_OF_DRAFT = "[%d,%d,%d,%d,%r]", "[%d,%d,%d,%d,%r,%d]"
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
    if _has_drafts(tokens):
        records = [_RECORD_OF_DRAFT % row if row[-1] else _RECORD % row[:-1] for row in _rows(tokens, _FIELDS)]
    else:
        records = [_RECORD % row for row in _rows(tokens, _FIELDS[:-1])]
    text = "[" + ",".join(records) + "]"
    return _NOT_A_NUMBER.sub("null", text) if "n" in text else text


def _rows(tokens: TokenArrays, fields: Sequence[str]) -> Iterable[tuple[Any, ...]]:
    return zip(*(getattr(tokens, field).tolist() for field in fields), strict=True)


def _has_drafts(tokens: TokenArrays) -> bool:
    return bool(np.count_nonzero(tokens.drafts))  # on ten tokens a fifth of the time of `any`


def _from_json(text: str) -> TokenArrays:
    columns = list(zip_longest(*json.loads(text), fillvalue=0)) or [()] * len(_FIELDS)
    return TokenArrays(*(np.array(column, dtype) for column, dtype in zip(columns, _NUMPY_TYPES, strict=False)))


def _copy_rows(task_id: int, outcomes: Sequence[OutcomeRow]) -> Iterable[bytes]:
    tokens = [o.tokens for o in outcomes]
    drafting = [t if t is not None and _has_drafts(t) else None for t in tokens]
    kept_of = [tokens] * (len(_FIELDS) - 1) + [drafting]
    arrays = zip(*(_array_fields(kept, i) for i, kept in enumerate(kept_of)), strict=True)
    for outcome, fields in zip(outcomes, arrays, strict=True):
        run, sample, task, n, prompt, cut, shown, isolated, *texts = _plain(task_id, outcome)
        yield _FIXED.pack(_N_COLUMNS, 8, run, 8, sample, 8, task, 4, n, 4, prompt, 4, cut, 1, shown, 1, isolated)
        yield from map(_text_field, texts)
        yield from fields


def _text_field(value: str | None) -> bytes:
    if value is None:
        return _NULL
    encoded = value.encode()
    return struct.pack(">i", len(encoded)) + encoded


def _array_fields(tokens: list[TokenArrays | None], i: int) -> list[bytes]:
    """Field i of every outcome as COPY fields, NULL for None: all elements are encoded at once, then cut by outcome."""
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


def _from_arrays(columns: Sequence[bytes | None]) -> TokenArrays:
    parts = zip(columns, _POSTGRESQL_TYPES, _NUMPY_TYPES, strict=True)
    kept = ((data, dtype, native) for data, (dtype, _), native in parts if data is not None)
    return TokenArrays(*(_elements(bytes(data), dtype).astype(native) for data, dtype, native in kept))


def _elements(data: bytes, dtype: str) -> npt.NDArray[Any]:
    element = np.dtype([("length", ">i4"), ("value", dtype)])
    return np.frombuffer(data, element, offset=20)["value"] if len(data) > 20 else np.empty(0, dtype)
