"""Rollups counted again from outcomes, tokens, scores and timings: streamed, so that memory does not grow with a run.

PostgreSQL adds up by itself, so that no token leaves it. SQLite, which would sort all tokens to do so, is asked shard
by shard, and hands out the tokens of one at a time.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

from sqlalchemy import Connection, Row, select, text

from db.records import Rollup, RunRow, TimingRow
from db.rollups import BILLION, merge
from db.session import Database
from db.tables import rollup as rollup_table
from db.tables import task, timing

#: rows fetched at once
_FETCH = 2_000
_FULL, _EXIT, _STOP = 0, 1, 2
_SUMS = [field.name for field in fields(Rollup)]
_TIMING = [timing.c[name] for name in TimingRow.__dataclass_fields__]


@contextmanager
def snapshot(db: Database) -> Iterator[Connection]:
    """A read transaction whose statements all see the same moment, whatever others commit meanwhile."""
    with db.read() as connection:
        if db.dialect == "postgresql":
            connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
            # a reader holds nobody up, and may be busy with a file for long
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        yield connection


@dataclass(frozen=True)
class Recounted:
    """The sums of a run over one shard, as they are counted."""

    task_id: int
    first_batch: int
    end_batch: int
    sums: Rollup


def recount(connection: Connection, one: RunRow) -> Iterator[Recounted]:
    """One for every shard that has outcomes of the run, by first batch.

    Presumes that every outcome lies inside its shard and has the tokens that it counts: see `db.checks`.
    """
    chosen = select(*_TIMING).where(timing.c.run_id == one.id).order_by(timing.c.batch)
    timings = _Line(stream(connection, chosen), lambda row: row.batch)
    count = _count_on_sqlite if connection.dialect.name == "sqlite" else _count_on_postgresql
    for shard in count(connection, one):
        timings.through(shard.first_batch - 1)  # of no shard: `db.checks` tells
        own = timings.through(shard.end_batch - 1)
        yield replace(shard, sums=merge([shard.sums, _of_timings(own)]))


@dataclass(frozen=True)
class Difference:
    """A rollup as it is kept and as it is counted; None: there is none, or nothing to count."""

    task_id: int
    kept: Rollup | None
    counted: Rollup | None


def differences(connection: Connection, one: RunRow, *, everything: bool = False) -> Iterator[Difference]:
    """Of each shard with a rollup or outcomes of the run, by first batch; without `everything` where they differ."""
    chosen = (
        select(task.c.first_batch, rollup_table)
        .join(task, task.c.id == rollup_table.c.task_id)
        .where(rollup_table.c.run_id == one.id)
        .order_by(task.c.first_batch, task.c.id)
    )
    rollups = _Line(stream(connection, chosen), _by_shard)
    for shard in recount(connection, one):
        kept = None
        for row in rollups.through((shard.first_batch, shard.task_id)):
            if row.task_id == shard.task_id:
                kept = _kept(row)
            else:
                yield Difference(row.task_id, _kept(row), None)
        if everything or kept != shard.sums:
            yield Difference(shard.task_id, kept, shard.sums)
    for row in rollups.rest():
        yield Difference(row.task_id, _kept(row), None)


def _kept(row: Row[Any]) -> Rollup:
    values = {name: getattr(row, name) for name in _SUMS}
    for name in ("exit_histogram", "stop_histogram"):
        values[name] = {int(layer): n for layer, n in values[name].items()}
    return Rollup(**values)


def _by_shard(row: Row[Any]) -> tuple[int, int]:
    return row.first_batch, row.task_id


class _Line:
    """Rows in the order of their places, taken from the front."""

    def __init__(self, rows: Iterator[Row[Any]], place: Callable[[Row[Any]], Any]) -> None:
        self._rows = rows
        self._place = place
        self._head = next(rows, None)

    def through(self, last: Any) -> list[Row[Any]]:
        """Take the rows up to this place, those at it included."""
        taken = []
        while self._head is not None and self._place(self._head) <= last:
            taken.append(self._head)
            self._head = next(self._rows, None)
        return taken

    def rest(self) -> Iterator[Row[Any]]:
        """Take all that are left."""
        while self._head is not None:
            yield self._head
            self._head = next(self._rows, None)


def stream(connection: Connection, statement: Any, **parameters: Any) -> Iterator[Row[Any]]:
    """The rows of a statement, fetched some thousand at a time."""
    with connection.execute(statement, parameters, execution_options={"yield_per": _FETCH}) as rows:
        yield from rows


def _of_timings(rows: list[Row[Any]]) -> Rollup:
    counted: dict[str, Any] = Counter()
    for row in rows:
        counted["timed_batches" if row.timed else "untimed_batches"] += 1
        for name in ("prefill_ns", "decode_ns", "decode_tokens", "ideal_ns"):
            counted[name] += getattr(row, name) * row.timed
        for name in ("flops", "drafted", "drafts_kept"):
            counted[name] += getattr(row, name)
    return Rollup(**counted)


def _of_tokens(counts: Iterator[tuple[int, int, int, int]]) -> Rollup:
    """counts: (decision, exit layer, tokens, sum of their layers run)."""
    decisions, layers = Counter[int](), {False: Counter[int](), True: Counter[int]()}
    run, exit_layers = {False: 0, True: 0}, 0
    for decision, layer, n, layers_run in counts:
        stop = decision == _STOP
        decisions[decision] += n
        layers[stop][layer] += n
        run[stop] += layers_run
        exit_layers += 0 if stop else layer * n
    return Rollup(
        full_tokens=decisions[_FULL],
        exit_tokens=decisions[_EXIT],
        stops=decisions[_STOP],
        exit_layer_sum=exit_layers,
        layers_run_sum=run[False],
        stop_layers_run_sum=run[True],
        exit_histogram=dict(sorted(layers[False].items())),
        stop_histogram=dict(sorted(layers[True].items())),
    )


def _of_scores(counts: Iterator[tuple[str, int, int]]) -> Rollup:
    """counts: (metric, completions scored, sum in billionths)."""
    numbers, sums = Counter[str](), Counter[str]()
    for metric, n, total in counts:
        numbers[metric] += n
        sums[metric] += total
    return Rollup(score_counts=dict(sorted(numbers.items())), score_sums=dict(sorted(sums.items())))


# SQLite: sums shard by shard, found by position in the benchmark

_SHARDS_ON_SQLITE = text("""
SELECT t.id, t.first_batch, t.end_batch, json_extract(j.pinned, '$.batch_size') AS batch_size
FROM task t JOIN job j ON j.id = t.job_id
WHERE t.job_id = :job AND t.benchmark_id = :benchmark AND t.kind = 'shard' AND t.state = 'done'
ORDER BY t.first_batch, t.id
""")
_IN_SHARD = """
FROM sample s CROSS JOIN outcome o ON o.run_id = :run AND o.sample_id = s.id AND o.task_id = :task
"""
_WHICH = "WHERE s.benchmark_id = :benchmark AND s.position >= :first AND s.position < :end"
_OUTCOMES_ON_SQLITE = text(f"""
SELECT count(*) AS samples, count(o.error) AS errors, sum(o.shown AND o.error IS NULL) AS shown,
  sum(o.isolated) AS isolated, sum(o.cut_tokens > 0) AS cut_prompts, sum(o.n_tokens) AS n_tokens,
  group_concat(o.tokens) AS tokens
{_IN_SHARD} {_WHICH}
""")
# SQLite's round() goes away from zero at a half; Python's, and so the rollups', to the even neighbour
_SCORES_ON_SQLITE = text(f"""
SELECT metric, count(*) AS n, sum(whole + (rest > 0.5 OR (rest = 0.5 AND whole % 2 = 1))
  - (rest < -0.5 OR (rest = -0.5 AND whole % 2 = -1))) AS total
