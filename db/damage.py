"""What of a job cannot be counted at all: outcomes, tokens and scores that contradict themselves."""

from collections.abc import Iterator

from sqlalchemy import Connection, select, text

from db.tables import job

BACKUP = "restore a backup"

_OUTSIDE = text("""
SELECT o.run_id, count(*) AS n, min(o.sample_id) AS first
FROM outcome o JOIN run r ON r.id = o.run_id LEFT JOIN sample s ON s.id = o.sample_id
  LEFT JOIN task t ON t.id = o.task_id AND t.job_id = r.job_id AND t.kind = 'shard' AND t.state = 'done'
    AND t.benchmark_id = r.benchmark_id
WHERE r.job_id = :job AND NOT coalesce(s.benchmark_id = r.benchmark_id
  AND s.position >= t.first_batch * :batch_size AND s.position < t.end_batch * :batch_size, false)
GROUP BY o.run_id ORDER BY o.run_id
""")
_COUNTS = """
SELECT o.run_id, count(*) AS n, min(o.sample_id) AS first
FROM outcome o JOIN run r ON r.id = o.run_id
WHERE r.job_id = :job AND ({wrong})
GROUP BY o.run_id ORDER BY o.run_id
"""
_EXPECTED = (
    "CASE WHEN o.error IS NULL THEN o.n_tokens + CASE WHEN o.finish = 'stop' THEN 1 ELSE 0 END"
    " WHEN o.n_tokens = 0 THEN -1 ELSE -2 END"
)
_COUNTED = {
    "sqlite": text(
        _COUNTS.format(
            wrong="CASE WHEN o.tokens IS NULL THEN -1 WHEN json_valid(o.tokens) THEN json_array_length(o.tokens)"
            f" ELSE -3 END <> {_EXPECTED}"
        )
    ),
    "postgresql": text(
        _COUNTS.format(
            wrong=" OR ".join(
                f"coalesce(cardinality(o.{array}), -1) <> {_EXPECTED}"
                for array in ("token_ids", "exit_layers", "layers_run", "decisions", "confidences")
            )
            + " OR cardinality(o.drafts) <> cardinality(o.token_ids)"
        )
    ),
}
#: scores of which nobody can say what they are of
_NAMELESS = """
SELECT c.run_id, count(*) AS n, min(c.sample_id) AS first
FROM score_row c JOIN run r ON r.id = c.run_id
  LEFT JOIN (SELECT list_id, count(*) AS n FROM metric_list GROUP BY list_id) m ON m.list_id = c.list_id
WHERE r.job_id = :job AND coalesce(m.n, 0) <> {length}
GROUP BY c.run_id ORDER BY c.run_id
"""
_NAMED = {
    "sqlite": text(_NAMELESS.format(length="json_array_length(c.scores)")),
    "postgresql": text(_NAMELESS.format(length="cardinality(c.scores)")),
}


def damage(connection: Connection, job_id: int) -> Iterator[tuple[int, str]]:
    """(run, sentence) for runs whose outcomes or scores cannot be counted."""
    pinned = connection.execute(select(job.c.pinned).where(job.c.id == job_id)).scalar_one()
    asked = {"job": job_id, "batch_size": (pinned or {}).get("batch_size", 0)}
    for run_id, n, first in connection.execute(_OUTSIDE, asked):
        yield (
            run_id,
            f"run {run_id} of job {job_id}: {n} outcomes lie outside the done shards that they name, that of sample "
            f"{first} first; {BACKUP}, or submit the job again.",
        )
    for run_id, n, first in connection.execute(_COUNTED[connection.dialect.name], {"job": job_id}):
        yield (
            run_id,
            f"run {run_id} of job {job_id}: {n} outcomes have another number of token records than they count, that of "
            f"sample {first} first; {BACKUP}, or submit the job again.",
        )
    for run_id, n, first in connection.execute(_NAMED[connection.dialect.name], {"job": job_id}):
        yield (
            run_id,
            f"run {run_id} of job {job_id}: {n} completions have other scores than their list of metrics names, that "
            f"of sample {first} first; {BACKUP}.",
        )
