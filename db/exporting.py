"""Writing an export: one moment of the record, a window of samples at a time."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import ColumnElement, Connection, Row, Select, and_, select

from db.errors import BadInput
from db.exchange import EXITS, SCHEMAS, digest, parquet, write_manifest
from db.jobs import runs_of
from db.partial import is_partial
from db.records import JobState, RunRow, SampleRow
from db.recount import snapshot, stream
from db.session import Database
from db.tables import artifact, benchmark, job, job_kernels, label, outcome, run, sample, score, task, timing
from db.token_columns import selection, tokens_from
from db.token_parquet import token_columns
from db.trace_parquet import trace_columns
from db.traces import read_traces

#: samples read at once
_WINDOW = 500
#: rows that a file holds in one piece: what a reader needs in memory
_ROW_GROUP = 50_000

_JOB = ("name", "spec", "state", "priority", "pinned", "error", "created_at", "started_at", "finished_at", "principal")
_OUTCOME = ("text", "error", "finish", "n_tokens", "prompt_tokens", "cut_tokens", "shown", "isolated")


def export_job(db: Database, job_id: int, folder: Path, *, shortstop: str) -> str:
    """Write an export of a job that has ended into a folder that is not there yet, whole or not at all.

    shortstop: the version that writes it. Returns the export's id. Raises `BadInput`.
    """
    if folder.exists():
        raise BadInput(f"folder {str(folder)!r} is there already; remove it, or name another one.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with snapshot(db) as connection:
            row = _ended(connection, job_id)
            partial.mkdir(parents=True)
            id = write_manifest(partial, _write(connection, row, partial), shortstop)
        partial.rename(folder)
    except OSError as error:
        raise BadInput(f"folder {str(folder)!r} cannot be written ({error.strerror}); name another one.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return id


def _ended(connection: Connection, job_id: int) -> Row[Any]:
    row = connection.execute(select(job).where(job.c.id == job_id)).one_or_none()
    if row is None or is_partial(row):
        raise BadInput(f"job {job_id} does not exist; `shortstop list` shows those that do.")
    if not JobState(row.state).ended:
        raise BadInput(f"job {job_id} is {row.state}; export it when it has ended, or cancel it first.")
    return row


class _File:
    """A Parquet file on its way, in pieces of one size whatever is handed to it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / parquet(name)
        self.count = 0
        self._schema = SCHEMAS[name]
        self._waiting: list[pa.RecordBatch] = []
        self._writer = pq.ParquetWriter(self.path, self._schema, compression="zstd")

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._write(1)
        self._writer.close()

    def add(self, rows: Iterable[Sequence[Any]]) -> None:
        columns = list(zip(*rows, strict=True)) or [()] * len(self._schema)
        self.add_columns([pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)])

    def add_columns(self, columns: list[pa.Array]) -> None:
        self._waiting.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self.count += len(self._waiting[-1])
        self._write(_ROW_GROUP)

    def _write(self, at_least: int) -> None:
        rows = sum(map(len, self._waiting))
        if rows >= at_least:
            self._writer.write_table(pa.Table.from_batches(self._waiting), row_group_size=rows)
            self._waiting = []


def _write(connection: Connection, row: Row[Any], folder: Path) -> dict[str, Any]:
    """All files but the manifest. Returns what that holds."""
    runs = runs_of(connection, row.id)
    tasks = connection.execute(select(task).where(task.c.job_id == row.id).order_by(task.c.id)).all()
    ids = dict.fromkeys(one.benchmark_id for one in runs)
    benchmarks = {id: place for place, id in enumerate(ids)}
    places = {one.id: place for place, one in enumerate(tasks)}
    files: dict[str, Any] = {}
    for name, writing in (
        ("samples", _samples(connection, benchmarks)),
        ("runs", [_run_rows(runs, benchmarks)]),
        ("tasks", [_task_rows(tasks, places, benchmarks)]),
        ("scores", _scores(connection, runs)),
        ("labels", [_labels(connection, row.id, benchmarks)]),
        ("timings", _timings(connection, runs)),
    ):
        with _File(folder, name) as file:
            for some in writing:
                file.add(some)
        files[name] = _facts(file)
    with _File(folder, "completions") as completions, _File(folder, "tokens") as tokens:
        _outcomes(connection, runs, places, completions, tokens)
    files |= {"completions": _facts(completions), "tokens": _facts(tokens)}
    with _File(folder, "traces") as traces:
        _traces(connection, row, runs, traces)
    files["traces"] = _facts(traces)
    kernels = select(job_kernels.c.device_class, job_kernels.c.kernels).where(job_kernels.c.job_id == row.id)
    return {
        "job": {name: getattr(row, name) for name in _JOB},
        "kernels": dict(connection.execute(kernels.order_by(job_kernels.c.device_class)).all()),
        "benchmarks": [_benchmark(connection, id) for id in ids],
        "artifacts": _artifacts(connection, (row.pinned or {}).get("exits_hash"), folder),
        "files": files,
    }


def _facts(file: _File) -> dict[str, Any]:
    return {"rows": file.count, "sha256": digest(file.path)}


def _benchmark(connection: Connection, id: int) -> dict[str, Any]:
    row = connection.execute(select(benchmark).where(benchmark.c.id == id)).one()
    return {name: value for name, value in row._asdict().items() if name != "id"}


