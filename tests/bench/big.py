"""Jobs of millions of tokens on PostgreSQL, made in minutes: copies, by SQL, of a small one that went every step."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, inspect, text

from db import results
from db.session import Database
from tests.bench.shards import POLICIES, TOKENS, Shape, Work
from workers.estimates import summarise

#: batches as small as jobs have them: the smaller, the more shards, rollups and timings stand behind as many tokens
SHAPE = Shape(batch=8, batches=2)
SHARDS = 16
#: on disk, of a token with all that belongs to it, while it is written
BYTES = 150

_SAMPLES = """
generate_series(0, :samples - 1) i
JOIN sample o ON o.benchmark_id = :small_benchmark AND o.position = i % :small
"""
_SHARDS = """
generate_series(0, :samples / :shard - 1) i
CROSS JOIN (SELECT * FROM task WHERE job_id = :small_job AND kind = 'shard' LIMIT 1) o
"""
#: one row a sample of the big job, each with what the small job has for one of its samples under some of its runs
_BY_SAMPLE = """
sample s
JOIN task k ON k.job_id = :job AND k.first_batch = s.position / :shard * :batches
JOIN sample t ON t.benchmark_id = :small_benchmark AND t.position = s.position % :small
JOIN {} o ON o.sample_id = t.id
JOIN run small_run ON small_run.id = o.run_id AND small_run.job_id = :small_job
JOIN run r ON r.job_id = :job AND r.position = small_run.position
WHERE s.benchmark_id = :benchmark
"""
_BY_BATCH = """
generate_series(0, :samples / :batch - 1) i
JOIN timing o ON o.batch = i % (:small / :batch)
JOIN run small_run ON small_run.id = o.run_id AND small_run.job_id = :small_job
JOIN run r ON r.job_id = :job AND r.position = small_run.position
"""
_BY_SHARD = """
task k
JOIN task t ON t.job_id = :small_job AND t.kind = 'shard' AND t.first_batch = k.first_batch % (:small / :batch)
JOIN rollup o ON o.task_id = t.id
JOIN run small_run ON small_run.id = o.run_id
JOIN run r ON r.job_id = :job AND r.position = small_run.position
WHERE k.job_id = :job
"""


class Mould:
    """The small job that big ones are copied from: worked off, scored, finalised with a true summary."""

    def __init__(self, db: Database) -> None:
        work = Work(db, SHAPE, SHARDS)
        for _ in range(SHARDS):
            work.commit(work.made())
        assert results.finalise(db, work.job_id, summarise)
        self.db, self.job_id, self.benchmark_id = db, work.job_id, work.runs[0].benchmark_id

    def cast(self, tokens: int, runs: Sequence[int] = range(len(POLICIES))) -> int:
        """A finished job with about so many tokens under these of the policies. Returns its id."""
        shards = max(1, tokens // (TOKENS * len(runs) * SHAPE.samples))
        values: dict[str, Any] = {
            "samples": shards * SHAPE.samples,
            "batch": SHAPE.batch,
            "batches": SHAPE.batches,
            "shard": SHAPE.samples,
            "small": SHARDS * SHAPE.samples,
            "small_job": self.job_id,
            "small_benchmark": self.benchmark_id,
            "runs": list(runs),
        }
        with self.db.write() as connection:
            connection.execute(text("SET LOCAL session_replication_role = replica"))  # what is copied refers rightly
            _copy(connection, values, "job", "job o WHERE id = :small_job")
            values["job"] = _last(connection, "job")
            changed = {"content_hash": "'big ' || :job", "n_samples": ":samples"}
            _copy(connection, values, "benchmark", "benchmark o WHERE id = :small_benchmark", **changed)
            values["benchmark"] = _last(connection, "benchmark")
            _copy_all(connection, values)
        with self.db.write() as connection:
            connection.execute(text("ANALYZE"))  # what autovacuum does within minutes
        return int(values["job"])


def _copy_all(connection: Connection, values: dict[str, Any]) -> None:
    job, benchmark = {"job_id": ":job"}, {"benchmark_id": ":benchmark"}
    _copy(connection, values, "sample", _SAMPLES, **benchmark, position="i", name="'s/' || i")
    _copy(connection, values, "run", "run o WHERE job_id = :small_job AND position = ANY(:runs)", **job, **benchmark)
    extent = {"first_batch": "i * :batches", "end_batch": "(i + 1) * :batches"}
    _copy(connection, values, "task", _SHARDS, **job, **benchmark, **extent)
    connection.execute(text("ANALYZE sample, task, run"))  # or the joins below are planned as if these were empty
    run, sample, task = {"run_id": "r.id"}, {"sample_id": "s.id"}, {"task_id": "k.id"}
    _copy(connection, values, "outcome", _BY_SAMPLE.format("outcome"), **run, **sample, **task)
    _copy(connection, values, "score_row", _BY_SAMPLE.format("score_row"), **run, **sample)
    _copy(connection, values, "timing", _BY_BATCH, **run, batch="i")
    _copy(connection, values, "rollup", _BY_SHARD, **run, **task)


def _copy(connection: Connection, values: dict[str, Any], table: str, source: str, **changed: str) -> None:
    """Insert the rows `o` of the source, some of their columns changed."""
    names = [column["name"] for column in inspect(connection).get_columns(table) if column["name"] != "id"]
    selected = ", ".join(changed.get(name, f"o.{name}") for name in names)
    statement = text(f"INSERT INTO {table} ({', '.join(names)}) SELECT {selected} FROM {source}")
    connection.execute(statement, {name: values[name] for name in statement.compile().params})


def _last(connection: Connection, table: str) -> int:
    return int(connection.execute(text(f"SELECT max(id) FROM {table}")).scalar_one())
