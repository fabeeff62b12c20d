"""Completions and tokens as Arrow: what data frames, downloads and pages of the API are cut from."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from db import results
from db.jobs import runs
from db.readings import Place
from db.records import CompletionRow, TokenBatch
from db.rollups import rollup
from db.session import Database

if TYPE_CHECKING:
    import pyarrow as pa

#: completions that a batch of Arrow holds
_PIECE = 1_000


def completion_columns(row: CompletionRow) -> dict[str, Any]:
    """A completion as one flat row: its run, its sample, its outcome, a column a metric."""
    sample, outcome = row.sample, row.outcome
    return {
        "run_id": row.run_id,
        "policy": row.policy,
        "benchmark": row.benchmark,
        "sample_id": sample.id,
        "sample": sample.name,
        "source_group": sample.source_group,
        "language": sample.language,
        "prompt": sample.prompt,
        "reference": sample.reference,
        "text": outcome.text,
        "error": outcome.error,
        "finish": outcome.finish,
        "n_tokens": outcome.n_tokens,
        "prompt_tokens": outcome.prompt_tokens,
        "cut_tokens": outcome.cut_tokens,
        "shown": outcome.shown,
        **row.scores,
    }


def completion_schema(db: Database, job_id: int) -> "pa.Schema":
    """The columns that the job's completions have by now."""
    import pyarrow as pa

    metrics = sorted({metric for run in runs(db, job_id) for metric in rollup(db, run.id).score_counts})
    of_sample = ("sample", "source_group", "language", "prompt", "reference")
    return pa.schema(
        [
            ("run_id", pa.int64()),
            *((name, pa.string()) for name in ("policy", "benchmark")),
            ("sample_id", pa.int64()),
            *((name, pa.string()) for name in (*of_sample, "text", "error", "finish")),
            *((name, pa.int32()) for name in ("n_tokens", "prompt_tokens", "cut_tokens")),
            ("shown", pa.bool_()),
            *((metric, pa.float64()) for metric in metrics),
        ]
    )


def completion_batches(
    db: Database, job_id: int, schema: "pa.Schema", *, run_id: int | None = None, after: Place | None = None
) -> "Iterator[pa.RecordBatch]":
    """The completions of a job, or of one run, in pieces; no transaction is open between two of them."""
    import pyarrow as pa

    which: dict[str, int] = {"job_id": job_id} if run_id is None else {"run_id": run_id}
    rows = map(completion_columns, results.completions(db, **which, after=after, with_tokens=False))
    while piece := list(islice(rows, _PIECE)):
        yield pa.RecordBatch.from_pylist(piece, schema=schema)


def token_schema() -> "pa.Schema":
    """The columns of the view `token`."""
    import pyarrow as pa

    return pa.schema(
        [
            ("run_id", pa.int64()),
            ("job_id", pa.int64()),
            ("policy", pa.string()),
            ("outcome_id", pa.int64()),
            ("sample_id", pa.int64()),
            ("position", pa.int32()),
            ("token_id", pa.int32()),
            ("exit_layer", pa.int16()),
            ("layers_run", pa.int16()),
            ("decision", pa.string()),
            ("confidence", pa.float32()),
            ("draft_layer", pa.int16()),
            ("draft_kept", pa.bool_()),
        ]
    )


def token_batches(
    db: Database, job_id: int, schema: "pa.Schema", *, run_id: int | None = None, since: Place | None = None
) -> "Iterator[pa.RecordBatch]":
    """The tokens of a job, or of one run, in pieces; no transaction is open between two of them."""
    which: dict[str, int] = {"job_id": job_id} if run_id is None else {"run_id": run_id}
    for batch in results.tokens(db, **which, since=since):
        yield _arrow(batch, schema)


def _arrow(batch: TokenBatch, schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    never = batch.draft_layer == 0
    masks = {"token_id": batch.token_id < 0, "draft_layer": never, "draft_kept": never}
    columns = [pa.array(getattr(batch, field.name), type=field.type, mask=masks.get(field.name)) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
