"""Reading results back: samples, completions and tokens in the benchmark's order, and what a summary is made of."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, Row, Select, and_, select

from db.errors import BadInput, Missing
from db.jobs import runs_of
from db.records import CompletionRow, OutcomeRow, RunData, RunRow, SampleRow, TokenBatch
from db.rollups import rollup_of
from db.session import Database
from db.tables import benchmark, job, outcome, run, sample, score, timing
from db.token_columns import selection, tokens_from

#: samples read in one transaction while streaming
_WINDOW = 500
_DECISIONS = np.array(["full", "exit", "stop"], dtype=object)
_OUTCOME_FIELDS = [name for name in OutcomeRow.__dataclass_fields__ if name != "tokens"]
_OUTCOME = [outcome.c[name] for name in _OUTCOME_FIELDS]
_SAMPLE = [sample.c[name] for name in SampleRow.__dataclass_fields__]
_SAMPLE_ID = list(SampleRow.__dataclass_fields__).index("id")


def samples_of(db: Database, benchmark_id: int, first: int, end: int) -> list[SampleRow]:
    """Samples at positions `[first, end)` of the benchmark, in order."""
    with db.read() as connection:
        return read_samples(connection, benchmark_id, first, end)


def read_samples(connection: Connection, benchmark_id: int, first: int, end: int) -> list[SampleRow]:
    """As `samples_of`, inside the caller's transaction."""
    chosen = select(*_SAMPLE).where(
        sample.c.benchmark_id == benchmark_id, sample.c.position >= first, sample.c.position < end
    )
    return [SampleRow(*row) for row in connection.execute(chosen.order_by(sample.c.position))]


@dataclass(frozen=True)
class Place:
    """Where a reader stopped: a run of the job, and a sample of its benchmark."""

    run_id: int
    sample_id: int


def completions(
    db: Database,
    *,
    run_id: int | None = None,
    job_id: int | None = None,
    limit: int | None = None,
    after: Place | None = None,
    with_tokens: bool = True,
) -> Iterator[CompletionRow]:
    """Of one run or one job, by run, then in the benchmark's order; streamed. Raises `Missing` for an unknown run.

    after: only what comes behind this completion. with_tokens: whether outcomes bring their tokens along.
    """
    starts = _starts(db, _runs(db, run_id, job_id), after, skip=1)
    rows = (
        row
        for one, start in starts
        for window in _windows(db, one, limit, start, selection(db.dialect) if with_tokens else [])
        for row in window
    )
    return islice(rows, limit)


def tokens(
    db: Database, *, run_id: int | None = None, job_id: int | None = None, since: Place | None = None
) -> Iterator[TokenBatch]:
    """The columns of the view `token` for one run or one job, by run and sample, in pieces of some thousand rows.

    since: only this completion's tokens, and what comes behind them.
    """
    for one, start in _starts(db, _runs(db, run_id, job_id), since, skip=0):
        for first in range(start, _n_samples(db, one), _WINDOW):
            with db.read() as connection:
                columns = [outcome.c.id, outcome.c.sample_id, *selection(db.dialect)]
                rows = connection.execute(_in_window(one, first, _WINDOW, columns)).all()
            batch = _token_batch(one, db.dialect, [tuple(row) for row in rows])
            if len(batch):
                yield batch


def run_data(db: Database, run_id: int, *, revision: int | None = None) -> RunData:
    """What the run's summary is made of. Raises `Missing` for an unknown run.

    revision: of the scores; that in force when absent.
    """
    [one] = _runs(db, run_id, None)
    with db.read() as connection:
        same_job = [other for other in runs_of(connection, one.job_id) if other.benchmark_id == one.benchmark_id]
        data = _run_data(connection, one, revision)

        def reference(kind: str) -> RunData | None:
            other = next((other for other in same_job if other.policy_kind == kind), None)
            return None if other is None or other == one else _run_data(connection, other, revision)

        return replace(data, full=reference("full"), original=reference("original"))


def _run_data(connection: Connection, one: RunRow, revision: int | None) -> RunData:
    pinned = connection.execute(select(job.c.pinned).where(job.c.id == one.job_id)).scalar_one()
    sums = rollup_of(connection, one.id)
    return RunData(
        run_id=one.id,
        job_id=one.job_id,
        policy=one.policy,
        policy_kind=one.policy_kind,
        benchmark=one.benchmark,
        pinned=pinned,
        **_sample_columns(connection, one, revision),
        **_batch_columns(connection, one, pinned["batch_size"]),
        exit_layer_sum=sums.exit_layer_sum,
        layers_run_sum=sums.layers_run_sum,
        exit_histogram=sums.exit_histogram,
        stop_histogram=sums.stop_histogram,
        decisions={"full": sums.full_tokens, "exit": sums.exit_tokens, "stop": sums.stops},
        drafted=sums.drafted,
        drafts_kept=sums.drafts_kept,
    )


