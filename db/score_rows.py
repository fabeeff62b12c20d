"""How scores are written: many at once, through the driver, inside the transaction that SQLAlchemy began."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from db.binary_copy import copied_rows, text_field
from db.records import ScoreRow

_COLUMNS = "metric, version, run_id, revision, sample_id, value"
_COPY = f"COPY score ({_COLUMNS}) FROM STDIN (FORMAT BINARY)"
_INSERT = f"INSERT INTO score ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"

_FIELD_COUNT = struct.pack(">h", len(_COLUMNS.split()))
#: each field behind its length: int8, int4, int8, float8
_FIELDS = {"run_id": ">i8", "revision": ">i4", "sample_id": ">i8", "value": ">f8"}
_NUMBERS = np.dtype([pair for name, kind in _FIELDS.items() for pair in ((f"size of {name}", ">i4"), (name, kind))])


def insert_scores(connection: Connection, scores: Sequence[ScoreRow], revisions: dict[int, int]) -> None:
    """Write scores, each under the revision of its run."""
    with scores_sent(connection, scores, revisions):
        pass


@contextmanager
def scores_sent(connection: Connection, scores: Sequence[ScoreRow], revisions: dict[int, int]) -> Iterator[None]:
    """As `insert_scores`. What is done inside, without the database, is done while PostgreSQL takes them in."""
    if not scores:
        yield
    elif connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        driver.executemany(
            _INSERT, [(s.metric, s.version, s.run_id, revisions[s.run_id], s.sample_id, s.value) for s in scores]
        )
        yield
    else:
        with copied_rows(connection, _COPY, [_copied_rows(scores, revisions)]):
            yield


def _copied_rows(scores: Sequence[ScoreRow], revisions: dict[int, int]) -> bytes:
    """The rows of `_COPY`. What begins each is the same for all scores of a metric; the rest are numbers."""
    kinds: dict[tuple[str, str], int] = {}
    kind = np.array([kinds.setdefault((s.metric, s.version), len(kinds)) for s in scores])
    begins = [_FIELD_COUNT + text_field(metric) + text_field(version) for metric, version in kinds]
    width = max(map(len, begins))
    aligned = np.frombuffer(b"".join(begin.rjust(width) for begin in begins), np.uint8).reshape(-1, width)
    blank = np.array([width - len(begin) for begin in begins])
    rows = np.hstack([aligned[kind], _numbers(scores, revisions)])
    return rows[np.arange(rows.shape[1]) >= blank[kind, None]].tobytes()


def _numbers(scores: Sequence[ScoreRow], revisions: dict[int, int]) -> npt.NDArray[np.uint8]:
    fields = np.empty(len(scores), _NUMBERS)
    fields["run_id"] = [s.run_id for s in scores]
    fields["revision"] = [revisions[s.run_id] for s in scores]
    fields["sample_id"] = [s.sample_id for s in scores]
    fields["value"] = [s.value for s in scores]
    for name in _FIELDS:
        fields[f"size of {name}"] = _NUMBERS[name].itemsize
    return fields.view(np.uint8).reshape(len(scores), -1)
