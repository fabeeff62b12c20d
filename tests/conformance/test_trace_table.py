"""Traces in the record: written with their shard, read in order, gone with their job."""

from dataclasses import replace

import numpy as np
import pytest
from made import claimed, planned_job, results_of, work

from db import jobs, queue, results
from db.errors import LeaseLost, Missing, RecordError
from db.pruning import prune
from db.records import ShardResults, TraceArrays, TraceRow
from db.session import Database
from db.traces import source_groups, traced_tokens, traces


def arrays(draw: np.random.Generator, points: int = 4, n: int = 5) -> TraceArrays:
    columns = [draw.random((points, n), dtype=np.float32) for _ in range(4)]
    ids = draw.integers(0, 2**24 - 1, (points, n), dtype=np.int32)
    controller = draw.random((points, 3, n), dtype=np.float32)
    controller[0] = np.nan
    ranks = draw.integers(-1, 2**24 - 2, (points, n), dtype=np.int32)
    return TraceArrays(draw.integers(0, 2**31 - 1, n, dtype=np.int32), ids, *columns, controller, ranks)


def with_traces(made: ShardResults, seed: int) -> ShardResults:
    draw = np.random.default_rng(seed)
    kept = [row for row in made.outcomes if row.error is None]
    return replace(
        made,
        traces=[TraceRow(row.run_id, row.sample_id, 7, 2**32 - 1, arrays(draw, n=1 + i)) for i, row in enumerate(kept)],
    )


def test_traces_come_back_bit_by_bit_and_in_order(db: Database) -> None:
    """Protects the table: what a shard committed is read in the benchmark's order, in pieces of any size."""
    job_id = planned_job(db, policies=["full"])
    [run] = jobs.runs(db, job_id)
    written: dict[int, TraceRow] = {}
    while lease := queue.claim(db, "worker", kind="shard"):
        made = with_traces(results_of(db, lease), lease.first_batch)
        written |= {row.sample_id: row for row in made.traces}
        results.commit_shard(db, lease, made)
    found = [one for piece in traces(db, run.id, samples=3) for one in piece]
    assert [one.position for one in found] == sorted(one.position for one in found)
    assert {one.sample_id for one in found} == written.keys()
    for one in found:
        row = written[one.sample_id]
        assert (one.prompt_tokens, one.prompt_key) == (7, 2**32 - 1)
        for column in TraceArrays.__dataclass_fields__:
            back, there = getattr(one.arrays, column), getattr(row.arrays, column)
            assert np.array_equal(back, there, equal_nan=column == "controller"), column
    assert traced_tokens(db, run.id) == sum(len(one.arrays) for one in found)
    assert source_groups(db, run.id) == sorted({one.source_group for one in found})
    every_other = [one.position for piece in traces(db, run.id, samples=2, every=2) for one in piece]
    assert every_other == [one.position for one in found if one.position % 4 < 2]
    with pytest.raises(Missing, match="run 999 does not exist"):
        next(traces(db, 999))


def test_a_lost_lease_writes_no_trace(db: Database) -> None:
    """Protects the fence: a worker that came back from the dead leaves nothing; a shard brings its own samples."""
    job_id = planned_job(db, policies=["full"])
    [run] = jobs.runs(db, job_id)
    lease = claimed(db)
    made = with_traces(results_of(db, lease), 1)
    strange = replace(made, traces=[replace(made.traces[0], run_id=run.id + 1)])
    with pytest.raises(RecordError, match="not its own"):
        results.commit_shard(db, lease, strange)
    jobs.cancel_job(db, job_id)
    with pytest.raises(LeaseLost):
        results.commit_shard(db, lease, made)
    assert traced_tokens(db, run.id) == 0


def test_traces_go_with_their_job(db: Database) -> None:
    """Protects `db prune`: nothing of a trace is left, and what others use stays."""
    job_id = planned_job(db, policies=["full"])
    [run] = jobs.runs(db, job_id)
    lease = claimed(db)
    results.commit_shard(db, lease, with_traces(results_of(db, lease), 1))
    assert traced_tokens(db, run.id) > 0
    work(db)
    jobs.cancel_job(db, job_id)
    assert prune(db, -1).jobs == [job_id]
    assert traced_tokens(db, run.id) == 0