def _sample_columns(connection: Connection, one: RunRow, revision: int | None) -> dict[str, Any]:
    """One place a sample that has an outcome, in the benchmark's order."""
    counts = [outcome.c[name] for name in ("sample_id", "n_tokens", "finish", "shown", "cut_tokens", "isolated")]
    failed = outcome.c.error.is_not(None).label("failed")  # texts stay where they are: a run may have very many
    chosen = (
        select(sample.c.position, sample.c.source_group, failed, *counts)
        .join(outcome)
        .where(outcome.c.run_id == one.id)
        .order_by(sample.c.position)
    )
    rows = connection.execute(chosen).all()
    place = {row.sample_id: i for i, row in enumerate(rows)}
    return {
        "sample": np.array([row.position for row in rows], np.int64),
        "source_group": np.array([row.source_group for row in rows], object),
        "n_tokens": np.array([row.n_tokens for row in rows], np.int64),
        "error": np.array([row.failed for row in rows], np.bool_),
        "stopped": np.array([row.finish == "stop" for row in rows], np.bool_),
        "shown": np.array([row.shown for row in rows], np.bool_),
        "cut": np.array([row.cut_tokens > 0 for row in rows], np.bool_),
        "isolated": np.array([row.isolated for row in rows], np.bool_),
        "scores": _score_columns(connection, one, place, revision),
    }


def _score_columns(
    connection: Connection, one: RunRow, place: dict[int, int], revision: int | None
) -> dict[str, npt.NDArray[np.float64]]:
    current = (score.c.run_id == one.id, score.c.revision == (run.c.score_revision if revision is None else revision))
    chosen = select(score.c.metric, score.c.sample_id, score.c.value).join(run).where(*current)
    columns: defaultdict[str, npt.NDArray[np.float64]] = defaultdict(lambda: np.full(len(place), np.nan))
    for metric, sample_id, value in connection.execute(chosen):
        columns[metric][place[sample_id]] = value
    return {metric: columns[metric] for metric in sorted(columns)}


def _batch_columns(connection: Connection, one: RunRow, batch_size: int) -> dict[str, Any]:
    """One place a batch, in order. A batch belongs to the source group of its first sample."""
    first_of_batch = (sample.c.benchmark_id == one.benchmark_id, sample.c.position == timing.c.batch * batch_size)
    chosen = select(timing, sample.c.source_group).join(sample, and_(*first_of_batch)).where(timing.c.run_id == one.id)
    rows = connection.execute(chosen.order_by(timing.c.batch)).all()
    names = ("batch", "prefill_ns", "decode_ns", "decode_tokens", "flops", "ideal_ns")
    columns: dict[str, Any] = {name: np.array([getattr(row, name) for row in rows], np.int64) for name in names}
    columns["batch_group"] = np.array([row.source_group for row in rows], object)
    columns["timed"] = np.array([row.timed for row in rows], np.bool_)
    if any(row.full_decode_ns is not None for row in rows):
        columns["full_decode_ns"] = np.array([row.full_decode_ns or 0 for row in rows], np.int64)
    return columns


def _runs(db: Database, run_id: int | None, job_id: int | None) -> list[RunRow]:
    with db.read() as connection:
        if run_id is not None:
            job_id = connection.execute(select(run.c.job_id).where(run.c.id == run_id)).scalar_one_or_none()
        rows = [] if job_id is None else runs_of(connection, job_id)
    rows = [row for row in rows if run_id in (None, row.id)]
    if run_id is not None and not rows:
        raise Missing(f"run {run_id} does not exist; `shortstop show` lists the runs of a job.")
    return rows


def _starts(db: Database, runs: list[RunRow], place: Place | None, skip: int) -> list[tuple[RunRow, int]]:
    """The runs from `place` on, each with the position of the sample that it begins with: `skip` behind the place."""
    if place is None:
        return [(one, 0) for one in runs]
    at = next((i for i, one in enumerate(runs) if one.id == place.run_id), None)
    with db.read() as connection:
        asked = select(sample.c.position, sample.c.benchmark_id).where(sample.c.id == place.sample_id)
        found = connection.execute(asked).one_or_none()
    if at is None or found is None or found.benchmark_id != runs[at].benchmark_id:
        raise BadInput("the cursor is not of these rows; begin without one.")
    return [(runs[at], found.position + skip), *((one, 0) for one in runs[at + 1 :])]


