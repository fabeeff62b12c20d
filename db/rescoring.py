"""Scoring again what is stored: new scores beside the old ones, then one transaction that puts them in force.

Every attempt writes under a revision of its own, so that two at once never mix: the first that flips
`run.score_revision` wins, the other starts over from what that one left. Until the flip the old revision is in force.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, Row, and_, delete, func, select, update

from db import events, schema
from db.elsewhere import KIND
from db.errors import BadInput
from db.events import LOCAL, What
from db.jobs import runs_of
from db.partial import is_partial
from db.readings import run_data
from db.records import JobState, RunData, RunRow, ScoreRow
from db.rollups import ScoreSums, add_scores, replace_scores
from db.score_rows import insert_scores
from db.session import Database
from db.tables import benchmark, job, job_event, outcome, run, sample, score, score_row
from db.token_columns import selection, tokens_from

#: samples of a benchmark whose scores are written in one transaction
_WINDOW = 200
_COMPLETED = [
    *(outcome.c[name] for name in ("run_id", "sample_id", "task_id", "text", "n_tokens")),
    sample.c.reference,
]


@dataclass(frozen=True)
class Completed:
    """A stored completion, as it is scored."""

    text: str
    reference: str
    token_ids: list[int] | None = None  #: a stop has none; None where tokens were not asked for, or made elsewhere
    full_token_ids: list[int] | None = None  #: of the `full` run; None also where that ended with an error
    prompt: str | None = None  #: None where tests were not asked for
    test: str | None = None  #: of the sample; None also where it has none


@dataclass(frozen=True)
class Rescored:
    """What became of it."""

    revision: int  #: in force from now on
    completions: int


class _Overtaken(Exception):
    """Another attempt put its revision in force."""


@dataclass(frozen=True)
class _Attempt:
    job_id: int
    finished_at: float  #: when the job ended: another time means that it was worked on since
    runs: list[RunRow]
    base: int  #: the revision in force when the attempt began
    revision: int
    metrics: dict[str, str]  #: name -> version


@dataclass(frozen=True)
class _Window:
    """Some samples of a benchmark, and the runs on it."""

    runs: list[RunRow]
    first: int
    end: int

    @property
    def run_ids(self) -> list[int]:
        return [one.id for one in self.runs]

    @property
    def samples(self) -> ColumnElement[bool]:
        of_benchmark = sample.c.benchmark_id == self.runs[0].benchmark_id
        return and_(of_benchmark, sample.c.position >= self.first, sample.c.position < self.end)

    def scores(self, kept_in: FromClause) -> ColumnElement[bool]:
        """Of rows of `score` or `score_row`."""
        in_window = select(sample.c.id).where(self.samples)
        return and_(kept_in.c.run_id.in_(self.run_ids), kept_in.c.sample_id.in_(in_window))


def rescore(
    db: Database,
    job_id: int,
    metrics: dict[str, str],
    score_one: Callable[[Completed], dict[str, float]],
    summarise: Callable[[RunData], dict[str, Any]],
    *,
    with_tokens: bool = False,
    with_tests: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    who: str = LOCAL,
) -> Rescored:
    """Add or renew metrics for every completion of a job that has ended; its other scores stay as they are.

    metrics: version by name. score_one gives the values of these metrics that a completion has, with_tokens: also from
    its tokens, with_tests: also from its sample's prompt and test. on_progress is told samples under a policy, done and
    in all. Scores of the revision before are kept, older ones deleted. May be interrupted at any moment, and called
    again. Raises `BadInput` where the job has not ended, has no runs, or is worked on again meanwhile.
    """
    while True:
        attempt = _begin(db, job_id, metrics, who)
        try:
            completions, sums = _write(db, attempt, score_one, with_tokens, with_tests, on_progress)
            summaries = _summaries(db, attempt, summarise)
            _flip(db, attempt, sums, summaries)
        except _Overtaken:
            _delete(db, attempt, attempt.revision)
            continue
        for revision in range(1, attempt.revision):
            if revision != attempt.base:
                _delete(db, attempt, revision)
        return Rescored(attempt.revision, completions)


def _begin(db: Database, job_id: int, metrics: dict[str, str], who: str) -> _Attempt:
    """Take the next revision; that it is taken stands among the job's events."""
    with db.write() as connection:
        schema.hold(connection)
        chosen = select(job.c.state, job.c.finished_at, job.c.error).where(job.c.id == job_id).with_for_update()
        row = connection.execute(chosen).one_or_none()
        if row is None or is_partial(row):
            raise BadInput(f"job {job_id} does not exist; `shortstop list` shows those that do.")
        if not JobState(row.state).ended:
            raise BadInput(f"job {job_id} is {row.state}; score it again once it has ended.")
        runs = runs_of(connection, job_id)
        if not runs:
            raise BadInput(f"job {job_id} ended before it had runs; there is nothing to score.")
        base = _in_force(connection, job_id)
        attempts = select(job_event.c.detail).where(job_event.c.job_id == job_id, job_event.c.what == What.RESCORING)
        taken = [detail["revision"] for detail in connection.execute(attempts).scalars()]
        revision = max([base, *taken]) + 1
        events.record(connection, job_id, who, What.RESCORING, revision=revision, metrics=metrics)
    return _Attempt(job_id, row.finished_at, runs, base, revision, metrics)


