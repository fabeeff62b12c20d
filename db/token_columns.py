"""How the tokens of an outcome are kept: typed arrays on PostgreSQL, a JSON array of small records on SQLite.

Drafts are rare and cost nothing where there are none: PostgreSQL keeps NULL for an outcome without any, SQLite a sixth
element only in the record of a token that was one.

Both ways write through the driver's own connection, inside the transaction that SQLAlchemy began.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, literal_column

from db.binary_copy import NULL, array_header, copied_rows, elements, text_field
from db.errors import RecordError
from db.queue import storable
from db.records import OutcomeRow, TokenArrays
from db.token_json import FIELDS, NUMPY_TYPES, from_json, ids_from_json, to_json

#: numpy type in PostgreSQL's byte order, and the type's object id in its catalogue (int4, int2, float4)
_POSTGRESQL_TYPES = ((">i4", 23), (">i2", 21), (">i2", 21), (">i2", 21), (">f4", 700), (">i2", 21))

_COLUMNS = "run_id, sample_id, task_id, n_tokens, prompt_tokens, cut_tokens, shown, isolated, text, error, finish"
_N_COLUMNS = len(_COLUMNS.split()) + len(FIELDS)
#: {}: a table with these columns
_COPY = f"COPY {{}} ({_COLUMNS}, {', '.join(FIELDS)}) FROM STDIN (FORMAT BINARY)"
_INSERT = f"INSERT INTO {{}} ({_COLUMNS}, tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

#: field count, then each fixed field behind its length: three int8, three int4, two bool
_FIXED = struct.Struct(">h iq iq iq ii ii ii i? i?".replace(" ", ""))


def insert_outcomes(connection: Connection, task_id: int, outcomes: Sequence[OutcomeRow]) -> None:
    """Write the outcomes of one shard with their tokens. Raises `RecordError` where tokens and counts disagree."""
    for outcome in outcomes:
        _check(outcome)
    write_rows(connection, "outcome", task_id, outcomes)


def write_rows(connection: Connection, table: str, task_id: int, outcomes: Sequence[OutcomeRow]) -> None:
    """Write outcomes into a table with the columns of `outcome`."""
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        driver.executemany(_INSERT.format(table), _rows(task_id, outcomes))
    else:
        with copied_rows(connection, _COPY.format(table), _copied_rows(task_id, outcomes)):
            pass


def selection(dialect: str) -> list[ColumnElement[Any]]:
    """The columns of `outcome` that `tokens_from` reads."""
    columns = ["outcome.tokens"] if dialect == "sqlite" else [f"array_send(outcome.{field})" for field in FIELDS]
    return [literal_column(column).label(f"tokens_{i}") for i, column in enumerate(columns)]


def tokens_from(dialect: str, columns: Sequence[Any]) -> TokenArrays | None:
    """The arrays back from what `selection` named; None for an error."""
    if columns[0] is None:
        return None
    return from_json(columns[0]) if dialect == "sqlite" else _from_arrays(columns)


def ids_selection(dialect: str, alias: str) -> ColumnElement[Any]:
    """What `ids_from` reads, of `outcome` under another name."""
    return literal_column(f"{alias}.tokens" if dialect == "sqlite" else f"array_send({alias}.token_ids)").label(
        f"ids_{alias}"
    )


def ids_from(dialect: str, kept: Any) -> list[int] | None:
    """The token ids of one outcome, without the place of a stop; None for an error."""
    if kept is None:
        return None
    ids = ids_from_json(kept) if dialect == "sqlite" else _elements(bytes(kept), _POSTGRESQL_TYPES[0][0]).tolist()
    return ids[:-1] if ids and ids[-1] < 0 else ids


def _rows(task_id: int, outcomes: Sequence[OutcomeRow]) -> Iterator[tuple[Any, ...]]:
    """Parameters of `_INSERT`."""
    texts = iter(to_json([o.tokens for o in outcomes if o.tokens is not None]))
    for o in outcomes:
        counts = (o.run_id, o.sample_id, task_id, o.n_tokens, o.prompt_tokens, o.cut_tokens, o.shown, o.isolated)
        kept = (value if value is None else storable(value) for value in (o.text, o.error, o.finish))
        yield (*counts, *kept, None if o.tokens is None else next(texts))


def _copied_rows(task_id: int, outcomes: Sequence[OutcomeRow]) -> Iterator[bytes]:
    """The rows of `_COPY`, in pieces."""
    arrays = zip(*_arrays([o.tokens for o in outcomes]), strict=True)
    for o, fields in zip(outcomes, arrays, strict=True):
        yield _FIXED.pack(
            _N_COLUMNS, 8, o.run_id, 8, o.sample_id, 8, task_id, 4, o.n_tokens, 4, o.prompt_tokens, 4, o.cut_tokens,
            1, o.shown, 1, o.isolated,
        )  # fmt: skip
        yield text_field(o.text)
        yield text_field(o.error)
        yield text_field(o.finish)
        yield from fields


def _check(outcome: OutcomeRow) -> None:
    expected = outcome.n_tokens + (outcome.finish == "stop") if outcome.error is None else 0
    found = len(outcome.tokens) if outcome.tokens is not None else 0
    if found != expected or (outcome.error is None) != (outcome.tokens is not None):
        raise RecordError(
            f"sample {outcome.sample_id} under run {outcome.run_id} has {found} token records where {expected} belong."
        )


def _arrays(tokens: Sequence[TokenArrays | None]) -> Iterator[list[bytes]]:
    """Of each of `FIELDS` the fields of all outcomes: all elements are encoded at once, then cut by outcome."""
    kept = [one for one in tokens if one is not None]
    for field, dtype, (sent, oid) in zip(FIELDS, NUMPY_TYPES, _POSTGRESQL_TYPES, strict=True):
        joined = np.concatenate([np.empty(0, dtype), *(getattr(one, field) for one in kept)])
        if field == "drafts" and not joined.any():
            yield [NULL] * len(tokens)
        else:
            yield _cut(elements(joined, sent), tokens, field, 4 + np.dtype(sent).itemsize, oid)


def _cut(encoded: bytes, tokens: Sequence[TokenArrays | None], field: str, size: int, oid: int) -> list[bytes]:
    """The array of each outcome; NULL for None, and for drafts without any. size: of an element behind its length."""
    at, fields = 0, []
    for one in tokens:
        if one is None:
            fields.append(NULL)
            continue
        n = len(getattr(one, field))
        end = at + n * size
        is_null = field == "drafts" and not np.count_nonzero(one.drafts)  # on ten tokens a fifth of the time of `any`
        fields.append(NULL if is_null else array_header(n, size, oid) + encoded[at:end])
        at = end
    return fields


def _from_arrays(columns: Sequence[bytes | None]) -> TokenArrays:
    parts = zip(columns, _POSTGRESQL_TYPES, NUMPY_TYPES, strict=True)
    kept = ((data, dtype, native) for data, (dtype, _), native in parts if data is not None)
    return TokenArrays(*(_elements(bytes(data), dtype).astype(native) for data, dtype, native in kept))


def _elements(data: bytes, dtype: str) -> npt.NDArray[Any]:
    element = np.dtype([("length", ">i4"), ("value", dtype)])
    return np.frombuffer(data, element, offset=20)["value"] if len(data) > 20 else np.empty(0, dtype)
