"""How scores are written: a row a completion, its values in the order of a list of metrics.

The list stands once in `metric_list`, under a number that its content gives: every writer knows it without asking. The
view `score` has a row for each value, on both databases alike.

Many rows at once, through the driver, inside the transaction that SQLAlchemy began.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from db.binary_copy import array_header, copied_rows
from db.errors import RecordError
from db.queue import storable
from db.records import ScoreRow
from db.tables import metric_list

#: (name, version), in the order of the values
Metrics = tuple[tuple[str, str], ...]

_COLUMNS = "list_id, run_id, revision, sample_id, scores"
_COPY = f"COPY score_row ({_COLUMNS}) FROM STDIN (FORMAT BINARY)"
_INSERT = f"INSERT INTO score_row ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)"

#: what the rows of one list have in common: field count, then int8 behind its length
_BEGIN = struct.Struct(">h iq".replace(" ", ""))
_N_COLUMNS = len(_COLUMNS.split())
_FLOAT8 = 701  # its object id in PostgreSQL's catalogue


def insert_scores(connection: Connection, scores: Sequence[ScoreRow], revisions: Mapping[int, int]) -> None:
    """Write the scores of completions, all that each has, under the revision of its run.

    Raises `RecordError` where a completion has two of one metric.
    """
    with scores_sent(connection, scores, revisions):
        pass


@contextmanager
def scores_sent(connection: Connection, scores: Sequence[ScoreRow], revisions: Mapping[int, int]) -> Iterator[None]:
    """As `insert_scores`. What is done inside, without the database, is done while PostgreSQL takes them in."""
    if not scores:
        yield
        return
    by_list = _by_list(scores)
    _insert_lists(connection, by_list)
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        driver.executemany(_INSERT, _rows(by_list, revisions))
        yield
    else:
        with copied_rows(connection, _COPY, _copied_rows(by_list, revisions)):
            yield


_Values = dict[tuple[int, int], list[float]]  #: by run and sample


def _by_list(scores: Iterable[ScoreRow]) -> dict[Metrics, _Values]:
    """Completions that have the same metrics stand together."""
    found: dict[tuple[int, int], list[ScoreRow]] = {}
    for score in scores:
        found.setdefault((score.run_id, score.sample_id), []).append(score)
    by_list: dict[Metrics, _Values] = {}
    for key, of_completion in found.items():
        metrics = tuple([(score.metric, score.version) for score in of_completion])
        values = by_list.get(metrics)
        if values is None:
            _check(metrics, *key)
            values = by_list[metrics] = {}
        values[key] = [score.value for score in of_completion]
    return by_list


def _check(metrics: Metrics, run_id: int, sample_id: int) -> None:
    names = [name for name, _ in metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecordError(f"sample {sample_id} under run {run_id} has two scores of {twice!r}; a metric gives one.")


def _insert_lists(connection: Connection, lists: Iterable[Metrics]) -> None:
    """Those that are new; in one order, so that no two writers wait for each other."""
    wanted = {_list_id(metrics): metrics for metrics in lists}
    asked = select(metric_list.c.list_id).where(metric_list.c.list_id.in_(wanted), metric_list.c.place == 1)
    there = set(connection.execute(asked).scalars())
    rows = [
        {"list_id": list_id, "place": place, "metric": storable(name), "version": storable(version)}
        for list_id in sorted(wanted.keys() - there)
        for place, (name, version) in enumerate(wanted[list_id], 1)
    ]
    if rows:
        new = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        connection.execute(new(metric_list).on_conflict_do_nothing(), rows)


def _list_id(metrics: Metrics) -> int:
    """A signed number of 64 bits; what has it has this content."""
    return int.from_bytes(hashlib.sha256(json.dumps(metrics).encode()).digest()[:8], "big", signed=True)


def _rows(by_list: Mapping[Metrics, _Values], revisions: Mapping[int, int]) -> Iterator[tuple[Any, ...]]:
    """Parameters of `_INSERT`. Python writes every digit that tells a number from its neighbours."""
    for metrics, values in by_list.items():
        list_id = _list_id(metrics)
        for (run_id, sample_id), numbers in values.items():
            yield list_id, run_id, revisions[run_id], sample_id, json.dumps(list(map(float, numbers)), allow_nan=False)


def _copied_rows(by_list: Mapping[Metrics, _Values], revisions: Mapping[int, int]) -> Iterator[bytes]:
    """The rows of `_COPY`. All rows of a list have one layout: numpy fills them column by column."""
    for metrics, values in by_list.items():
        n = len(metrics)
        header = array_header(n, 4 + 8, _FLOAT8)
        rows = np.empty(len(values), _layout(n, len(header)))
        keys = np.array(list(values), np.int64)
        rows["begin"] = np.void(_BEGIN.pack(_N_COLUMNS, 8, _list_id(metrics)))
        rows["run_size"] = rows["sample_size"] = 8
        rows["revision_size"] = 4
        rows["run_id"], rows["sample_id"] = keys[:, 0], keys[:, 1]
        rows["revision"] = [revisions[run_id] for run_id, _ in values]
        rows["header"] = np.void(header)
        rows["scores"]["size"] = 8
        rows["scores"]["value"] = np.array(list(values.values()), np.float64)
        yield rows.tobytes()


def _layout(n: int, header: int) -> npt.DTypeLike:
    """Of a row with n values, each field behind its length."""
    numbers = [("run_size", ">i4"), ("run_id", ">i8"), ("revision_size", ">i4"), ("revision", ">i4")]
    numbers += [("sample_size", ">i4"), ("sample_id", ">i8")]
    scores = ("scores", [("size", ">i4"), ("value", ">f8")], (n,))
    return np.dtype([("begin", f"V{_BEGIN.size}"), *numbers, ("header", f"V{header}"), scores])