def _write(
    db: Database,
    attempt: _Attempt,
    score_one: Callable[[Completed], dict[str, float]],
    with_tokens: bool,
    with_tests: bool,
    on_progress: Callable[[int, int], None],
) -> tuple[int, ScoreSums]:
    """Write the attempt's scores, a short transaction each window. Returns completions and the sums by shard."""
    windows = list(_windows(db, attempt))
    total = sum((window.end - window.first) * len(window.runs) for window in windows)
    sums: ScoreSums = {}
    completions = done = 0
    for window in windows:
        on_progress(done, total)
        rows = _completed(db, window, with_tokens)
        if with_tests:
            rows = _with_tests(db, window, rows)
        scores = [
            (row.task_id, ScoreRow(row.run_id, row.sample_id, name, attempt.metrics[name], value))
            for row, completed in rows
            for name, value in score_one(completed).items()
        ]
        _write_window(db, attempt, window, [one for _, one in scores])
        add_scores(sums, scores)
        completions += len(rows)
        done += (window.end - window.first) * len(window.runs)
    on_progress(done, total)
    return completions, sums


def _windows(db: Database, attempt: _Attempt) -> Iterator[_Window]:
    for benchmark_id, group in groupby(attempt.runs, key=lambda one: one.benchmark_id):
        runs = list(group)
        with db.read() as connection:
            size = select(benchmark.c.n_samples).where(benchmark.c.id == benchmark_id)
            n_samples = connection.execute(size).scalar_one()
        for first in range(0, n_samples, _WINDOW):
            yield _Window(runs, first, min(first + _WINDOW, n_samples))


def _completed(db: Database, window: _Window, with_tokens: bool) -> list[tuple[Row[Any], Completed]]:
    """The completions of a window, errors left out, each with its row: run, sample and shard."""
    tokens = selection(db.dialect) if with_tokens else []
    chosen = (
        select(*_COMPLETED, *tokens)
        .join_from(outcome, sample)
        .where(window.samples, outcome.c.run_id.in_(window.run_ids), outcome.c.text.is_not(None))
        .order_by(outcome.c.run_id, sample.c.position)
    )
    with db.read() as connection:
        rows = connection.execute(chosen).all()
    if not with_tokens:
        return [(row, Completed(row.text, row.reference)) for row in rows]
    ours = {one.id for one in window.runs if one.policy_kind != KIND}
    ids = {(row.run_id, row.sample_id): _token_ids(db.dialect, row) for row in rows if row.run_id in ours}
    full = next((one.id for one in window.runs if one.policy_kind == "full"), None)
    return [
        (row, Completed(row.text, row.reference, ids.get((row.run_id, row.sample_id)), ids.get((full, row.sample_id))))
        for row in rows
    ]


