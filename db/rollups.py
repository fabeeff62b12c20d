"""Rollups: 64-bit sums per (run, shard), written with the results, merged exactly in any order."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, bindparam, insert, select, update

from db.records import OutcomeRow, Rollup, ScoreRow, ShardResults, TimingRow
from db.session import Database
from db.tables import rollup as rollup_table
from db.tables import run

#: scores are summed in billionths
BILLION = 1_000_000_000
_FULL, _EXIT, _STOP = 0, 1, 2
_Row = TypeVar("_Row", OutcomeRow, TimingRow)
_NAMES = [field.name for field in fields(Rollup)]

#: by run and shard: how many completions a metric scored, and the sum in billionths
ScoreSums = dict[tuple[int, int], tuple[dict[str, int], dict[str, int]]]


def rollup(db: Database, run_id: int) -> Rollup:
    """The run's sums as they stand now."""
    with db.read() as connection:
        return rollup_of(connection, run_id)


def rollup_of(connection: Connection, run_id: int) -> Rollup:
    """As `rollup`, inside the caller's transaction."""
    columns = [rollup_table.c[name] for name in _NAMES]
    rows = connection.execute(select(*columns).where(rollup_table.c.run_id == run_id))
    return merge(_from_row(row) for row in rows.mappings())


def rollups_of_job(db: Database, job_id: int) -> dict[int, Rollup]:
    """The sums of each run of a job, all of one moment."""
    columns = [run.c.id, *(rollup_table.c[name] for name in _NAMES)]
    chosen = select(*columns).join(rollup_table, isouter=True).where(run.c.job_id == job_id)
    found: dict[int, Rollup] = {}
    with db.read() as connection:
        for row in connection.execute(chosen).mappings():
            one = Rollup() if row["samples"] is None else _from_row({name: row[name] for name in _NAMES})
            found[row["id"]] = merge([found.get(row["id"], Rollup()), one])
    return found


def insert_rollups(connection: Connection, task_id: int, sums: Mapping[int, Rollup]) -> None:
    """Write one rollup for each run of the shard."""
    rows = [{"run_id": run_id, "task_id": task_id} | vars(one) for run_id, one in sums.items()]
    if rows:
        connection.execute(insert(rollup_table), rows)


def add_scores(sums: ScoreSums, scores: Iterable[tuple[int, ScoreRow]]) -> None:
    """Add scores, each with its shard, to the sums."""
    for task_id, score in scores:
        counts, billionths = sums.setdefault((score.run_id, task_id), ({}, {}))
        counts[score.metric] = counts.get(score.metric, 0) + 1
        billionths[score.metric] = billionths.get(score.metric, 0) + round(score.value * BILLION)


def replace_scores(connection: Connection, run_ids: list[int], metrics: Collection[str], sums: ScoreSums) -> None:
    """Put `sums` in the place of what the rollups of these runs say of these metrics."""
    columns = [rollup_table.c[name] for name in ("run_id", "task_id", "score_counts", "score_sums")]
    rows = connection.execute(select(*columns).where(rollup_table.c.run_id.in_(run_ids))).all()
    change = (
        update(rollup_table)
        .where(rollup_table.c.run_id == bindparam("of_run"), rollup_table.c.task_id == bindparam("of_task"))
        .values(score_counts=bindparam("counts"), score_sums=bindparam("billionths"))
    )
    changes = []
    for run_id, task_id, old_counts, old_sums in rows:
        counts, billionths = sums.get((run_id, task_id), ({}, {}))
        new = {"counts": _without(old_counts, metrics) | counts, "billionths": _without(old_sums, metrics) | billionths}
        changes.append({"of_run": run_id, "of_task": task_id} | new)
    if changes:
        connection.execute(change, changes)


def _without(by_metric: dict[str, int], metrics: Collection[str]) -> dict[str, int]:
    return {name: value for name, value in by_metric.items() if name not in metrics}