FROM (
  SELECT c.metric, CAST(c.value * {BILLION} AS INTEGER) AS whole,
    c.value * {BILLION} - CAST(c.value * {BILLION} AS INTEGER) AS rest
  {_IN_SHARD} CROSS JOIN run r ON r.id = :run
    CROSS JOIN score c ON c.run_id = r.id AND c.revision = r.score_revision AND c.sample_id = s.id
  {_WHICH}
)
GROUP BY metric
""")


def _count_on_sqlite(connection: Connection, one: RunRow) -> Iterator[Recounted]:
    of_run = {"run": one.id, "benchmark": one.benchmark_id}
    for shard in stream(connection, _SHARDS_ON_SQLITE, job=one.job_id, benchmark=one.benchmark_id):
        extent = {"first": shard.first_batch * shard.batch_size, "end": shard.end_batch * shard.batch_size}
        asked = of_run | extent | {"task": shard.id}
        row = connection.execute(_OUTCOMES_ON_SQLITE, asked).one()
        if row.samples == 0:
            continue
        scores = connection.execute(_SCORES_ON_SQLITE, asked).all()
        parts = [
            Rollup(row.samples, row.errors, row.shown, row.isolated, row.cut_prompts, row.n_tokens),
            _of_tokens(_token_counts(row.tokens)),
            _of_scores((score.metric, score.n, score.total) for score in scores),
        ]
        yield Recounted(shard.id, shard.first_batch, shard.end_batch, merge(parts))


def _token_counts(tokens: str | None) -> Iterator[tuple[int, int, int, int]]:
    """Of the JSON of many outcomes, one behind the other: one call an outcome would take twice the time."""
    outcomes = json.loads(f"[{tokens or ''}]")
    counted = Counter([(record[3], record[1], record[2]) for record in chain.from_iterable(outcomes)])
    return ((decision, layer, n, layers_run * n) for (decision, layer, layers_run), n in counted.items())


# PostgreSQL: sums by shard

_OUTCOMES_ON_POSTGRESQL = text("""
SELECT t.id AS task_id, t.first_batch, t.end_batch, count(*) AS samples, count(o.error) AS errors,
  count(*) FILTER (WHERE o.shown AND o.error IS NULL) AS shown, count(*) FILTER (WHERE o.isolated) AS isolated,
  count(*) FILTER (WHERE o.cut_tokens > 0) AS cut_prompts, sum(o.n_tokens) AS tokens