def _artifacts(connection: Connection, hash: str | None, folder: Path) -> list[dict[str, str]]:
    found = connection.execute(select(artifact).where(artifact.c.hash == hash)).one_or_none()
    if found is None:
        return []
    file = folder / EXITS
    file.write_bytes(found.content)
    return [{"hash": found.hash, "kind": found.kind, "sha256": digest(file)}]


def _samples(connection: Connection, benchmarks: dict[int, int]) -> Iterator[list[tuple[Any, ...]]]:
    columns = [sample.c[name] for name in SampleRow.__dataclass_fields__ if name != "id"]
    for id, place in benchmarks.items():
        chosen = select(*columns).where(sample.c.benchmark_id == id).order_by(sample.c.position)
        yield from _pieces((place, *row) for row in stream(connection, chosen))


def _run_rows(runs: list[RunRow], benchmarks: dict[int, int]) -> list[tuple[Any, ...]]:
    return [
        (
            place,
            benchmarks[one.benchmark_id],
            one.benchmark,
            one.policy,
            one.policy_kind,
            json.dumps(one.policy_spec),
            None if one.summary is None else json.dumps(one.summary),
        )
        for place, one in enumerate(runs)
    ]


def _task_rows(tasks: Sequence[Row[Any]], places: dict[int, int], benchmarks: dict[int, int]) -> list[tuple[Any, ...]]:
    return [
        (
            places[one.id],
            one.kind,
            one.state,
            benchmarks.get(one.benchmark_id),
            one.first_batch,
            one.end_batch,
            one.done_batches,
            places.get(one.parent_id),
            one.epoch,
            one.attempt,
            one.deaths,
            one.worker,
            one.error,
        )
        for one in tasks
    ]


def _scores(connection: Connection, runs: list[RunRow]) -> Iterator[list[tuple[Any, ...]]]:
    """Those in force."""
    for place, one in enumerate(runs):
        for first in _windows(connection, one):
            chosen = _in_window(one, first, [sample.c.position, score.c.metric, score.c.version, score.c.value])
            chosen = chosen.join(score, and_(score.c.run_id == one.id, score.c.sample_id == sample.c.id)).join(
                run, and_(run.c.id == score.c.run_id, run.c.score_revision == score.c.revision)
            )
            yield sorted((place, *row) for row in connection.execute(chosen))


def _labels(connection: Connection, job_id: int, benchmarks: dict[int, int]) -> list[tuple[Any, ...]]:
    """In one order on both databases: they sort texts differently."""
    columns = [
        sample.c.benchmark_id,
        sample.c.position,
        *(label.c[name] for name in ("text", "judge", "accepted", "at")),
    ]
    rows = connection.execute(select(*columns).join_from(label, sample).where(label.c.job_id == job_id))
    return sorted((benchmarks[row.benchmark_id], *row[1:]) for row in rows)


def _timings(connection: Connection, runs: list[RunRow]) -> Iterator[list[tuple[Any, ...]]]:
    columns = [timing.c[name] for name in SCHEMAS["timings"].names if name != "run"]
    for place, one in enumerate(runs):
        chosen = select(*columns).where(timing.c.run_id == one.id).order_by(timing.c.batch)
        yield from _pieces((place, *row) for row in stream(connection, chosen))


def _outcomes(
    connection: Connection, runs: list[RunRow], places: dict[int, int], completions: _File, tokens: _File
) -> None:
    dialect = connection.dialect.name
    columns = [sample.c.position, outcome.c.task_id, *(outcome.c[name] for name in _OUTCOME), *selection(dialect)]
    for place, one in enumerate(runs):
        for first in _windows(connection, one):
            chosen = _in_window(one, first, columns).join(
                outcome, and_(outcome.c.run_id == one.id, outcome.c.sample_id == sample.c.id)
            )
            rows = [tuple(row) for row in connection.execute(chosen.order_by(sample.c.position))]
            n = 2 + len(_OUTCOME)
            completions.add((place, row[0], places[row[1]], *row[2:n]) for row in rows)
            arrays = [(row[0], tokens_from(dialect, row[n:])) for row in rows]
            tokens.add_columns(token_columns(place, [(at, one) for at, one in arrays if one is not None]))


def _traces(connection: Connection, row: Row[Any], runs: list[RunRow], file: _File) -> None:
    pinned = row.pinned or {}
    if pinned.get("trace") is None:
        return
    points = sorted({*pinned["exit_points"], pinned["n_layers"]})
    for place, one in enumerate(runs):
        for first in _windows(connection, one):
            file.add_columns(trace_columns(place, read_traces(connection, one, first, first + _WINDOW), points))


def _windows(connection: Connection, one: RunRow) -> range:
    size = select(benchmark.c.n_samples).where(benchmark.c.id == one.benchmark_id)
    return range(0, connection.execute(size).scalar_one(), _WINDOW)


def _in_window(one: RunRow, first: int, columns: Sequence[ColumnElement[Any]]) -> Select[Any]:
    """Of the run's benchmark, samples at positions `[first, first + _WINDOW)`; the caller joins the rest."""
    within = (sample.c.position >= first, sample.c.position < first + _WINDOW)
    return select(*columns).select_from(sample).where(sample.c.benchmark_id == one.benchmark_id, *within)


def _pieces(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    piece: list[tuple[Any, ...]] = []
    for row in rows:
        piece.append(row)
        if len(piece) == _WINDOW:
            yield piece
            piece = []
    yield piece
