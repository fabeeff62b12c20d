"""The whole system inside the caller's process: database, workers and report, without a command line or a server."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import structlog

from cluster import adding, jobs, rescoring
from cluster.frames import completion_batches, completion_columns, completion_schema, token_batches, token_schema
from cluster.grids import default_policies, parse_replay
from cluster.logs import configure_logs
from cluster.replays import ReplayReport, replay_trace
from cluster.reports.build import build_report
from cluster.reports.decoder import decoder
from cluster.reports.model import JobReport
from cluster.settings import Settings, load_settings
from cluster.spec import JobSpec, parse_job, read_job
from cluster.traced import trace_batches, trace_of, trace_schema
from db import results
from db.jobs import job as read_job_row
from db.session import Database, open_database

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from engine.spec import PolicySpec


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
        _work(db, job_id, settings, inline)
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
        _work(db, _number(job), settings, inline)
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

            rows = results.completions(db, job_id=row.id, with_tokens=False)
            return pd.DataFrame(map(completion_columns, rows))
        schema = completion_schema(db, row.id)
    import pyarrow as pa

    return pa.RecordBatchReader.from_batches(schema, _batches(url, completion_batches, row.id, schema))


def tokens(job: int | JobReport, *, database: str | None = None) -> "pa.RecordBatchReader":
    """A row a token, streamed as Arrow: the columns of the view `token`. `.read_pandas()` gives a DataFrame.

    A stop is the last row of its completion, without a token id. Raises `BadInput`.
    """
    import pyarrow as pa

    url = _settings(database).database_url
    with closing(open_database(url, create=False)) as db:
        read_job_row(db, _number(job))
    schema = token_schema()
    return pa.RecordBatchReader.from_batches(schema, _batches(url, token_batches, _number(job), schema))


def traces(job: int, benchmark: str | None = None, *, database: str | None = None) -> "pa.RecordBatchReader":
    """A row a token of a target and exit point, streamed as Arrow, of a job that is a trace. `.read_pandas()`.

    benchmark: which, where the trace has several. Raises `BadInput`.
    """
    import pyarrow as pa

    url = _settings(database).database_url
    with closing(open_database(url, create=False)) as db:
        trace_of(db, job, benchmark)
    schema = trace_schema()

    def cut(db: Database, job_id: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        return trace_batches(trace_of(db, job_id, benchmark), schema)

    return pa.RecordBatchReader.from_batches(schema, _batches(url, cut, job, schema))


def replay(
    job: int,
    policies: Any = None,
    *,
    benchmark: str | None = None,
    database: str | None = None,
) -> ReplayReport:
    """Apply policies to the trace of a job: as `shortstop replay`, in any form that its files take. Raises `BadInput`.

    policies: many of every kind where they are absent. benchmark: which, where the trace has several.
    """
    with closing(open_database(_settings(database).database_url, create=False)) as db:
        trace = trace_of(db, job, benchmark)
        asked = default_policies(trace.pinned) if policies is None else policies
        return replay_trace(trace, parse_replay(asked))


def _work(db: Database, job_id: int, settings: Settings, inline: bool) -> None:
    jobs.work(
        db,
        job_id,
        workers=settings.workers,
        inline=inline,
        gpus_per_worker=settings.gpus_per_worker,
        ray_address=settings.ray_address,
        lease_seconds=settings.lease_seconds,
    )


def _settings(database: str | None = None, workers: int | None = None) -> Settings:
    """The settings; logs are set up as they say where the caller has not set up structlog."""
    settings = load_settings(database_url=database, workers=workers)
    if not structlog.is_configured():
        configure_logs(settings.log_level)
    return settings


def _number(job: int | JobReport) -> int:
    return job if isinstance(job, int) else job.job_id


def _batches(
    url: str, cut: "Callable[[Database, int, pa.Schema], Iterator[pa.RecordBatch]]", job_id: int, schema: "pa.Schema"
) -> "Iterator[pa.RecordBatch]":
    with closing(open_database(url, create=False)) as db:
        yield from cut(db, job_id, schema)