def _n_samples(db: Database, one: RunRow) -> int:
    with db.read() as connection:
        size = select(benchmark.c.n_samples).where(benchmark.c.id == one.benchmark_id)
        return int(connection.execute(size).scalar_one())


def _in_window(one: RunRow, first: int, size: int, columns: Sequence[ColumnElement[Any]]) -> Select[Any]:
    """Outcomes of the run whose samples are at positions `[first, first + size)`, in order."""
    return (
        select(*columns)
        .select_from(sample)
        .join(outcome, and_(outcome.c.sample_id == sample.c.id, outcome.c.run_id == one.id))
        .where(
            sample.c.benchmark_id == one.benchmark_id,
            sample.c.position >= first,
            sample.c.position < first + size,
        )
        .order_by(sample.c.position)
    )


def _windows(
    db: Database, one: RunRow, limit: int | None, first: int, of_tokens: Sequence[ColumnElement[Any]]
) -> Iterator[list[CompletionRow]]:
    """The run's completions, a short transaction each few hundred; in the first no more than were asked for."""
    columns = [*_SAMPLE, *_OUTCOME, *of_tokens]
    size, n_samples = _WINDOW if limit is None else min(limit, _WINDOW), _n_samples(db, one)
    while first < n_samples:
        with db.read() as connection:
            rows = connection.execute(_in_window(one, first, size, columns)).all()
            ids = [row[_SAMPLE_ID] for row in rows]
            scores = _scores_between(connection, one, min(ids), max(ids)) if ids else {}
        yield [_completion(one, db.dialect, row, scores) for row in rows]
        first, size = first + size, _WINDOW


def _scores_between(connection: Connection, one: RunRow, first: int, last: int) -> dict[int, dict[str, float]]:
    """By sample, of those with numbers from first to last. One way through one index, whatever the planner guesses: a
    server that is asked while its tables fill keeps plans that were good for empty ones.
    """
    revision = select(run.c.score_revision).where(run.c.id == one.id).scalar_subquery()
    chosen = (
        select(score.c.sample_id, score.c.metric, score.c.value)
        .where(score.c.run_id == one.id, score.c.revision == revision, score.c.sample_id.between(first, last))
        .order_by(score.c.metric)
    )
    found: dict[int, dict[str, float]] = {}
    for sample_id, metric, value in connection.execute(chosen):
        found.setdefault(sample_id, {})[metric] = value
    return found


def _completion(one: RunRow, dialect: str, row: Row[Any], scores: dict[int, dict[str, float]]) -> CompletionRow:
    n = len(_SAMPLE)
    values = tuple(row)
    fields = dict(zip(_OUTCOME_FIELDS, values[n : n + len(_OUTCOME)], strict=True))
    of_tokens = values[n + len(_OUTCOME) :]
    return CompletionRow(
        run_id=one.id,
        policy=one.policy,
        benchmark=one.benchmark,
        sample=SampleRow(*values[:n]),
        outcome=OutcomeRow(**fields, tokens=tokens_from(dialect, of_tokens) if of_tokens else None),
        scores=scores.get(fields["sample_id"], {}),
    )


def _token_batch(one: RunRow, dialect: str, rows: Sequence[tuple[Any, ...]]) -> TokenBatch:
    """rows: (outcome id, sample id, token columns...)."""
    kept = [(row[0], row[1], arrays) for row in rows if (arrays := tokens_from(dialect, row[2:])) is not None]
    lengths = [len(arrays) for _, _, arrays in kept]
    decisions = _joined([arrays.decisions for _, _, arrays in kept], np.int16)
    drafts = _joined([arrays.drafts for _, _, arrays in kept], np.int16)
    return TokenBatch(
        run_id=np.full(sum(lengths), one.id, np.int64),
        job_id=np.full(sum(lengths), one.job_id, np.int64),
        policy=np.full(sum(lengths), one.policy, object),
        outcome_id=np.repeat(np.array([outcome_id for outcome_id, _, _ in kept], np.int64), lengths),
        sample_id=np.repeat(np.array([sample_id for _, sample_id, _ in kept], np.int64), lengths),
        position=_joined([np.arange(1, n + 1) for n in lengths], np.int32),
        token_id=_joined([arrays.token_ids for _, _, arrays in kept], np.int32),
        exit_layer=_joined([arrays.exit_layers for _, _, arrays in kept], np.int16),
        layers_run=_joined([arrays.layers_run for _, _, arrays in kept], np.int16),
        decision=_DECISIONS[decisions],
        confidence=_joined([arrays.confidences for _, _, arrays in kept], np.float32),
        draft_layer=np.abs(drafts),
        draft_kept=drafts > 0,
    )


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: type[Any]) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)