def of_results(results: ShardResults) -> dict[int, Rollup]:
    """The sums of each run in the results."""
    outcomes, timings = _by_run(results.outcomes), _by_run(results.timings)
    scores: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in results.scores:
        scores[score.run_id][score.metric].append(score.value)
    return {
        run_id: merge([_of_outcomes(outcomes[run_id]), _of_timings(timings[run_id]), _of_scores(scores[run_id])])
        for run_id in sorted(outcomes)
    }


def _by_run(rows: Iterable[_Row]) -> defaultdict[int, list[_Row]]:
    found: defaultdict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        found[row.run_id].append(row)
    return found


def merge(rollups: Iterable[Rollup]) -> Rollup:
    """Their sum, in Python's integers: it neither rounds nor overflows, whatever the order."""
    total: dict[str, Any] = dict(vars(Rollup()))
    for one in rollups:
        for name in _NAMES:
            value = getattr(one, name)
            total[name] = _added(total[name], value) if isinstance(value, dict) else total[name] + value
    return Rollup(**total)


def _added(left: dict[Any, int], right: dict[Any, int]) -> dict[Any, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in sorted(left.keys() | right.keys())}


def _of_outcomes(outcomes: list[OutcomeRow]) -> Rollup:
    tokens = [o.tokens for o in outcomes if o.tokens is not None]
    exit_layers = _column([t.exit_layers for t in tokens])
    layers_run = _column([t.layers_run for t in tokens])
    decisions = _column([t.decisions for t in tokens])
    stops = decisions == _STOP
    return Rollup(
        samples=len(outcomes),
        errors=sum(o.error is not None for o in outcomes),
        shown=sum(o.shown for o in outcomes if o.error is None),
        isolated=sum(o.isolated for o in outcomes),
        cut_prompts=sum(o.cut_tokens > 0 for o in outcomes),
        tokens=sum(o.n_tokens for o in outcomes),
        full_tokens=int((decisions == _FULL).sum()),
        exit_tokens=int((decisions == _EXIT).sum()),
        stops=int(stops.sum()),
        exit_layer_sum=int(exit_layers[~stops].sum()),
        layers_run_sum=int(layers_run[~stops].sum()),
        stop_layers_run_sum=int(layers_run[stops].sum()),
        exit_histogram=_histogram(exit_layers[~stops]),
        stop_histogram=_histogram(exit_layers[stops]),
    )


def _of_timings(timings: list[TimingRow]) -> Rollup:
    timed = [t for t in timings if t.timed]
    return Rollup(
        timed_batches=len(timed),
        untimed_batches=len(timings) - len(timed),
        prefill_ns=sum(t.prefill_ns for t in timed),
        decode_ns=sum(t.decode_ns for t in timed),
        decode_tokens=sum(t.decode_tokens for t in timed),
        ideal_ns=sum(t.ideal_ns for t in timed),
        flops=sum(t.flops for t in timings),
        drafted=sum(t.drafted for t in timings),
        drafts_kept=sum(t.drafts_kept for t in timings),
    )


def _of_scores(values: Mapping[str, list[float]]) -> Rollup:
    return Rollup(
        score_counts={metric: len(of_metric) for metric, of_metric in values.items()},
        score_sums={metric: _billionths(of_metric) for metric, of_metric in values.items()},
    )


def _billionths(values: list[float]) -> int:
    """Their sum, each rounded as `round` does; numpy rounds a shard's at once."""
    return sum(map(int, np.rint(np.array(values) * BILLION).tolist()))


def _column(arrays: list[npt.NDArray[np.int16]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int64)


def _histogram(layers: npt.NDArray[np.int64]) -> dict[int, int]:
    found, counts = np.unique(layers, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _from_row(row: Mapping[Any, Any]) -> Rollup:
    """JSON turned the layers into text."""
    layers = {name: {int(k): n for k, n in row[name].items()} for name in ("exit_histogram", "stop_histogram")}
    return Rollup(**dict(row) | layers)
