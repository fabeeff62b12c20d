"""How scores are written: many at once, through the driver, inside the transaction that SQLAlchemy began."""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection

from db.binary_copy import copy_rows, text_field
from db.records import ScoreRow

_COLUMNS = "metric, version, run_id, revision, sample_id, value"
_COPY = f"COPY score ({_COLUMNS}) FROM STDIN (FORMAT BINARY)"
_INSERT = f"INSERT INTO score ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"

_FIELD_COUNT = struct.pack(">h", len(_COLUMNS.split()))
#: each field behind its length: int8, int4, int8, float8
_NUMBERS = struct.Struct(">iq ii iq id".replace(" ", ""))


def insert_scores(connection: Connection, scores: Sequence[ScoreRow], revisions: dict[int, int]) -> None:
    """Write scores, each under the revision of its run."""
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        driver.executemany(
            _INSERT, ((s.metric, s.version, s.run_id, revisions[s.run_id], s.sample_id, s.value) for s in scores)
        )
    else:
        copy_rows(connection, _COPY, _copied_rows(scores, revisions))


def _copied_rows(scores: Sequence[ScoreRow], revisions: dict[int, int]) -> Iterator[bytes]:
    """Half of each row is the same for all scores of a metric."""
    begins = {
        (metric, version): _FIELD_COUNT + text_field(metric) + text_field(version)
        for metric, version in {(s.metric, s.version) for s in scores}
    }
    for s in scores:
        yield begins[s.metric, s.version]
        yield _NUMBERS.pack(8, s.run_id, 4, revisions[s.run_id], 8, s.sample_id, 8, s.value)