def _with_tests(
    db: Database, window: _Window, rows: Sequence[tuple[Row[Any], Completed]]
) -> list[tuple[Row[Any], Completed]]:
    chosen = select(sample.c.id, sample.c.prompt, sample.c.test).where(window.samples)
    with db.read() as connection:
        found = {id: (prompt, test) for id, prompt, test in connection.execute(chosen)}
    return [
        (row, replace(completed, prompt=found[row.sample_id][0], test=found[row.sample_id][1]))
        for row, completed in rows
    ]


def _token_ids(dialect: str, row: Row[Any]) -> list[int]:
    tokens = tokens_from(dialect, tuple(row)[len(_COMPLETED) :])
    return [] if tokens is None else tokens.token_ids[: row.n_tokens].tolist()


def _write_window(db: Database, attempt: _Attempt, window: _Window, scores: Sequence[ScoreRow]) -> None:
    """The new scores, and a copy of the others in force."""
    columns = [score.c[name] for name in ScoreRow.__dataclass_fields__]
    others = (score.c.revision == attempt.base, score.c.metric.not_in(list(attempt.metrics)))
    chosen = select(*columns).where(window.scores(score), *others).order_by(*columns[:3])
    with db.write() as connection:
        _check_unchanged(connection, attempt)
        kept = [ScoreRow(*row) for row in connection.execute(chosen)]
        insert_scores(connection, [*kept, *scores], dict.fromkeys(window.run_ids, attempt.revision))


def _summaries(
    db: Database, attempt: _Attempt, summarise: Callable[[RunData], dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Anew for the runs that have one; a job that was cancelled has none."""
    summarised = [one.id for one in attempt.runs if one.summary is not None]
    return {run_id: summarise(run_data(db, run_id, revision=attempt.revision)) for run_id in summarised}


def _flip(db: Database, attempt: _Attempt, sums: ScoreSums, summaries: dict[int, dict[str, Any]]) -> None:
    """Put the attempt's revision in force, together with the sums and summaries that go with it."""
    run_ids = [one.id for one in attempt.runs]
    with db.write() as connection:
        _check_unchanged(connection, attempt, to_flip=True)
        replace_scores(connection, run_ids, attempt.metrics, sums)
        connection.execute(update(run).where(run.c.id.in_(run_ids)).values(score_revision=attempt.revision))
        for run_id, summary in summaries.items():
            connection.execute(update(run).where(run.c.id == run_id).values(summary=summary))
        pinned = connection.execute(select(job.c.pinned).where(job.c.id == attempt.job_id)).scalar_one()
        pinned = pinned | {"metrics": pinned.get("metrics", {}) | attempt.metrics}
        connection.execute(update(job).where(job.c.id == attempt.job_id).values(pinned=pinned))


def _check_unchanged(connection: Connection, attempt: _Attempt, *, to_flip: bool = False) -> None:
    """That the job is as it was when the attempt began, and stays so until this transaction ends.

    Raises `_Overtaken`, `BadInput`.
    """
    schema.hold(connection)
    ended = select(job.c.finished_at, job.c.error).where(job.c.id == attempt.job_id)
    row = connection.execute(ended.with_for_update(read=not to_flip)).one_or_none()
    if row is None or is_partial(row):
        raise BadInput(f"job {attempt.job_id} is being pruned; there is nothing left to score.")
    if row.finished_at != attempt.finished_at:
        raise BadInput(f"job {attempt.job_id} is worked on again; score it again once it has ended.")
    if _in_force(connection, attempt.job_id) != attempt.base:
        raise _Overtaken


def _in_force(connection: Connection, job_id: int) -> int:
    """The revision of the job's scores: its runs change it together."""
    return int(connection.execute(select(func.max(run.c.score_revision)).where(run.c.job_id == job_id)).scalar_one())


def _delete(db: Database, attempt: _Attempt, revision: int) -> None:
    """All scores of a revision, a short transaction each window."""
    run_ids = [one.id for one in attempt.runs]
    of_revision = score_row.c.revision == revision
    some = select(score_row.c.run_id).where(score_row.c.run_id.in_(run_ids), of_revision).limit(1)
    with db.read() as connection:
        if connection.execute(some).first() is None:
            return
    for window in _windows(db, attempt):
        with db.write() as connection:
            connection.execute(delete(score_row).where(window.scores(score_row), of_revision))
