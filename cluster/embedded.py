"""The whole system inside the caller's process: database, workers and report, without a command line or a server."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import structlog

from cluster import adding, jobs, rescoring
from cluster.logs import configure_logs
from cluster.reports.build import build_report
from cluster.reports.decoder import decoder
from cluster.reports.model import JobReport
from cluster.settings import Settings, load_settings
from cluster.spec import JobSpec, parse_job, read_job
from db import results
from db.jobs import job as read_job_row
from db.jobs import runs
from db.records import CompletionRow, TokenBatch
from db.rollups import rollup
from db.session import open_database

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from engine.spec import PolicySpec

#: completions that a batch of Arrow holds
_PIECE = 1_000


def evaluate(
    spec: JobSpec | dict[str, Any] | str | Path,
    *,
    database: str | None = None,
    workers: int | None = None,
    inline: bool = False,
) -> JobReport:
    """Submit a job, work on it until it has ended, and return its report.

    spec: a JobSpec, what a spec file would hold, or such a file; relative paths start from the file's folder, or from
    this one. database: a URL; the one of the settings when absent. inline: one worker in this process, without Ray.
    Raises `BadInput`, before anything is written. A job that failed is told by the report's `state` and `error`.
    """
    settings = _settings(database, workers)
    if isinstance(spec, str | Path):
        asked = jobs.anchored(read_job(spec), Path(spec).absolute().parent)
    else:
        asked = jobs.anchored(parse_job(spec), Path.cwd())
    jobs.validate(asked)  # before there is a job, or a database
    with closing(open_database(settings.database_url)) as db:
        job_id = jobs.submit(db, asked)
        jobs.work(db, job_id, workers=settings.workers, inline=inline, lease_seconds=settings.lease_seconds)
        return build_report(db, job_id, decoder(db, job_id))


def report(job: int, *, database: str | None = None) -> JobReport:
    """The report of a job, finished or under way. Raises `BadInput`."""
    with closing(open_database(_settings(database).database_url, create=False)) as db:
        return build_report(db, job, decoder(db, job))


def add_policy(
    job: int | JobReport,
    policy: "PolicySpec | dict[str, Any] | str",
    *,
    database: str | None = None,
    workers: int | None = None,
    inline: bool = False,
) -> JobReport:
    """Add a policy to a job that is done, compute only its runs, and return the report. Raises `BadInput`.

    database, workers and inline as in `evaluate`.
    """
    settings = _settings(database, workers)
    with closing(open_database(settings.database_url, create=False)) as db:
        adding.add_policy(db, _number(job), policy)
        jobs.work(db, _number(job), workers=settings.workers, inline=inline, lease_seconds=settings.lease_seconds)
        return build_report(db, _number(job), decoder(db, _number(job)))


def rescore(
    job: int | JobReport,
    metrics: Sequence[str] | None = None,
    *,
    execute: bool = False,
    database: str | None = None,
) -> JobReport:
    """Add or renew metrics for the stored completions of a job that has ended, and return its report.

    metrics: all that the job has where they are absent. execute: allows `pass@1`, which executes completions in a
    sandbox. Raises `BadInput`.
    """
    with closing(open_database(_settings(database).database_url, create=False)) as db:
        rescoring.rescore(db, _number(job), metrics, execute=execute)
        return build_report(db, _number(job), decoder(db, _number(job)))


@overload
def completions(
    job: int | JobReport, *, arrow: Literal[False] = False, database: str | None = None
) -> "pd.DataFrame": ...


@overload
def completions(
    job: int | JobReport, *, arrow: Literal[True], database: str | None = None
) -> "pa.RecordBatchReader": ...


def completions(
    job: int | JobReport, *, arrow: bool = False, database: str | None = None
) -> "pd.DataFrame | pa.RecordBatchReader":
    """A row a completion, with a column a metric; sample columns as in the database. Raises `BadInput`.

    arrow: streamed as Arrow instead of a DataFrame; memory does not grow with the job.
    """
    url = _settings(database).database_url
    with closing(open_database(url, create=False)) as db:
        row = read_job_row(db, _number(job))
        if not arrow:
            import pandas as pd

            return pd.DataFrame(map(_completion, results.completions(db, job_id=row.id)))
        metrics = sorted({metric for run in runs(db, row.id) for metric in rollup(db, run.id).score_counts})
    import pyarrow as pa

    schema = _completion_schema(metrics)
    return pa.RecordBatchReader.from_batches(schema, _completion_batches(url, row.id, schema))


def tokens(job: int | JobReport, *, database: str | None = None) -> "pa.RecordBatchReader":
    """A row a token, streamed as Arrow: the columns of the view `token`. `.read_pandas()` gives a DataFrame.

    A stop is the last row of its completion, without a token id. Raises `BadInput`.
    """
    import pyarrow as pa

    url = _settings(database).database_url
    with closing(open_database(url, create=False)) as db:
        read_job_row(db, _number(job))
    schema = _token_schema()
    return pa.RecordBatchReader.from_batches(schema, _token_batches(url, _number(job), schema))


def _settings(database: str | None = None, workers: int | None = None) -> Settings:
    """The settings; logs are set up as they say where the caller has not set up structlog."""
    settings = load_settings(database_url=database, workers=workers)
    if not structlog.is_configured():
        configure_logs(settings.log_level)
    return settings


def _number(job: int | JobReport) -> int:
    return job if isinstance(job, int) else job.job_id


def _completion(row: CompletionRow) -> dict[str, Any]:
    sample, outcome = row.sample, row.outcome
    return {
        "run_id": row.run_id,
        "policy": row.policy,
        "benchmark": row.benchmark,
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


def _completion_schema(metrics: list[str]) -> "pa.Schema":
    import pyarrow as pa

    of_sample = ("sample", "source_group", "language", "prompt", "reference")
    return pa.schema(
        [
            ("run_id", pa.int64()),
            *((name, pa.string()) for name in ("policy", "benchmark", *of_sample, "text", "error", "finish")),
            *((name, pa.int32()) for name in ("n_tokens", "prompt_tokens", "cut_tokens")),
            ("shown", pa.bool_()),
            *((metric, pa.float64()) for metric in metrics),
        ]
    )


def _completion_batches(url: str, job_id: int, schema: "pa.Schema") -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    with closing(open_database(url, create=False)) as db:
        rows = map(_completion, results.completions(db, job_id=job_id))
        while piece := list(islice(rows, _PIECE)):
            yield pa.RecordBatch.from_pylist(piece, schema=schema)


def _token_schema() -> "pa.Schema":
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


def _token_batches(url: str, job_id: int, schema: "pa.Schema") -> "Iterator[pa.RecordBatch]":
    with closing(open_database(url, create=False)) as db:
        for batch in results.tokens(db, job_id=job_id):
            yield _arrow(batch, schema)


def _arrow(batch: TokenBatch, schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    never = batch.draft_layer == 0
    masks = {"token_id": batch.token_id < 0, "draft_layer": never, "draft_kept": never}
    columns = [pa.array(getattr(batch, field.name), type=field.type, mask=masks.get(field.name)) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
