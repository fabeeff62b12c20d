"""The record: jobs, benchmarks, runs, the queue, outcomes with their tokens, scores, timings, rollups, five views."""

from collections.abc import Callable

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
READY, LEASED = sa.text("state = 'ready'"), sa.text("state = 'leased'")


def upgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    create_tables()
    for column in TOKENS_ON_SQLITE if on_sqlite else TOKENS_ON_POSTGRESQL:
        op.add_column("outcome", column)
    op.execute(TOKEN_ON_SQLITE if on_sqlite else TOKEN_ON_POSTGRESQL)
    op.execute(COMPLETION)
    op.execute(COMPLETION_SCORE)
    op.execute(BATCH)
    op.execute(run_summary(number_on_sqlite if on_sqlite else number_on_postgresql))


def create_tables() -> None:
    op.create_table(
        "artifact",
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_artifact"),
    )
    op.create_table(
        "benchmark",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("content_hash", sa.Text(), nullable=False),
        sa.Column("ends_with_line", sa.Boolean(), nullable=False),
        sa.Column("n_samples", sa.Integer(), nullable=False),
        sa.Column("left_out", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_benchmark"),
        sa.UniqueConstraint("content_hash", name="uq_benchmark_content_hash"),
    )
    op.create_table(
        "device_class",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_device_class"),
    )
    op.create_table(
        "idle_worker",
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("worker", name="pk_idle_worker"),
    )
    op.create_table(
        "job",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("pinned", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_job"),
    )
    op.create_table(
        "benchmark_name",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("benchmark_id", ID, nullable=False),
        sa.ForeignKeyConstraint(["benchmark_id"], ["benchmark.id"], name="fk_benchmark_name_benchmark_id"),
        sa.PrimaryKeyConstraint("name", "version", name="pk_benchmark_name"),
    )
    op.create_table(
        "run",
        sa.Column("id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("benchmark_id", ID, nullable=False),
        sa.Column("benchmark", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("policy_kind", sa.Text(), nullable=False),
        sa.Column("policy_spec", sa.JSON(), nullable=False),
        sa.Column("score_revision", sa.Integer(), nullable=False),
        sa.Column("summary", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["benchmark_id"], ["benchmark.id"], name="fk_run_benchmark_id"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_run_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_run"),
        sa.UniqueConstraint("job_id", "benchmark_id", "policy", name="uq_run_job_id_benchmark_id_policy"),
    )
    op.create_table(
        "sample",
        sa.Column("id", ID, nullable=False),
        sa.Column("benchmark_id", ID, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("language", sa.Text(), nullable=False),
        sa.Column("source_group", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["benchmark_id"], ["benchmark.id"], name="fk_sample_benchmark_id"),
        sa.PrimaryKeyConstraint("id", name="pk_sample"),
        sa.UniqueConstraint("benchmark_id", "position", name="uq_sample_benchmark_id_position"),
    )
    op.create_table(
        "task",
        sa.Column("id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("run_after", sa.Double(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("benchmark_id", ID, nullable=True),
        sa.Column("first_batch", sa.Integer(), nullable=False),
        sa.Column("end_batch", sa.Integer(), nullable=False),
        sa.Column("done_batches", sa.Integer(), nullable=False),
        sa.Column("parent_id", ID, nullable=True),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("isolated_from", sa.Integer(), nullable=True),
        sa.Column("alone", sa.Integer(), nullable=True),
        sa.Column("guilty", sa.JSON(), nullable=False),
        sa.CheckConstraint("end_batch >= first_batch", name="ck_task_extent"),
        sa.ForeignKeyConstraint(["benchmark_id"], ["benchmark.id"], name="fk_task_benchmark_id"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_task_job_id"),
        sa.ForeignKeyConstraint(["parent_id"], ["task.id"], name="fk_task_parent_id"),
        sa.PrimaryKeyConstraint("id", name="pk_task"),
    )
    op.create_index("ix_task_job_id", "task", ["job_id"], unique=False)
    op.create_index(
        "ix_task_leased", "task", ["lease_until"], unique=False, sqlite_where=LEASED, postgresql_where=LEASED
    )
    op.create_index(
        "ix_task_ready",
        "task",
        ["kind", sa.literal_column("priority DESC"), "id"],
        unique=False,
        sqlite_where=READY,
        postgresql_where=READY,
    )
    op.create_table(
        "outcome",
        sa.Column("id", ID, nullable=False),
        sa.Column("run_id", ID, nullable=False),
        sa.Column("sample_id", ID, nullable=False),
        sa.Column("task_id", ID, nullable=False),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("finish", sa.Text(), nullable=True),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("cut_tokens", sa.Integer(), nullable=False),
        sa.Column("shown", sa.Boolean(), nullable=False),
        sa.Column("isolated", sa.Boolean(), nullable=False),
        sa.CheckConstraint("(text IS NULL) <> (error IS NULL)", name="ck_outcome_completion_or_error"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_outcome_run_id"),
        sa.ForeignKeyConstraint(["sample_id"], ["sample.id"], name="fk_outcome_sample_id"),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name="fk_outcome_task_id"),
        sa.PrimaryKeyConstraint("id", name="pk_outcome"),
        sa.UniqueConstraint("run_id", "sample_id", name="uq_outcome_run_id_sample_id"),
    )
    op.create_table(
        "rollup",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("task_id", ID, nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("errors", sa.BigInteger(), nullable=False),
        sa.Column("shown", sa.BigInteger(), nullable=False),
        sa.Column("isolated", sa.BigInteger(), nullable=False),
        sa.Column("cut_prompts", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("full_tokens", sa.BigInteger(), nullable=False),
        sa.Column("exit_tokens", sa.BigInteger(), nullable=False),
        sa.Column("stops", sa.BigInteger(), nullable=False),
        sa.Column("exit_layer_sum", sa.BigInteger(), nullable=False),
        sa.Column("layers_run_sum", sa.BigInteger(), nullable=False),
        sa.Column("stop_layers_run_sum", sa.BigInteger(), nullable=False),
        sa.Column("timed_batches", sa.BigInteger(), nullable=False),
        sa.Column("untimed_batches", sa.BigInteger(), nullable=False),
        sa.Column("prefill_ns", sa.BigInteger(), nullable=False),
        sa.Column("decode_ns", sa.BigInteger(), nullable=False),
        sa.Column("decode_tokens", sa.BigInteger(), nullable=False),
        sa.Column("ideal_ns", sa.BigInteger(), nullable=False),
        sa.Column("flops", sa.BigInteger(), nullable=False),
        sa.Column("exit_histogram", sa.JSON(), nullable=False),
        sa.Column("stop_histogram", sa.JSON(), nullable=False),
        sa.Column("score_counts", sa.JSON(), nullable=False),
        sa.Column("score_sums", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_rollup_run_id"),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name="fk_rollup_task_id"),
        sa.PrimaryKeyConstraint("run_id", "task_id", name="pk_rollup"),
    )
    op.create_table(
        "score",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("sample_id", ID, nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_score_run_id"),
        sa.ForeignKeyConstraint(["sample_id"], ["sample.id"], name="fk_score_sample_id"),
        sa.PrimaryKeyConstraint("run_id", "revision", "sample_id", "metric", name="pk_score"),
    )
    op.create_table(
        "timing",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("prefill_ns", sa.BigInteger(), nullable=False),
        sa.Column("decode_ns", sa.BigInteger(), nullable=False),
        sa.Column("decode_tokens", sa.BigInteger(), nullable=False),
        sa.Column("flops", sa.BigInteger(), nullable=False),
        sa.Column("ideal_ns", sa.BigInteger(), nullable=False),
        sa.Column("device_class", sa.Text(), nullable=False),
        sa.Column("timed", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_timing_run_id"),
        sa.PrimaryKeyConstraint("run_id", "batch", name="pk_timing"),
    )


#: a JSON array of [token_id, exit_layer, layers_run, decision, confidence]
TOKENS_ON_SQLITE = [sa.Column("tokens", sa.Text())]

TOKENS_ON_POSTGRESQL = [
    sa.Column("token_ids", postgresql.ARRAY(sa.Integer())),
    sa.Column("exit_layers", postgresql.ARRAY(sa.SmallInteger())),
    sa.Column("layers_run", postgresql.ARRAY(sa.SmallInteger())),
    sa.Column("decisions", postgresql.ARRAY(sa.SmallInteger())),
    sa.Column("confidences", postgresql.ARRAY(sa.REAL())),
]

TOKEN_ON_SQLITE = """
CREATE VIEW token AS
SELECT o.run_id, r.job_id, r.policy, o.id AS outcome_id, o.sample_id, t.key + 1 AS position,
  CASE json_extract(t.value, '$[3]') WHEN 2 THEN NULL ELSE json_extract(t.value, '$[0]') END AS token_id,
  json_extract(t.value, '$[1]') AS exit_layer,
  json_extract(t.value, '$[2]') AS layers_run,
  CASE json_extract(t.value, '$[3]') WHEN 0 THEN 'full' WHEN 1 THEN 'exit' ELSE 'stop' END AS decision,
  json_extract(t.value, '$[4]') AS confidence
FROM outcome o JOIN run r ON r.id = o.run_id JOIN json_each(o.tokens) t
"""

# subscripts, not unnest: a column that a question does not name costs nothing
TOKEN_ON_POSTGRESQL = """
CREATE VIEW token AS
SELECT o.run_id, r.job_id, r.policy, o.id AS outcome_id, o.sample_id, p AS position,
  CASE o.decisions[p] WHEN 2 THEN NULL ELSE o.token_ids[p] END AS token_id,
  o.exit_layers[p] AS exit_layer,
  o.layers_run[p] AS layers_run,
  CASE o.decisions[p] WHEN 0 THEN 'full' WHEN 1 THEN 'exit' ELSE 'stop' END AS decision,
  nullif(o.confidences[p]::double precision, 'NaN') AS confidence
FROM outcome o JOIN run r ON r.id = o.run_id
  CROSS JOIN LATERAL generate_series(1, o.n_tokens + CASE o.finish WHEN 'stop' THEN 1 ELSE 0 END) p
"""

COMPLETION = """
CREATE VIEW completion AS
SELECT r.job_id, o.run_id, r.policy, r.benchmark, o.id AS outcome_id, o.sample_id, s.position, s.name AS sample,
  s.language, s.source_group, s.prompt, s.reference, o.text, o.error, o.finish, o.n_tokens, o.prompt_tokens,
  o.cut_tokens, o.shown, o.isolated
FROM outcome o JOIN run r ON r.id = o.run_id JOIN sample s ON s.id = o.sample_id
"""

COMPLETION_SCORE = """
CREATE VIEW completion_score AS
SELECT r.job_id, c.run_id, r.policy, r.benchmark, c.sample_id, c.metric, c.version, c.value
FROM score c JOIN run r ON r.id = c.run_id AND r.score_revision = c.revision
"""

BATCH = """
CREATE VIEW batch AS
SELECT r.job_id, t.run_id, r.policy, r.benchmark, t.batch, t.rows, t.prefill_ns, t.decode_ns, t.decode_tokens,
  t.flops, t.ideal_ns, t.device_class, t.timed
FROM timing t JOIN run r ON r.id = t.run_id
"""


def number_on_sqlite(path: str, kind: str) -> str:
    return f"cast(json_extract(r.summary, '$.{path}') AS {'INTEGER' if kind == 'bigint' else 'REAL'})"


def number_on_postgresql(path: str, kind: str) -> str:
    return f"(r.summary #>> '{{{path.replace('.', ',')}}}')::{kind}"


def run_summary(number: Callable[[str, str], str]) -> str:
    """A row a run; the figures are NULL until the job has ended."""
    integers = ["samples", "errors", "tokens", "stops", "cut_prompts", "n_layers", "flops"]
    figures = {name: name for name in ["shown", "mean_exit_layer", "mean_layers_run", "layers_skipped"]}
    for name in ["speedup_token", "speedup_request"]:
        figures |= {name: f"{name}.value", f"{name}_low": f"{name}.low", f"{name}_high": f"{name}.high"}
    figures |= {name: name for name in ["speedup_ideal", "efficiency", "tokens_per_second"]}
    for name in ["rouge_l", "em", "es", "accepted"]:
        figures |= {name: f"metrics.{name}.value", f"{name}_change": f"change.{name}.value"}
    columns = [f"{number(name, 'bigint')} AS {name}" for name in integers]
    columns += [f"{number(path, 'double precision')} AS {name}" for name, path in figures.items()]
    return f"""
CREATE VIEW run_summary AS
SELECT r.job_id, j.name AS job, j.state, r.id AS run_id, r.benchmark, r.policy, {", ".join(columns)}
FROM run r JOIN job j ON j.id = r.job_id
"""
