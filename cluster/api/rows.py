"""Completions and tokens over HTTP: a page at a time, or all of them in a stream that no size fills the memory with."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query
from pydantic_core import to_json
from starlette.responses import Response, StreamingResponse

from cluster import frames
from cluster.api.access import Reader
from cluster.api.cursors import cursor, keys_of
from cluster.api.jobs import JobId, Shared
from cluster.api.problems import described, streams
from db import jobs, results
from db.errors import Missing
from db.readings import Place
from db.session import Database

if TYPE_CHECKING:
    import pyarrow as pa

router = APIRouter(tags=["results"])

Form = Annotated[
    Literal["json", "ndjson", "csv", "parquet"],
    Query(alias="format", description="json: a page; all others: everything from the cursor on, streamed"),
]
MEDIA_TYPES = {"ndjson": "application/x-ndjson", "csv": "text/csv", "parquet": "application/vnd.apache.parquet"}
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of a page")]
RunId = Annotated[int | None, Query(ge=1, le=2**63 - 1, description="only this run of the job")]
_STREAMS = streams(*MEDIA_TYPES.values())
#: rows of a row group, however they come
_GROUP = 10_000


@dataclass(frozen=True)
class Rows:
    """A page of rows; a row has the columns that a download has."""

    rows: list[dict[str, Any]]
    next: str | None  #: the cursor of the next page; null on the last


@router.get("/v1/jobs/{job_id}/completions", response_model=Rows, responses=described("missing") | _STREAMS)
async def completions(
    job_id: JobId,
    caller: Reader,
    state: Shared,
    form: Form = "json",
    run: RunId = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="of a page")] = 100,
) -> Response:
    """The completions of a job, by run and in the benchmark's order: a row each, with a column a metric."""
    db = state.db
    after = None if cursor is None else Place(*keys_of(cursor, 2))

    def begin() -> Response:
        _check_run(db, job_id, run)
        if form == "json":
            return _page(_completion_page(db, job_id, run, after, limit))
        schema = frames.completion_schema(db, job_id)
        batches = frames.completion_batches(db, job_id, schema, run_id=run, after=after)
        return _streamed(form, schema, batches, job_id)

    return await to_thread.run_sync(begin)


def _completion_page(db: Database, job_id: int, run: int | None, after: Place | None, limit: int) -> Rows:
    which: dict[str, int] = {"job_id": job_id} if run is None else {"run_id": run}
    found = list(results.completions(db, **which, limit=limit + 1, after=after, with_tokens=False))
    last = found[limit - 1] if len(found) > limit else None
    return Rows(
        [frames.completion_columns(row) for row in found[:limit]],
        None if last is None else cursor(last.run_id, last.sample.id),
    )


@router.get("/v1/jobs/{job_id}/tokens", response_model=Rows, responses=described("missing") | _STREAMS)
async def tokens(
    job_id: JobId,
    caller: Reader,
    state: Shared,
    form: Form = "json",
    run: RunId = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="of a page")] = 1000,
) -> Response:
    """The tokens of a job, by run, sample and position, with the columns of the view `token`."""
    keys = None if cursor is None else keys_of(cursor, 3)

    def begin() -> Response:
        _check_run(state.db, job_id, run)
        schema = frames.token_schema()
        since = None if keys is None else Place(keys[0], keys[1])
        batches = frames.token_batches(state.db, job_id, schema, run_id=run, since=since)
        if keys is not None:
            batches = _behind(batches, keys)
        return _page(_token_page(batches, limit)) if form == "json" else _streamed(form, schema, batches, job_id)

    return await to_thread.run_sync(begin)


def _behind(batches: "Iterator[pa.RecordBatch]", keys: tuple[int, ...]) -> "Iterator[pa.RecordBatch]":
    """Without the rows of the first completion up to the position of the cursor."""
    first = next(batches, None)
    if first is None:
        return iter(())
    columns = (first.column(name).to_pylist() for name in ("run_id", "sample_id", "position"))
    seen = sum(1 for row in zip(*columns, strict=True) if row[:2] == keys[:2] and row[2] <= keys[2])
    return chain([first.slice(seen)], batches)


def _token_page(batches: "Iterator[pa.RecordBatch]", limit: int) -> Rows:
    found = list(islice((row for batch in batches for row in batch.slice(0, limit + 1).to_pylist()), limit + 1))
    last = found[limit - 1] if len(found) > limit else None
    keys = ("run_id", "sample_id", "position")
    return Rows(found[:limit], None if last is None else cursor(*(last[key] for key in keys)))


def _page(rows: Rows) -> Response:
    return Response(to_json(rows, inf_nan_mode="null"), media_type="application/json")


def _check_run(db: Database, job_id: int, run: int | None) -> None:
    """Raises `Missing` where there is no such job, or it has no such run."""
    jobs.job(db, job_id)
    if run is not None and run not in {one.id for one in jobs.runs(db, job_id)}:
        raise Missing(f"job {job_id} has no run {run}; `shortstop show {job_id}` lists those it has.")


def _streamed(form: str, schema: "pa.Schema", batches: "Iterator[pa.RecordBatch]", job_id: int) -> StreamingResponse:
    write = {"ndjson": _ndjson, "csv": _csv, "parquet": _parquet}[form]
    headers = {"Content-Disposition": f'attachment; filename="job-{job_id}.{form}"'}
    return StreamingResponse(write(schema, batches), media_type=MEDIA_TYPES[form], headers=headers)


def _ndjson(schema: "pa.Schema", batches: "Iterator[pa.RecordBatch]") -> Iterator[bytes]:
    for batch in batches:
        yield "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist()).encode()


def _csv(schema: "pa.Schema", batches: "Iterator[pa.RecordBatch]") -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.csv

    header = True
    for batch in chain([pa.RecordBatch.from_pylist([], schema=schema)], batches):
        out = io.BytesIO()
        pyarrow.csv.write_csv(batch, out, pyarrow.csv.WriteOptions(include_header=header))
        header = False
        yield out.getvalue()


def _parquet(schema: "pa.Schema", batches: "Iterator[pa.RecordBatch]") -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = _Pipe()
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            waiting.append(batch)
            if sum(map(len, waiting)) >= _GROUP:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting = []
                yield out.taken()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))
    yield out.taken()


class _Pipe(io.RawIOBase):
    """Where Parquet is written to; what is written is taken away from time to time."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, piece: Any) -> int:
        self._pieces.append(bytes(piece))
        self._at += len(self._pieces[-1])
        return len(self._pieces[-1])

    def taken(self) -> bytes:
        """All that was written since the last time."""
        whole, self._pieces = b"".join(self._pieces), []
        return whole