FROM outcome o JOIN task t ON t.id = o.task_id
WHERE o.run_id = :run GROUP BY t.id ORDER BY t.first_batch, t.id
""")
_TOKENS_ON_POSTGRESQL = text("""
SELECT t.id AS task_id, t.first_batch, counted.decision, counted.exit_layer, counted.n, counted.layers_run
FROM (
  SELECT o.task_id, v.decision, v.exit_layer, count(*) AS n, sum(v.layers_run) AS layers_run
  FROM outcome o CROSS JOIN LATERAL unnest(o.decisions, o.exit_layers, o.layers_run)
    AS v (decision, exit_layer, layers_run)
  WHERE o.run_id = :run GROUP BY 1, 2, 3
) AS counted JOIN task t ON t.id = counted.task_id
ORDER BY t.first_batch, t.id
""")
# round() of a double goes to the even neighbour of a half, as Python's does
_SCORES_ON_POSTGRESQL = text(f"""
SELECT t.id AS task_id, t.first_batch, c.metric, count(*) AS n, sum(round(c.value * {BILLION})::bigint) AS total
FROM score c JOIN run r ON r.id = c.run_id AND r.score_revision = c.revision
  JOIN outcome o ON o.run_id = c.run_id AND o.sample_id = c.sample_id JOIN task t ON t.id = o.task_id
WHERE c.run_id = :run GROUP BY t.first_batch, t.id, c.metric ORDER BY t.first_batch, t.id
""")


def _count_on_postgresql(connection: Connection, one: RunRow) -> Iterator[Recounted]:
    tokens = _Line(stream(connection, _TOKENS_ON_POSTGRESQL, run=one.id), _by_shard)
    scores = _Line(stream(connection, _SCORES_ON_POSTGRESQL, run=one.id), _by_shard)
    for row in stream(connection, _OUTCOMES_ON_POSTGRESQL, run=one.id):
        place = _by_shard(row)
        parts = [
            Rollup(row.samples, row.errors, row.shown, row.isolated, row.cut_prompts, int(row.tokens)),
            _of_tokens((t.decision, t.exit_layer, t.n, int(t.layers_run)) for t in tokens.through(place)),
            _of_scores((s.metric, s.n, int(s.total)) for s in scores.through(place)),
        ]
        yield Recounted(row.task_id, row.first_batch, row.end_batch, merge(parts))
