"""Scores: a row a completion where they are kept, a row each where they are read."""

import sys
import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from made import claimed, planned_job, results_of
from sqlalchemy import text

from db import results
from db.errors import RecordError
from db.queries import query
from db.records import ScoreRow, ShardResults
from db.session import Database, open_database

#: numbers that need every digit, and those at the ends
NUMBERS = [0.0, 1.0, -1.0, 0.1 + 0.2, 1 / 3, 5e-324, -sys.float_info.min, 12345.678901234567, 1e-9, 2.0**-30]


def scored(made: ShardResults, values: list[dict[str, float]]) -> ShardResults:
    """A completion each, in turn."""
    rows = zip(made.outcomes, values, strict=False)
    scores = [
        ScoreRow(o.run_id, o.sample_id, name, f"{name}@1", value) for o, own in rows for name, value in own.items()
    ]
    return replace(made, scores=scores)


def test_every_digit_is_kept(db: Database) -> None:
    """Seventeen of them tell a number from its neighbours; on SQLite they are written and read as text."""
    rng = np.random.default_rng(7)
    job_id = planned_job(db, 64, batch_size=64, shard_batches=1, policies=["full"])
    lease = claimed(db)
    random = rng.random(63 * 10) * 10.0 ** rng.integers(-9, 1, 63 * 10)
    values = [NUMBERS, *random.reshape(63, 10).tolist()]
    sent = scored(results_of(db, lease), [{f"m{i}": value for i, value in enumerate(row)} for row in values])
    results.commit_shard(db, lease, sent)
    wanted = sorted((score.sample_id, score.metric, score.value) for score in sent.scores)
    asked = f"SELECT sample_id, metric, value FROM completion_score WHERE job_id = {job_id} ORDER BY 1, 2"
    assert list(query(db, asked)) == wanted
    read = [
        (row.sample.id, name, value)
        for row in results.completions(db, job_id=job_id)
        for name, value in row.scores.items()
    ]
    assert sorted(read) == wanted


def test_completions_may_have_other_metrics_than_their_neighbours(db: Database) -> None:
    """Each list stands once, whatever shard it came with; a completion without scores has no row."""
    job_id = planned_job(db, 8, batch_size=4, shard_batches=1, policies=["full"])
    each = [{"es": 0.25, "em": 1.0}, {"em": 0.0}, {}, {"es": 0.75, "em": 1.0}]
    for _ in range(2):
        lease = claimed(db)
        results.commit_shard(db, lease, scored(results_of(db, lease), each))
    assert [row.scores for row in results.completions(db, job_id=job_id)] == [*each, *each]
    with db.read() as connection:
        lists = connection.execute(text("SELECT count(*), count(DISTINCT list_id) FROM metric_list")).one()
        rows = connection.execute(text("SELECT count(*) FROM score_row")).scalar_one()
    assert (tuple(lists), rows) == ((3, 2), 6)


def test_a_completion_with_two_scores_of_one_metric_is_refused(db: Database) -> None:
    """And nothing of its shard is written."""
    planned_job(db, 2, batch_size=2, shard_batches=1, policies=["full"])
    lease = claimed(db)
    made = scored(results_of(db, lease), [{"es": 0.5}])
    twice = replace(made, scores=[*made.scores, *made.scores])
    with pytest.raises(RecordError, match=r"sample 1 under run 1 has two scores of 'es'; a metric gives one"):
        results.commit_shard(db, lease, twice)
    with db.read() as connection:
        for table in ("outcome", "score_row", "metric_list"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 0
    results.commit_shard(db, lease, made)


def test_writers_that_meet_a_new_list_at_once(db: Database, url: str) -> None:
    """Both shards are there, and the list once."""
    job_id = planned_job(db, 8, batch_size=1, shard_batches=1, policies=["full"])
    together = threading.Barrier(4)
    failed: list[Exception] = []

    def worker() -> None:
        try:
            with closing(open_database(url)) as own:
                for _ in range(2):
                    lease = claimed(own)
                    made = scored(results_of(own, lease), [{"es": 0.5, "em": 1.0}])
                    together.wait(timeout=30)
                    results.commit_shard(own, lease, made)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [row.scores for row in results.completions(db, job_id=job_id)] == [{"es": 0.5, "em": 1.0}] * 8
    with db.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM metric_list")).scalar_one() == 2
